from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imported import contents_trained, read_one, reasons_in
from outside_world import remove_package
from traces import trace_path

from cookbook.data import formats
from cookbook.data.importers import importer_of, inspect, marked
from cookbook.data.importers.base import Imported
from cookbook.data.importers.source import open_documents
from cookbook.data.selection import ReadingOptions
from cookbook.data.sources.base import BadRow, Row
from cookbook.errors import ConfigError, DataError

SHELL = {
    "name": "shell",
    "description": "Run a command.",
    "parameters": {
        "type": "object",
        "properties": {"cmd": {"type": "string", "description": "the command", "enum": None}},
        "required": ["cmd"],
        "additionalProperties": False,
    },
    "options": None,
}
SHELL_SCHEMA = {
    "type": "function",
    "function": {
        "name": "shell",
        "description": "Run a command.",
        "parameters": {
            "type": "object",
            "properties": {"cmd": {"type": "string", "description": "the command"}},
            "required": ["cmd"],
            "additionalProperties": False,
        },
    },
}
SYSTEM = {"id": "m1", "role": "system", "content": "Be brief.", "source": None}
TASK = {"id": "m2", "role": "user", "content": "Count.", "source": "input"}
FIRST = {
    "id": "m3",
    "role": "assistant",
    "source": "generate",
    "model": "a/model",
    "content": [
        {"type": "reasoning", "reasoning": "use wc", "redacted": False, "signature": None},
        {"type": "text", "text": "Trying.", "refusal": None},
    ],
    "tool_calls": [
        {
            "id": "c1",
            "function": "shell",
            "arguments": {"cmd": "bad"},
            "parse_error": None,
            "type": "function",
        }
    ],
}
FAILED = {
    "id": "m4",
    "role": "tool",
    "content": "",
    "tool_call_id": "c1",
    "function": "shell",
    "error": {"type": "unknown", "message": "no such file"},
}
LAST = {"id": "m5", "role": "assistant", "source": "generate", "content": "Seven.", "tool_calls": None}


def model_event(
    read: list[dict[str, Any]], answer: dict[str, Any], stop: str = "stop", **keys: Any
) -> dict[str, Any]:
    output = {"model": "a/model", "choices": [{"message": answer, "stop_reason": stop}], "completion": "x"}
    return {
        "event": "model",
        "role": None,
        "model": "a/model",
        "input": read,
        "tools": [SHELL],
        "output": output,
        "span_id": "s1",
        "pending": None,
        "error": None,
        **keys,
    }


def sample_of(**keys: Any) -> dict[str, Any]:
    """A sample as Inspect dumps it: a system prompt, a task, a call that fails, an answer."""
    sample = {
        "id": 1,
        "epoch": 1,
        "input": "Count.",
        "target": "seven",
        "messages": [SYSTEM, TASK, FIRST, FAILED, LAST],
        "output": {"choices": [{"message": LAST, "stop_reason": "stop"}]},
        "scores": {"includes": {"value": "C", "answer": "Seven."}},
        "metadata": {},
        "events": [
            {"event": "span_begin", "id": "s1", "parent_id": None, "type": "solver", "name": "generate"},
            model_event([SYSTEM, TASK], FIRST, "tool_calls"),
            {"event": "tool", "id": "c1", "function": "shell"},
            model_event([SYSTEM, TASK, FIRST, FAILED], LAST),
        ],
        "attachments": {},
        "error": None,
        "limit": None,
    }
    return copy.deepcopy({**sample, **keys})


def log_of(*samples: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"version": 2, "status": "success", "eval": {"task": "t"}, "samples": list(samples), **keys}


read = functools.partial(read_one, format="inspect")
trained = contents_trained


def messages_of(document: dict[str, Any], **options: Any) -> list[Any]:
    (conversation,) = read(document, **options)[0].conversations
    return list(conversation.messages)


def reasons(document: dict[str, Any], **options: Any) -> dict[str, int]:
    return reasons_in(read(document, **options)[1])


# -- samples ----------------------------------------------------------------------------------


def test_a_sample_is_a_conversation_with_the_tools_of_its_model_events() -> None:
    found, _ = read(sample_of())
    (conversation,) = found.conversations
    call = {"id": "c1", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "bad"}}}
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "Trying.", "reasoning_content": "use wc", "tool_calls": [call]},
        {"role": "tool", "content": "no such file", "tool_call_id": "c1", "name": "shell"},
        {"role": "assistant", "content": "Seven."},
    ]
    assert conversation.tools == [SHELL_SCHEMA]
    assert conversation.is_rollout
    assert dict(found.dropped) == {}


def test_a_sample_is_refused_without_its_format_and_a_chat_is_not() -> None:
    with pytest.raises(DataError, match="it is an Inspect log.*Read it with format=inspect"):
        formats.recognise(sample_of())
    with pytest.raises(DataError, match="format=inspect"):
        formats.recognise(log_of(sample_of()))
    assert marked({"messages": [{"role": "user", "content": "a"}], "input": "b", "epoch": 1}) is None
    assert marked({"samples": [], "status": "done"}) is None


def test_what_no_call_of_the_model_returned_is_context() -> None:
    shots = [
        {"id": "s1", "role": "user", "content": "1 + 1?", "source": "input"},
        {"id": "s2", "role": "assistant", "content": "Two.", "source": "input"},
        {"id": "s3", "role": "user", "content": "And?", "source": "input"},
        {"id": "s4", "role": "assistant", "content": "By hand.", "source": "operator"},
        {"id": "s5", "role": "user", "content": "And?", "source": None},
        {"id": "s6", "role": "assistant", "content": "By code.", "source": None},
    ]
    document = sample_of(messages=[*shots, TASK, LAST], events=[])
    assert trained(messages_of(document)) == ["Seven."]
    assert reasons(document) == {
        "messages of the input": 1,
        "messages of the operator": 1,
        "messages that no call of the model returned": 1,
    }


def test_an_answer_without_a_source_is_trained_if_a_model_event_returned_it() -> None:
    plain = {key: value for key, value in LAST.items() if key not in ("source", "id")}
    document = sample_of(messages=[TASK, plain], events=[model_event([TASK], plain)], output={})
    assert trained(messages_of(document)) == ["Seven."]


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ("max_tokens", "answers cut by a token limit"),
        ("model_length", "answers cut by a token limit"),
        ("content_filter", "answers cut by a content filter"),
    ],
)
def test_an_answer_that_a_limit_cut_is_not_trained(stop: str, reason: str) -> None:
    document = sample_of(output={"choices": [{"message": LAST, "stop_reason": stop}]})
    document["events"].pop()
    assert trained(messages_of(document)) == ["Trying."]
    assert reasons(document) == {reason: 1}
    document = sample_of()
    document["events"][1]["output"]["choices"][0]["stop_reason"] = stop
    assert trained(messages_of(document)) == ["Seven."]


def test_a_call_whose_arguments_could_not_be_parsed_is_not_trained() -> None:
    document = sample_of()
    document["messages"][2]["tool_calls"][0]["parse_error"] = "not JSON"
    assert trained(messages_of(document)) == ["Seven."]
    assert reasons(document) == {"calls whose arguments could not be parsed": 1}


def test_an_answer_begun_by_a_prefill_is_one_message_that_is_not_trained() -> None:
    prefill = {"id": "p", "role": "assistant", "content": "The answer is", "source": None}
    answer = {**LAST, "content": " seven."}
    messages = messages_of(sample_of(messages=[TASK, prefill, answer], events=[]))
    assert messages[1] == {"role": "assistant", "content": "The answer is seven.", "trainable": False}


def test_flags_of_a_message_mask_it() -> None:
    document = sample_of()
    document["messages"][2]["metadata"] = {"train": False}
    assert trained(messages_of(document)) == ["Seven."]
    document["messages"][4]["metadata"] = {"keep": 0}
    assert trained(messages_of(document, mask_key="keep")) == []


def test_encrypted_reasoning_is_dropped_and_counted() -> None:
    document = sample_of()
    document["messages"][2]["content"][0] = {"type": "reasoning", "reasoning": "Zm9v", "redacted": True}
    document["messages"][4]["content"] = [
        {"type": "data", "data": {"x": 1}},
        {"type": "text", "text": "Seven."},
    ]
    found, _ = read(document)
    assert "reasoning_content" not in found.conversations[0].messages[2]
    assert dict(found.dropped) == {"encrypted thoughts": 1, "blocks that only a provider reads": 1}


def test_a_tool_of_the_provider_ends_a_turn_with_its_result() -> None:
    parts = [
        {"type": "text", "text": "Searching."},
        {
            "type": "tool_use",
            "tool_type": "web_search",
            "id": "w1",
            "name": "web_search",
            "arguments": '{"query": "x"}',
            "result": "found x",
            "error": None,
        },
        {"type": "text", "text": "It is x."},
    ]
    messages = messages_of(sample_of(messages=[TASK, {**LAST, "content": parts}]))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == "found x"
    assert trained(messages) == ["Searching.", "It is x."]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "data:image/png;base64,iVBORw0KGgo="},
        {"type": "audio", "audio": "a.wav", "format": "wav"},
        {"type": "document", "document": "a.pdf", "filename": "a.pdf"},
        {"type": "text", "text": "data:image/png;base64,iVBORw0KGgo="},
    ],
)
@pytest.mark.parametrize("place", [1, 3, 4])
def test_pictures_and_files_are_refused_with_their_message(part: dict[str, Any], place: int) -> None:
    document = sample_of()
    document["messages"][place]["content"] = [part]
    with pytest.raises(DataError, match=f"message {place + 1} .*only text can be trained on"):
        read(document)


def test_attachments_stand_where_they_are_referred_to() -> None:
    document = sample_of(attachments={"abc": "Count it.", "pic": "data:image/png;base64,iVBORw0KGgo="})
    document["messages"][1]["content"] = "attachment://abc"
    assert messages_of(document)[1]["content"] == "Count it."
    document["messages"][1]["content"] = [{"type": "text", "text": "attachment://pic"}]
    with pytest.raises(DataError, match="message 2 has a file written as text"):
        read(document)


def test_an_attachment_that_the_log_does_not_hold_is_refused() -> None:
    sample = sample_of(attachments={"0" * 32: "the text"})
    sample["messages"][1]["content"] = f"attachment://{'0' * 32}"
    assert messages_of(sample)[1]["content"] == "the text"
    sample["attachments"] = {}
    with pytest.raises(DataError, match="refers to attachment://0+, which the log does not hold"):
        read(sample)


def test_samples_of_the_first_versions_are_read() -> None:
    document = sample_of(score={"value": "I"}, transcript={"events": sample_of()["events"], "content": {}})
    del document["events"], document["scores"]
    document["messages"][3] = {
        "role": "tool",
        "content": "",
        "tool_call_id": "c1",
        "tool_error": "no such file",
    }
    (conversation,) = read(document, min_reward=0.0)[0].conversations
    assert conversation.messages[3]["content"] == "no such file"
    assert conversation.tools == [SHELL_SCHEMA]
    assert conversation.reward == 0.0


def test_a_sample_without_messages_is_its_input_and_output() -> None:
    document = sample_of(messages=[], events=[])
    assert [message["content"] for message in messages_of(document)] == ["Count.", "Seven."]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    document = sample_of(messages=None, events=[], input=asked)
    assert [message["role"] for message in messages_of(document)] == ["system", "user", "assistant"]
    found, _ = read(sample_of(messages=[], output={}))
    assert found == Imported([], {"samples without messages": 1})


def test_a_sample_in_a_row_of_its_own_is_found() -> None:
    assert len(messages_of({"task": "t", "sample": sample_of()})) == 5


def test_lists_and_objects_may_be_json_in_a_string() -> None:
    document = sample_of()
    for key in ("messages", "events", "scores", "output", "attachments"):
        document[key] = json.dumps(document[key])
    options = {"min_reward": 0.5}
    assert read(document, **options)[0].conversations == read(sample_of(), **options)[0].conversations


def test_how_samples_ended_is_counted() -> None:
    document = {
        **sample_of(error={"message": "boom"}, limit={"type": "token", "limit": 9}),
        "log_status": "cancelled",
    }
    found, counted = read(document)
    assert len(found.conversations) == 1
    assert {(note.what, note.item): number for note, number in counted.items()} == {
        ("Samples of unfinished logs, by their status", "cancelled"): 1,
        ("ended with an error", ""): 1,
        ("Samples that a limit ended", "token"): 1,
    }
    found, _ = read(sample_of(invalidation={"author": "a"}))
    assert found == Imported([], {"samples that were invalidated": 1})


# -- rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        ("C", 1),
        ("I", 0),
        ("P", 0.5),
        ("N", 0),
        (True, 1),
        (False, 0),
        (0.25, 0.25),
        ("0.75", 0.75),
        ("yes", 1),
    ],
)
def test_the_score_is_the_reward(value: Any, reward: float) -> None:
    document = sample_of(scores={"s": {"value": value}})
    assert read(document, min_reward=0.0)[0].conversations[0].reward == reward
    assert read(document, min_reward=0.0, reward_key="scores.s.value")[0].conversations[0].reward == reward
    assert read(document, min_reward=0.0, reward_key="scores.s")[0].conversations[0].reward == reward
    (kept,) = read(document, min_reward=0.3)[0].conversations
    assert bool(kept.messages) == (reward >= 0.3)


def test_several_scores_need_the_name_of_one() -> None:
    document = sample_of(scores={"a": {"value": "C"}, "b": {"value": {"x": 0.5, "y": "I"}}})
    with pytest.raises(DataError, match="several values .*reward_key=scores.a.value"):
        read(document, min_reward=0.5)
    assert read(document, max_reward=1, reward_key="scores.b.value.x")[0].conversations[0].reward == 0.5
    assert read(document, max_reward=1, reward_key="scores.b.value.y")[0].conversations[0].reward == 0.0
    with pytest.raises(DataError, match="reward_key=scores.b.value.x"):
        read(sample_of(scores={"b": {"value": {"x": 0.5}}}), min_reward=0.5)


def test_metadata_may_hold_the_reward() -> None:
    document = sample_of(metadata={"solved": True})
    for key in ("metadata.solved", "solved"):
        assert read(document, min_reward=0.5, reward_key=key)[0].conversations[0].reward == 1.0


def test_a_sample_without_a_score_is_refused_and_one_with_an_error_is_counted() -> None:
    document = sample_of(scores={"s": {"value": float("nan")}})
    with pytest.raises(DataError, match="no reward to compare with min_reward=0.5"):
        formats.conversations_of(document, "inspect", ReadingOptions(min_reward=0.5))
    found, _ = read(sample_of(scores=None, error={"message": "boom"}), min_reward=0.5)
    assert found == Imported([], {"samples that ended with an error before they were scored": 1})


# -- several agents ---------------------------------------------------------------------------


def spans(*rows: tuple[str, str | None, str, str]) -> list[dict[str, Any]]:
    keys = ("id", "parent_id", "type", "name")
    return [{"event": "span_begin", **dict(zip(keys, row, strict=True))} for row in rows]


def test_a_sub_agent_is_a_conversation_of_its_own() -> None:
    asked = {"id": "a1", "role": "user", "content": "Look.", "source": None}
    call = {**FIRST, "id": "a2", "content": "Looking."}
    result = {**FAILED, "id": "a3", "content": "a.txt", "error": None}
    answer = {**LAST, "id": "a4", "content": "One file."}
    document = sample_of()
    document["events"] += [
        *spans(
            ("s2", "s1", "tool", "helper"), ("s3", "s2", "agent", "helper"), ("s4", "s3", "generate", "g")
        ),
        model_event([asked], call, "tool_calls", span_id="s4"),
        model_event([asked, call, result], answer, span_id="s4", tools=[]),
    ]
    own, other = read(document)[0].conversations
    assert trained(list(own.messages)) == ["Trying.", "Seven."]
    assert trained(list(other.messages)) == ["Looking.", "One file."]
    assert [message["content"] for message in other.messages] == ["Look.", "Looking.", "a.txt", "One file."]


def test_calls_of_scorers_and_of_other_roles_are_counted_and_not_trained() -> None:
    grade = {**LAST, "id": "g1", "content": "GRADE: C"}
    document = sample_of()
    document["events"] += [
        *spans(("sc", None, "scorers", "scorers"), ("sd", "sc", "agent", "judge")),
        model_event([TASK], grade, span_id="sd"),
        model_event([TASK], {**grade, "id": "g2"}, role="grader"),
        model_event([TASK], {**grade, "id": "g3"}),
        model_event([TASK], grade, error="timeout"),
        model_event([], {**grade, "id": "g4"}, pending=True),
    ]
    found, _ = read(document)
    assert len(found.conversations) == 1
    assert dict(found.dropped) == {
        "calls of the model by scorers": 1,
        "calls of models in other roles": 1,
        "calls of the model outside of the conversation": 1,
        "calls of the model that failed": 1,
    }


def test_answers_to_a_rewritten_history_are_trained_once_with_what_their_call_read() -> None:
    summary = {"id": "x1", "role": "user", "content": "Summary: tried.", "source": None}
    more = {"id": "x2", "role": "user", "content": "Go on.", "source": None}
    end = {**LAST, "id": "x3", "content": "Done."}
    document = sample_of(messages=[SYSTEM, TASK, FIRST, FAILED, LAST, more, end])
    document["events"][3] = model_event([SYSTEM, summary], LAST)
    document["events"].append(model_event([SYSTEM, summary, LAST, more], end))
    own, other = read(document)[0].conversations
    assert trained(list(own.messages)) == ["Trying."]
    assert [message["content"] for message in own.messages] == ["Be brief.", "Count.", "Trying."]
    assert trained(list(other.messages)) == ["Seven.", "Done."]
    assert [message["content"] for message in other.messages] == [
        *("Be brief.", "Summary: tried.", "Seven.", "Go on.", "Done.")
    ]


def test_an_answer_whose_call_was_removed_later_is_trained_as_it_was_returned() -> None:
    submit = {"id": "c9", "function": "submit", "arguments": {"answer": "seven"}, "type": "function"}
    document = sample_of()
    document["events"][3] = model_event([SYSTEM, TASK, FIRST, FAILED], {**LAST, "tool_calls": [submit]})
    document["messages"][4]["content"] = "Seven.\n\nseven"
    messages = messages_of(document)
    assert messages[4]["content"] == "Seven."
    assert messages[4]["tool_calls"][0]["function"] == {"name": "submit", "arguments": {"answer": "seven"}}
    counted = read(document)[1]
    assert [note.what for note in counted] == [
        "lost a call after it was returned; trained as the call of the model returned it"
    ]


def test_inputs_of_condensed_events_are_read_from_the_pool() -> None:
    asked = {"id": "a1", "role": "user", "content": "Look.", "source": None}
    answer = {**LAST, "id": "a4", "content": "One file."}
    document = sample_of(events_data={"messages": [SYSTEM, asked, TASK], "calls": []})
    document["events"] += [
        *spans(("s3", "s1", "agent", "helper")),
        model_event([], answer, span_id="s3", input_refs=[[0, 2]]),
    ]
    _, other = read(document)[0].conversations
    assert [message["content"] for message in other.messages] == ["Be brief.", "Look.", "One file."]
    document["events"][-1]["input_refs"] = ["0"]
    with pytest.raises(DataError, match="`input_refs` of event 6"):
        read(document)


def test_tools_that_change_midway_are_all_given_and_counted() -> None:
    document = sample_of()
    document["events"][3]["tools"] = [{"name": "submit", "description": "End.", "parameters": {}}]
    found, counted = read(document)
    assert [tool["function"]["name"] for tool in found.conversations[0].tools or ()] == ["shell", "submit"]
    assert [note.what for note in counted] == ["changed the tools midway; each turn has those of all calls"]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"messages": [TASK, 3]}, "message 2 is a int, not an object"),
        ({"messages": {"a": 1}}, "`messages` is a dict, not a list"),
        ({"messages": [TASK, {"role": "judge", "content": "x"}, LAST]}, "message 2 has the role `judge`"),
        ({"messages": [TASK, {**FAILED, "tool_call_id": "c9"}, LAST]}, "message 2 answers the call `c9`"),
        ({"messages": [TASK, FIRST, FAILED, FAILED, LAST]}, "message 4 is a second result"),
        ({"messages": [TASK, {**LAST, "content": 3}]}, "message 2"),
        (
            {"messages": [TASK, {**LAST, "tool_calls": [{"id": "c"}]}]},
            "a tool call of message 2 has no `name`",
        ),
        ({"messages": [TASK, {**LAST, "tool_calls": {"a": 1}}]}, "`tool_calls` of message 2 is a dict"),
        ({"messages": [TASK, {**LAST, "tool_calls": [3]}]}, "a tool call of message 2 is a int"),
        ({"messages": [TASK, LAST, {**LAST, "id": "m9"}]}, "messages 2 and 3 are both the assistant's"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(change: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        read(sample_of(**{"events": [], **change}))


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just([]), st.just({}))


@pytest.mark.slow
@settings(max_examples=400)
@given(st.data())
def test_a_field_of_another_type_is_read_or_refused(data: st.DataObject) -> None:
    document = sample_of(events_data={"messages": [SYSTEM], "calls": []}, attachments={"a": "b"})
    document["events"] += [*spans(("s3", "s1", "agent", "h")), model_event([TASK], {**LAST, "id": "o"})]
    document["events"][-1]["span_id"] = "s3"
    where: Any = (document := copy.deepcopy(document))  # the damage stays out of what other tests read
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        inner = where[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            where[key] = data.draw(
                st.one_of(JUNK, JUNK.map(lambda value: [value]), JUNK.map(lambda v: {"a": v}))
            )
            break
        where = inner
    for options in ({}, {"min_reward": 0.5}):
        with contextlib.suppress(DataError):
            assert isinstance(read(document, **options)[0], Imported)


# -- files ------------------------------------------------------------------------------------


def write_archive(path: Path, samples: list[dict[str, Any]], **keys: Any) -> Path:
    """An `.eval` file as Inspect lays it out."""
    spec = {
        "created": "2026-01-01T00:00:00+00:00",
        "task": "t",
        "dataset": {"sample_ids": [sample["id"] for sample in samples]},
        "model": "a/model",
        "config": {},
    }
    header = {"version": 2, "status": "success", "eval": spec, **keys}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
    return path


def timed(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with the keys that the package's reader requires of events."""
    events = []
    for number, event in enumerate(sample["events"]):
        keys = {"timestamp": "2026-01-01T00:00:00+00:00", "working_start": 0.0, "uuid": f"u{number}"}
        more = {"tool_choice": "auto", "config": {}} if event["event"] == "model" else {}
        more = {"type": "function", "arguments": {}, "events": []} if event["event"] == "tool" else more
        events.append({**keys, **more, **event})
    return {**sample, "events": events}


def test_every_kind_of_file_trains_the_answers_of_the_model(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    pytest.importorskip("inspect_ai")
    samples = [timed(sample_of(id=number, epoch=2)) for number in range(2)]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "log.json").write_text(json.dumps(log_of(*samples), indent=1), encoding="utf-8")
    write_archive(tmp_path / "log.eval", samples)
    for name in ("samples.jsonl", "samples.jsonl.gz", "log.json", "log.eval"):
        texts = trained_texts(tmp_path / name, "inspect")
        assert len(texts) == 2, name
        for first, last in texts:
            assert "Trying." in first
            assert '"cmd": "bad"' in first
            assert first.endswith("<|im_end|>")
            assert last.endswith("Seven.<|im_end|>")
            assert "no such file" not in first + last
    assert len(trained_texts(tmp_path, "inspect")) == 8


def test_rows_name_their_sample(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    samples = [timed(sample_of(id="a/b")), timed(sample_of(id=2, epoch=3))]
    write_archive(tmp_path / "log.eval", samples)
    (tmp_path / "log.json").write_text(json.dumps(log_of(*samples)), encoding="utf-8")
    importer = importer_of("inspect", ReadingOptions())
    assert importer is not None
    places = [row.place for row in open_documents(importer, tmp_path).rows()]
    assert places == [
        f"sample a/b of {tmp_path.name}/log.eval",
        f"sample 2 in epoch 3 of {tmp_path.name}/log.eval",
        f"sample a/b of {tmp_path.name}/log.json",
        f"sample 2 in epoch 3 of {tmp_path.name}/log.json",
    ]


def test_a_log_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_package(monkeypatch, "inspect_ai")
    path = write_archive(tmp_path / "log.eval", [])
    with pytest.raises(ConfigError, match=r"format=inspect for log.eval needs.*sft-cookbook\[inspect\]"):
        list(inspect.InspectImporter().documents(path, "log.eval"))


def test_a_file_that_is_no_archive_of_a_log_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    importer = inspect.InspectImporter()
    path = tmp_path / "a.eval"
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match="a.eval cannot be read as an Inspect log"):
        list(importer.documents(path, "a.eval"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(DataError, match="a.eval is no Inspect log"):
        list(importer.documents(path, "a.eval"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", "{}")
        archive.writestr("samples/1_epoch_1/messages/0.json", "[]")
    with pytest.raises(DataError, match="in chunks"):
        list(importer.documents(path, "a.eval"))


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    path = write_archive(tmp_path / "a.eval", [])
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="`header.json` cannot be decompressed"):
        list(inspect.InspectImporter().documents(path, "a.eval"))


def test_a_damaged_sample_is_a_bad_row_beside_good_ones(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    path = write_archive(tmp_path / "a.eval", [timed(sample_of())])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("samples/2_epoch_1.json", '{"id": 2}')
    good, bad = inspect.InspectImporter().documents(path, "a.eval")
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow)
    assert bad.place == "2_epoch_1 of a.eval"
    assert "cannot be read" in bad.reason


def test_a_member_that_is_larger_than_a_row_may_be_is_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("inspect_ai")
    path = write_archive(tmp_path / "a.eval", [timed(sample_of(store={"x": "a" * 2**25}))])
    assert path.stat().st_size < 2**20
    monkeypatch.setenv("COOKBOOK_MAX_LINE_MIB", "1")
    (bad,) = inspect.InspectImporter().documents(path, "a.eval")
    assert isinstance(bad, BadRow)
    assert "more than 16 MiB" in bad.reason


def test_a_member_that_holds_more_than_it_states_is_not_decompressed_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    path = write_archive(tmp_path / "a.eval", [timed(sample_of(store={"x": "a" * 2**22}))])
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("samples/1_epoch_1.json").file_size
    start = content.rindex(b"PK\x01\x02")
    central = content[start:].replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(content[:start] + central)
    (bad,) = inspect.InspectImporter().documents(path, "a.eval")
    assert isinstance(bad, BadRow)
    assert "CRC" in bad.reason


# -- published logs ---------------------------------------------------------------------------


@pytest.mark.published
def test_logs_that_inspect_wrote_are_read(trained_texts: Callable[..., list[list[str]]]) -> None:
    texts = [text for example in trained_texts(trace_path("inspect_eval"), "inspect") for text in example]
    assert len(texts) == 6 * 3
    for said in ("SAY try", "tool call for tool shell", "FINAL seven"):
        assert sum(said in text for text in texts) == 6
    assert sum("THINK try" in text for text in texts) == 6
    assert not any(word in text for text in texts for word in ("ERRTEXT", "RESULT", "TASK", "SYS-PROMPT"))


def test_a_row_that_is_no_sample_is_refused() -> None:
    with pytest.raises(DataError, match=r"it is no sample of an Inspect log \(keys: type, payload\)"):
        read({"type": "response_item", "payload": {}})
