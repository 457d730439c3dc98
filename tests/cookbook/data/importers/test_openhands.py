"""Rollouts of OpenHands: what the model saw and wrote, from the events of versions 0 and 1."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imported import damaged, read, said, trained
from traces import trace_path

from cookbook.data.formats import conversations_of
from cookbook.data.importers import marked
from cookbook.data.selection import ReadingOptions
from cookbook.errors import DataError

Event = dict[str, Any]

BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Runs a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}

# -- version 0 --------------------------------------------------------------------------------


def numbered(*events: Event) -> list[Event]:
    return [{"id": number, "timestamp": "t", **event} for number, event in enumerate(events)]


def response(text: str, *calls: tuple[str, str, Event], id: str = "", **more: Any) -> Event:
    """The response of the model as the metadata of an action holds it."""
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for call_id, name, arguments in calls
    ]
    message = {"role": "assistant", "content": text, "tool_calls": made, **more}
    return {"id": id or f"r-{calls[0][0]}", "choices": [{"index": 0, "message": message}]}


def metadata(call_id: str, name: str, answered: Event) -> Event:
    return {
        "tool_call_id": call_id,
        "function_name": name,
        "model_response": answered,
        "total_calls_in_response": len(answered["choices"][0]["message"]["tool_calls"]),
    }


def act(kind: str, call_id: str, name: str, answered: Event, **args: Any) -> Event:
    return {
        "source": "agent",
        "action": kind,
        "message": "?",
        "args": {"thought": "?", **args},
        "tool_call_metadata": metadata(call_id, name, answered),
    }


def observe(
    kind: str, text: str, call_id: str = "", name: str = "", answered: Event | None = None, **extras: Any
) -> Event:
    event = {
        "source": "agent",
        "observation": kind,
        "message": "?",
        "content": text,
        "extras": extras,
        "cause": 1,
    }
    return event if answered is None else {**event, "tool_call_metadata": metadata(call_id, name, answered)}


SYSTEM = {
    "source": "agent",
    "action": "system",
    "message": "?",
    "args": {"content": "You work.", "tools": [BASH], "agent_class": "CodeActAgent"},
}
TASK = {"source": "user", "action": "message", "args": {"content": "List it.", "image_urls": []}}
LS = response("I look.", ("c1", "bash", {"command": "ls"}), reasoning_content="First look.")
LOOK = act("run", "c1", "bash", LS, command="ls")
SEEN = observe(
    "run",
    "a b",
    "c1",
    "bash",
    LS,
    command="ls",
    metadata={"exit_code": 0, "working_dir": "/w", "suffix": "\n[done]"},
)
FINISH = response("", ("c2", "finish", {"message": "Two files."}))
DONE = act("finish", "c2", "finish", FINISH, final_thought="Two files.")
STATE = {
    "source": "environment",
    "observation": "agent_state_changed",
    "content": "",
    "extras": {"agent_state": "running"},
}
RECALL = {
    "source": "user",
    "action": "recall",
    "args": {"recall_type": "workspace_context", "query": "List it."},
}
RECALLED = {
    "source": "environment",
    "observation": "recall",
    "content": "Added workspace context",
    "extras": {"recall_type": "workspace_context", "repo_name": "", "date": "2026-01-01"},
}
V0 = numbered(SYSTEM, TASK, RECALL, RECALLED, STATE, LOOK, SEEN, DONE)
LOOKED = '<First look.> I look. bash({"command": "ls"})'
FINISHED = 'finish({"message": "Two files."})'
RESULT = "a b\n[done]\n[Current working directory: /w]\n[Command finished with exit code 0]"


def test_the_responses_of_the_model_are_trained_and_other_events_are_counted() -> None:
    found = read({"history": V0}, "openhands")
    (conversation,) = found.conversations
    assert said(conversation) == [
        ("system", "You work."),
        ("user", "List it."),
        ("assistant", LOOKED),
        ("tool", RESULT),
        ("assistant", FINISHED),
    ]
    assert trained(conversation) == [LOOKED, FINISHED]
    assert conversation.tools == [BASH]
    assert found.dropped == {"recall events": 2, "agent_state_changed events": 1}


def test_pairs_of_an_action_and_its_observation_and_other_keys_are_read() -> None:
    pairs = [[SYSTEM, {}], [TASK, STATE], [LOOK, SEEN], [DONE, None]]
    for row in (
        {"history": pairs, "instance": {"id": 1}, "test_result": {}},
        {"trajectory": json.dumps(V0)},
        {"events": list(reversed(V0))},
        {"instance_id": "x", "output": {"history": V0}},
    ):
        assert trained(read(row, "openhands").conversations[0]) == [LOOKED, FINISHED]


def test_parallel_calls_of_version_0_are_one_response() -> None:
    both = response("Both.", ("c1", "bash", {"command": "ls"}), ("c3", "bash", {"command": "pwd"}))
    events = numbered(
        SYSTEM,
        TASK,
        act("run", "c1", "bash", both),
        observe("run", "a b", "c1", "bash", both),
        act("run", "c3", "bash", both),
        observe("error", "No.", "c3", "bash", both),
        {"source": "agent", "action": "message", "args": {"content": "Two files."}},
        {"source": "user", "action": "message", "args": {"content": "Thanks."}},
    )
    (conversation,) = read({"history": events}, "openhands").conversations
    assert said(conversation)[2:] == [
        ("assistant", 'Both. bash({"command": "ls"}) bash({"command": "pwd"})'),
        ("tool", "a b"),
        ("tool", "No.\n[Error occurred in processing last action]"),
        ("assistant", "Two files."),
    ]


def test_a_message_of_the_user_between_a_call_and_its_result_follows_the_result() -> None:
    events = numbered(
        SYSTEM, TASK, LOOK, {"source": "user", "action": "message", "args": {"content": "Hurry."}}, SEEN, DONE
    )
    (conversation,) = read({"history": events}, "openhands").conversations
    assert [role for role, _ in said(conversation)] == [
        "system",
        "user",
        "assistant",
        "tool",
        "user",
        "assistant",
    ]
    assert trained(conversation) == [LOOKED, FINISHED]


def test_a_finish_without_a_response_is_a_message_and_commands_of_the_user_are_his() -> None:
    events = numbered(
        {"source": "user", "action": "run", "args": {"command": "make"}},
        observe("run", "ok"),
        {"source": "agent", "action": "finish", "args": {"thought": "All done.", "outputs": {}}},
    )
    (conversation,) = read({"history": events}, "openhands").conversations
    assert said(conversation) == [
        ("user", "User executed the command:\nmake\n\n\nObserved result of command executed by user:\nok"),
        ("assistant", "All done."),
    ]


def test_a_sub_agent_of_version_0_is_a_conversation_of_its_own() -> None:
    asked = response("", ("d1", "delegate", {"task": "Browse."}))
    inner = response("Browsing.", ("b1", "browser", {"code": "go()"}))
    events = numbered(
        *(SYSTEM, TASK, act("delegate", "d1", "delegate", asked, agent="BrowsingAgent", inputs={})),
        {"source": "user", "action": "message", "args": {"content": "TASK: Browse."}},
        act("browse_interactive", "b1", "browser", inner),
        observe("browse", "A page.", "b1", "browser", inner, screenshot="data:image/png;base64,AAAA"),
        {"source": "agent", "action": "finish", "args": {"thought": "I saw a page."}},
        observe("delegate", "?", "d1", "delegate", asked, outputs={"content": "It is a page."}),
        DONE,
    )
    found = read({"history": events}, "openhands")
    main, sub = found.conversations
    assert said(main)[2:] == [
        ("assistant", 'delegate({"task": "Browse."})'),
        ("tool", "It is a page."),
        ("assistant", FINISHED),
    ]
    assert said(sub) == [
        ("user", "TASK: Browse."),
        ("assistant", 'Browsing. browser({"code": "go()"})'),
        ("tool", "A page."),
        ("assistant", "I saw a page."),
    ]
    assert trained(sub) == ['Browsing. browser({"code": "go()"})', "I saw a page."]
    assert found.dropped["screenshots of the browser"] == 1


@pytest.mark.parametrize(
    "forgotten",
    [
        {"forgotten_event_ids": [2, 3]},
        {"forgotten_event_ids": None, "forgotten_events_start_id": 2, "forgotten_events_end_id": 3},
    ],
)
def test_a_condensation_of_version_0_begins_a_conversation_with_its_summary(forgotten: Event) -> None:
    second = response("Again.", ("c5", "bash", {"command": "pwd"}))
    condensation = {
        "source": "agent",
        "action": "condensation",
        "args": {"summary": "I looked.", "summary_offset": 2, **forgotten},
    }
    events = numbered(
        *(
            SYSTEM,
            TASK,
            LOOK,
            SEEN,
            act("run", "c5", "bash", second),
            observe("run", "/w", "c5", "bash", second),
        ),
        *(condensation, DONE),
    )
    one, two = read({"history": events}, "openhands").conversations
    assert trained(one) == [LOOKED, 'Again. bash({"command": "pwd"})']
    assert said(two) == [
        ("system", "You work."),
        ("user", "List it.\n\nI looked."),
        ("assistant", 'Again. bash({"command": "pwd"})'),
        ("tool", "/w"),
        ("assistant", FINISHED),
    ]
    assert trained(two) == [FINISHED]


# -- version 1 --------------------------------------------------------------------------------


def text(*parts: str) -> list[Event]:
    return [{"cache_prompt": False, "type": "text", "text": part} for part in parts]


def event(kind: str, id: str, source: str = "agent", **values: Any) -> Event:
    return {"kind": kind, "id": id, "timestamp": "t", "source": source, **values}


def action_event(
    id: str, call_id: str, command: str, response_id: str, thought: str = "", **values: Any
) -> Event:
    call = {
        "id": call_id,
        "name": "terminal",
        "arguments": json.dumps({"command": command}),
        "origin": "completion",
    }
    made = event(
        *("ActionEvent", id),
        thought=text(thought) if thought else [],
        thinking_blocks=[],
        reasoning_content=None,
        action={"kind": "TerminalAction", "command": command, "is_input": False},
        tool_call=call,
        tool_name="terminal",
        tool_call_id=call_id,
        llm_response_id=response_id,
    )
    return {**made, **values}


def observation_event(id: str, call_id: str, content: Any, **values: Any) -> Event:
    observed = {"kind": "TerminalObservation", "content": content, "is_error": False, **values}
    return event(
        *("ObservationEvent", id, "environment"),
        observation=observed,
        tool_name="terminal",
        tool_call_id=call_id,
        action_id="?",
    )


def message_event(id: str, role: str, *parts: str, source: str = "", **values: Any) -> Event:
    message = {"role": role, "content": text(*parts), "thinking_blocks": []}
    return event(
        "MessageEvent", id, source or ("user" if role == "user" else "agent"), llm_message=message, **values
    )


PROMPT = event(
    *("SystemPromptEvent", "e0"),
    system_prompt={"type": "text", "text": "You work."},
    dynamic_context={"type": "text", "text": "It is May."},
    tools=[
        {"kind": "TerminalTool", "description": "Runs.", "action_type": "TerminalAction"},
        {
            "kind": "MCPToolDefinition",
            "mcp_tool": {"name": "fetch", "description": "Gets.", "inputSchema": {"type": "object"}},
        },
        BASH,
    ],
)
ASKED = message_event("e1", "user", "List it.", extended_content=text("Use ls."), activated_skills=["shell"])
CALL = action_event("e2", "q1", "ls", "r1", "I look.", reasoning_content="First look.")
ANSWER = observation_event("e3", "q1", text("a b"), metadata={"exit_code": 0, "working_dir": "/w"})
LAST = message_event("e9", "assistant", "Two files.")
V1 = [
    *(
        PROMPT,
        ASKED,
        event("ConversationStateUpdateEvent", "e8", "environment", key="k", value={}),
        CALL,
        ANSWER,
    ),
    *(event("TokenEvent", "e7", prompt_token_ids=[1], response_token_ids=[2]), LAST),
]
CALLED = '<First look.> I look. terminal({"command": "ls"})'


def test_version_1_shows_the_model_contexts_and_the_state_of_the_shell() -> None:
    found = read({"events": V1}, "openhands")
    (conversation,) = found.conversations
    assert said(conversation) == [
        ("system", "You work.\nIt is May."),
        ("user", "List it.\nUse ls."),
        ("assistant", CALLED),
        ("tool", "a b\n[Current working directory: /w]\n[Command finished with exit code 0]"),
        ("assistant", "Two files."),
    ]
    assert trained(conversation) == [CALLED, "Two files."]
    assert [tool["function"]["name"] for tool in conversation.tools or ()] == ["fetch", "bash"]
    assert found.dropped == {
        "tools without a schema": 1,
        "ConversationStateUpdateEvent events": 1,
        "TokenEvent events": 1,
    }


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_actions_of_one_response_are_one_message(is_interleaved: bool) -> None:
    one, two = CALL, action_event("e4", "q2", "pwd", "r1")
    results = [event("AgentErrorEvent", "e5", tool_name="terminal", tool_call_id="q2", error="No."), ANSWER]
    between = [one, ANSWER, two, results[0]] if is_interleaved else [one, two, *results]
    (conversation,) = read({"events": [PROMPT, ASKED, *between, LAST]}, "openhands").conversations
    assert said(conversation)[2:] == [
        ("assistant", CALLED + ' terminal({"command": "pwd"})'),
        ("tool", "a b\n[Current working directory: /w]\n[Command finished with exit code 0]"),
        ("tool", "No."),
        ("assistant", "Two files."),
    ]


def test_rejections_errors_thinking_blocks_and_old_calls_are_read() -> None:
    old = {"id": "q1", "type": "function", "function": {"name": "terminal", "arguments": '{"command": "ls"}'}}
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
    ]
    events = [
        *(PROMPT, ASKED, {**CALL, "tool_call": old, "reasoning_content": None, "thinking_blocks": blocks}),
        event(
            "UserRejectObservation",
            "e3",
            "environment",
            tool_name="t",
            tool_call_id="q1",
            rejection_reason="no",
        ),
        action_event("e4", "q2", "pwd", "r2"),
        observation_event("e5", "q2", text("bad"), is_error=True),
        LAST,
    ]
    found = read({"events": events}, "openhands")
    assert said(found.conversations[0])[2:] == [
        ("assistant", '<Hm.> I look. terminal({"command": "ls"})'),
        ("tool", "Action rejected: no"),
        ("assistant", 'terminal({"command": "pwd"})'),
        ("tool", "[An error occurred during execution.]\nbad"),
        ("assistant", "Two files."),
    ]
    assert found.dropped["encrypted thoughts"] == 1


def test_a_condensation_of_version_1_begins_a_conversation_with_its_summary() -> None:
    condensation = event(
        *("Condensation", "k1", "environment"),
        forgotten_event_ids=["e2", "e3"],
        summary="I looked.",
        summary_offset=2,
        llm_response_id="s",
    )
    again = [action_event("e4", "q2", "pwd", "r2"), observation_event("e5", "q2", text("/w"))]
    later = event(
        *("Condensation", "k2", "environment"),
        forgotten_event_ids=["k1-summary", "e4", "e5"],
        summary="Twice.",
        summary_offset=2,
    )
    events = [PROMPT, ASKED, CALL, ANSWER, condensation, *again, later, LAST]
    one, two, three = read({"events": events}, "openhands").conversations
    assert trained(one) == [CALLED]
    assert said(two)[1:3] == [
        ("user", "List it.\nUse ls.\n\nI looked."),
        ("assistant", 'terminal({"command": "pwd"})'),
    ]
    assert said(three)[1:] == [("user", "List it.\nUse ls.\n\nTwice."), ("assistant", "Two files.")]


def test_results_of_forgotten_calls_are_dropped() -> None:
    condensation = event("Condensation", "k1", "environment", forgotten_event_ids=["e2"], llm_response_id="s")
    found = read({"events": [PROMPT, ASKED, CALL, ANSWER, condensation, LAST]}, "openhands")
    assert [said(each)[-1] for each in found.conversations] == [
        ("assistant", CALLED),
        ("assistant", "Two files."),
    ]
    assert "tool" not in [role for role, _ in said(found.conversations[1])]


def test_branches_of_a_tree_of_events_train_what_they_share_once() -> None:
    other = message_event("e10", "assistant", "Just two.", parent_id="e3")
    filtered = [
        {**each, "parent_id": f"{number}"} for number, each in enumerate((PROMPT, ASKED, CALL, ANSWER, LAST))
    ]
    assert len(read({"events": filtered}, "openhands").conversations) == 1
    one, two = read({"events": [PROMPT, ASKED, CALL, ANSWER, LAST, other]}, "openhands").conversations
    assert trained(one) == [CALLED, "Two files."]
    assert trained(two) == ["Just two."]
    assert [role for role, _ in said(two)] == ["system", "user", "assistant", "tool", "assistant"]


# -- rows, rewards and refusals -------------------------------------------------------------------


def test_rows_of_messages_are_read_with_their_tools() -> None:
    messages = [
        {"role": "system", "content": "You work."},
        {"role": "user", "content": "List it."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": json.dumps(LS["choices"][0]["message"]["tool_calls"]),
        },
        {"role": "tool", "tool_call_id": "c1", "name": "bash", "content": "a b"},
        {"role": "assistant", "content": "Two files."},
    ]
    for key in ("messages", "trajectory"):
        (conversation,) = read({key: messages, "tools": [BASH], "resolved": 1}, "openhands").conversations
        assert trained(conversation) == ['bash({"command": "ls"})', "Two files."]
        assert conversation.tools == [BASH]
    with pytest.raises(DataError, match="format=openai_log"):
        read({"messages": messages[:2], "response": {"choices": []}}, "openhands")


@pytest.mark.parametrize(
    ("outcome", "options"),
    [
        ({"resolved": False}, {"min_reward": 1}),
        ({"test_result": {"report": {"resolved": False}}}, {"min_reward": 1}),
        ({"report": json.dumps({"resolved": False})}, {"min_reward": 1}),
        ({"test_result": {"score": 0.25}}, {"min_reward": 0.5, "reward_key": "test_result.score"}),
        ({"reward": 2}, {"max_reward": 1}),
    ],
)
def test_rollouts_are_selected_by_their_outcome(outcome: Event, options: Event) -> None:
    assert conversations_of({"history": V0, **outcome}, "openhands", ReadingOptions(**options)) == []


def test_an_event_may_be_masked() -> None:
    events = copy.deepcopy(V1)
    events[3]["loss_mask"] = 0
    assert trained(read({"events": events}, "openhands").conversations[0]) == ["Two files."]


def test_a_rollout_that_failed_before_its_first_event_is_counted() -> None:
    assert read({"history": [], "error": "no runtime"}, "openhands").dropped == {"rollouts without events": 1}
    assert read({"history": V0[:2]}, "openhands").dropped == {"rollouts without a response of the model": 1}


IMAGE = {"type": "image", "image_urls": ["data:image/png;base64,AAAA"]}


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (
            [SYSTEM, TASK, {**LOOK, "tool_call_metadata": None}],
            "event 3 is an action `run` without `tool_call_metadata`",
        ),
        (
            [TASK, {**LOOK, "tool_call_metadata": {"tool_call_id": "c1"}}],
            "event 2 has no message in its `model_resp",
        ),
        ([{**TASK, "args": {"content": "?", "image_urls": ["x"]}}, LOOK], "event 1 has images"),
        ([{**TASK, "source": None}, LOOK], "event 1 is a message without a `source`"),
        ([TASK, SEEN, DONE], "event 2 answers the call `c1`, which was not made"),
        ([TASK, LOOK, SEEN, SEEN], "event 4 is a second result of the call `c1`"),
        ([TASK, {"action": "fly", "args": {}, "source": "agent"}], "event 2 is an action `fly`"),
        ([TASK, {"thought": "?"}, DONE], "event 2 is no event of OpenHands"),
        ([ASKED, {**CALL, "tool_call": None}], "event 2 has no `tool_call`"),
        ([ASKED, CALL, observation_event("e3", "q1", [IMAGE]), LAST], "event 3 has a part of type `image`"),
        ([ASKED, event("ACPToolCallEvent", "e3"), LAST], "event 2 is of kind `ACPToolCallEvent`"),
        (
            [ASKED, CALL, event("Condensation", "k", summary="?"), LAST],
            "event 3 condenses the history, and which",
        ),
    ],
)
def test_what_is_not_understood_is_refused_with_its_event(events: list[Event], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read({"events": events}, "openhands")


def test_events_never_pass_as_rows_or_steps_of_another_format() -> None:
    for row in (
        {"history": V0},
        {"trajectory": V0},
        {"events": V1},
        {"history": [[TASK, STATE]]},
        LOOK,
        SEEN,
        *V1,
    ):
        importer = marked(row)
        assert importer is not None
        assert importer.name == "openhands"
        with pytest.raises(DataError, match="format=openhands"):
            conversations_of(row)
    for steps in ([LOOK, SEEN], [SEEN, LOOK], [TASK, DONE], V1):
        with pytest.raises(DataError, match="event of OpenHands.*format=openhands"):
            conversations_of({"steps": steps, "task": "List it."}, "trajectory")


@pytest.mark.slow
def test_malformed_values_are_refused_by_a_data_error_or_read() -> None:
    condensation = event(
        "Condensation", "k", forgotten_event_ids=["e2"], summary="I looked.", summary_offset=2
    )
    refused = 0
    for events in (V0, V1, [PROMPT, ASKED, CALL, ANSWER, condensation, LAST]):
        for document in damaged({"events": events}):
            try:
                conversations_of(document, "openhands")
            except DataError:
                refused += 1
    assert refused > 100


# -- files ------------------------------------------------------------------------------------


def without_thinking(events: list[Event]) -> list[Event]:
    return json.loads(json.dumps(events).replace('"First look."', "null"))


PLAIN_V0, PLAIN_V1 = without_thinking(V0), without_thinking(V1)


def check_turns(examples: list[list[str]], number: int) -> None:
    assert len(examples) == number
    for look, end in examples:
        assert "I look." in look
        assert '"command": "ls"' in look
        assert look.endswith("</tool_call><|im_end|>")
        assert "Two files." in end
        assert end.endswith("<|im_end|>")


def test_a_folder_of_event_files_is_one_rollout(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    one = tmp_path / "conversations" / "one"
    (one / "events").mkdir(parents=True)
    (one / "base_state.json").write_text('{"id": "one"}', encoding="utf-8")
    for number, each in enumerate(PLAIN_V1):
        name = f"event-{number:05d}-{number:08x}-aaaa.json"
        (one / "events" / name).write_text(json.dumps(each), encoding="utf-8")
    two = tmp_path / "conversations" / "two"
    (two / "events").mkdir(parents=True)
    (two / "event_cache").mkdir()
    (two / "event_cache" / "0-25.json").write_text(json.dumps(PLAIN_V0), encoding="utf-8")
    filler = [{**STATE, "id": number} for number in range(8, 11)]
    for each in [*PLAIN_V0[:-1], *filler, {**PLAIN_V0[-1], "id": 11}]:
        (two / "events" / f"{each['id']}.json").write_text(json.dumps(each), encoding="utf-8")
    options = {"format": "openhands", "renderer_name": "qwen3_instruct"}
    check_turns(trained_texts(tmp_path / "conversations", **options), 2)
    check_turns(trained_texts(two, **options), 1)
    check_turns(trained_texts(one / "events", **options), 1)


def test_a_damaged_event_file_makes_its_rollout_bad(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "events").mkdir(parents=True)
        for number, each in enumerate(PLAIN_V1):
            path = tmp_path / name / "events" / f"event-{number:05d}-{number:08x}-aaaa.json"
            path.write_text(json.dumps(each), encoding="utf-8")
    (tmp_path / "two" / "events" / "event-00003-00000003-aaaa.json").write_text("{", encoding="utf-8")
    options = {"format": "openhands", "renderer_name": "qwen3_instruct"}
    with pytest.raises(DataError, match="two/events/event-00003-00000003-aaaa.json"):
        trained_texts(tmp_path, **options)
    check_turns(trained_texts(tmp_path, on_bad_row="skip", **options), 1)


def test_a_file_of_events_is_one_rollout(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    lines = "".join(json.dumps(each) + "\n" for each in PLAIN_V1)
    (tmp_path / "events.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "events.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "events.json").write_text(json.dumps(PLAIN_V0, indent=1), encoding="utf-8")
    other = json.loads(json.dumps(PLAIN_V0).replace("List it.", "What is there?"))
    rows = [{"instance_id": "x", "history": history, "metadata": {}} for history in (PLAIN_V0, other)]
    (tmp_path / "output.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"format": "openhands", "renderer_name": "qwen3_instruct"}
    for name, number in (
        ("events.jsonl", 1),
        ("events.jsonl.gz", 1),
        ("events.json", 1),
        ("output.jsonl", 2),
    ):
        check_turns(trained_texts(tmp_path / name, **options), number)


@pytest.mark.published
def test_published_events_train_their_two_responses(trained_texts: Callable[..., list[list[str]]]) -> None:
    path = trace_path("openhands_v1_events/data.jsonl")
    look, final = (turn for example in trained_texts(path, "openhands") for turn in example)
    assert "THINK ls" in look
    assert "SAY look" in look
    assert '"command": "ls"' in look
    assert final.endswith("FINAL two files<|im_end|>")
