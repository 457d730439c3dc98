"""Reading rows of every chat format as conversations."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import chat_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cookbook.data import importers
from cookbook.data.conversation import Conversation, linked
from cookbook.data.formats import FORMATS, conversations_of, recognise
from cookbook.data.selection import ReadingOptions
from cookbook.errors import ConfigError, DataError

USER = {"role": "user", "content": "How many legs?"}
REPLY = {"role": "assistant", "content": "eight"}
CHAT = [USER, REPLY]
SCHEMA = {"name": "count", "description": "counts", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def only(row: dict[str, Any], format: str | None = None) -> Conversation:
    (conversation,) = conversations_of(row, format)
    return conversation


def messages(row: dict[str, Any], format: str | None = None) -> list[Any]:
    return only(row, format).messages


def call(name: str, arguments: dict[str, Any], call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- recognition ------------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
STEPS = [{"observation": "a", "action": "b"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": CHAT}, "messages"),
        ({"messages": json.dumps(CHAT)}, "messages"),
        ({"conversations": CHAT}, "messages"),
        ({"conversation": CHAT}, "messages"),
        ({"messages": ["no message"]}, "messages"),
        ({"messages": []}, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"conversation": SHAREGPT}, "sharegpt"),
        ({"messages": SHAREGPT}, "sharegpt"),
        ({"steps": STEPS}, "trajectory"),
        ({"trajectory": STEPS}, "trajectory"),
        ({"rollout": STEPS}, "trajectory"),
        ({"transitions": STEPS}, "trajectory"),
        ({"turns": CHAT}, "trajectory"),
        ({"trajectory": {"steps": STEPS}}, "trajectory"),
        ({"rollouts": [STEPS]}, "trajectory"),
        ({"trajectories": [{"steps": STEPS}]}, "trajectory"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "response": "b"}, "alpaca"),
        *[
            ({prompt: "a", completion: "b"}, "prompt_completion")
            for prompt in ("prompt", "question", "query", "input")
            for completion in ("completion", "response", "answer", "output", "chosen")
        ],
        ({"text": "a"}, "text"),
        # If two rules fit, the order of the table decides.
        ({"messages": CHAT, "steps": STEPS, "prompt": "a", "completion": "b", "text": "c"}, "messages"),
        ({"messages": CHAT, "conversations": SHAREGPT}, "messages"),
        ({"conversations": SHAREGPT, "steps": STEPS}, "sharegpt"),
        ({"steps": STEPS, "instruction": "a", "output": "b"}, "trajectory"),
        ({"instruction": "a", "output": "b", "prompt": "a b", "text": "a b"}, "alpaca"),
        ({"prompt": "a", "completion": "b", "text": "a b"}, "prompt_completion"),
        # Null counts as absent, and a column with the right name but another type does not fit.
        ({"messages": None, "text": "a"}, "text"),
        ({"turns": 3, "prompt": "a", "response": "b"}, "prompt_completion"),
        ({"steps": ["add", "carry"], "question": "a", "answer": "b"}, "prompt_completion"),
        ({"conversations": ["a", "b"], "text": "c"}, "text"),
    ],
)
def test_a_row_is_recognised_by_its_keys(row: dict[str, Any], name: str) -> None:
    assert recognise(row) == name


@pytest.mark.parametrize(
    "row", [{}, {"words": "a"}, {"messages": 3}, {"prompt": "a"}, {"instruction": "a"}, {"text": ["a"]}]
)
def test_a_row_of_unknown_format_is_an_error_that_lists_its_keys_and_the_formats(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        conversations_of(row)
    said = str(caught.value)
    assert said.startswith("its format is unknown (keys: ")
    assert all(word in said for word in [*row, *FORMATS, "format=", "subclass"])


def test_the_error_for_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Unknown format `sharegtp`. Did you mean `sharegpt`"):
        conversations_of({"text": "a"}, "sharegtp")


def test_the_importers_are_all_that_there_are_by_their_own_names() -> None:
    found = {}
    for file in pkgutil.iter_modules(importers.__path__):
        module = importlib.import_module(f"{importers.__name__}.{file.name}")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        found |= {kind.name: kind for kind in kinds if issubclass(kind, importers.Importer) and kind.name}
    assert dict(importers.IMPORTERS) == found


def test_a_named_format_is_taken_over_the_recognised_one() -> None:
    row = {"messages": CHAT, "text": "all of it"}
    assert only(row, "text") == Conversation([], text="all of it")
    assert messages(row) == CHAT


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("messages", "no list of `messages` (keys: a, b)."),
        ("sharegpt", "no list of `conversations` (keys: a, b)."),
        ("trajectory", "no list of `steps` (keys: a, b)."),
        ("alpaca", "no `instruction` (keys: a, b)."),
        ("prompt_completion", "no `prompt` (keys: a, b)."),
        ("text", "no string under `text` (keys: a, b)."),
    ],
)
def test_the_error_for_a_row_of_another_format_names_what_is_missing(format: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        conversations_of({"a": 1, "b": 2}, format)
    assert str(caught.value) == reason


# -- messages ---------------------------------------------------------------------------------


def test_plain_messages_are_not_changed() -> None:
    row = {
        "messages": [{"role": "system", "content": "s"}, USER, {**REPLY, "trainable": False, "weight": 0.5}]
    }
    assert messages(row) == row["messages"]
    assert only(row).tools is None


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "human", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "Model", "content": "a"}, {"role": "assistant", "content": "a"}),
        ({"role": "bot", "content": "a"}, {"role": "assistant", "content": "a"}),
        ({"role": "critic", "content": "a"}, {"role": "critic", "content": "a"}),
        ({"role": "user", "content": "a", "name": None, "x": 1}, {"role": "user", "content": "a", "x": 1}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}, "c"],
            },
            {"role": "user", "content": "a bc"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "a"}],
            },
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "hm"},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        (
            {"role": "assistant", "content": "a", "thinking": "hm", "tool_calls": []},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        (
            {
                "role": "assistant",
                "content": "a",
                "reasoning_content": "",
                "reasoning": "hm",
                "thinking": "hm",
            },
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}],
                "thinking": "",
            },
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        ({"role": "tool", "content": {"b": 1, "a": "é"}}, {"role": "tool", "content": '{"b": 1, "a": "é"}'}),
        ({"role": "tool", "content": [1, None]}, {"role": "tool", "content": "[1, null]"}),
        ({"role": "tool", "content": [{"type": "text", "text": "a"}]}, {"role": "tool", "content": "a"}),
        ({"role": "tool", "content": [{"type": "cat"}]}, {"role": "tool", "content": '[{"type": "cat"}]'}),
        ({"role": "function", "name": "f", "content": "a"}, {"role": "tool", "name": "f", "content": "a"}),
    ],
)
def test_messages_of_every_spelling_are_normalized(message: dict[str, Any], read: dict[str, Any]) -> None:
    assert messages({"messages": [message]}) == [read]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"reasoning_content": "a", "thinking": "b"}, "two different texts of thinking"),
        (
            {"content": [{"type": "thinking", "thinking": "b"}], "reasoning": "a"},
            "two different texts of thinking",
        ),
        ({"reasoning_content": "a", "thinking": 3}, "thinking of message 1 is a int"),
    ],
)
def test_different_texts_of_reasoning_are_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        messages({"messages": [{"role": "assistant", "content": "x", **more}]})


@pytest.mark.parametrize(
    "calls",
    [
        {
            "tool_calls": [
                {"id": "x1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
            ]
        },
        {"tool_calls": [{"id": "x1", "function": {"name": "f", "arguments": {"a": None}}}]},
        {"tool_calls": json.dumps([{"id": "x1", "name": "f", "arguments": {"a": None}}])},
        {"tool_calls": [{"id": "x1", "name": "f", "args": {"a": None}}]},
    ],
)
def test_arguments_are_parsed_to_a_dict(calls: dict[str, Any]) -> None:
    (message,) = messages({"messages": [{"role": "assistant", "content": None, **calls}]})
    assert message == {"role": "assistant", "tool_calls": [call("f", {"a": None}, "x1")]}


@pytest.mark.parametrize("arguments", ["", " ", "{}", None])
def test_blank_arguments_are_an_empty_dict(arguments: Any) -> None:
    calls = [{"id": "x", "function": {"name": "f", "arguments": arguments}}]
    (message,) = messages({"messages": [{"role": "assistant", "tool_calls": calls}]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_legacy_function_calls_are_linked_to_their_results() -> None:
    row = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "count", "arguments": '{"n": 1}'},
            },
            {"role": "function", "name": "count", "content": "8"},
            REPLY,
        ],
        "functions": [SCHEMA],
    }
    assert only(row) == Conversation(
        [
            USER,
            {"role": "assistant", "tool_calls": [call("count", {"n": 1}, "call00001")]},
            {"role": "tool", "name": "count", "content": "8", "tool_call_id": "call00001"},
            REPLY,
        ],
        tools=[TOOL],
    )


def test_calls_and_results_that_have_ids_keep_them() -> None:
    given_ = [
        {"role": "assistant", "tool_calls": [call("f", {}, "call00001"), call("g", {}, "b")]},
        {"role": "tool", "tool_call_id": "b", "content": "of g"},
        {"role": "tool", "tool_call_id": "call00001", "content": "of f"},
    ]
    assert messages({"messages": given_}) == given_
    # A call without an id gets an unused one, and a result without an id that of the open call.
    mixed = [{**given_[0], "tool_calls": [*given_[0]["tool_calls"], {"name": "h"}]}, given_[1], given_[2]]
    read = messages({"messages": [*mixed, {"role": "tool", "content": "of h"}]})
    assert read[0]["tool_calls"][2]["id"] == read[3]["tool_call_id"] == "call00002"


def test_a_result_without_an_id_answers_the_call_of_its_name() -> None:
    calls = {"role": "assistant", "tool_calls": [{"name": "f"}, {"name": "g"}]}
    results = [{"role": "tool", "name": "g", "content": ""}, {"role": "tool", "name": "f", "content": ""}]
    read = messages({"messages": [calls, *results]})
    assert [message["tool_call_id"] for message in read[1:]] == ["call00002", "call00001"]


def test_results_are_not_linked_to_calls_of_an_earlier_turn() -> None:
    def asks(name: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"name": name}, {"name": f"{name}2"}]}

    result = {"role": "tool", "content": ""}
    read = messages({"messages": [asks("f"), result, asks("g"), result, USER, result]})
    assert [message.get("tool_call_id") for message in read] == [
        None,
        "call00001",
        None,
        "call00003",
        None,
        None,
    ]
    # Calls in consecutive messages are joined.
    read = messages({"messages": [asks("f"), asks("g"), result, result, result]})
    assert [made["id"] for made in read[0]["tool_calls"]] == [f"call0000{number}" for number in (1, 2, 3, 4)]
    assert [message["tool_call_id"] for message in read[1:]] == ["call00001", "call00002", "call00003"]


def test_linking_does_not_change_the_given_messages() -> None:
    given_: Any = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]
    before = json.dumps(given_)
    linked(given_)
    assert json.dumps(given_) == before


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [SCHEMA],
        json.dumps([SCHEMA]),
        [json.dumps(TOOL)],
        [{"type": "function", **SCHEMA}],
        [{"function": SCHEMA}],
    ],
)
def test_tools_are_converted_to_openai_schemas(tools: Any) -> None:
    assert only({"messages": CHAT, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_row_without_tools_has_none(tools: Any) -> None:
    assert only({"messages": CHAT, "tools": tools}).tools is None


def test_the_system_prompt_of_a_row_is_used_unless_the_messages_have_one() -> None:
    own = {"role": "system", "content": "own"}
    assert messages({"messages": CHAT, "system": "of the row"})[0]["content"] == "of the row"
    assert messages({"messages": CHAT, "system_prompt": ""}) == CHAT
    assert messages({"messages": [own, *CHAT], "system": "of the row"}) == [own, *CHAT]


def bad_call(**function: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["hi"]}, "message 1 is a str, not an object"),
        ({"messages": [USER, {"content": "x"}]}, r"message 2 has no `role` \(keys: content\)"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has no `role`"),
        ({"messages": [{"role": "user", "content": 7}]}, "content of message 1 is a int"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content of message 1 is a dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "message 1 has a part of type `image_url`, and only text",
        ),
        (
            {"messages": [{"role": "tool", "content": [{"type": "image", "image": "x"}]}]},
            "message 1 has a part of type `image`",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "`text` without text"),
        ({"messages": [{"role": "user", "content": [3]}]}, "without text"),
        (bad_call(name="f", arguments='{"a": '), "arguments of the call of `f` in message 2 is not JSON"),
        (bad_call(name="f", arguments="[1]"), "arguments of the call of `f` in message 2 are a list"),
        (bad_call(name="f", arguments=3), "are a int, not an object"),
        (bad_call(arguments={}), r"a tool call of message 2 has no `name` \(keys: arguments\)"),
        ({"messages": [{"role": "assistant", "tool_calls": ["{"]}]}, "a tool call of message 1 is not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "a tool call of message 1 is a int"),
        (
            {"messages": [{"role": "assistant", "content": "", "reasoning": 3}]},
            "thinking of message 1 is a int",
        ),
        ({"messages": [{**REPLY, "trainable": "yes"}]}, "`trainable` of message 1 is 'yes'"),
        ({"messages": [{**REPLY, "weight": -1}]}, "`weight` of message 1 is -1"),
        ({"messages": [{**REPLY, "weight": float("nan")}]}, "`weight` of message 1 is nan"),
        ({"messages": [{**REPLY, "weight": "1"}]}, "`weight` of message 1 is '1'"),
        ({"messages": CHAT, "tools": "[{"}, "`tools` is not JSON"),
        ({"messages": CHAT, "tools": {"name": "f"}}, "`tools` is a dict, not a list"),
        ({"messages": CHAT, "tools": [{"description": "x"}]}, "tool 1 has no `name`"),
        ({"messages": CHAT, "tools": [3]}, "tool 1 is a int"),
        ({"messages": CHAT, "system": ["x"]}, "the system prompt is a list"),
        ({"messages": [{"role": "tool", "content": {"a": b"x"}}]}, "message 1 cannot be printed as JSON"),
    ],
)
def test_the_error_for_a_bad_row_of_messages_gives_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        conversations_of(row)


def test_json_that_is_nested_too_deeply_is_a_bad_row() -> None:
    with pytest.raises(DataError, match="is JSON that cannot be read"):
        conversations_of(bad_call(name="f", arguments="[" * 200_000))


# -- pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("How many legs?", "eight"),
        ([USER], [REPLY]),
        ([USER], "eight"),
        ("How many legs?", [REPLY]),
        (json.dumps([USER]), REPLY),
        ([USER], [USER, REPLY]),
    ],
)
def test_a_prompt_and_its_completion_may_be_texts_or_messages(prompt: Any, completion: Any) -> None:
    assert messages({"prompt": prompt, "completion": completion}) == CHAT
    assert messages({"prompt": prompt, "chosen": completion, "rejected": "nine"}) == CHAT


def test_a_prompt_may_have_a_system_prompt_and_tools() -> None:
    row = {"system_prompt": "s", "question": "How many legs?", "response": "eight", "tools": [SCHEMA]}
    chat = [{"role": "system", "content": "s"}, *CHAT]
    assert only(row) == Conversation(chat, [TOOL], pair=("How many legs?", "eight"))


def test_a_prompt_that_looks_like_a_list_is_text() -> None:
    assert messages({"prompt": "[1, 2]", "completion": "[3]"})[0] == {"role": "user", "content": "[1, 2]"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": 3, "completion": "a"}, "`prompt` is a int"),
        ({"prompt": "a", "completion": ["b", "c"]}, "`completion` is a list"),
        (
            {"prompt": [{"role": "user", "content": 3}], "completion": "a"},
            "the content of message 1 of `prompt` is a int",
        ),
        ({"instruction": "a", "output": 3}, "`output` is a int"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "turn 1 of `history`"),
        ({"instruction": "a", "output": "b", "history": 3}, "`history` is a int"),
    ],
)
def test_the_error_for_a_bad_pair_gives_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        conversations_of(row)


def test_an_instruction_and_its_input_are_on_separate_lines() -> None:
    row = {"instruction": "Count the legs.", "input": "a spider", "output": "eight"}
    assert messages(row) == [{"role": "user", "content": "Count the legs.\na spider"}, REPLY]
    assert messages({**row, "input": ""})[0]["content"] == "Count the legs."
    assert messages({"instruction": "a", "context": "b", "response": "c"})[0]["content"] == "a\nb"


def test_a_history_comes_before_the_instruction_and_after_the_system_prompt() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert [message["content"] for message in messages(row)] == ["s", "a", "b", "c", "d"]
    assert messages({**row, "history": '[["a", "b"]]'}) == messages(row)


def test_text_is_not_changed() -> None:
    assert only({"text": " <b>\n"}) == Conversation([], text=" <b>\n")


# -- sharegpt ---------------------------------------------------------------------------------


def test_consecutive_sharegpt_calls_are_one_message() -> None:
    turns = [
        ("system", "s"),
        ("human", "a"),
        ("gpt", "let me see"),
        ("function_call", '{"name": "f", "arguments": {"x": null}}'),
        ("tool_call", '[{"name": "g", "arguments": "{}"}]'),
        ("observation", {"n": 1}),
        ("tool", "2"),
        ("chatgpt", "b"),
    ]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns], "system": "not this"}
    assert messages(row) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [call("f", {"x": None}, "call00001"), call("g", {}, "call00002")],
        },
        {"role": "tool", "content": '{"n": 1}', "tool_call_id": "call00001"},
        {"role": "tool", "content": "2", "tool_call_id": "call00002"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"from": "function_call", "value": "f(x)"}, "a tool call of message 2 is not JSON"),
        ({"from": "function_call", "value": ""}, "message 2 is a function call without a call"),
        ({"from": "gpt", "value": 3}, "content of message 2 is a int"),
        ({"value": "b"}, "message 2 is not an object with `from` and `value`"),
        ("b", "message 2 is not an object with `from` and `value`"),
    ],
)
def test_the_error_for_a_bad_sharegpt_row_gives_the_reason(item: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        conversations_of({"conversations": [SHAREGPT[0], item]})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    texts.filter(bool),
    st.dictionaries(texts, json_values, max_size=3),
)
turns_ = st.lists(
    st.tuples(st.just("user"), texts)
    | st.tuples(st.just("assistant"), texts)
    | st.tuples(st.just("calls"), st.lists(st.tuples(calls, texts), min_size=1, max_size=3)),
    min_size=1,
    max_size=6,
).filter(lambda turns: not any(one[0] == two[0] == "assistant" for one, two in itertools.pairwise(turns)))


@pytest.mark.slow
@given(turns_, st.booleans())
@settings(deadline=None)
def test_messages_written_as_sharegpt_are_read_back(turns: list[tuple[str, Any]], in_one: bool) -> None:
    expected: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    num_calls = 0
    for kind, said in turns:
        if kind != "calls":
            expected.append({"role": kind, "content": said})
            items.append({"from": {"user": "human", "assistant": "gpt"}[kind], "value": said})
            continue
        ids = [f"call{num_calls + number:05d}" for number in range(1, len(said) + 1)]
        num_calls += len(said)
        made = [
            call(function["name"], function["arguments"], i)
            for (function, _), i in zip(said, ids, strict=True)
        ]
        # A call after a text of the assistant is joined with it.
        before = expected.pop() if expected and expected[-1]["role"] == "assistant" else {"role": "assistant"}
        expected.append({**before, "tool_calls": made})
        expected += [
            {"role": "tool", "content": result, "tool_call_id": i}
            for (_, result), i in zip(said, ids, strict=True)
        ]
        functions = [function for function, _ in said]
        values = [functions] if in_one else functions
        items += [{"from": "function_call", "value": json.dumps(value)} for value in values]
        items += [{"from": "observation", "value": result} for _, result in said]
    assert messages({"conversations": items}) == expected


KEYS = [
    "messages", "conversations", "role", "content", "from", "value", "tool_calls", "function", "name",
    "arguments", "tools", "steps", "rollouts", "trajectory", "observation", "action", "thought",
    "tool_results", "reward", "prompt", "completion", "instruction", "output", "input", "history", "text",
    "system", "type", "weight", "next_obs",
]  # fmt: skip
LEAVES = [
    "user",
    "assistant",
    "tool",
    "system",
    "gpt",
    "human",
    "function_call",
    "observation",
    "[",
    "{}",
    "[{}]",
    "text",
]
rows = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(LEAVES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
        | st.lists(st.fixed_dictionaries({"role": st.sampled_from(LEAVES), "content": inner}), max_size=3)
        | st.lists(st.fixed_dictionaries({}, optional={"observation": inner, "action": inner}), max_size=3)
    ),
    max_leaves=25,
)


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(KEYS), rows, max_size=6),
    st.none() | st.sampled_from(sorted(FORMATS)),
    st.none() | st.floats(-1, 1),
)
@settings(max_examples=300, deadline=None)
def test_any_row_is_read_or_refused_and_not_changed(
    row: dict[str, Any], format: str | None, min_reward: float | None
) -> None:
    before = repr(row)
    try:
        found = conversations_of(row, format, ReadingOptions(min_reward=min_reward))
    except DataError:
        found = []
    for conversation in found:
        json.dumps([conversation.messages, conversation.tools])
        for message in conversation.messages:
            assert None not in message.values()
            for made in message.get("tool_calls") or []:
                assert isinstance(made["function"]["arguments"], dict)
                assert made["id"] is not None
    assert repr(row) == before


# -- rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reward", "total_reward", "score", "return"])
def test_a_row_with_too_low_a_reward_is_skipped(key: str) -> None:
    assert conversations_of({"messages": CHAT, key: 0.5}, options=ReadingOptions(min_reward=0.6)) == []
    assert len(conversations_of({"messages": CHAT, key: 0.5}, options=ReadingOptions(min_reward=0.5))) == 1
    assert len(conversations_of({"messages": CHAT, key: "0.5"}, options=ReadingOptions(min_reward=0.5))) == 1
    assert len(conversations_of({"messages": CHAT, key: 0.5})) == 1


ROWS_WITHOUT_REWARD = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "output": "b"},
    {"text": "a"},
    {"steps": [{"obs": "a", "act": "b"}]},
]


@pytest.mark.parametrize("row", ROWS_WITHOUT_REWARD)
@pytest.mark.parametrize(
    "options", [{"min_reward": 0.0}, {"max_reward": 0.0}, {"min_reward": 0.0, "reward_key": "a.b"}]
)
def test_a_row_without_a_reward_is_refused_where_rewards_select(row: Any, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no reward to compare with m.._reward=0.0.*reward_key="):
        conversations_of({**row, "success": True}, options=ReadingOptions(**options))


@pytest.mark.parametrize("row", ROWS_WITHOUT_REWARD)
@pytest.mark.parametrize(("success", "num_kept"), [(True, 1), (False, 0), (1, 1), (0.0, 0), ("0.7", 1)])
def test_a_reward_is_found_at_a_dotted_key(row: Any, success: Any, num_kept: int) -> None:
    options = ReadingOptions(min_reward=0.5, reward_key="metadata.all.success")
    assert (
        len(conversations_of({**row, "metadata": {"all": {"success": success}}}, options=options)) == num_kept
    )


@pytest.mark.parametrize("reward", ["high", [1], float("nan")])
def test_a_reward_that_is_not_a_number_is_a_bad_row_with_min_reward(reward: Any) -> None:
    with pytest.raises(DataError, match="`score` is .*not a number"):
        conversations_of({"messages": CHAT, "score": reward}, options=ReadingOptions(min_reward=0.0))
    assert len(conversations_of({"messages": CHAT, "score": reward})) == 1


# -- rows of well-known data sets --------------------------------------------------------------


@pytest.fixture(params=["own", pytest.param("published", marks=pytest.mark.published)])
def rows_of(request: pytest.FixtureRequest) -> Callable[[str], list[Any]]:
    """(name of a published file): the rows of that format in this repository, or the published ones."""
    return chat_data.ROWS.__getitem__ if request.param == "own" else chat_data.published_rows


def test_every_call_of_the_glaive_data_is_read(rows_of: Callable[[str], list[Any]]) -> None:
    data = rows_of("glaive_toolcall_en_demo.json")
    num_messages = num_calls = 0
    for row in data:
        conversation = only(row)
        raw = row["conversations"]
        by_role = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
        # No two calls are consecutive here, so each item is one message.
        assert [message["role"] for message in conversation.messages] == [
            by_role[item["from"]] for item in raw
        ]
        assert [tool["function"] for tool in conversation.tools or []] == json.loads(row["tools"])
        last_id = None
        for item, message in zip(raw, conversation.messages, strict=True):
            num_messages += 1
            if item["from"] == "function_call":
                (made,) = message["tool_calls"] or []
                assert made["function"] == json.loads(item["value"])
                assert isinstance(made["function"]["arguments"], dict)
                last_id = made["id"]
                num_calls += 1
            else:
                assert message["content"] == item["value"]
            if item["from"] == "observation":
                assert message["tool_call_id"] == last_id
    assert num_messages == sum(len(row["conversations"]) for row in data)
    assert num_calls == sum(item["from"] == "function_call" for row in data for item in row["conversations"])
    assert num_calls > 0


def test_the_alpaca_data_is_read_to_the_last_character(rows_of: Callable[[str], list[Any]]) -> None:
    for row in rows_of("alpaca_en_demo.json"):
        assert recognise(row) == "alpaca"
        user, reply = messages(row)
        assert reply == {"role": "assistant", "content": row["output"]}
        joined = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert user == {"role": "user", "content": joined}


def test_the_conversations_are_read_as_they_are(rows_of: Callable[[str], list[Any]]) -> None:
    for row in rows_of("conversations.jsonl"):
        assert messages(row) == row["messages"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "value": "eight"},
        {"type": "text", "text": None, "value": "eight"},
        {"type": "text", "text": {"value": "eight", "annotations": []}},
        {"type": "output_text", "text": "eight"},
    ],
)
def test_the_text_of_a_part_may_be_under_value(part: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [part]}]}
    assert conversations_of(row)[0].messages[1] == {"role": "assistant", "content": "eight"}


def test_a_part_without_text_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "value": 3}]}]}
    with pytest.raises(DataError, match="message 1 has a part of type `text` without text"):
        conversations_of(row)


def test_a_result_of_a_call_that_no_message_makes_is_refused() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "b"},
        {"role": "assistant", "content": "done"},
    ]
    with pytest.raises(DataError, match="message 3 answers the call `b`, which no message makes"):
        conversations_of({"messages": messages})


@pytest.mark.parametrize(
    ("told", "content"),
    [
        ({"content": "", "error": {"type": "timeout", "message": "too slow"}}, "too slow"),
        ({"content": None, "error": "too slow"}, "too slow"),
        ({"content": "so far", "error": {"message": "too slow"}}, "so far\ntoo slow"),
        ({"content": "it was too slow", "error": "too slow"}, "it was too slow"),
        ({"content": "fine", "is_error": False, "error": None}, "fine"),
        ({"content": "bad", "is_error": True, "error": True}, "bad"),
        ({"content": "", "error": {"code": 7}}, '{"code": 7}'),
    ],
)
def test_the_error_of_a_tool_is_its_result(told: dict[str, Any], content: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (conversation,) = conversations_of({"messages": [*asked, {"role": "tool", "tool_call_id": "a", **told}]})
    assert conversation.messages[2] == {"role": "tool", "tool_call_id": "a", "content": content}


@pytest.mark.parametrize(
    "content",
    [
        {
            "screen": {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": "iVBOR"},
            }
        },
        [{"type": "image_blob", "data": "iVBOR"}],
        {"shot": "data:image/png;base64,iVBOR"},
    ],
)
def test_an_image_within_the_result_of_a_tool_is_refused(content: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "tool", "content": content}]
    with pytest.raises(DataError, match="only text can be trained on"):
        conversations_of({"messages": messages})


@pytest.mark.parametrize(("mask", "is_trained"), [({"loss_mask": 0}, False), ({"train_mask": 1}, True)])
def test_a_number_for_the_mask_of_a_message_is_a_flag(mask: dict[str, Any], is_trained: bool) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mask}]
    (conversation,) = conversations_of({"messages": messages})
    assert conversation.messages[1].get("trainable") is is_trained
    with pytest.raises(DataError, match="only whole messages"):
        conversations_of({"messages": [messages[0], {**messages[1], "loss_mask": [0, 1]}]})


@pytest.mark.parametrize(
    ("mask", "trained"),
    [([1, 0], ["a"]), ([0, 1, 0, 1], ["a", "b"]), ("[1, 1]", ["a", "b"]), ([False, True], ["b"])],
)
def test_a_mask_of_the_row_is_of_its_messages_or_of_its_turns(mask: Any, trained: list[str]) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "b"},
        ],
        "info": {"mask": mask},
    }
    (conversation,) = conversations_of(row, options=ReadingOptions(mask_key="info.mask"))
    found = [message["content"] for message in conversation.messages if message["role"] == "assistant"
             and message.get("trainable") is not False]  # fmt: skip
    assert found == trained


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([1, 0, 1], "`mask` has 3 numbers, and the conversation has 2 messages"),
        ([1, 2], "`mask` holds 2, not 1"),
        ("yes", "`mask` is 'yes', not a list"),
        (None, "no mask under mask_key=mask"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, said: str) -> None:
    row = {
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
        "mask": mask,
    }
    with pytest.raises(DataError, match=said):
        conversations_of(row, options=ReadingOptions(mask_key="mask"))


def test_a_mask_of_each_message_is_read_and_removed() -> None:
    messages = [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "a", "keep": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "keep": 1},
    ]
    (conversation,) = conversations_of({"messages": messages}, options=ReadingOptions(mask_key="keep"))
    assert conversation.messages[1] == {"role": "assistant", "content": "a", "trainable": False}
    assert conversation.messages[3] == {"role": "assistant", "content": "b"}


def test_rewards_of_a_group_select_its_rollouts() -> None:
    rollouts = [{"steps": [{"observation": "q", "action": text}]} for text in "abc"]
    row = {"rollouts": rollouts, "rewards": [0.1, 0.9, 0.5]}

    def kept(**options: Any) -> list[Any]:
        found = conversations_of(row, options=ReadingOptions(**options))
        return [conversation.messages[-1]["content"] for conversation in found]

    assert kept(min_reward=0.5) == ["b", "c"]
    assert kept(max_reward=0.5) == ["a", "c"]
    assert kept(min_reward=0.2, max_reward=0.6) == ["c"]
    assert kept(min_reward=0.5, reward_key="rewards") == ["b", "c"]
    with pytest.raises(DataError, match="`rewards` has 2 rewards for 3 rollouts"):
        conversations_of({**row, "rewards": [1, 0]}, options=ReadingOptions(min_reward=0.5))


def test_what_was_thought_may_be_left_out() -> None:
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "thinking": "hm"}]
    (conversation,) = conversations_of({"messages": messages}, options=ReadingOptions(drop_thinking=True))
    assert conversation.messages[1] == {"role": "assistant", "content": "a"}
