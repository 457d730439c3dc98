"""Logged calls of Chat Completions and the Responses API."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from imported import damaged, published_rows, read, trained_texts

from cookbook.data.formats import recognise
from cookbook.data.importers import IMPORTERS
from cookbook.data.importers.openai_log import earlier_items
from cookbook.errors import DataError

SCHEMA = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
FUNCTION = {"name": "shell", "description": "Runs a command.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]


def call(call_id: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": "shell", "arguments": json.dumps(arguments)}
    return {"id": call_id, "type": "function", "function": function}


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "List the files."},
    {"role": "assistant", "content": None, "tool_calls": [call("c1", cmd="ls")]},
    {"role": "tool", "tool_call_id": "c1", "content": "a.txt"},
]
ANSWER = {"role": "assistant", "content": "There is one: a.txt."}
REQUEST = {"model": "m", "temperature": 0.2, "messages": HISTORY, "tools": TOOLS}
RESPONSE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": ANSWER}],
    "usage": {"total_tokens": 30},
}
EXPECTED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "List the files."},
    {
        "role": "assistant",
        "content": "",
        "trainable": False,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "shell", "arguments": {"cmd": "ls"}}}
        ],
    },
    {"role": "tool", "content": "a.txt", "tool_call_id": "c1", "name": "shell"},
    {"role": "assistant", "content": "There is one: a.txt."},
]

ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
    {"type": "function_call", "id": "fc1", "call_id": "c1", "name": "shell", "arguments": '{"cmd": "ls"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
]
OUTPUT = [
    {
        "type": "message",
        "id": "msg1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "There is one: a.txt.", "annotations": []}],
    }
]
FLAT_TOOLS = [{"type": "function", "strict": True, **FUNCTION}]

CHUNKS = [
    {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"role": "assistant"}}]},
    {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "There is one: "}}]},
    {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "a.txt."}, "finish_reason": "stop"}],
    },
    {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 30}},
]

ROWS: dict[str, dict[str, Any]] = {
    "request and response": {"request": REQUEST, "response": RESPONSE},
    "JSON in strings": {"request_body": json.dumps(REQUEST), "response_body": json.dumps(RESPONSE)},
    "below bodies": {
        "request": {"url": "/v1/chat/completions", "body": REQUEST},
        "response": {"status": 200, "body": RESPONSE},
    },
    "files of a batch, joined": {
        "custom_id": "r1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": REQUEST,
        "response": {"status_code": 200, "request_id": "x", "body": RESPONSE},
        "error": None,
    },
    "a proxy's record of HTTP": {
        "request": {"method": "POST", "headers": {}, "body": REQUEST},
        "response": {
            "status_code": 200,
            "body_raw": "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n",
        },
    },
    "LiteLLM's payload": {
        "id": "l",
        "call_type": "acompletion",
        "status": "success",
        "error_str": None,
        "messages": HISTORY,
        "response": RESPONSE,
        "model_parameters": {"tools": TOOLS, "temperature": 0.2},
    },
    "LiteLLM's payload below a key": {
        "standard_logging_object": {
            "call_type": "completion",
            "messages": json.dumps(HISTORY),
            "response": RESPONSE,
            "model_parameters": {"tools": TOOLS},
        }
    },
    "LiteLLM's table of spending": {
        "request_id": "l",
        "messages": "{}",
        "response": json.dumps(RESPONSE),
        "proxy_server_request": json.dumps(REQUEST),
    },
    "arguments of LiteLLM's callback": {
        "kwargs": {"messages": HISTORY, "optional_params": {"tools": TOOLS}},
        "response_obj": RESPONSE,
    },
    "completions that OpenHands logs": {
        "messages": HISTORY,
        "response": RESPONSE,
        "args": [],
        "kwargs": {"tools": TOOLS, "temperature": 0},
        "timestamp": 1.0,
        "cost": 0.1,
    },
    "a stored completion": {**RESPONSE, "messages": HISTORY, "tools": TOOLS},
    "Langfuse's generation": {
        "type": "GENERATION",
        "input": {"messages": HISTORY, "tools": TOOLS},
        "output": ANSWER,
        "modelParameters": {"temperature": 0.2},
    },
    "a generation with a text": {
        "input": json.dumps({"messages": HISTORY, "tools": TOOLS}),
        "output": ANSWER["content"],
    },
    "a trace with observations": {
        "id": "t",
        "input": "List the files.",
        "output": "done",
        "observations": [
            {"type": "GENERATION", "input": HISTORY, "output": ANSWER, "metadata": {"tools": TOOLS}}
        ],
    },
    "a choice": {
        "input": {"messages": HISTORY, "tools": TOOLS},
        "output": [{"finish_reason": "stop", "message": ANSWER}],
    },
    "a local server's response": {
        "request": REQUEST,
        "response": {"model": "m", "message": ANSWER, "done": True, "done_reason": "stop"},
    },
    "chunks": {"request": REQUEST, "response": CHUNKS},
    "server-sent events": {
        "request": REQUEST,
        "response": "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n",
    },
    "the Responses API": {
        "request": {"instructions": "Be brief.", "input": ITEMS, "tools": FLAT_TOOLS},
        "response": {"object": "response", "status": "completed", "error": None, "output": OUTPUT},
    },
    "the Responses API in one object": {
        "object": "response",
        "status": "completed",
        "instructions": "Be brief.",
        "input": ITEMS,
        "tools": FLAT_TOOLS,
        "output": OUTPUT,
    },
    "a response that repeats its instructions": {
        "request": {"prompt": {"id": "pmpt_1"}, "input": ITEMS, "tools": FLAT_TOOLS},
        "response": {
            "object": "response",
            "status": "completed",
            "instructions": [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}],
            "output": OUTPUT,
        },
    },
    "the Responses API, streamed": {
        "request": {"input": [{"role": "system", "content": "Be brief."}, *ITEMS], "tools": FLAT_TOOLS},
        "response": [
            {"type": "response.created", "response": {"status": "in_progress", "output": []}},
            {"type": "response.output_text.delta", "delta": "There"},
            {"type": "response.completed", "response": {"status": "completed", "output": OUTPUT}},
        ],
    },
    "the Responses API in LiteLLM": {
        "call_type": "aresponses",
        "status": "success",
        "messages": ITEMS,
        "response": {"object": "response", "output": OUTPUT},
        "model_parameters": {"instructions": "Be brief.", "tools": FLAT_TOOLS},
    },
}
"""The same call, as different logs have it."""


@pytest.mark.parametrize("name", ROWS)
def test_every_log_of_a_call_is_the_same_conversation(name: str) -> None:
    found = read(ROWS[name], "openai_log")
    assert found.messages == EXPECTED
    assert found.conversations[0].tools == TOOLS
    assert found.conversations[0].is_rollout
    assert found.trained == ["There is one: a.txt."]
    assert found.dropped == {}
    assert found.counted["earlier answers of the log"] == 1


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ROWS
        if not name.startswith(
            (
                "a trace",
                "a generation",
                "server-sent",
                "a proxy's",
                "Langfuse",
                "LiteLLM's payload below",
                "a choice",
            )
        )
    ],
)
def test_a_logged_call_is_refused_where_no_format_is_named(name: str) -> None:
    with pytest.raises(DataError, match="Read it with format=openai_log"):
        recognise(ROWS[name])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
        {"prompt": "Hi.", "response": "Hello."},
        {"input": "Hi.", "output": "Hello."},
        {"prompt": "Which?", "choices": ["a", "b"], "answer": "a"},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"prompt": "Hi.", "response": "data: {none"},
    ],
)
def test_a_row_of_another_format_is_not_taken_for_a_log(row: dict[str, Any]) -> None:
    assert not IMPORTERS["openai_log"]().marks(row)
    assert recognise(row) in ("messages", "prompt_completion", "alpaca")


@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        '{"a": 1}',
        '{"output": "x"}',
        '{"status": "error"}',
        "[1, 2]",
        "data: none",
        '{"content": "x"}',
    ],
)
def test_a_response_that_is_a_string_is_the_text_of_the_answer(text: str) -> None:
    row = {"messages": HISTORY[:2], "response": text}
    assert read(row, "openai_log").trained == [text]
    assert read(
        {"inputs": {"messages": HISTORY[:2]}, "outputs": {"output": "Hi."}}, "openai_log"
    ).trained == ["Hi."]


# -- nested rows ------------------------------------------------------------------------------


def test_an_answer_has_the_same_bytes_in_its_own_row_and_in_the_history_of_later_rows() -> None:
    answers: list[dict[str, Any]] = [
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [call("c1", cmd="ls"), call("c2", cmd="pwd")],
        },
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Look.",
            "tool_calls": [call("c3", cmd="cat  a")],
        },
        {"role": "assistant", "content": "Done. ", "annotations": []},
    ]
    results = [
        [
            {"role": "tool", "tool_call_id": "c2", "content": "/"},
            {"role": "tool", "tool_call_id": "c1", "content": "a"},
        ],
        [{"role": "tool", "tool_call_id": "c3", "content": [{"type": "text", "text": "b"}]}],
        [],
    ]
    history: list[dict[str, Any]] = [{"role": "user", "content": "Go."}]
    rows = []
    for answer, result in zip(answers, results, strict=True):
        choice = {"message": answer, "finish_reason": "tool_calls" if result else "stop"}
        row = {"request": {"messages": copy.deepcopy(history)}, "response": {"choices": [choice]}}
        rows.append(read(row, "openai_log").messages)
        history += [answer, *result]

    def plain(messages: list[Any]) -> list[str]:
        return [
            json.dumps({key: value for key, value in message.items() if key != "trainable"})
            for message in messages
        ]

    for shorter, longer in itertools.pairwise(rows):
        assert plain(longer)[: len(shorter)] == plain(shorter)
    assert [row[-1].get("trainable", True) for row in rows] == [True, True, True]
    assert [message["content"] for message in rows[1] if message["role"] == "tool"] == ["a", "/"]


def test_output_items_have_the_same_bytes_in_the_input_of_the_next_request() -> None:
    output = [
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [{"type": "summary_text", "text": "Two "}, {"type": "summary_text", "text": "parts."}],
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me look."}],
        },
        {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": '{"cmd":"ls"}'},
        {"type": "function_call", "call_id": "c2", "name": "shell", "arguments": '{"cmd":"pwd"}'},
    ]
    results = [
        {"type": "function_call_output", "call_id": "c1", "output": "a"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "/"}]},
    ]
    one = read({"input": "Go.", "output": output}, "openai_log")
    items = [{"role": "user", "content": "Go."}, *output, *results]
    two = read({"input": items, "output": OUTPUT}, "openai_log")
    assert {key: value for key, value in two.messages[1].items() if key != "trainable"} == one.messages[1]
    assert one.messages[1]["reasoning_content"] == "Two \n\nparts."
    assert len(one.messages[1]["tool_calls"]) == 2
    assert two.trained == ["There is one: a.txt."]


# -- answers ----------------------------------------------------------------------------------


def test_each_of_several_choices_is_a_conversation_and_only_finished_ones_are_trained() -> None:
    choices = [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "one"}},
        {"index": 1, "finish_reason": "length", "message": {"role": "assistant", "content": "two and"}},
        {"index": 2, "finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}},
        {"index": 3, "finish_reason": None, "message": {"role": "assistant", "content": "four"}},
        {"index": 4, "finish_reason": "stop", "message": {"role": "assistant", "content": None}},
        {
            "index": 5,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": None, "refusal": "No."},
        },
    ]
    found = read({"request": REQUEST, "response": {"choices": choices}}, "openai_log")
    assert found.trained == ["one", "four", "No."]
    assert all(conversation.messages[:4] == EXPECTED[:4] for conversation in found.conversations)
    assert found.dropped == {
        "truncated answers": 1,
        "answers stopped by a content filter": 1,
        "answers without a text or a call": 1,
    }


def test_an_unknown_reason_for_the_end_of_an_answer_is_refused() -> None:
    choice = {"finish_reason": "moonrise", "message": ANSWER}
    with pytest.raises(DataError, match="the response ended for the reason `moonrise`, which is unknown"):
        read({"request": REQUEST, "response": {"choices": [choice]}}, "openai_log")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"status": "failure"}, "failed calls"),
        ({"success": False}, "failed calls"),
        ({"error": {"message": "overloaded"}}, "failed calls"),
        ({"error_str": "Timeout"}, "failed calls"),
        ({"response": {"error": {"code": 400}}}, "failed calls"),
        ({"response": {"status_code": 500, "body": {"message": "x"}}}, "failed calls"),
        ({"response_status": 429}, "failed calls"),
        ({"level": "ERROR"}, "failed calls"),
        ({"response": None}, "calls without an answer"),
        ({"response": {}}, "calls without an answer"),
        ({"response": {"choices": []}}, "calls without an answer"),
        ({"response": {"status": "failed", "output": []}}, "failed calls"),
        (
            {
                "response": {
                    "status": "incomplete",
                    "incomplete_details": {"reason": "max_output_tokens"},
                    "output": OUTPUT,
                }
            },
            "truncated answers",
        ),
        (
            {
                "response": {
                    "status": "incomplete",
                    "incomplete_details": {"reason": "content_filter"},
                    "output": OUTPUT,
                }
            },
            "answers stopped by a content filter",
        ),
        ({"response": {"status": "in_progress", "output": []}}, "unfinished answers"),
        ({"response": CHUNKS[:2]}, "truncated answers"),
        (
            {"response": {"choices": [{"message": ANSWER, "finish_reason": "content-filter"}]}},
            "answers stopped by a content filter",
        ),
        (
            {"request": {"input": "Go on.", "conversation": {"id": "conv_1"}}},
            "calls whose earlier messages are not in the log",
        ),
        (
            {"call_type": "aembedding", "response": {"object": "list", "data": [{"embedding": [0.1]}]}},
            "calls that are not chats",
        ),
        (
            {"request": {**REQUEST, "messages": [*HISTORY, {"role": "assistant", "content": "There"}]}},
            "answers that continue a message of the assistant",
        ),
        (
            {"request": {"input": "Go on.", "previous_response_id": "r1"}},
            "calls whose earlier messages are not in the log",
        ),
        (
            {"request": {"input": [{"type": "item_reference", "id": "m"}]}},
            "calls whose earlier messages are not in the log",
        ),
    ],
)
def test_calls_without_a_whole_answer_are_dropped_and_counted(changes: dict[str, Any], what: str) -> None:
    found = read({"request": REQUEST, "response": RESPONSE, **changes}, "openai_log")
    assert found.conversations == []
    assert found.dropped == {what: 1}


@pytest.mark.parametrize("kind", [{"type": "SPAN"}, {"run_type": "tool"}, {"type": "function"}])
def test_spans_that_are_not_calls_of_a_model_are_counted(kind: dict[str, Any]) -> None:
    found = read({**kind, "input": {"input": "x"}, "output": "y"}, "openai_log")
    assert found.conversations == []
    assert found.dropped == {"observations that are not calls of a model": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"request": REQUEST}, "it is a request without its response"),
        ({"messages": HISTORY}, "it is a request without its response.*format=messages"),
        ({"response": RESPONSE}, "it is a response without its request"),
        (RESPONSE, "it is a response without its request"),
        ({"custom_id": "r1", "body": REQUEST}, "it is a request without its response"),
        ({"model": "m"}, r"neither a request nor a response \(keys: model\)"),
        ({"request": REQUEST, "response": {"choices": [{"text": "x"}]}}, "the response has no `message`"),
        ({"request": REQUEST, "response": {"id": "x"}}, r"neither `choices` nor `output` \(keys: id\)"),
        (
            {"request": REQUEST, "response": {"type": "message", "content": [], "stop_reason": "end_turn"}},
            "Read it with format=anthropic",
        ),
        (
            {"request": REQUEST, "response": {"choices": [{"message": {"content": "redacted-by-litellm"}}]}},
            "LiteLLM has redacted its texts",
        ),
        (
            {"input": [*ITEMS, {"type": "web_search_call", "id": "w"}], "output": OUTPUT},
            "item 4 is a call of a built-in tool of type `web_search_call`",
        ),
        (
            {"input": "Go.", "output": [{"type": "local_shell_call", "action": {"type": "exec"}}]},
            "the response is a call of a built-in tool of type `local_shell_call`",
        ),
        (
            {"request": {"messages": HISTORY[:2] + HISTORY[3:]}, "response": RESPONSE},
            "message 3 answers the call `c1`, which was not made before",
        ),
        (
            {
                "request": {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
                            ],
                        }
                    ]
                },
                "response": RESPONSE,
            },
            "message 1 .*`image_url`",
        ),
        (
            {
                "request": REQUEST,
                "response": {"choices": [{"message": {"content": "", "audio": {"data": "AA"}}}]},
            },
            "`audio` of the response is not empty",
        ),
        (
            {
                "calls": [
                    {"request": REQUEST, "response": RESPONSE},
                    {"request": REQUEST, "response": {"id": "x"}},
                ]
            },
            "^calls 2: the response has neither",
        ),
        (
            {"request": REQUEST, "response": [{"role": "user", "content": "Hi."}, ANSWER]},
            "the response has messages of the user or a system",
        ),
        (
            {"request": {"messages": [{"text": "Hi."}]}, "response": RESPONSE},
            "message 1 is not an object with a role",
        ),
        (
            {"calls": [{"request": REQUEST, "response": RESPONSE}, {"request": REQUEST}]},
            "^calls 2: it is a request",
        ),
        ({"request": {**REQUEST, "tools": 5}, "response": RESPONSE}, "`tools` is a int, not a list"),
    ],
)
def test_a_row_that_cannot_be_understood_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(row, "openai_log")


def test_a_response_that_was_already_added_to_the_messages_is_trained_once() -> None:
    row = {
        "request": {**REQUEST, "messages": [*HISTORY, {**ANSWER, "tool_calls": None}]},
        "response": RESPONSE,
    }
    assert read(row, "openai_log").messages == EXPECTED


def test_a_result_before_a_call_is_not_taken_for_the_response() -> None:
    again = {**ITEMS[1], "call_id": "c2"}
    found = read({"input": ITEMS, "output": [again]}, "openai_log")
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]


def test_calls_of_custom_tools_in_chats_take_one_text() -> None:
    custom = {"id": "p", "type": "custom", "custom": {"name": "apply_patch", "input": "*** Begin"}}
    response = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [custom]}}]}
    row = {
        "request": {
            "messages": HISTORY[:2],
            "tools": [{"type": "custom", "custom": {"name": "apply_patch", "description": "Applies it."}}],
        },
        "response": response,
    }
    found = read(row, "openai_log")
    (patch,) = found.messages[-1]["tool_calls"]
    assert patch["function"] == {"name": "apply_patch", "arguments": {"input": "*** Begin"}}
    (tool,) = found.conversations[0].tools or []
    assert tool["function"]["parameters"]["required"] == ["input"]


@pytest.mark.parametrize(
    "thinking",
    [
        {"reasoning_content": "Look.", "thinking_blocks": [{"type": "thinking", "thinking": "Look."}]},
        {"reasoning": "Look.", "reasoning_details": [{"type": "reasoning.text", "text": "Look."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Look.", "signature": "x"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "Look."}]},
        {
            "content": [
                {"type": "thinking", "thinking": "Look."},
                {"type": "text", "text": "There is one: a.txt."},
            ]
        },
    ],
)
def test_thinking_is_read_as_every_provider_writes_it(thinking: dict[str, Any]) -> None:
    response = {"choices": [{"message": {**ANSWER, **thinking}}]}
    answer = read({"request": REQUEST, "response": response}, "openai_log").messages[-1]
    assert answer == {**ANSWER, "reasoning_content": "Look."}


def test_functions_of_the_first_api_are_read() -> None:
    row = {
        "messages": [
            HISTORY[1],
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "shell", "arguments": '{"cmd": "ls"}'},
            },
            {"role": "function", "name": "shell", "content": "a.txt"},
        ],
        "functions": [FUNCTION],
        "response": RESPONSE,
    }
    found = read(row, "openai_log")
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_call_id"] == found.messages[1]["tool_calls"][0]["id"]
    assert found.conversations[0].tools == TOOLS


# -- items of the Responses API ---------------------------------------------------------------


def test_custom_tools_take_one_text_and_built_in_tools_are_counted() -> None:
    row = {
        "input": "Patch it.",
        "tools": [
            {
                "type": "custom",
                "name": "apply_patch",
                "description": "Applies it.",
                "format": {"type": "text"},
            },
            {"type": "web_search"},
            {"type": "local_shell"},
        ],
        "output": [
            {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
            {"type": "custom_tool_call", "call_id": "p", "name": "apply_patch", "input": "*** Begin\n+x"},
        ],
    }
    found = read(row, "openai_log")
    (patch,) = found.messages[-1]["tool_calls"]
    assert patch["function"] == {"name": "apply_patch", "arguments": {"input": "*** Begin\n+x"}}
    assert found.conversations[0].tools == [
        {
            "type": "function",
            "function": {
                "name": "apply_patch",
                "description": "Applies it.",
                "parameters": {
                    "type": "object",
                    "properties": {"input": {"type": "string"}},
                    "required": ["input"],
                },
            },
        }
    ]
    assert found.dropped == {"built-in tools without a schema": 2, "encrypted thoughts": 1}


def test_a_run_whose_output_has_results_trains_every_turn_of_the_output() -> None:
    output = [ITEMS[1], ITEMS[2], *OUTPUT]
    found = read({"input": "List the files.", "output": output}, "openai_log")
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.trained == ["", "There is one: a.txt."]


def test_lists_of_tools_of_servers_are_counted() -> None:
    listing = {"type": "mcp_list_tools", "server_label": "s", "tools": []}
    found = read({"input": [*ITEMS, listing], "output": [listing, *OUTPUT]}, "openai_log")
    assert found.trained == ["There is one: a.txt."]
    assert found.dropped == {"lists of tools of MCP servers": 2}


def test_the_name_of_a_provider_beside_the_request_is_not_a_system_prompt() -> None:
    row = {"system": "openai", "type": "event", "request": {"messages": HISTORY[1:2]}, "response": RESPONSE}
    assert [message["role"] for message in read(row, "openai_log").messages] == ["user", "assistant"]


def test_instructions_precede_messages_and_are_not_repeated() -> None:
    items = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    found = read({"instructions": "Be brief.", "input": items, "output": OUTPUT}, "openai_log")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]


# -- options ----------------------------------------------------------------------------------


def test_rewards_of_the_row_its_metadata_or_a_choice_select() -> None:
    def kept(row: dict[str, Any], **options: Any) -> list[str]:
        found = read({"request": REQUEST, "response": RESPONSE, **row}, "openai_log", **options)
        return found.trained

    assert kept({"reward": 1.0}, min_reward=0.5) == ["There is one: a.txt."]
    assert kept({"reward": 0.0}, min_reward=0.5) == []
    assert kept({"metadata": {"score": 1}}, min_reward=0.5) == ["There is one: a.txt."]
    assert kept({"scores": {"judge": False}}, min_reward=0.5, reward_key="scores.judge") == []
    choices = [
        {"message": {"role": "assistant", "content": text}, "reward": reward}
        for text, reward in (("bad", 0), ("good", 1))
    ]
    assert kept({"response": {"choices": choices}}, min_reward=0.5) == ["good"]
    with pytest.raises(DataError, match="no reward to compare with min_reward=0.5"):
        kept({}, min_reward=0.5)


@pytest.mark.parametrize(
    "row",
    [
        {"request": REQUEST, "response": RESPONSE, "train": False},
        {"request": REQUEST, "response": {"choices": [{"message": ANSWER, "loss_mask": 0}]}},
        {"request": REQUEST, "response": {"choices": [{"message": {**ANSWER, "weight": 0}}]}},
    ],
)
def test_a_masked_answer_is_not_trained(row: dict[str, Any]) -> None:
    found = read(row, "openai_log")
    assert found.trained == []
    assert found.counted["masked by their step"] == 1


def test_a_number_under_the_mask_key_masks_the_row() -> None:
    row = {"request": REQUEST, "response": RESPONSE}
    assert read({**row, "keep": 1}, "openai_log", mask_key="keep").trained == ["There is one: a.txt."]
    masked = read({**row, "keep": 0}, "openai_log", mask_key="keep")
    assert masked.trained == []
    assert masked.counted["masked by `keep`"] == 1
    assert read({**row, "keep": [1, 0]}, "openai_log", mask_key="keep").trained == []


def test_flags_of_earlier_answers_do_not_train_them() -> None:
    history = [
        *HISTORY[:2],
        {"role": "assistant", "content": "x", "train": True},
        {"role": "user", "content": "y"},
    ]
    found = read({"request": {"messages": history}, "response": RESPONSE}, "openai_log")
    assert found.trained == ["There is one: a.txt."]


def test_variables_of_the_chat_template_are_kept() -> None:
    request = {**REQUEST, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    found = read({"request": request, "response": RESPONSE}, "openai_log")
    assert found.conversations[0].template_kwargs == {"enable_thinking": False}


# -- calls that continue others ---------------------------------------------------------------


def test_calls_that_continue_a_response_of_the_file_have_its_messages(tmp_path: Path) -> None:
    rows = [
        {
            "request": {"instructions": "Be brief.", "input": "List the files.", "tools": FLAT_TOOLS},
            "response": {"id": "r1", "status": "completed", "output": [ITEMS[1]]},
        },
        {
            "request": {
                "instructions": "Be brief.",
                "input": [ITEMS[2]],
                "previous_response_id": "r1",
                "tools": FLAT_TOOLS,
            },
            "response": {"id": "r2", "status": "completed", "output": OUTPUT},
        },
        {
            "instructions": "Be short.",
            "input": "Thanks.",
            "id": "r3",
            "previous_response_id": "r2",
            "output": [
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Bye."}]}
            ],
        },
        {"input": "And?", "previous_response_id": "r0", "output": OUTPUT, "id": "r4"},
        {"input": "So?", "previous_response_id": "r4", "output": OUTPUT, "id": "r5"},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    documents: list[Any] = list(IMPORTERS["openai_log"]().documents(path, "log.jsonl"))
    one, two, three, *lost = [read(document, "openai_log") for document in documents]
    assert one.trained == [""]
    assert two.messages == EXPECTED
    assert [message["content"] for message in three.messages] == [
        *("Be short.", "List the files.", "", "a.txt", "There is one: a.txt.", "Thanks.", "Bye.")
    ]
    assert three.trained == ["Bye."]
    assert [found.dropped for found in lost] == [{"calls whose earlier messages are not in the log": 1}] * 2


# -- malformed documents ----------------------------------------------------------------------


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ROWS)
def test_a_document_damaged_anywhere_is_read_or_refused(name: str) -> None:
    num_refused = 0
    for document in damaged({**ROWS[name], "previous_response_id": None}):
        earlier_items(document, {"r1": [{}]})
        IMPORTERS["openai_log"]().marks(document)
        try:
            found = read(document, "openai_log")
        except DataError:
            num_refused += 1
            continue
        assert "EARLIER" not in found.trained
    assert num_refused > 0


# -- files ------------------------------------------------------------------------------------


def test_each_answer_of_a_file_of_logs_is_trained_once(tmp_path: Path, tiny_qwen3: str) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [call("c1", cmd="ls")]}
    first = {
        "request": {**REQUEST, "messages": HISTORY[:2]},
        "response": {"choices": [{"finish_reason": "tool_calls", "message": calling}]},
    }
    path = tmp_path / "log.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in (first, *(ROWS[name] for name in ("request and response", "the Responses API", "chunks"))):
            file.write(json.dumps(row) + "\n")
    trained = "".join(trained_texts(path, tiny_qwen3, format="openai_log"))
    assert trained.replace("<think>\n\n</think>\n\n", "") == (
        '<tool_call>\n{"name": "shell", "arguments": {"cmd": "ls"}}\n</tool_call><|im_end|>'
        "There is one: a.txt.<|im_end|>"
    )


@pytest.mark.published
@pytest.mark.parametrize(
    ("name", "trained", "roles"),
    [
        ("chat_completions_log", "THE-RESPONSE", ["user", "assistant", "user", "assistant"]),
        ("litellm_payload", "THE-RESPONSE", ["user", "assistant", "user", "assistant"]),
        ("responses_api", "FINAL sunny", ["system", "user", "assistant", "tool", "assistant"]),
    ],
)
def test_published_logs_train_the_response(name: str, trained: str, roles: list[str]) -> None:
    for row in published_rows(f"{name}/data.jsonl"):
        found = read(row, "openai_log")
        assert found.trained == [trained]
        assert [message["role"] for message in found.messages] == roles
        assert found.conversations[0].tools
