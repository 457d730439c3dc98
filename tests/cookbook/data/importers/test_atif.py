from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imported import contents_trained, read_one, reasons_in
from traces import trace_path

from cookbook.data import FromConversationFileBuilder, formats
from cookbook.data.importers import importer_of, marked
from cookbook.data.importers.atif import AtifImporter
from cookbook.data.importers.base import Imported
from cookbook.data.importers.source import open_documents
from cookbook.data.selection import ReadingOptions
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.errors import DataError

SHELL = {
    "type": "function",
    "function": {
        "name": "shell",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
    },
}
STEPS: list[dict[str, Any]] = [
    {"step_id": 1, "source": "system", "message": "Be brief."},
    {"step_id": 2, "source": "user", "message": "Count the lines."},
    {
        "step_id": 3,
        "timestamp": "2026-01-01T00:00:00Z",
        "source": "agent",
        "model_name": "m",
        "message": "Counting.",
        "reasoning_content": "use wc",
        "tool_calls": [
            {"tool_call_id": "c1", "function_name": "shell", "arguments": {"cmd": "wc -l a.txt"}},
            {"tool_call_id": "c2", "function_name": "shell", "arguments": {"cmd": "ls"}},
        ],
        "observation": {
            "results": [
                {"source_call_id": "c1", "content": "7 a.txt"},
                {"source_call_id": "c2", "content": "a.txt b.txt"},
            ]
        },
        "metrics": {"prompt_tokens": 3, "logprobs": [-0.1], "completion_token_ids": [1]},
        "llm_call_count": 1,
    },
    {"step_id": 4, "source": "agent", "message": "Seven lines."},
]


def trajectory(*steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    document = {
        "schema_version": "ATIF-v1.7",
        "session_id": "s1",
        "trajectory_id": "t1",
        "agent": {"name": "codex", "version": "1", "model_name": "m", "tool_definitions": [SHELL]},
        "steps": steps or STEPS,
        "final_metrics": {"total_steps": 4},
    }
    return copy.deepcopy({**document, **keys})


def numbered(*steps: dict[str, Any]) -> dict[str, Any]:
    return trajectory(*({"step_id": number, **step} for number, step in enumerate(steps, 1)))


USER = {"source": "user", "message": "Count."}
DONE = {"source": "agent", "message": "Done."}


def agent(message: Any = "", *calls: str, **keys: Any) -> dict[str, Any]:
    """A step of the agent with a call of `shell` for each id."""
    made = [{"tool_call_id": call, "function_name": "shell", "arguments": {"cmd": call}} for call in calls]
    return {"source": "agent", "message": message, **({"tool_calls": made} if made else {}), **keys}


def results(*values: dict[str, Any]) -> dict[str, Any]:
    return {"observation": {"results": list(values)}}


read = functools.partial(read_one, format="atif")
trained = contents_trained


def messages_of(document: dict[str, Any], **options: Any) -> list[Any]:
    (conversation,) = read(document, **options)[0].conversations
    return list(conversation.messages)


def said(messages: list[Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def reasons(document: dict[str, Any], **options: Any) -> dict[str, int]:
    return reasons_in(read(document, **options)[1])


# -- steps ------------------------------------------------------------------------------------


def test_a_trajectory_is_a_conversation_with_its_tools() -> None:
    found, counted = read(trajectory())
    (conversation,) = found.conversations
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "wc -l a.txt"}}},
        {"id": "c2", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "ls"}}},
    ]
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Count the lines."},
        {"role": "assistant", "content": "Counting.", "reasoning_content": "use wc", "tool_calls": calls},
        {"role": "tool", "content": "7 a.txt", "tool_call_id": "c1", "name": "shell"},
        {"role": "tool", "content": "a.txt b.txt", "tool_call_id": "c2", "name": "shell"},
        {"role": "assistant", "content": "Seven lines."},
    ]
    assert conversation.tools == [SHELL]
    assert conversation.is_rollout
    assert not found.dropped
    assert not counted


@pytest.mark.parametrize("version", [f"ATIF-v1.{minor}" for minor in range(9)])
def test_every_version_is_marked_and_refused_without_its_format(version: str) -> None:
    document = trajectory(schema_version=version)
    with pytest.raises(DataError, match="it is an ATIF trajectory.*Read it with format=atif"):
        formats.recognise(document)
    assert len(messages_of(document)) == 6


def test_a_trajectory_without_a_version_is_marked_by_its_steps_and_others_are_not() -> None:
    document = trajectory()
    del document["schema_version"]
    assert marked(document) is not None
    assert marked({"steps": [{"observation": "a door", "action": "open"}]}) is None
    assert marked({"task": "t", "trajectory": document}) is not None
    assert marked({"schema_version": "1.0", "messages": []}) is None
    assert marked({"trajectory": {"steps": [{"action": "open"}]}}) is None


def test_contents_may_be_parts_or_nothing() -> None:
    document = numbered(
        {"source": "user", "message": [{"type": "text", "text": "Count "}, {"type": "text", "text": "it."}]},
        agent(None, "c1", **results({"source_call_id": "c1", "content": [{"type": "text", "text": "7"}]})),
        agent("Again.", "c2", **results({"source_call_id": "c2", "content": None})),
        {"source": "agent"},
        DONE,
    )
    found, _ = read(document)
    assert said(list(found.conversations[0].messages)) == [
        *(("user", "Count it."), ("assistant", ""), ("tool", "7")),
        *(("assistant", "Again."), ("tool", ""), ("assistant", "Done.")),
    ]
    assert dict(found.dropped) == {"empty steps": 1}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"media_type": "image/png", "path": "a.png"}},
        {"type": "audio", "source": {"media_type": "audio/wav", "path": "a.wav"}},
        {"type": "text", "text": "data:image/png;base64,iVBORw0KGgo="},
    ],
)
def test_pictures_and_sounds_are_refused_with_their_step(part: dict[str, Any]) -> None:
    match = "step 2 .*only text can be trained on"
    with pytest.raises(DataError, match=match):
        read(numbered(USER, agent([part]), DONE))
    with pytest.raises(DataError, match=match):
        read(numbered(USER, agent("", "c", **results({"source_call_id": "c", "content": [part]})), DONE))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"is_copied_context": True}, "copied context"),
        ({"extra": {"is_copied_context": True}}, "copied context"),
        ({"llm_call_count": 0}, "steps without a call of the model"),
        ({"extra": {"train": False}}, "masked by their step"),
        ({"mask": True}, "masked by their step"),
        ({"extra": {"loss_mask": 0}}, "masked by their step"),
        ({"extra": {"success": False}}, "success: false"),
    ],
)
def test_steps_that_are_not_trained_are_context_and_counted(step: dict[str, Any], reason: str) -> None:
    document = numbered(USER, agent("First."), USER, agent("Second.", **step), USER, DONE)
    assert trained(messages_of(document)) == ["First.", "Done."]
    assert reasons(document) == {reason: 1}


def test_an_untrained_step_beside_a_trained_one_is_dropped_and_counted() -> None:
    copied, dispatched = {"is_copied_context": True}, {"llm_call_count": 0}
    for steps in (
        [agent("Old.", **copied), DONE],
        [agent("Old.", **copied), agent("Dispatch.", **dispatched), DONE],
        [DONE, agent("Dispatch.", **dispatched)],
    ):
        found, _ = read(numbered(USER, *steps))
        assert said(list(found.conversations[0].messages)) == [("user", "Count."), ("assistant", "Done.")]
        what = "untrained steps of the agent with another step of it beside them"
        assert dict(found.dropped) == {what: len(steps) - 1}
    call = agent("", "c1", **dispatched, **results({"source_call_id": "c1", "content": "7"}))
    assert trained(messages_of(numbered(USER, call, DONE))) == ["Done."]
    assert trained(messages_of(numbered(USER, agent("Old.", **copied), call, DONE))) == ["Done."]
    with pytest.raises(DataError, match="messages 2 and 3 are both the assistant's"):
        read(numbered(USER, DONE, DONE))


def test_masks_and_rewards_of_steps_are_used_where_they_are_asked_for() -> None:
    document = numbered(
        *(USER, agent("One.", extra={"keep": 0})),
        *(USER, agent("Two.", extra={"keep": 1, "reward": -1})),
        *(USER, agent("Three.", reward=0.5)),
    )
    assert trained(messages_of(document)) == ["One.", "Two.", "Three."]
    assert reasons(document, min_step_reward=0.0) == {"reward below min_step_reward=0": 1}
    (conversation,) = formats.conversations_of(document, "atif", ReadingOptions(mask_key="keep"))
    assert trained(list(conversation.messages)) == ["Two.", "Three."]


def test_results_without_an_id_answer_the_calls_of_their_step_and_else_are_the_users() -> None:
    document = numbered(
        USER,
        agent("A plan in text.", **results({"content": "terminal 1"})),
        agent("", "c1", "c2", **results({"content": "terminal 2"})),
        agent("Text.", **results({"content": "terminal 3"})),
        DONE,
    )
    assert said(messages_of(document)) == [
        *(("user", "Count."), ("assistant", "A plan in text."), ("user", "terminal 1")),
        *(("assistant", ""), ("tool", "terminal 2"), ("assistant", "Text."), ("user", "terminal 3")),
        ("assistant", "Done."),
    ]
    counted = read(document)[1]
    assert [(note.what, number) for note, number in counted.items()] == [("had no result", 1)]


def test_results_in_a_step_of_the_system_answer_the_calls_before_it() -> None:
    for result in ({"source_call_id": "c1", "content": "7"}, {"content": "7"}):
        step = {"source": "system", "message": "", **results(result)}
        assert said(messages_of(numbered(USER, agent("", "c1"), step, DONE))) == [
            *(("user", "Count."), ("assistant", ""), ("tool", "7"), ("assistant", "Done."))
        ]


def test_results_in_another_order_than_the_calls_are_reordered() -> None:
    document = trajectory()
    document["steps"][2]["observation"]["results"].reverse()
    assert messages_of(document) == messages_of(trajectory())
    assert [note.what for note in read(document)[1]] == ["stood in another order than the calls; reordered"]


def test_errors_stand_in_results_that_say_nothing_else() -> None:
    document = numbered(
        USER,
        agent(
            "",
            *("c1", "c2", "c3"),
            **results(
                {"source_call_id": "c1", "content": "", "error": {"type": "timeout", "message": "too slow"}},
                {"tool_call_id": "c2", "content": None, "error": "no file"},
                {"source_call_id": "c3", "content": "denied", "is_error": True},
            ),
        ),
        DONE,
    )
    assert [content for role, content in said(messages_of(document)) if role == "tool"] == [
        *("too slow", "no file", "denied")
    ]


def test_steps_of_one_response_are_one_message() -> None:
    one = {"extra": {"api_call_id": "a1"}}
    document = numbered(
        USER,
        agent("Both.", "c1", **results({"source_call_id": "c1", "content": "1"}), **one),
        agent("", "c2", **results({"source_call_id": "c2", "content": "2"}), **one),
        DONE,
    )
    messages = messages_of(document)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c1", "c2"]


def test_a_step_of_several_calls_of_the_model_is_counted() -> None:
    counted = read(numbered(USER, agent("Done.", llm_call_count=3)))[1]
    assert [note.what for note in counted] == ["stood for several calls of the model"]


def test_a_trajectory_that_ends_unanswered_loses_its_tail() -> None:
    found, counted = read(
        numbered(USER, agent("", "c1", **results({"source_call_id": "c1", "content": "x"})))
    )
    assert said(list(found.conversations[0].messages)) == [("user", "Count."), ("assistant", "")]
    assert [note.what for note in counted] == [
        "ended without an answer to its last message, which was dropped"
    ]
    found, _ = read(numbered(USER))
    assert found == Imported([], {"trajectories without a step of the agent": 1})


def test_side_chains_are_dropped_and_counted() -> None:
    found, _ = read(numbered(USER, agent("Side.", extra={"is_sidechain": True}), DONE))
    assert trained(list(found.conversations[0].messages)) == ["Done."]
    assert dict(found.dropped) == {"steps of side chains": 1}


# -- contexts ---------------------------------------------------------------------------------

REPLACED = {"context_management": {"type": "compaction", "boundary": "replace"}}


def test_a_replaced_context_begins_a_conversation_with_the_summary() -> None:
    document = numbered(
        {"source": "system", "message": "Be brief."},
        USER,
        agent("Old."),
        {
            "source": "system",
            "message": "Compacted.",
            "extra": REPLACED,
            **results({"content": "Summary."}),
        },
        {"source": "user", "message": "Continue."},
        agent("New."),
    )
    found, counted = read(document)
    before, after = found.conversations
    assert said(list(before.messages)) == [("system", "Be brief."), ("user", "Count."), ("assistant", "Old.")]
    assert said(list(after.messages)) == [
        *(("system", "Be brief."), ("user", "Summary.\n\nContinue."), ("assistant", "New."))
    ]
    assert after.tools == [SHELL]
    assert [note.what for note in counted] == ["replaced its context midway; what follows is a conversation"]


def test_a_context_replaced_by_a_step_of_the_agent_ends_with_this_step() -> None:
    compact = agent(
        "", "k1", llm_call_count=0, extra=REPLACED, **results({"source_call_id": "k1", "content": ""})
    )
    document = numbered(USER, agent("Old."), USER, compact, {"source": "user", "message": "New task."}, DONE)
    before, after = read(document)[0].conversations
    assert trained(list(before.messages)) == ["Old."]
    assert said(list(after.messages)) == [("user", "New task."), ("assistant", "Done.")]


def test_a_continuation_trains_only_what_is_new() -> None:
    document = numbered(
        {**USER, "is_copied_context": True},
        agent("Old.", is_copied_context=True),
        {"source": "user", "message": "Go on."},
        DONE,
    )
    assert trained(messages_of(document)) == ["Done."]


def test_sub_agents_are_conversations_of_their_own() -> None:
    inner = trajectory({"step_id": 1, **USER}, {"step_id": 2, **agent("Inner.")}, trajectory_id="t3")
    sub = trajectory(
        {"step_id": 1, **USER},
        {"step_id": 2, **agent("Sub.")},
        trajectory_id="t2",
        agent={"name": "sub"},
        subagent_trajectories=[inner],
    )
    ref = {"source_call_id": "c1", "content": None, "subagent_trajectory_ref": [{"trajectory_id": "t2"}]}
    document = numbered(USER, agent("", "c1", **results(ref)), DONE)
    document["subagent_trajectories"] = [sub]
    found, _ = read(document)
    assert [trained(list(each.messages)) for each in found.conversations] == [
        ["", "Done."],
        ["Sub."],
        ["Inner."],
    ]
    assert [each.tools for each in found.conversations] == [[SHELL], None, [SHELL]]
    document["subagent_trajectories"][0]["steps"][1]["source"] = "critic"
    with pytest.raises(DataError, match="^sub-agent 1: step 2 has the source `critic`"):
        read(document)


def test_references_to_other_files_are_counted_and_not_followed() -> None:
    ref = [{"session_id": "s2", "trajectory_path": "/etc/passwd"}]
    delegated = {"source": "system", "message": "", **results({"subagent_trajectory_ref": ref})}
    document = numbered(USER, agent("", "c1", "c2", **results({"content": "7"})), delegated, DONE)
    document["continued_trajectory_ref"] = "trajectory.cont-1.json"
    found, _ = read(document)
    assert said(list(found.conversations[0].messages))[2:] == [("tool", "7"), ("assistant", "Done.")]
    assert dict(found.dropped) == {"references to trajectories in other files": 2}


# -- tools ------------------------------------------------------------------------------------


def test_tools_are_read_from_the_agent_or_the_trajectory_in_any_shape() -> None:
    inner = SHELL["function"]
    assert isinstance(inner, dict)
    anthropic = {
        "name": "shell",
        "description": inner["description"],
        "input_schema": inner["parameters"],
    }
    for tools in ([SHELL], [inner], json.dumps([SHELL]), [anthropic], [{"type": "custom", **anthropic}]):
        document = trajectory(agent={"name": "a", "tool_definitions": tools})
        assert read(document)[0].conversations[0].tools == [SHELL]
    assert read(trajectory(agent={"name": "a"}, tools=[SHELL]))[0].conversations[0].tools == [SHELL]
    found, _ = read(trajectory(agent={"name": "a", "tool_definitions": ["bash", SHELL]}))
    assert found.conversations[0].tools == [SHELL]
    assert dict(found.dropped) == {"tools without a schema": 1}
    assert read(trajectory(agent=None))[0].conversations[0].tools is None


# -- Worlds -----------------------------------------------------------------------------------


def worlds(**keys: Any) -> dict[str, Any]:
    """A trajectory of Worlds' sampler: no prompt, a goal, commands as strings."""
    call = {"tool_call_id": "a", "function_name": "nmap", "arguments": "nmap -sn 10.0.0.0/24"}
    document = {
        "schema_version": "ATIF-v1.4",
        "agent": {"name": "kali", "version": "1"},
        "extra": {
            "goal": {"target_type": "group", "target_name": "Domain Admins"},
            "initial_state": {"host": "ws1", "credentials": []},
        },
        "steps": [
            {
                "step_id": 1,
                "source": "agent",
                "message": "",
                "reasoning_content": "look around",
                "tool_calls": [call],
                "observation": {"results": [{"tool_call_id": "a", "content": "2 hosts", "is_error": False}]},
            },
            {"step_id": 2, **DONE},
        ],
        "success": False,
        "worlds_summary": {"success": False},
    }
    return {**document, **keys}


def test_the_goal_of_worlds_is_the_system_prompt_and_a_command_is_an_argument() -> None:
    messages = messages_of(worlds())
    assert said(messages) == [
        ("system", "Goal: group Domain Admins"),
        ("user", 'Initial state: {"host": "ws1", "credentials": []}'),
        *(("assistant", ""), ("tool", "2 hosts"), ("assistant", "Done.")),
    ]
    assert messages[2]["tool_calls"][0]["function"] == {
        "name": "nmap",
        "arguments": {"command": "nmap -sn 10.0.0.0/24"},
    }
    assert messages[2]["reasoning_content"] == "look around"
    document = numbered(USER, DONE)
    assert said(messages_of({**document, "extra": {"goal": "x"}}))[0] == ("user", "Count.")
    assert said(messages_of(worlds(extra={"goal": "Find it."})))[0] == ("system", "Goal: Find it.")


def test_rollouts_of_a_worlds_agent_are_read_with_the_format_and_without() -> None:
    call = {"id": "k1", "type": "function", "function": {"name": "shell", "arguments": '{"cmd": "id"}'}}
    document = {
        "messages": [
            {"role": "user", "content": "Get in."},
            {"role": "assistant", "content": "Trying.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "k1", "content": "uid=0"},
            {"role": "assistant", "content": "In."},
        ],
        "tools": [SHELL],
        "metadata": {"success": True, "worlds_summary": {"success": True}},
    }
    options = {"min_reward": 0.5, "reward_key": "metadata.success"}
    (conversation,) = read(document, min_reward=0.5)[0].conversations
    assert conversation.reward == 1.0
    (plain,) = formats.conversations_of(document, None, ReadingOptions(**options))
    assert said(list(conversation.messages)) == said(list(plain.messages))
    assert trained(list(conversation.messages)) == ["Trying.", "In."]
    assert conversation.tools == plain.tools == [SHELL]
    document["metadata"] = {"worlds_summary": {"success": False}}
    assert read(document, min_reward=0.5)[0].conversations[0].messages == []


# -- rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "options", "reward"),
    [
        ({"reward": 0.25}, {}, 0.25),
        ({"extra": {"reward": 0.25}}, {}, 0.25),
        ({"final_metrics": {"extra": {"reward": 0.25}}}, {}, 0.25),
        ({"success": True}, {}, 1.0),
        ({"extra": {"resolved": False}}, {}, 0.0),
        ({"worlds_summary": {"success": True}}, {}, 1.0),
        ({"reward": 1, "extra": {"grade": {"tests": 0.5}}}, {"reward_key": "extra.grade.tests"}, 0.5),
        ({"extra": {"grade": {"tests": 0.5}}}, {"reward_key": "grade.tests"}, 0.5),
        ({"final_metrics": {"total_cost_usd": 0.5}}, {"reward_key": "final_metrics.total_cost_usd"}, 0.5),
    ],
)
def test_a_reward_stands_at_any_level(keys: dict[str, Any], options: dict[str, Any], reward: float) -> None:
    document = trajectory(**keys)
    (kept,) = read(document, min_reward=reward, **options)[0].conversations
    assert kept.reward == reward
    assert kept.messages
    (skipped,) = read(document, max_reward=reward - 0.01, **options)[0].conversations
    assert skipped.messages == []
    assert read(document)[0].conversations[0].reward is None


def test_a_row_may_hold_a_trajectory_beside_its_reward() -> None:
    for value in (trajectory(), json.dumps(trajectory()), [trajectory(), trajectory()]):
        found, _ = read({"task": "t", "trajectory": value, "reward": 0.5}, min_reward=0.5)
        assert {each.reward for each in found.conversations} == {0.5}
        assert all(len(each.messages) == 6 for each in found.conversations)
        assert len(found.conversations) == (2 if isinstance(value, list) else 1)


def test_a_trajectory_without_a_reward_is_refused_where_rewards_select() -> None:
    with pytest.raises(DataError, match="no reward to compare with min_reward=0.5"):
        formats.conversations_of(trajectory(), "atif", ReadingOptions(min_reward=0.5))


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({"schema_version": "ATIF-v1.7"}, "no list of `steps`"),
        (trajectory(steps="none"), "no list of `steps`"),
        (trajectory(steps=[3]), "step 1 is a int"),
        (numbered({"source": "critic", "message": "x"}), "step 1 has the source `critic`"),
        (numbered({"message": "x"}), "step 1 has the source `None`"),
        (numbered({**USER, "tool_calls": [{"function_name": "a"}]}), "step 1 is of the source `user`"),
        (numbered(USER, agent(3)), "the content of step 2 is a int"),
        (numbered(USER, agent("x", tool_calls={"a": 1})), "`tool_calls` of step 2 is a dict"),
        (numbered(USER, agent("x", tool_calls=[3])), "a tool call of step 2 is a int"),
        (numbered(USER, agent("x", tool_calls=[{"arguments": {}}])), "a tool call of step 2 has no `name`"),
        (numbered(USER, agent("x", reasoning_content=[1])), "`reasoning_content` of step 2 is a list"),
        (numbered(USER, agent("x", llm_call_count="0")), "`llm_call_count` of step 2 is '0'"),
        (numbered(USER, agent("x", observation="y")), "the observation of step 2 has no list of `results`"),
        (numbered(USER, agent("x", **results("y"))), "a result of step 2 is a str"),  # type: ignore[arg-type]
        (numbered(USER, agent("x", "c1", **results({"source_call_id": "c9"}))), "answers the call `c9`"),
        (numbered(USER, agent("x", "c1", "c1")), "two calls have the id `c1`"),
        (
            numbered(USER, agent("x", "c1", **results(*[{"source_call_id": "c1", "content": "y"}] * 2))),
            "a result of step 2 is a second result",
        ),
        (trajectory(agent={"tool_definitions": {"a": 1}}), "`tool_definitions` is a dict"),
        (trajectory(subagent_trajectories={"a": 1}), "`subagent_trajectories` is a dict"),
        (trajectory(subagent_trajectories=[1]), "sub-agent 1: it is a int"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(document: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        read(document)


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just([]), st.just({}))


@pytest.mark.slow
@settings(max_examples=400)
@given(st.data())
def test_a_field_of_another_type_is_read_or_refused(data: st.DataObject) -> None:
    sub = numbered(
        {"source": "system", "message": "x", "extra": REPLACED, **results({"content": "s"})}, USER, DONE
    )
    document = copy.deepcopy(trajectory(subagent_trajectories=[sub], extra={"goal": {"a": 1}}, success=True))
    where: Any = document
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        inner = where[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            junk = st.one_of(JUNK, JUNK.map(lambda value: [value]), JUNK.map(lambda value: {"a": value}))
            where[key] = data.draw(junk)
            break
        where = inner
    for options in ({}, {"min_reward": 0.5}):
        with contextlib.suppress(DataError):
            assert isinstance(read(document, **options)[0], Imported)


# -- files ------------------------------------------------------------------------------------


def test_every_kind_of_file_trains_the_steps_of_the_agent(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    text = json.dumps(trajectory())
    (tmp_path / "a.json").write_text(json.dumps(trajectory(), indent=1), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(text + "\n" + text + "\n", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name, number in (("a.json", 1), ("b.jsonl", 2), ("c.jsonl.gz", 1)):
        texts = trained_texts(tmp_path / name, "atif")
        assert len(texts) == number
        for first, last in texts:
            assert "use wc" in first
            assert "Counting." in first
            assert '"cmd": "ls"' in first
            assert last.endswith("Seven lines.<|im_end|>")
            assert not any(word in first + last for word in ("7 a.txt", "a.txt b.txt", "Be brief"))


def write_trial(folder: Path, *, result: Any = None, texts: dict[str, str] | None = None) -> Path:
    """A trial as Harbor lays it out."""
    for name, content in {
        "agent/trajectory.json": json.dumps(trajectory()),
        "agent/sessions/log.jsonl": '{"type": "event"}\n{"type": "event"}\n',
        "config.json": '{"task": {}, "agents": []}',
        "lock.json": '{"trials": []}',
        "artifacts/manifest.json": '[{"path": "a"}]',
        **({} if result is None else {"result.json": json.dumps(result)}),
        **(texts or {}),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def test_a_folder_of_jobs_is_read_without_the_files_that_are_no_trajectories(
    tmp_path: Path, tiny_qwen3: str
) -> None:
    write_trial(tmp_path / "jobs" / "one")
    write_trial(tmp_path / "jobs" / "two", result={"trial_name": "t"})
    config = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=tiny_qwen3, renderer_name="qwen3")
    builder = FromConversationFileBuilder(
        file_path=str(tmp_path / "jobs"), common_config=config, format="atif", test_size=0, repeated="keep"
    )
    data, _ = builder()
    (report,) = data.reports()
    text = " ".join(" ".join(report.lines()).split())
    assert "Left out of rollouts: rows of the folder that are not an ATIF trajectory (11 times)" in text
    assert "Read as: atif (2 documents)" in text
    assert "11 rows without a conversation to train on" in text
    importer = importer_of("atif", ReadingOptions())
    assert importer is not None
    (row,) = open_documents(importer, tmp_path / "jobs" / "one" / "config.json").rows()
    with pytest.raises(DataError, match="no list of `steps`"):
        formats.conversations_of(row, "atif")  # type: ignore[arg-type]


def test_a_folder_without_a_trajectory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    importer = importer_of("atif", ReadingOptions())
    assert importer is not None
    with pytest.raises(DataError, match="has no documents to read with format=atif"):
        list(open_documents(importer, tmp_path).rows())


@pytest.mark.parametrize(
    ("trial", "options", "reward"),
    [
        ({"result": {"verifier_result": {"rewards": {"reward": 1.0}}}}, {}, 1.0),
        ({"result": {"verifier_result": {"rewards": {"tests": 0.5}}}}, {}, 0.5),
        ({"result": {"verifier_result": {"reward": 0.25}}}, {}, 0.25),
        ({"result": {"verifier_result": {"rewards": {"a": 1, "b": 0}}}}, {"reward_key": "rewards.b"}, 0.0),
        (
            {"result": {"verifier_result": {"rewards": {"a": 1, "b": 0}}}},
            {"reward_key": "verifier_result.rewards.a"},
            1.0,
        ),
        ({"result": {}, "texts": {"verifier/reward.txt": "0.75\n"}}, {}, 0.75),
        ({"texts": {"verifier/reward.json": '{"reward": 0.5}'}}, {}, 0.5),
    ],
)
def test_the_verifier_of_a_trial_gives_the_reward(
    tmp_path: Path, trial: dict[str, Any], options: dict[str, Any], reward: float
) -> None:
    write_trial(tmp_path / "one", **trial)
    importer = importer_of("atif", ReadingOptions(min_reward=0.0, **options))
    assert importer is not None
    for path in (tmp_path, tmp_path / "one" / "agent" / "trajectory.json"):
        rows = [row for row in open_documents(importer, path).rows() if row]
        (conversation,) = importer.read(rows[0]).conversations  # type: ignore[arg-type]
        assert conversation.reward == reward


def test_trials_that_failed_and_trajectories_of_other_agents_are_left_out(tmp_path: Path) -> None:
    other = {"user-agent/trajectory.json": json.dumps(trajectory())}
    failed = {"verifier_result": None, "exception_info": {"exception_type": "AgentTimeoutError"}}
    write_trial(tmp_path / "one", result=failed, texts=other)
    importer = importer_of("atif", ReadingOptions(min_reward=0.5))
    assert importer is not None
    source = open_documents(importer, tmp_path)
    assert list(source.unread) == ["one/user-agent/trajectory.json"]
    (row,) = [row for row in source.rows() if row]
    assert importer.read(row) == Imported(  # type: ignore[arg-type]
        [], {"trajectories of trials that failed before they were verified": 1}
    )


def test_a_reward_of_a_trial_that_cannot_be_read_is_refused_and_a_link_is_not_followed(
    tmp_path: Path,
) -> None:
    trial = write_trial(tmp_path / "one", texts={"result.json": "{"})
    importer = importer_of("atif", ReadingOptions(min_reward=0.0))
    assert importer is not None
    (bad,) = open_documents(importer, trial / "agent" / "trajectory.json").rows()
    assert "`result.json` of its trial cannot be read" in bad.reason  # type: ignore[union-attr]
    (tmp_path / "other.json").write_text('{"verifier_result": {"rewards": {"reward": 1}}}', encoding="utf-8")
    (trial / "result.json").unlink()
    (trial / "result.json").symlink_to(tmp_path / "other.json")
    (row,) = open_documents(importer, trial / "agent" / "trajectory.json").rows()
    assert importer.read(row).conversations[0].reward is None  # type: ignore[arg-type]


# -- published rollouts -----------------------------------------------------------------------


@pytest.mark.published
@pytest.mark.parametrize("name", ["atif/data.jsonl", "atif/trajectory.json"])
def test_a_published_trajectory_trains_its_agent(
    name: str, trained_texts: Callable[..., list[list[str]]]
) -> None:
    ((first, last),) = trained_texts(trace_path(name), "atif")
    assert "THINK use wc" in first
    assert "SAY counting" in first
    assert '"cmd": "wc -l a.txt"' in first
    assert last.endswith("FINAL seven lines<|im_end|>")
    assert not any(word in first + last for word in ("RESULT", "TASK", "SYS-PROMPT"))


@pytest.mark.published
def test_published_rollouts_of_worlds_are_read(trained_texts: Callable[..., list[list[str]]]) -> None:
    path = trace_path("dreadnode_worlds_atif")
    texts = [text for example in trained_texts(path, "atif") for text in example]
    assert any("THINK look around" in text and '"command": "nmap -sn 10.0.0.0/24"' in text for text in texts)
    assert any('"command": "smbclient -L //dc1"' in text for text in texts)
    assert not any(word in text for text in texts for word in ("RESULT", "GOAL"))
    path = trace_path("dreadnode_worlds_agent")
    for format in ("atif", None):
        kept = trained_texts(path, format, min_reward=0.5, reward_key="metadata.success")
        assert [text for example in kept for text in example] == [
            "<think>\n\n</think>\n\nDONE good<|im_end|>"
        ]


def test_a_trajectory_in_a_list_or_in_json_is_marked() -> None:
    trajectory = {"schema_version": "ATIF-v1.4", "agent": {"name": "a"}, "steps": []}
    for row in ({"trajectories": [trajectory]}, {"trajectory": json.dumps(trajectory), "reward": 1}):
        with pytest.raises(DataError, match="format=atif"):
            formats.conversations_of(row)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Executed Read",
            "Executed Read t1",
            "Executed Read (no result)",
            "[tool call]",
            "[tool call: Read]",
        ),
        *("(tool calls)", "Tool call", "Read result"),
    ],
)
def test_a_text_that_a_converter_wrote_for_a_call_is_not_trained(text: str) -> None:
    call = {"tool_call_id": "t1", "function_name": "Read", "arguments": {"path": "a"}}
    result = {"source_call_id": "t1", "content": "x"}
    steps = [
        {"step_id": 1, "source": "user", "message": "Look."},
        {"step_id": 2, "source": "agent", "message": "I look."},
        {
            "step_id": 3,
            "source": "agent",
            "message": text,
            "tool_calls": [call],
            "observation": {"results": [result]},
        },
        {"step_id": 4, "source": "agent", "message": text},
    ]
    document = {"schema_version": "ATIF-v1.2", "agent": {"name": "claude-code"}, "steps": steps}
    found, _ = read(document)
    (conversation,) = found.conversations
    assert [message["content"] for message in conversation.messages] == ["Look.", "I look.", "x", text]
    assert found.dropped == {"texts that a converter wrote for calls without one": 1}


def test_calls_of_one_thought_that_a_converter_wrote_as_several_steps_are_one_message() -> None:
    steps: list[dict[str, Any]] = [{"step_id": 1, "source": "user", "message": "Look."}]
    for number, name in enumerate(("a", "b"), 2):
        steps.append(
            {
                "step_id": number,
                "source": "agent",
                "message": f"Executed Read {name}",
                "reasoning_content": "I read both.",
                "tool_calls": [{"tool_call_id": name, "function_name": "Read", "arguments": {}}],
                "observation": {"results": [{"source_call_id": name, "content": f"{name} is read"}]},
            }
        )
    document = {"schema_version": "ATIF-v1.2", "agent": {"name": "claude-code"}, "steps": steps}
    (conversation,) = read(document)[0].conversations
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert len(conversation.messages[1]["tool_calls"]) == 2
    assert conversation.messages[1]["reasoning_content"] == "I read both."


@pytest.mark.parametrize(
    "values",
    [
        {"message": "Tool result"},
        {"message": "[unparsed Copilot event]"},
        {"message": "x is 7", "extra": {"source_call_id": "t9"}},
        {"message": "x", "extra": {"copilot_parse_error": "no content"}},
    ],
)
def test_a_step_that_a_converter_could_not_place_is_refused(values: dict[str, Any]) -> None:
    steps = [{"step_id": 1, "source": "user", "message": "q"}, {"step_id": 2, "source": "agent", **values}]
    with pytest.raises(DataError, match="step 2 is of the source `agent` and holds a result or an event"):
        read({"schema_version": "ATIF-v1.2", "agent": {"name": "copilot"}, "steps": steps})


def run_of(agent: str, *steps: dict[str, Any]) -> dict[str, Any]:
    numbered = [{"step_id": number, **step} for number, step in enumerate(steps, 1)]
    return {"schema_version": "ATIF-v1.5", "agent": {"name": agent}, "steps": numbered}


def agent_step(text: str, name: str = "", reasoning: str = "", **arguments: str) -> dict[str, Any]:
    calls = [{"tool_call_id": "call_2_1", "function_name": name, "arguments": arguments}] if name else None
    result = {"content": "notes.txt"}
    step = {"source": "agent", "message": text, "reasoning_content": reasoning or None, "tool_calls": calls}
    return {**step, "observation": {"results": [result]}}


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("Running command: ls", "execute_bash", {"command": "ls"}),
        ("Reading file: /a", "str_replace_editor", {"command": "view", "path": "/a"}),
        ("I am interacting with the MCP server with name:\n```\nfetch\n```", "fetch", {}),
        ("I am thinking...: hm", "think", {"thought": "hm"}),
        ("It is done.", "finish", {"message": "It is done."}),
        ("All done! What's next on the agenda?", "finish", {}),
        ("Calling grep", "grep", {"pattern": "a"}),
    ],
)
def test_a_description_of_a_call_is_not_trained(text: str, name: str, arguments: dict[str, str]) -> None:
    found, _ = read(
        run_of("openhands", {"source": "user", "message": "q"}, agent_step(text, name, **arguments))
    )
    (conversation,) = found.conversations
    assert conversation.messages[1]["content"] == ""
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_text_that_only_begins_as_a_description_is_trained() -> None:
    text = "Running command: what a good idea."
    run = run_of("openhands", {"source": "user", "message": "q"}, agent_step(text, "bash", command="ls"))
    assert messages_of(run)[1]["content"] == text


def test_status_messages_of_openhands_are_no_system_prompts() -> None:
    status = {"source": "system", "message": "Retrieving content for: q"}
    found, _ = read(run_of("openhands", {"source": "user", "message": "q"}, status, agent_step("a")))
    assert [message["role"] for message in found.conversations[0].messages] == ["user", "assistant"]
    assert found.dropped == {"status messages of OpenHands": 1}


def test_thoughts_and_calls_that_repeat_a_message_of_mini_swe_agent_are_dropped() -> None:
    text = "THOUGHT: I look.\n\n```bash\nls\n```"
    run = run_of(
        "mini-swe-agent",
        {"source": "user", "message": "q"},
        agent_step(text, "bash_command", "I look.", command="ls"),
        agent_step("I look again.", "bash", "I look again.", command="ls -a"),
        agent_step("Done."),
    )
    one, two, three, four, five, last = messages_of(run)
    assert (one["content"], two["content"], three) == ("q", text, {"role": "user", "content": "notes.txt"})
    assert "tool_calls" not in two
    assert "reasoning_content" not in two
    assert four["content"] == "I look again."
    assert "reasoning_content" not in four
    assert four["tool_calls"][0]["function"]["arguments"] == {"command": "ls -a"}
    assert (five["role"], last["content"]) == ("tool", "Done.")


def test_a_run_of_swe_agent_without_its_task_is_refused() -> None:
    step = agent_step("I look.\n\nls", "swe_agent_action", "I look.", raw_action="ls")
    with pytest.raises(DataError, match=r"without its task.*format=swe_agent"):
        read(run_of("swe-agent", {"source": "system", "message": "s"}, step))
    (_, answer) = messages_of(run_of("swe-agent", {"source": "user", "message": "q"}, step))
    assert answer == {"role": "assistant", "content": "I look.\n\nls"}


def test_a_reward_that_changes_beside_a_trajectory_is_read_again(tmp_path: Path) -> None:
    trial = tmp_path / "job" / "trial"
    (trial / "agent").mkdir(parents=True)
    (trial / "verifier").mkdir()
    step = {"step_id": 1, "source": "agent", "message": "done"}
    document = {"schema_version": "ATIF-v1.7", "session_id": "s", "agent": {"name": "a"}, "steps": [step]}
    (trial / "agent" / "trajectory.json").write_text(json.dumps(document), encoding="utf-8")
    reward = trial / "verifier" / "reward.txt"
    reward.write_text("1", encoding="utf-8")
    source = open_documents(AtifImporter(), tmp_path / "job")
    before = source.fingerprint()
    assert source.fingerprint() == before
    reward.write_text("0.0", encoding="utf-8")
    assert source.fingerprint() != before


def test_a_summary_of_an_early_terminus_begins_a_conversation() -> None:
    handoff = {
        "source": "system",
        "message": "Performed context summarization and handoff to continue task.",
        "observation": {"results": [{"subagent_trajectory_ref": [{"trajectory_path": "summary.json"}]}]},
    }
    run = run_of(
        "terminus-2",
        {"source": "user", "message": "q"},
        agent_step("one"),
        handoff,
        {"source": "user", "message": "It was begun."},
        agent_step("two"),
    )
    found, _ = read(run)
    said = [[message["content"] for message in each.messages] for each in found.conversations]
    assert said == [["q", "one"], ["It was begun.", "two"]]
