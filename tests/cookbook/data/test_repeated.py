"""History that conversations repeat is trained once, and held-out rows share no answer with trained ones."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained_texts import trained_texts

from cookbook import models
from cookbook.data import FromConversationFileBuilder
from cookbook.data.conversation import Conversation
from cookbook.data.repeated import Decision, groups_of, grow, held_out_of, paths_of, row_keys
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset
from cookbook.errors import DataError
from renderers import Message, TrainOnWhat

ALL = TrainOnWhat.ALL_ASSISTANT_MESSAGES
TOOL = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def agent(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def chat(*texts: str, **more: Any) -> Conversation:
    """Turns of the user and of the assistant, one after the other."""
    messages = [agent(text) if number % 2 else user(text) for number, text in enumerate(texts)]
    return Conversation(messages, is_rollout=True, **more)


def merged(conversations: Sequence[Conversation], mode: TrainOnWhat = ALL) -> list[list[str] | None]:
    """The texts that each conversation trains; None for one that is merged into another."""
    paths = paths_of([[conversation] for conversation in conversations], mode)
    decisions = grow(paths, "merge").decisions
    found: list[list[str] | None] = []
    for number, conversation in enumerate(conversations):
        own = {
            at: 1.0
            for at, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and message.get("trainable") is not False
        }
        decision = decisions.get(number, Decision(False, own))
        texts = [str(conversation.messages[at]["content"]) for at in sorted(decision.weights)]
        found.append(None if decision.is_merged else texts)
    return found


# -- the tree ---------------------------------------------------------------------------------


def test_a_beginning_is_merged_into_the_longer_conversation() -> None:
    assert merged([chat("q", "1"), chat("q", "1", "r", "2")]) == [None, ["1", "2"]]
    assert merged([chat("q", "1", "r", "2"), chat("q", "1")]) == [["1", "2"], None]


def test_of_equal_conversations_the_first_is_kept() -> None:
    assert merged([chat("q", "1"), chat("q", "1"), chat("q", "1")]) == [["1"], None, None]


def test_in_a_branch_turns_that_another_trains_are_context() -> None:
    assert merged([chat("q", "1", "r", "2"), chat("q", "1", "s", "3")]) == [["1", "2"], ["3"]]


def test_other_tools_or_variables_are_another_conversation() -> None:
    assert merged([chat("q", "1"), chat("q", "1", tools=[TOOL])]) == [["1"], ["1"]]
    assert merged([chat("q", "1"), chat("q", "1", template_kwargs={"enable_thinking": False})]) == [
        ["1"],
        ["1"],
    ]


def logged(*texts: str) -> Conversation:
    """A logged call: only its last answer is trained."""
    found = chat(*texts)
    for message in found.messages[:-1]:
        if message["role"] == "assistant":
            message["trainable"] = False
    return found


def test_answers_that_rows_train_one_each_are_all_trained_in_the_longest() -> None:
    rows = [logged("q", "1"), logged("q", "1", "r", "2"), logged("q", "1", "r", "2", "s", "3")]
    for order in itertools.permutations(rows):
        assert sorted(map(str, merged(order))) == sorted(map(str, [None, None, ["1", "2", "3"]]))


def test_an_answer_that_no_row_trains_stays_untrained() -> None:
    rows = [logged("q", "example", "r", "1"), logged("q", "example", "r", "1", "s", "2")]
    assert merged(rows) == [None, ["1", "2"]]


def test_a_turn_is_trained_with_its_thinking_where_a_log_drops_it_later() -> None:
    one = Conversation([user("q"), agent("1", reasoning_content="hm")], is_rollout=True)
    two = Conversation(
        [user("q"), agent("1"), user("r"), agent("2", reasoning_content="so")], is_rollout=True
    )
    assert merged([one, two]) == [["1"], ["2"]]
    assert merged([two, one]) == [["2"], ["1"]]


def test_ids_of_calls_do_not_tell_conversations_apart() -> None:
    def called(call_id: str, *rest: Message) -> Conversation:
        call = {"id": call_id, "type": "function", "function": {"name": "shell", "arguments": {"cmd": "ls"}}}
        result: Message = {"role": "tool", "tool_call_id": call_id, "content": "a.txt"}
        return Conversation([user("q"), agent("look", tool_calls=[call]), result, *rest], tools=[TOOL])

    assert merged([called("a"), called("b", agent("done"))]) == [None, ["look", "done"]]


def test_only_rollouts_and_calls_of_tools_are_merged_by_default() -> None:
    plain = [
        Conversation([user("q"), agent("1")]),
        Conversation([user("q"), agent("1"), user("r"), agent("2")]),
    ]
    tree = grow(paths_of([plain], ALL), None)
    assert (tree.decisions, tree.twins) == ({}, {})
    with_tools = [Conversation(each.messages, tools=[TOOL]) for each in plain]
    assert grow(paths_of([with_tools], ALL), None).decisions[0].is_merged


def test_a_last_answer_of_each_row_is_trained_in_the_longest() -> None:
    rows = [chat("q", "1"), chat("q", "1", "r", "2")]
    assert merged(rows, TrainOnWhat.LAST_ASSISTANT_MESSAGE) == [None, ["1", "2"]]


def test_users_turns_of_the_mode_stay_trained_in_every_branch() -> None:
    rows = [[chat("q", "1", "r", "2")], [chat("q", "1", "s", "3")]]
    decisions = grow(paths_of(rows, TrainOnWhat.ALL_MESSAGES), "merge").decisions
    assert dict(decisions[1].weights) == {0: 1.0, 2: 1.0, 3: 1.0}


Walk = list[int]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_in_any_tree_every_answer_is_trained_exactly_once(walks: list[Walk]) -> None:
    """A walk chooses the next message of three at each turn; the conversation is what it passes."""
    rows = []
    for walk in walks:
        messages: list[Message] = []
        for depth, choice in enumerate(walk):
            messages += [user(f"u{depth}"), agent(f"a{choice}")]
        rows.append(Conversation(messages, is_rollout=True))
    decisions = grow(paths_of([[row] for row in rows], ALL), "merge").decisions
    trained: Counter[str] = Counter()
    kept = []
    for number, row in enumerate(rows):
        decision = decisions.get(number)
        if decision is not None and decision.is_merged:
            continue
        kept.append(walks[number])
        for at in range(1, len(row.messages), 2) if decision is None else decision.weights:
            trained[json.dumps(walks[number][: at // 2 + 1])] += 1
    nodes = {json.dumps(walk[:end]) for walk in walks for end in range(1, len(walk) + 1)}
    assert trained == Counter(dict.fromkeys(nodes, 1))
    leaves = {
        json.dumps(walk)
        for walk in walks
        if not any(other[: len(walk)] == walk and len(other) > len(walk) for other in walks)
    }
    assert sorted(map(json.dumps, kept)) == sorted(leaves)


# -- held-out rows ----------------------------------------------------------------------------


def groups(*rows: Conversation) -> list[int]:
    return groups_of(row_keys(paths_of([[row] for row in rows], ALL))).tolist()


def test_rows_that_share_an_answer_or_a_prompt_are_one_group() -> None:
    assert groups(chat("q", "1"), chat("q", "1", "r", "2"), chat("p", "1"), chat("q", "3")) == [0, 0, 2, 0]


def test_a_shared_system_prompt_is_no_reason_to_stay_together() -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    rows = [Conversation([system, user(text), agent("yes")]) for text in "ab"]
    assert groups(*rows) == [0, 1]
    without_user = [Conversation([system, agent(text)]) for text in "ab"]
    assert groups(*without_user) == [0, 1]


def test_texts_are_together_where_they_are_equal() -> None:
    assert groups(*(Conversation([], text=text) for text in "aab")) == [0, 0, 2]


def test_groups_are_held_out_whole_and_no_more_rows_than_asked() -> None:
    group_of = np.asarray([0, 0, 0, 3, 4, 4, 6])
    order = np.arange(7)
    assert held_out_of(group_of, order, 2).tolist() == [False, False, False, True, False, False, True]
    assert held_out_of(group_of, order, 3).tolist() == [True] * 3 + [False] * 4
    assert not held_out_of(np.zeros(5, np.int64), np.arange(5), 4).any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 9))
def test_rows_of_their_own_are_held_out_as_a_permutation_says(
    numbers: list[int], size: int, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(numbers))
    alone = held_out_of(np.arange(len(numbers)), order, size)
    assert np.flatnonzero(alone).tolist() == sorted(order[:size].tolist())
    _, group_of = np.unique(numbers, return_inverse=True)
    found = held_out_of(group_of, order, size)
    assert found.sum() <= size
    assert not set(group_of[found].tolist()) & set(group_of[~found].tolist())


# -- files ------------------------------------------------------------------------------------


def nested(num_turns: int, task: str = "Tidy up.", first: int = 1) -> list[dict[str, Any]]:
    """Rows of a log: each holds a turn with all before it."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    rows = []
    for number in range(first, first + num_turns):
        call = {
            "id": f"c{number}",
            "type": "function",
            "function": {"name": "shell", "arguments": {"n": number}},
        }
        messages.append({"role": "assistant", "content": f"answer {task} {number}", "tool_calls": [call]})
        rows.append({"messages": list(messages), "tools": [TOOL]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": f"result {number}"})
    return rows


def built(
    tmp_path: Path, model: str, rows: Sequence[Any], **options: Any
) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {key: options.pop(key) for key in ("max_length", "on_long", "batch_size") if key in options}
    config = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model,
        renderer_name="qwen3",
        **{"max_length": None, "batch_size": 2, **common},
    )
    return FromConversationFileBuilder(
        file_path=str(path), common_config=config, **{"test_size": 0, **options}
    )()


def answers(dataset: SupervisedDataset | None, model: str) -> Counter[str]:
    """How often each answer is trained."""
    assert dataset is not None
    texts = trained_texts(dataset, models.get_tokenizer(model))
    plain = (text.split("</think>")[-1].split("<tool_call>")[0] for each in texts for text in each)
    return Counter(text.removesuffix("<|im_end|>").strip() for text in plain)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_log_train_each_answer_once(tmp_path: Path, tiny_qwen3: str, streaming: bool) -> None:
    rows = nested(6)
    branch = [*rows[2]["messages"], {"role": "tool", "tool_call_id": "c3", "content": "another result"},
              {"role": "assistant", "content": "of a branch"}]  # fmt: skip
    rows.insert(1, {"messages": branch, "tools": [TOOL]})
    train, _ = built(tmp_path, tiny_qwen3, rows, streaming=streaming)
    expected = Counter({f"answer Tidy up. {number}": 1 for number in range(1, 7)} | {"of a branch": 1})
    assert answers(train, tiny_qwen3) == expected
    assert answers(train, tiny_qwen3) == expected
    kept, _ = built(tmp_path, tiny_qwen3, rows, repeated="keep", streaming=streaming)
    assert answers(kept, tiny_qwen3)["answer Tidy up. 1"] == 7


def test_merging_is_reported(tmp_path: Path, tiny_qwen3: str) -> None:
    def lines(**options: Any) -> str:
        (report,) = built(tmp_path, tiny_qwen3, nested(6), **options)[0].reports()
        return " ".join(" ".join(report.lines()).split())

    assert "5 conversations repeated the beginning of another (repeated=merge)" in lines()
    assert "5 conversations repeated the beginning of another (repeated=keep)" in lines(repeated="keep")
    with pytest.raises(
        DataError, match="line 1 of log.jsonl repeats the beginning of line 2 of log.jsonl, as 4 others do"
    ):
        lines(repeated="raise")


def test_answers_that_several_datasets_train_are_named(
    tmp_path: Path, tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, rows in (("a", nested(3)), ("b", nested(5)), ("c", nested(2, "Sleep."))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=tiny_qwen3, renderer_name="qwen3", max_length=None
    )

    def build(names: str, repeated: Any) -> None:
        files = ",".join(str(tmp_path / f"{name}.jsonl") for name in names)
        FromConversationFileBuilder(file_path=files, common_config=config, test_size=0, repeated=repeated)()

    build("ab", "merge")
    assert "3 trained answers are in several of the datasets a.jsonl, b.jsonl" in caplog.text
    caplog.clear()
    build("ac", "merge")
    build("ab", "keep")
    assert "trained answers" not in caplog.text
    (tmp_path / "a.jsonl").write_text(json.dumps(nested(3)[-1]) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps(nested(5)[-1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="3 trained answers are in several of the datasets"):
        build("ab", "raise")


def test_plain_chats_that_repeat_others_are_kept_and_reported(tmp_path: Path, tiny_qwen3: str) -> None:
    rows = [
        {"messages": [user("q"), agent("1")]},
        {"messages": [user("q"), agent("1"), user("r"), agent("2")]},
    ]
    train, _ = built(tmp_path, tiny_qwen3, rows)
    assert answers(train, tiny_qwen3)["1"] == 2
    assert "1 conversation repeated the beginning of another (repeated=keep)" in " ".join(
        train.reports()[0].lines()
    )


@pytest.mark.cases(4)
@pytest.mark.parametrize("repeated", [None, "keep"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_held_out_answer_is_trained(
    tmp_path: Path, tiny_qwen3: str, repeated: str | None, streaming: bool, seed: int
) -> None:
    rows = [row for number in range(8) for row in nested(3, f"Task {number}.")]
    np.random.default_rng(seed).shuffle(rows)  # type: ignore[arg-type]
    train, test = built(
        tmp_path, tiny_qwen3, rows, test_size=6, repeated=repeated, streaming=streaming, shuffle_seed=seed
    )
    trained, held_out = answers(train, tiny_qwen3), answers(test, tiny_qwen3)
    assert held_out
    assert trained
    assert not trained.keys() & held_out.keys()
    if not streaming:
        assert len(trained.keys() | held_out.keys()) == 24


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [user(f"q{n % 10}"), agent(f"a{n % 10}")]} for n in range(40)],
        [{"conversations": [{"from": "human", "value": f"q{n % 10}"}, {"from": "gpt", "value": f"a{n % 10}"}]}
         for n in range(40)],
        [{"prompt": f"q{n % 10}", "completion": f"a{n % 10}"} for n in range(40)],
        [{"instruction": f"q{n % 10}", "output": f"a{n % 10}"} for n in range(40)],
        [{"text": f"a{n % 10}"} for n in range(40)],
        [{"steps": [{"observation": f"q{n % 10}", "action": f"a{n % 10}"}]} for n in range(40)],
    ],
)  # fmt: skip
def test_no_held_out_answer_is_trained_in_any_format(
    tmp_path: Path, tiny_qwen3: str, rows: list[dict[str, Any]]
) -> None:
    train, test = built(tmp_path, tiny_qwen3, rows, test_size=8, repeated="keep")
    trained, held_out = answers(train, tiny_qwen3), answers(test, tiny_qwen3)
    assert (sum(held_out.values()), sum(trained.values())) == (8, 32)
    assert not trained.keys() & held_out.keys()


def test_rows_that_all_share_an_answer_cannot_be_held_out(tmp_path: Path, tiny_qwen3: str) -> None:
    rows = nested(20)
    with pytest.raises(
        DataError, match="test_size=3 rows cannot be held out: the 20 rows in log.jsonl share"
    ):
        built(tmp_path, tiny_qwen3, rows, test_size=3, repeated="keep")
    train, test = built(tmp_path, tiny_qwen3, rows, test_size=None, repeated="keep")
    assert test is None
    assert len(answers(train, tiny_qwen3)) == 20


@pytest.mark.slow
def test_a_stream_merges_the_same_rows_wherever_it_begins(tmp_path: Path, tiny_qwen3: str) -> None:
    rows = [row for number in range(60) for row in nested(5, f"Task {number}.")]
    train, _ = built(tmp_path, tiny_qwen3, rows, streaming=True, batch_size=7)
    batches = list(train.iter_batches())
    again, _ = built(tmp_path, tiny_qwen3, rows, streaming=True, batch_size=7)
    for index in (30, 3, 41):
        found = [datum.model_input.to_ints() for datum in again.get_batch(index)]
        assert found == [datum.model_input.to_ints() for datum in batches[index]]
    counts = answers(train, tiny_qwen3)
    # Task 51 has its rows on both sides of the border between two runs of 256 neighbours.
    assert {text for text, number in counts.items() if number > 1} == {"answer Task 51. 1"}
    assert len(counts) == 300
