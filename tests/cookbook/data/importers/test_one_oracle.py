"""Any tree of messages, written in any of the formats, comes out as the same conversations.

One oracle conversation, many writers: each writes what its tool writes of a rollout or of every call in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cookbook.data.conversation import Conversation
from cookbook.data.formats import conversations_of
from cookbook.data.repeated import grow, paths_of
from renderers import TrainOnWhat

Turn = tuple[str, str, tuple[tuple[int, str], ...]]
"""What the agent thinks and says, and the number and the result of each of its calls."""
Path = tuple[Turn, ...]
Documents = list[tuple[str, dict[str, Any]]]
"""Documents, each with the name of its format."""

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "act", "description": "Acts.", "parameters": PARAMETERS}}
SYSTEM, TASK = "Be an agent.", "Do it."


def call_id(depth: int, number: int) -> str:
    return f"c{depth}_{number}"


def plain(conversation: Conversation) -> Any:
    """What a conversation says, in one spelling, without ids."""
    assert [tool["function"]["name"] for tool in conversation.tools or []] == ["act"]
    said = []
    for message in conversation.messages:
        calls = [call["function"]["arguments"]["n"] for call in message.get("tool_calls") or ()]
        said.append(
            (message["role"], message.get("reasoning_content", ""), message.get("content") or "", calls)
        )
    return said


def oracle(path: Path) -> Any:
    said: list[Any] = [("system", "", SYSTEM, []), ("user", "", TASK, [])]
    for depth, (thought, text, calls) in enumerate(path):
        is_last = depth == len(path) - 1
        said.append(("assistant", thought, text, [number for number, _ in calls]))
        if not is_last:
            said += [("tool", "", result, []) for _, result in calls] or [("user", "", f"Go on {depth}.", [])]
    return said


# -- messages as the APIs write them ----------------------------------------------------------


def openai_call(depth: int, number: int) -> dict[str, Any]:
    function = {"name": "act", "arguments": json.dumps({"n": number})}
    return {"id": call_id(depth, number), "type": "function", "function": function}


def openai_answer(depth: int, turn: Turn) -> dict[str, Any]:
    thought, text, calls = turn
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [openai_call(depth, number) for number, _ in calls]
    return message


def openai_results(depth: int, turn: Turn) -> list[dict[str, Any]]:
    results = [
        {"role": "tool", "tool_call_id": call_id(depth, number), "content": result}
        for number, result in turn[2]
    ]
    return results or [{"role": "user", "content": f"Go on {depth}."}]


def openai_history(path: Path) -> list[dict[str, Any]]:
    """All messages before the last answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
    for depth, turn in enumerate(path[:-1]):
        messages += [openai_answer(depth, turn), *openai_results(depth, turn)]
    return messages


def write_messages(path: Path) -> Documents:
    messages = [*openai_history(path), openai_answer(len(path) - 1, path[-1])]
    return [("messages", {"messages": messages, "tools": [TOOL]})]


def write_chat_log(path: Path) -> Documents:
    """One row for each call of the API."""
    rows = []
    for end in range(1, len(path) + 1):
        answer = openai_answer(end - 1, path[end - 1])
        request = {"model": "m", "messages": openai_history(path[:end]), "tools": [TOOL]}
        reason = "tool_calls" if "tool_calls" in answer else "stop"
        choice = {"index": 0, "finish_reason": reason, "message": answer}
        rows.append(("openai_log", {"request": request, "response": {"choices": [choice]}}))
    return rows


def write_responses_log(path: Path) -> Documents:
    def output(depth: int, turn: Turn) -> list[dict[str, Any]]:
        thought, text, calls = turn
        items: list[dict[str, Any]] = []
        if thought:
            items.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": thought}]})
        if text:
            content = [{"type": "output_text", "text": text, "annotations": []}]
            items.append({"type": "message", "role": "assistant", "content": content})
        items += [
            {
                "type": "function_call",
                "call_id": call_id(depth, n),
                "name": "act",
                "arguments": json.dumps({"n": n}),
            }
            for n, _ in calls
        ]
        return items

    def results(depth: int, turn: Turn) -> list[dict[str, Any]]:
        found = [
            {"type": "function_call_output", "call_id": call_id(depth, n), "output": result}
            for n, result in turn[2]
        ]
        return found or [{"role": "user", "content": f"Go on {depth}."}]

    rows: Documents = []
    items: list[dict[str, Any]] = [{"role": "user", "content": TASK}]
    for depth, turn in enumerate(path):
        tools = [{"type": "function", **TOOL["function"]}]  # type: ignore[dict-item]
        row = {"instructions": SYSTEM, "input": list(items), "output": output(depth, turn), "tools": tools}
        rows.append(("openai_log", row))
        items += [*output(depth, turn), *results(depth, turn)]
    return rows


def write_anthropic_log(path: Path) -> Documents:
    def blocks(depth: int, turn: Turn) -> list[dict[str, Any]]:
        thought, text, calls = turn
        found: list[dict[str, Any]] = []
        if thought:
            found.append({"type": "thinking", "thinking": thought, "signature": "s"})
        if text:
            found.append({"type": "text", "text": text})
        return found + [
            {"type": "tool_use", "id": call_id(depth, n), "name": "act", "input": {"n": n}} for n, _ in calls
        ]

    rows: Documents = []
    messages: list[dict[str, Any]] = [{"role": "user", "content": TASK}]
    tools = [{"name": "act", "description": "Acts.", "input_schema": PARAMETERS}]
    for depth, turn in enumerate(path):
        request = {"model": "m", "system": SYSTEM, "messages": list(messages), "tools": tools}
        reason = "tool_use" if turn[2] else "end_turn"
        response = {
            "type": "message", "role": "assistant", "content": blocks(depth, turn), "stop_reason": reason
        }  # fmt: skip
        rows.append(("anthropic", {"request": request, "response": response}))
        results: Any = [
            {"type": "tool_result", "tool_use_id": call_id(depth, n), "content": result}
            for n, result in turn[2]
        ]
        messages += [
            {"role": "assistant", "content": blocks(depth, turn)},
            {"role": "user", "content": results or f"Go on {depth}."},
        ]
    return rows


# -- rollouts as the tools write them ---------------------------------------------------------


def write_atif(path: Path) -> Documents:
    steps: list[dict[str, Any]] = [
        {"step_id": 1, "source": "system", "message": SYSTEM},
        {"step_id": 2, "source": "user", "message": TASK},
    ]
    for depth, (thought, text, calls) in enumerate(path):
        step: dict[str, Any] = {"step_id": len(steps) + 1, "source": "agent", "message": text}
        if thought:
            step["reasoning_content"] = thought
        if calls:
            step["tool_calls"] = [
                {"tool_call_id": call_id(depth, n), "function_name": "act", "arguments": {"n": n}}
                for n, _ in calls
            ]
            results = [{"source_call_id": call_id(depth, n), "content": result} for n, result in calls]
            step["observation"] = {"results": results}
        steps.append(step)
        if not calls:
            steps.append({"step_id": len(steps) + 1, "source": "user", "message": f"Go on {depth}."})
    agent = {"name": "a", "version": "1", "tool_definitions": [TOOL]}
    return [("atif", {"schema_version": "ATIF-v1.7", "session_id": "s", "agent": agent, "steps": steps})]


def write_inspect(path: Path) -> Documents:
    tool = {"name": "act", "description": "Acts.", "parameters": PARAMETERS}
    messages: list[dict[str, Any]] = [
        {"id": "s", "role": "system", "content": SYSTEM},
        {"id": "u", "role": "user", "content": TASK, "source": "input"},
    ]
    events = []
    output: dict[str, Any] = {}
    for depth, (thought, text, calls) in enumerate(path):
        content: Any = text
        if thought:
            content = [{"type": "reasoning", "reasoning": thought}, {"type": "text", "text": text}]
        answer = {"id": f"a{depth}", "role": "assistant", "content": content, "source": "generate"}
        answer["tool_calls"] = [
            {"id": call_id(depth, n), "function": "act", "arguments": {"n": n}, "type": "function"}
            for n, _ in calls
        ]
        reason = "tool_calls" if calls else "stop"
        output = {"model": "m", "choices": [{"message": answer, "stop_reason": reason}], "completion": text}
        events.append(
            {"event": "model", "model": "m", "input": list(messages), "tools": [tool], "output": output}
        )
        messages.append(answer)
        messages += [
            {"role": "tool", "tool_call_id": call_id(depth, n), "function": "act", "content": result}
            for n, result in calls
        ] or [{"role": "user", "content": f"Go on {depth}."}]
    sample = {"id": 1, "epoch": 1, "input": TASK, "target": "t", "messages": messages}
    return [("inspect", {**sample, "output": output, "events": events})]


def write_trajectory(path: Path) -> Documents:
    steps = []
    for depth, (thought, text, calls) in enumerate(path):
        step: dict[str, Any] = {"action": text, "thought": thought or None}
        if calls:
            step["tool_calls"] = [openai_call(depth, n) for n, _ in calls]
            step["tool_results"] = [{"tool_call_id": call_id(depth, n), "content": r} for n, r in calls]
        else:
            step["next_observation"] = f"Go on {depth}."
        steps.append(step)
    return [("trajectory", {"system": SYSTEM, "task": TASK, "tools": [TOOL], "steps": steps})]


def write_openhands(path: Path) -> Documents:
    events: list[dict[str, Any]] = [
        {"id": "s", "source": "agent", "kind": "SystemPromptEvent", "tools": [TOOL],
         "system_prompt": {"type": "text", "text": SYSTEM}},
        {"id": "u", "source": "user", "kind": "MessageEvent",
         "llm_message": {"role": "user", "content": [{"type": "text", "text": TASK}]}},
    ]  # fmt: skip
    for depth, (thought, text, calls) in enumerate(path):
        for place, (n, _) in enumerate(calls):
            is_first = place == 0
            call = {"id": call_id(depth, n), "name": "act", "arguments": json.dumps({"n": n})}
            event: dict[str, Any] = {
                "id": f"a{depth}{place}",
                "source": "agent",
                "kind": "ActionEvent",
                "tool_name": "act",
            }
            event |= {"tool_call_id": call_id(depth, n), "tool_call": call, "llm_response_id": f"r{depth}"}
            event["thought"] = [{"type": "text", "text": text}] if is_first and text else []
            event["reasoning_content"] = thought if is_first and thought else None
            events.append({**event, "action": {"kind": "ActAction", "n": n}})
        for place, (n, result) in enumerate(calls):
            event = {"id": f"o{depth}{place}", "source": "environment", "kind": "ObservationEvent"}
            event |= {"tool_name": "act", "tool_call_id": call_id(depth, n), "action_id": f"a{depth}{place}"}
            content = [{"type": "text", "text": result}]
            events.append({**event, "observation": {"kind": "ActObservation", "content": content}})
        if not calls:
            message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            if thought:
                message["reasoning_content"] = thought
            go_on = {"role": "user", "content": [{"type": "text", "text": f"Go on {depth}."}]}
            events += [
                {"id": f"m{depth}", "source": "agent", "kind": "MessageEvent", "llm_message": message},
                {"id": f"g{depth}", "source": "user", "kind": "MessageEvent", "llm_message": go_on},
            ]
    return [("openhands", {"events": events})]


def write_swe_agent(path: Path) -> Documents:
    history: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM, "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": TASK, "agent": "main", "message_type": "observation"},
    ]
    for depth, turn in enumerate(path):
        answer = openai_answer(depth, turn)
        history.append({**answer, "thought": turn[1], "agent": "main", "message_type": "action"})
        observed = {"agent": "main", "message_type": "observation"}
        history += [
            {
                "role": "tool",
                "content": [{"type": "text", "text": result}],
                "tool_call_ids": [call_id(depth, n)],
                **observed,
            }
            for n, result in turn[2]
        ] or [{"role": "user", "content": f"Go on {depth}.", **observed}]
    return [("swe_agent", {"trajectory": [], "history": history, "info": {}, "tools": [TOOL]})]


WRITERS: dict[str, Callable[[Path], Documents]] = {
    "messages": write_messages,
    "chat log": write_chat_log,
    "responses log": write_responses_log,
    "anthropic log": write_anthropic_log,
    "atif": write_atif,
    "inspect": write_inspect,
    "trajectory": write_trajectory,
    "openhands": write_openhands,
    "swe_agent": write_swe_agent,
}

turns = st.tuples(
    st.sampled_from(["", "hm", "so"]),
    st.sampled_from(["one", "two", "three"]),
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["fine", "bad"])),
        max_size=2,
        unique_by=lambda call: call[0],
    ).map(tuple),
)
paths = st.lists(turns, min_size=1, max_size=4).map(tuple)


@st.composite
def trees(draw: Any) -> list[Path]:
    """Paths of a tree: each after the first leaves an earlier one at some turn."""
    found = [draw(paths)]
    for _ in range(draw(st.integers(0, 3))):
        trunk = draw(st.sampled_from(found))
        found.append((*trunk[: draw(st.integers(0, len(trunk)))], *draw(paths)))
    return found


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(tree=trees())
def test_any_tree_of_messages_is_read_as_its_conversations(name: str, tree: list[Path]) -> None:
    """The longest conversations are those of the tree, and each answer of the tree is trained once."""
    read: list[Conversation] = []
    expected = []
    for path in tree:
        found = [
            conversation
            for format, document in WRITERS[name](path)
            for conversation in conversations_of(document, format)
        ]
        read += found
        assert plain(found[-1]) == oracle(path)
        expected.append(oracle(path))
    mode = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    decisions = grow(paths_of([[conversation] for conversation in read], mode), "merge").decisions
    trained: Counter[str] = Counter()
    for number, conversation in enumerate(read):
        decision = decisions.get(number)
        if decision is not None:
            places = list(decision.weights)
        else:
            places = [
                place
                for place, message in enumerate(conversation.messages)
                if message["role"] == "assistant" and message.get("trainable") is not False
            ]
        for place in places:
            assert conversation.messages[place]["role"] == "assistant"
            trained[json.dumps(plain(conversation)[: place + 1])] += 1
    answers = {
        json.dumps(said[: place + 1])
        for said in expected
        for place, message in enumerate(said)
        if message[0] == "assistant"
    }
    by_bare = Counter(_bare(text) for text in trained.elements())
    assert set(by_bare) == {_bare(answer) for answer in answers}
    assert set(by_bare.values()) == {1}


def _bare(said: str) -> str:
    """A conversation without thinking: a turn that two branches thought of in two ways is one turn."""
    return json.dumps([(role, text, calls) for role, _, text, calls in json.loads(said)])
