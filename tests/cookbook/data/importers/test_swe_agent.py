"""Trajectories of SWE-agent and mini-swe-agent: which answers are trained, and after which messages."""

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

Entry = dict[str, Any]

SYSTEM: Entry = {
    "role": "system",
    "content": "You fix code.",
    "agent": "main",
    "message_type": "system_prompt",
}
TASK: Entry = {
    "role": "user",
    "content": [{"type": "text", "text": "Fix a.py.", "cache_control": {"type": "ephemeral"}}],
    "agent": "main",
    "message_type": "observation",
}


def action(text: str, command: str | None = None, call_id: str = "", **more: Any) -> Entry:
    """An answer in the history, with a call of bash if there is a command."""
    call = {
        "index": 1,
        "function": {"name": "bash", "arguments": json.dumps({"command": command})},
        "id": call_id,
        "type": "function",
    }
    return {
        "role": "assistant",
        "content": text,
        "thought": text,
        "action": command or "",
        "agent": "main",
        "tool_calls": [call] if command else None,
        "message_type": "action",
        "thinking_blocks": [],
        **more,
    }


def observed(text: str, call_id: str | None = None) -> Entry:
    message: Entry = {"role": "user", "content": text, "agent": "main", "message_type": "observation"}
    return {**message, "role": "tool", "tool_call_ids": [call_id]} if call_id else message


LOOK, SEEN = action("I look.", "ls", "t1"), observed("a.py", "t1")
FIX, FIXED = action("I fix.", "sed -i s/1/2/ a.py", "t2"), observed("done", "t2")
SUBMIT, DIFF = action("I submit.", "submit", "t3"), observed("diff", "t3")


def step(answer: Entry, query: list[Entry], **more: Any) -> Entry:
    return {
        "action": answer["action"],
        "observation": "o",
        "response": answer["content"],
        "query": query,
        "thought": answer["content"],
        "execution_time": 0.1,
        "state": {},
        "extra_info": {},
        **more,
    }


def trajectory(*answers_and_results: Entry, **more: Any) -> Entry:
    """A document whose steps each hold the query they answered."""
    history = [SYSTEM, TASK]
    steps = []
    for entry in answers_and_results:
        if entry["role"] == "assistant":
            steps.append(step(entry, copy.deepcopy(history)))
        history.append(entry)
    return {
        "trajectory": steps,
        "history": history,
        "info": {"exit_status": "submitted", "submission": "diff"},
        "replay_config": "{}",
        "environment": "swe_main",
        **more,
    }


WHOLE = trajectory(LOOK, SEEN, FIX, FIXED, SUBMIT, DIFF)
COMMANDS = ["ls", "sed -i s/1/2/ a.py", "submit"]
TURNS = [
    'I look. bash({"command": "ls"})',
    'I fix. bash({"command": "sed -i s/1/2/ a.py"})',
    'I submit. bash({"command": "submit"})',
]


def without(document: Entry, *keys: str) -> Entry:
    return {key: value for key, value in document.items() if key not in keys}


def test_each_answer_is_trained_once_after_the_query_it_answered() -> None:
    found = read(WHOLE, "swe_agent")
    (conversation,) = found.conversations
    assert said(conversation) == [
        ("system", "You fix code."),
        ("user", "Fix a.py."),
        ("assistant", TURNS[0]),
        ("tool", "a.py"),
        ("assistant", TURNS[1]),
        ("tool", "done"),
        ("assistant", TURNS[2]),
    ]
    assert trained(conversation) == TURNS
    assert conversation.is_rollout
    assert not found.dropped


def test_the_calls_of_the_last_answer_stand_in_the_history_only() -> None:
    found = read(without(WHOLE, "history"), "swe_agent")
    (conversation,) = found.conversations
    assert trained(conversation) == TURNS[:2]
    assert found.dropped == {"last answers whose calls are not in the log": 1}


def test_a_last_answer_in_which_the_action_is_text_needs_no_history() -> None:
    answers = [action("Look:\n```\nls\n```"), observed("a.py"), action("Done:\n```\nsubmit\n```")]
    document = without(trajectory(*answers), "history")
    (conversation,) = read(document, "swe_agent").conversations
    assert trained(conversation) == ["Look:\n```\nls\n```", "Done:\n```\nsubmit\n```"]
    only = without(trajectory(action("Done:\n```\nsubmit\n```")), "history")
    only["trajectory"][0]["action"] = "submit\n"
    assert trained(read(only, "swe_agent").conversations[0]) == ["Done:\n```\nsubmit\n```"]


def test_steps_of_version_1_0_hold_the_messages_after_them() -> None:
    document = copy.deepcopy(WHOLE)
    for number, each in enumerate(document["trajectory"]):
        del each["query"]
        each["messages"] = document["history"][: 4 + 2 * number]
    for kept in (document, without(document, "history")):
        (conversation,) = read(kept, "swe_agent").conversations
        assert trained(conversation) == TURNS
        assert said(conversation)[-1] == ("assistant", TURNS[2])


def test_versions_before_1_0_have_only_a_history() -> None:
    document = copy.deepcopy(WHOLE)
    for each in document["trajectory"]:
        del each["query"]
    for kept in (document, without(document, "trajectory")):
        assert trained(read(kept, "swe_agent").conversations[0]) == TURNS
    with pytest.raises(DataError, match="no `query` and it has no `history`"):
        read(without(document, "history"), "swe_agent")


def test_where_only_the_last_step_has_a_query_its_history_is_trained() -> None:
    document = copy.deepcopy(WHOLE)
    for each in document["trajectory"][:-1]:
        del each["query"]
    (conversation,) = read(document, "swe_agent").conversations
    assert trained(conversation) == TURNS


def test_a_query_that_rewrites_observations_begins_a_new_conversation() -> None:
    document = copy.deepcopy(WHOLE)
    elided = {**SEEN, "content": "Old environment output: (1 lines omitted)"}
    document["trajectory"][2]["query"][3] = elided
    one, two = read(document, "swe_agent").conversations
    assert trained(one) == TURNS[:2]
    assert trained(two) == TURNS[2:]
    assert said(two)[3] == ("tool", "Old environment output: (1 lines omitted)")
    assert [text for role, text in said(two) if role == "assistant"] == TURNS


def test_an_answer_the_agent_was_asked_to_repeat_is_not_trained() -> None:
    bad = action("I forget the call.")
    complaint = [
        {"role": "assistant", "content": "I forget the call.", "agent": "main", "message_type": "assistant"},
        {"role": "user", "content": "Call a tool.", "agent": "main", "message_type": "user"},
    ]
    document = copy.deepcopy(WHOLE)
    second = document["trajectory"][1]
    document["trajectory"].insert(1, step(bad, copy.deepcopy(second["query"])))
    second["query"] += complaint
    found = read(document, "swe_agent")
    (conversation,) = found.conversations
    assert trained(conversation) == TURNS
    assert "I forget" not in str(said(conversation))
    assert found.dropped == {"answers that the agent was asked to repeat": 1}


def test_the_step_that_the_program_writes_when_it_gives_up_is_dropped() -> None:
    text = "Exit due to cost limit"
    gave_up = step(action(text), [{}])
    history = [*WHOLE["history"][:6], action(text), observed("Exited (autosubmitted)")]
    document = {
        "trajectory": [*copy.deepcopy(WHOLE["trajectory"][:2]), gave_up],
        "history": history,
        "info": {"exit_status": "submitted (exit_cost)"},
    }
    for kept in (document, without(document, "trajectory")):
        found = read(kept, "swe_agent")
        assert trained(found.conversations[0]) == TURNS[:2]
        assert found.dropped == {"steps that the program wrote": 1}
    ends = {**without(document, "trajectory"), "info": {"exit_status": "exit_command"}}
    ends["history"] = [*ends["history"][:-2], action("I leave.", "exit", "t9")]
    assert len(trained(read(ends, "swe_agent").conversations[0])) == 3


def test_demonstrations_are_context() -> None:
    demo = [
        {**TASK, "content": "Fix b.py.", "is_demo": True},
        {**action("As shown.", "cat b.py", "d1"), "is_demo": True},
        {**observed("b", "d1"), "is_demo": True},
    ]
    document = copy.deepcopy(WHOLE)
    for messages in (document["history"], *(each["query"] for each in document["trajectory"])):
        messages[1:1] = demo
    for kept in (document, without(document, "trajectory")):
        (conversation,) = read(kept, "swe_agent").conversations
        assert trained(conversation) == TURNS
        assert said(conversation)[2] == ("assistant", 'As shown. bash({"command": "cat b.py"})')


def test_other_agents_of_a_history_are_conversations_of_their_own() -> None:
    reviewer = [
        {"role": "system", "content": "You review.", "agent": "reviewer"},
        {"role": "user", "content": "Is it right?", "agent": "reviewer"},
        {"role": "assistant", "content": "Yes.", "agent": "reviewer"},
    ]
    noise = [{"role": "assistant", "content": "?", "agent": "chooser"}]
    document = {"history": [*WHOLE["history"], *reviewer, *noise], "info": {}}
    found = read(document, "swe_agent")
    one, two = found.conversations
    assert trained(one) == TURNS
    assert said(two) == [("system", "You review."), ("user", "Is it right?"), ("assistant", "Yes.")]
    assert found.dropped == {"messages of other agents": 1}


def test_the_chosen_attempt_is_read_and_the_others_are_counted() -> None:
    attempt = without(WHOLE, "replay_config")
    found = read({**WHOLE, "attempts": [attempt, attempt]}, "swe_agent")
    assert trained(found.conversations[0]) == TURNS
    assert found.dropped == {"attempts that were not chosen": 1}
    assert trained(read({"attempts": [attempt]}, "swe_agent").conversations[0]) == TURNS
    with pytest.raises(DataError, match="none of its 2 attempts was chosen"):
        read({"attempts": [attempt, attempt]}, "swe_agent")


def test_thinking_and_flags_of_steps_are_read() -> None:
    document = copy.deepcopy(WHOLE)
    document["trajectory"][0]["loss_mask"] = 0
    document["trajectory"][1]["reasoning_content"] = "One becomes two."
    document["history"][-2]["thinking_blocks"] = [
        {"type": "thinking", "thinking": "Enough.", "signature": "x"}
    ]
    (conversation,) = read(document, "swe_agent").conversations
    assert trained(conversation) == ["<One becomes two.> " + TURNS[1], "<Enough.> " + TURNS[2]]


def test_a_step_is_masked_under_mask_key() -> None:
    document = copy.deepcopy(WHOLE)
    for each, keep in zip(document["trajectory"], (1, 0, 1), strict=True):
        each["keep"] = keep
    (conversation,) = conversations_of(document, "swe_agent", ReadingOptions(mask_key="keep"))
    assert trained(conversation) == [TURNS[0], TURNS[2]]
    with pytest.raises(DataError, match="no mask under mask_key=kept"):
        conversations_of(document, "swe_agent", ReadingOptions(mask_key="kept"))


# -- mini-swe-agent and data sets -----------------------------------------------------------------


def mini(*messages: Entry, version: str = "mini-swe-agent-1.1") -> Entry:
    exit = {"role": "exit", "content": "patch", "extra": {"exit_status": "Submitted", "submission": "patch"}}
    info = {"exit_status": "Submitted", "submission": "patch", "mini_version": "2.4.6"}
    return {"info": info, "messages": [*messages, exit], "trajectory_format": version, "instance_id": "x-1"}


def mini_call(call_id: str, command: str) -> Entry:
    function = {"name": "bash", "arguments": json.dumps({"command": command})}
    return {"id": call_id, "type": "function", "function": function}


def test_mini_swe_agent_calls_and_results_are_read_and_exit_is_dropped() -> None:
    document = mini(
        {"role": "system", "content": "You fix code."},
        {"role": "user", "content": "Fix a.py."},
        {
            "role": "assistant",
            "content": None,
            "function_call": None,
            "reasoning_content": "Two at once.",
            "tool_calls": [mini_call("c1", "ls"), mini_call("c2", "pwd")],
            "extra": {"actions": [{"command": "ls", "tool_call_id": "c1"}], "cost": 0.1, "timestamp": 1.0},
        },
        {"role": "tool", "tool_call_id": "c2", "content": "/w", "extra": {"returncode": 0}},
        {"role": "tool", "tool_call_id": "c1", "content": "a.py", "extra": {"returncode": 0}},
        {
            "role": "user",
            "content": "Use a tool.",
            "extra": {"interrupt_type": "FormatError", "response": {}},
        },
        {"role": "assistant", "content": "I submit.", "tool_calls": [mini_call("c3", "submit")]},
    )
    assert marked(document) is not None
    found = read(document, "swe_agent")
    assert said(found.conversations[0])[2:] == [
        ("assistant", '<Two at once.> bash({"command": "ls"}) bash({"command": "pwd"})'),
        ("tool", "a.py"),
        ("tool", "/w"),
        ("user", "Use a tool."),
        ("assistant", 'I submit. bash({"command": "submit"})'),
    ]
    assert found.dropped == {"messages of role exit": 1, "answers that the agent was asked to repeat": 1}


def test_mini_swe_agent_may_hold_items_of_the_responses_api() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look."}], "id": "r"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "bash",
            "arguments": '{"command": "ls"}',
            "id": "f",
        },
    ]
    document = mini(
        {"role": "system", "content": "You fix code."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix a.py."}]},
        {"object": "response", "id": "resp", "output": output, "extra": {"cost": 0.1}},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py", "extra": {}},
        {"object": "response", "output": [{"type": "message", "content": "Done."}]},
    )
    (conversation,) = read(document, "swe_agent").conversations
    assert said(conversation)[1:] == [
        ("user", "Fix a.py."),
        ("assistant", '<Look.> I look. bash({"command": "ls"})'),
        ("tool", "a.py"),
        ("assistant", "Done."),
    ]


def test_version_1_of_mini_swe_agent_ends_with_the_submission_of_the_user() -> None:
    document = mini(
        {"role": "system", "content": "You fix code.", "timestamp": 1.0},
        {"role": "user", "content": "Fix a.py.", "timestamp": 1.0},
        {
            "role": "assistant",
            "content": "THOUGHT\n```bash\nls\n```",
            "timestamp": 1.0,
            "extra": {"response": {}},
        },
        {"role": "user", "content": "patch", "timestamp": 1.0},
        version="mini-swe-agent-1",
    )
    document["messages"].pop()
    assert marked(document) is None  # the messages format reads it
    (conversation,) = read(document, "swe_agent").conversations
    assert said(conversation)[-1] == ("assistant", "THOUGHT\n```bash\nls\n```")


def test_rows_of_swe_smith_hold_messages_as_json_and_whether_they_are_resolved() -> None:
    row = {
        "messages": json.dumps(WHOLE["history"]),
        "instance_id": "x-1",
        "resolved": False,
        "model": "m",
        "traj_id": "t",
        "patch": "p",
    }
    assert trained(read(row, "swe_agent").conversations[0]) == TURNS
    assert conversations_of(row, "swe_agent", ReadingOptions(min_reward=1)) == []
    assert len(conversations_of({**row, "resolved": True}, "swe_agent", ReadingOptions(min_reward=1))) == 1


def test_rows_of_swe_agent_trajectories_hold_roles_and_texts() -> None:
    row = {
        "instance_id": "x-1",
        "target": True,
        "exit_status": "submitted",
        "trajectory": [
            {
                "role": "system",
                "system_prompt": "You fix code.",
                "text": None,
                "mask": False,
                "cutoff_date": "c",
            },
            {"role": "user", "system_prompt": None, "text": "Fix a.py.", "mask": False},
            {"role": "ai", "system_prompt": None, "text": "ls", "mask": False},
            {"role": "user", "system_prompt": None, "text": "a.py", "mask": False},
            {"role": "ai", "system_prompt": None, "text": "submit", "mask": False},
            {"role": "user", "system_prompt": None, "text": "diff", "mask": False},
        ],
    }
    (conversation,) = conversations_of(row, "swe_agent", ReadingOptions(min_reward=1))
    assert said(conversation)[0] == ("system", "You fix code.")
    assert trained(conversation) == ["ls", "submit"]
    row["target"] = False
    assert conversations_of(row, "swe_agent", ReadingOptions(min_reward=1)) == []


def test_a_trajectory_may_stand_inside_a_row_also_as_json() -> None:
    for inner in (WHOLE, json.dumps(WHOLE)):
        row = {"instance_id": "x-1", "resolved": True, "data": {"traj": inner}}
        (conversation,) = conversations_of(row, "swe_agent", ReadingOptions(min_reward=1))
        assert trained(conversation) == TURNS
    scored = {**WHOLE, "info": {"exit_status": "submitted", "review": {"accept": 0.25}}}
    options = ReadingOptions(min_reward=0.5, reward_key="info.review.accept")
    assert conversations_of(scored, "swe_agent", options) == []


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"steps": 1}, "no list under `trajectory`, `history` or `messages` .keys: steps."),
        ({"history": [SYSTEM, 7]}, "item 2 of `history` is a int"),
        ({"history": [SYSTEM, TASK, {**LOOK, "tool_calls": [7]}]}, "a tool call of message 3 is a int"),
        ({"history": [SYSTEM, {**TASK, "role": "judge"}]}, "message 2 has the role `judge`"),
        (
            {"history": [TASK, LOOK, observed("x", "t8")]},
            "message 3 answers the call `t8`, which was not made",
        ),
        (
            {"history": [TASK, {**LOOK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "message 2 has a part of type `image_url`",
        ),
        ({"trajectory": [step(LOOK, [TASK, 7])]}, "item 2 of `query` of step 1 is a int"),  # type: ignore[list-item]
        ({"trajectory": [{**step(LOOK, [TASK]), "response": 7}]}, "the response of step 1 is a int"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(document: Entry, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(document, "swe_agent")


def test_rows_of_swe_agent_are_refused_where_no_format_is_named() -> None:
    for row in (WHOLE, without(WHOLE, "history", "info")):
        with pytest.raises(DataError, match="format=swe_agent"):
            conversations_of(row)


def test_a_step_of_swe_agent_is_no_step_of_a_trajectory() -> None:
    row = {"task": "Fix a.py.", "steps": WHOLE["trajectory"]}
    with pytest.raises(DataError, match="step 1 is a step of SWE-agent.*format=swe_agent"):
        conversations_of(row)


@pytest.mark.slow
def test_malformed_values_are_refused_by_a_data_error_or_read() -> None:
    items = {"object": "response", "output": [{"type": "message", "content": "Hi."}]}
    refused = 0
    for whole in (WHOLE, mini(SYSTEM, TASK, items)):
        for document in damaged(whole):
            try:
                conversations_of(document, "swe_agent", ReadingOptions(min_reward=0, reward_key="info.score"))
                conversations_of(document, "swe_agent")
            except DataError:
                refused += 1
    assert refused > 100


# -- files ------------------------------------------------------------------------------------


def test_the_trained_tokens_of_a_folder_of_trajectories(
    tmp_path: Path, trained_texts: Callable[..., list[list[str]]]
) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "one" / "one.traj").write_text(json.dumps(WHOLE), encoding="utf-8")
    other = trajectory(action("Nothing to fix."))
    packed = gzip.compress(json.dumps(other).encode())
    (tmp_path / "runs" / "two" / "two.traj.gz").write_bytes(packed)
    (tmp_path / "runs" / "preds.json").write_text('{"x-1": {"model_patch": "p"}}', encoding="utf-8")
    whole, alone = trained_texts(tmp_path / "runs", "swe_agent", renderer_name="qwen3_instruct")
    assert alone == ["Nothing to fix.<|im_end|>"]
    for turn, text, command in zip(whole, ("look", "fix", "submit"), COMMANDS, strict=True):
        assert turn.startswith(f"I {text}.")
        assert f'"command": "{command}"' in turn
        assert turn.endswith("</tool_call><|im_end|>")


@pytest.mark.published
@pytest.mark.parametrize("name", ["data.jsonl", "x.json", "x.traj"])
def test_a_published_trajectory_trains_its_three_answers(
    trained_texts: Callable[..., list[list[str]]], name: str
) -> None:
    path = trace_path(f"swe_agent_traj_query/{name}")
    (turns,) = trained_texts(path, "swe_agent", renderer_name="qwen3_instruct")
    assert [turn.partition("\n")[0] for turn in turns] == ["THOUGHT look", "THOUGHT fix", "THOUGHT submit"]
