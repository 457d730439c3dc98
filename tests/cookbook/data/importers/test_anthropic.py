"""Logged calls of Anthropic's Messages API, and conversations in its shape."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from imported import damaged, read, trained_texts

from cookbook.data.formats import recognise
from cookbook.data.importers import IMPORTERS
from cookbook.errors import DataError

SCHEMA = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
SYSTEM = [
    {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "Use tools."},
]
CALLING = {
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "I must look.", "signature": "c2ln"},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "t1", "name": "shell", "input": {"cmd": "ls"}},
        {"type": "tool_use", "id": "t2", "name": "shell", "input": {"cmd": "pwd"}},
    ],
}
RESULTS = {
    "role": "user",
    "content": [
        {"type": "tool_result", "tool_use_id": "t2", "content": "no such command", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a.txt"}]},
        {"type": "text", "text": "Hurry."},
    ],
}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "List the files."}]}, CALLING, RESULTS]
TOOLS = [
    {"name": "shell", "description": "Runs a command.", "input_schema": SCHEMA, "cache_control": None},
    {"type": "bash_20250124", "name": "bash"},
]
REQUEST = {"model": "m", "max_tokens": 100, "system": SYSTEM, "messages": MESSAGES, "tools": TOOLS}
RESPONSE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "content": [
        {"type": "text", "text": "There is one: "},
        {"type": "text", "text": "a.txt.", "citations": []},
    ],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3},
}
CALLS = [
    {"id": "t1", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "ls"}}},
    {"id": "t2", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "pwd"}}},
]
EXPECTED = [
    {"role": "system", "content": "Be brief.\n\nUse tools."},
    {"role": "user", "content": "List the files."},
    {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "I must look.",
        "tool_calls": CALLS,
        "trainable": False,
    },
    {"role": "tool", "content": "a.txt", "tool_call_id": "t1", "name": "shell"},
    {"role": "tool", "content": "no such command", "tool_call_id": "t2", "name": "shell"},
    {"role": "user", "content": "Hurry."},
    {"role": "assistant", "content": "There is one: a.txt."},
]
EXPECTED_TOOLS = [
    {
        "type": "function",
        "function": {"name": "shell", "description": "Runs a command.", "parameters": SCHEMA},
    }
]

EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {"type": "message", "role": "assistant", "content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "So: "}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "x"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "t9", "name": "shell", "input": {}},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '{"cm'},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": 'd": "cat a.txt"}'},
    },
    {"type": "ping"},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
]

ROWS: dict[str, dict[str, Any]] = {
    "request and response": {"request": REQUEST, "response": RESPONSE},
    "JSON in strings": {"request_body": json.dumps(REQUEST), "response_body": json.dumps(RESPONSE)},
    "JSON in every string": {
        **REQUEST,
        "system": json.dumps(SYSTEM),
        "messages": json.dumps(
            [{**message, "content": json.dumps(message["content"])} for message in MESSAGES]
        ),
        "tools": json.dumps(TOOLS),
        "response": json.dumps(RESPONSE),
    },
    "the request itself with its response": {**REQUEST, "response": RESPONSE},
    "a log of Bedrock's invocations": {
        "schemaType": "ModelInvocationLog",
        "input": {"inputContentType": "application/json", "inputBodyJson": REQUEST},
        "output": {"outputContentType": "application/json", "outputBodyJson": RESPONSE},
    },
    "a batch, joined": {
        "custom_id": "r1",
        "params": REQUEST,
        "result": {"type": "succeeded", "message": RESPONSE},
    },
    "below other keys": {
        "log": [{"request": {"body": REQUEST}, "response": {"status": 200, "body": RESPONSE}}]
    },
}
"""The same call, as different logs have it."""


@pytest.mark.parametrize("name", ROWS)
def test_every_log_of_a_call_is_the_same_conversation(name: str) -> None:
    found = read(ROWS[name], "anthropic")
    assert found.messages == EXPECTED
    assert found.conversations[0].tools == EXPECTED_TOOLS
    assert found.trained == ["There is one: a.txt."]
    assert found.dropped == {"built-in tools without a schema": 1}
    assert found.counted["earlier answers of the log"] == 1
    assert found.counted["stood in another order than the calls; reordered"] == 1


def test_a_row_of_messages_trains_every_turn_of_the_assistant() -> None:
    answer = {"role": "assistant", "content": RESPONSE["content"]}
    found = read({**REQUEST, "messages": [*MESSAGES, answer]}, "anthropic")
    assert found.messages == [
        {key: value for key, value in message.items() if key != "trainable"} for message in EXPECTED
    ]
    assert found.conversations[0].tools == EXPECTED_TOOLS
    assert found.trained == ["Let me look.", "There is one: a.txt."]


def test_an_outcome_beside_messages_is_not_their_answer() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Done."}]
    assert read({"messages": messages, "result": "passed"}, "anthropic").trained == ["Let me look.", "Done."]


def test_outcomes_of_rows_of_messages_select() -> None:
    row = {"messages": [*MESSAGES, {"role": "assistant", "content": "Done."}], "input": "the task"}
    assert read({**row, "resolved": True}, "anthropic", min_reward=1).trained == ["Let me look.", "Done."]
    assert read({**row, "success": False}, "anthropic", min_reward=1).trained == []
    assert read({**row, "score": 1}, "anthropic", max_reward=0).trained == []


def test_a_row_of_messages_that_ends_unanswered_loses_its_end() -> None:
    found = read({"messages": MESSAGES}, "anthropic")
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    assert found.counted["ended without an answer to its last message, which was dropped"] == 1


def test_turns_of_a_row_of_messages_are_masked_one_by_one() -> None:
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one", "train": False},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": [{"type": "text", "text": "two and"}], "stop_reason": "max_tokens"},
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "three"},
    ]
    found = read({"messages": messages}, "anthropic")
    assert found.trained == ["three"]
    assert found.counted["masked by their step"] == found.counted["truncated answers"] == 1


def test_parts_of_one_answer_in_successive_messages_are_one_turn() -> None:
    thought, text, *calls = CALLING["content"]
    parts = [{"role": "assistant", "content": [part]} for part in (thought, text, *calls)]
    found = read({**REQUEST, "messages": [MESSAGES[0], *parts, RESULTS], "response": RESPONSE}, "anthropic")
    assert found.messages == EXPECTED


def test_an_answer_has_the_same_bytes_in_its_own_row_and_in_the_history_of_the_next() -> None:
    first = {**RESPONSE, "content": CALLING["content"], "stop_reason": "tool_use"}
    rows = [
        read({"request": {**REQUEST, "messages": MESSAGES[:1]}, "response": first}, "anthropic").messages,
        read({"request": REQUEST, "response": RESPONSE}, "anthropic").messages,
    ]
    plain = [
        [json.dumps({key: item for key, item in message.items() if key != "trainable"}) for message in row]
        for row in rows
    ]
    assert [[json.dumps(m) for m in row][-1] for row in rows] == [plain[0][-1], plain[1][-1]]
    for shorter, longer in itertools.pairwise(plain):
        assert longer[: len(shorter)] == shorter


def test_a_thought_after_the_text_is_put_first_and_counted() -> None:
    content = [RESPONSE["content"][0], CALLING["content"][0], RESPONSE["content"][1]]
    found = read({"request": REQUEST, "response": {**RESPONSE, "content": content}}, "anthropic")
    assert found.messages[-1] == {**EXPECTED[-1], "reasoning_content": "I must look."}
    assert found.counted["had a thought after its text or a call, which was put first"] == 1


def test_an_empty_result_is_an_empty_text() -> None:
    results = [{"type": "tool_result", "tool_use_id": call_id, "content": []} for call_id in ("t1", "t2")]
    messages = [*MESSAGES[:2], {"role": "user", "content": results}]
    found = read({"request": {**REQUEST, "messages": messages}, "response": RESPONSE}, "anthropic")
    assert [message["content"] for message in found.messages if message["role"] == "tool"] == ["", ""]


@pytest.mark.parametrize("kind", ["events", "text", "HTTP"])
def test_a_streamed_response_is_assembled(kind: str) -> None:
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in EVENTS)
    response = {"events": EVENTS, "text": text, "HTTP": {"status_code": 200, "body_raw": text}}[kind]
    answer = read({"request": REQUEST, "response": response}, "anthropic").messages[-1]
    assert answer["reasoning_content"] == "So: "
    assert answer["content"] == ""
    assert answer["tool_calls"] == [
        {"id": "t9", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "cat a.txt"}}}
    ]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"response": {**RESPONSE, "stop_reason": "max_tokens"}}, "truncated answers"),
        ({"response": {**RESPONSE, "stop_reason": "model_context_window_exceeded"}}, "truncated answers"),
        ({"response": {**RESPONSE, "stop_reason": "refusal"}}, "answers stopped by a content filter"),
        ({"response": {**RESPONSE, "stop_reason": "pause_turn"}}, "unfinished answers"),
        ({"response": EVENTS[:4]}, "truncated answers"),
        ({"response": [*EVENTS[:4], {"type": "error", "error": {"type": "overloaded"}}]}, "failed calls"),
        ({"response": {"type": "error", "error": {"type": "overloaded_error"}}}, "failed calls"),
        ({"response": {"type": "expired"}}, "failed calls"),
        ({"response": {**RESPONSE, "content": []}}, "answers without a text or a call"),
        ({"response": None}, "calls without an answer"),
        (
            {"request": {**REQUEST, "messages": [*MESSAGES, {"role": "assistant", "content": "{"}]}},
            "answers that continue a message of the assistant",
        ),
    ],
)
def test_calls_without_a_whole_answer_are_dropped_and_counted(changes: dict[str, Any], what: str) -> None:
    found = read({"request": REQUEST, "response": RESPONSE, **changes}, "anthropic")
    assert found.conversations == []
    assert found.dropped == {what: 1}


@pytest.mark.parametrize("stop_reason", ["end_turn", "tool_use", "stop_sequence", None])
def test_finished_answers_are_trained(stop_reason: str | None) -> None:
    found = read({"request": REQUEST, "response": {**RESPONSE, "stop_reason": stop_reason}}, "anthropic")
    assert found.trained == ["There is one: a.txt."]


def test_redacted_thinking_is_counted() -> None:
    content = [{"type": "redacted_thinking", "data": "EmwK"}, *RESPONSE["content"]]
    found = read({"request": REQUEST, "response": {**RESPONSE, "content": content}}, "anthropic")
    assert found.messages == EXPECTED
    assert found.dropped["encrypted thoughts"] == 1


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {
        "request": {**REQUEST, "messages": [{"role": "user", "content": list(blocks)}]},
        "response": RESPONSE,
    }


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBOR"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RESPONSE, "it is a response without its request"),
        ({"response": RESPONSE}, "it is a response without its request"),
        ({"custom_id": "r", "params": REQUEST}, "it is a request without its response"),
        ({"request": REQUEST}, "it is a request without its response"),
        ({"request": REQUEST, "response": {"choices": []}}, "Read it with format=openai_log"),
        ({"request": REQUEST, "response": {**RESPONSE, "stop_reason": "eclipse"}}, "the reason `eclipse`"),
        (user(IMAGE), "message 1 has a part of type `image`"),
        (user({"type": "document", "source": {"type": "text", "data": "x"}}), "message 1 .*`document`"),
        (user(RESULTS["content"][0]), "message 1 answers the call `t2`, which was not made before"),
        (
            {
                **REQUEST,
                "messages": [
                    MESSAGES[0],
                    CALLING,
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [IMAGE]}],
                    },
                ],
                "response": RESPONSE,
            },
            "message 3 has a part of type `image`",
        ),
        (
            {
                "request": REQUEST,
                "response": {
                    **RESPONSE,
                    "content": [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}],
                },
            },
            "the response has a block of type `server_tool_use`",
        ),
        ({"messages": 7, "input": "x"}, "`messages` is a int, not a list of messages"),
    ],
)
def test_a_row_that_cannot_be_understood_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(row, "anthropic")


@pytest.mark.parametrize(
    "row", [*ROWS.values(), {"messages": MESSAGES}, {"request": REQUEST, "response": EVENTS}]
)
def test_a_row_of_this_api_is_refused_where_no_format_is_named(row: dict[str, Any]) -> None:
    if "log" not in row:
        with pytest.raises(DataError, match="Read it with format=anthropic"):
            recognise(row)
    assert not IMPORTERS["openai_log"]().marks(row)


def test_messages_that_every_format_reads_are_not_of_this_api() -> None:
    texts = [{"type": "text", "text": "Hi."}]
    row = {
        "system": "S",
        "messages": [{"role": "user", "content": texts}, {"role": "assistant", "content": texts}],
    }
    assert recognise(row) == "messages"


def test_rewards_select() -> None:
    row = {"request": REQUEST, "response": RESPONSE, "metadata": {"score": 0.2}}
    assert read(row, "anthropic", min_reward=0.1).trained == ["There is one: a.txt."]
    assert read(row, "anthropic", min_reward=0.5).trained == []


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", [*ROWS, "messages", "stream"])
def test_a_document_damaged_anywhere_is_read_or_refused(name: str) -> None:
    others = {"messages": {**REQUEST}, "stream": {"request": REQUEST, "response": EVENTS}}
    num_refused = 0
    for document in damaged(ROWS.get(name) or others[name]):
        IMPORTERS["anthropic"]().marks(document)
        try:
            read(document, "anthropic")
        except DataError:
            num_refused += 1
    assert num_refused > 0


def test_only_the_response_of_a_file_is_trained(tmp_path: Path, tiny_qwen3: str) -> None:
    path = tmp_path / "rollouts" / "deep" / "call.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(ROWS["request and response"], indent=1), encoding="utf-8")
    (text,) = trained_texts(tmp_path / "rollouts", tiny_qwen3, format="anthropic")
    assert text.replace("<think>\n\n</think>\n\n", "") == "There is one: a.txt.<|im_end|>"
