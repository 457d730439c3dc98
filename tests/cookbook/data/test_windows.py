"""Long conversations in windows: every turn trained once, with as much before it as fits."""

from __future__ import annotations

import copy
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import chat_formats
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained_texts import trained_texts

from cookbook import models
from cookbook.data import FromConversationFileBuilder
from cookbook.data.repeated import weights_of, with_weights
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset
from cookbook.data.windows import windows
from cookbook.errors import ConfigError
from renderers import Message, TrainOnWhat, get_renderer

TOOL = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object", "properties": {}}}}


def rollout(num_steps: int, size: int = 3) -> list[dict[str, Any]]:
    """A task and tool calls, each with a result."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be an agent."},
        {"role": "user", "content": "The task."},
    ]
    for number in range(num_steps):
        call = {
            "id": f"c{number}",
            "type": "function",
            "function": {"name": "shell", "arguments": {"n": number}},
        }
        messages += [
            {"role": "assistant", "content": f"step {number}", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": " ".join([f"result {number}"] * size)},
        ]
    return [*messages, {"role": "assistant", "content": "the end"}]


def dialogue(num_turns: int) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(num_turns):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    return messages


def built(tmp_path: Path, model: str, messages: list[Any], **common: Any) -> SupervisedDataset:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n", encoding="utf-8")
    config = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, **{"renderer_name": "qwen3", "on_long": "window", **common}
    )
    return FromConversationFileBuilder(file_path=str(path), common_config=config, test_size=0)()[0]


def plain(text: str) -> str:
    return text.split("</think>")[-1].split("<tool_call>")[0].removesuffix("<|im_end|>").strip()


@pytest.mark.cases(4)
@pytest.mark.parametrize("renderer_name", ["qwen3", "qwen3_instruct"])
@pytest.mark.parametrize("max_length", [1000, 1500, 3000])
@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        (rollout(40), [*(f"step {number}" for number in range(40)), "the end"]),
        (dialogue(60), [f"answer {number}" for number in range(60)]),
    ],
    ids=["rollout", "dialogue"],
)
def test_every_turn_is_trained_once_within_the_length(
    tmp_path: Path, tiny_qwen3: str, renderer_name: str, max_length: int, messages: Any, answers: list[str]
) -> None:
    train = built(tmp_path, tiny_qwen3, messages, max_length=max_length, renderer_name=renderer_name)
    tokenizer = models.get_tokenizer(tiny_qwen3)
    found = [plain(text) for each in trained_texts(train, tokenizer) for text in each]
    assert Counter(found) == Counter(answers)
    for batch in train.iter_batches():
        for datum in batch:
            assert len(datum.model_input.to_ints()) < max_length
            text = tokenizer.decode(datum.model_input.to_ints())
            assert text.startswith("<|im_start|>system\n")
            assert messages[0]["content"] in text
            assert '"name": "shell"' in text
            # What follows the system prompt is a turn: never a result without its call.
            assert text.split("<|im_end|>\n<|im_start|>")[1].startswith("user\n")
            assert "<tool_response>" not in text.split("<|im_end|>\n<|im_start|>")[1]


def test_a_window_within_the_calls_of_a_task_keeps_the_task(tmp_path: Path, tiny_qwen3: str) -> None:
    train = built(tmp_path, tiny_qwen3, rollout(40), max_length=1200)
    tokenizer = models.get_tokenizer(tiny_qwen3)
    texts = [
        tokenizer.decode(datum.model_input.to_ints()) for batch in train.iter_batches() for datum in batch
    ]
    assert len(texts) > 2
    assert all("The task." in text for text in texts)


def test_a_turn_has_the_context_before_it_that_fits(tmp_path: Path, tiny_qwen3: str) -> None:
    """All but the first turn have what takes a good third of the window before them."""
    train = built(tmp_path, tiny_qwen3, rollout(60), max_length=1500, renderer_name="qwen3_instruct")
    for batch in train.iter_batches():
        for datum in batch:
            weights = datum.loss_fn_inputs["weights"].to_numpy()
            is_first = "step 0" in models.get_tokenizer(tiny_qwen3).decode(datum.model_input.to_ints())
            assert is_first or weights.nonzero()[0][0] > 1500 / 3


@pytest.mark.slow
def test_windows_cost_a_linear_number_of_tokens(tmp_path: Path, tiny_qwen3: str) -> None:
    def tokens(num_steps: int) -> tuple[int, int]:
        whole = built(
            tmp_path, tiny_qwen3, rollout(num_steps), max_length=None, renderer_name="qwen3_instruct"
        ).reports()[0]
        cut = built(tmp_path, tiny_qwen3, rollout(num_steps), max_length=1500, renderer_name="qwen3_instruct")
        return whole.tokens, cut.reports()[0].tokens

    for num_steps in (50, 200):
        whole, cut = tokens(num_steps)
        assert cut < 3 * whole


def test_a_conversation_that_fits_is_left_as_it_is(tmp_path: Path, tiny_qwen3: str) -> None:
    whole = built(tmp_path, tiny_qwen3, rollout(3), max_length=None, on_long="truncate")
    same = built(tmp_path, tiny_qwen3, rollout(3), max_length=3000)
    assert [[datum.model_input.to_ints() for datum in batch] for batch in whole.iter_batches()] == [
        [datum.model_input.to_ints() for datum in batch] for batch in same.iter_batches()
    ]


def test_a_turn_that_fits_no_window_is_truncated_and_reported(tmp_path: Path, tiny_qwen3: str) -> None:
    messages = dialogue(20)
    messages[20]["content"] = "a very long answer " * 200
    train = built(tmp_path, tiny_qwen3, messages, max_length=1000)
    tokenizer = models.get_tokenizer(tiny_qwen3)
    found = Counter(plain(text) for each in trained_texts(train, tokenizer) for text in each)
    assert set(found.values()) == {1}
    assert len(found) == 20
    (report,) = train.reports()
    assert report.truncated == 1
    assert "Long conversations cut into windows (on_long=window)" in " ".join(report.lines())


def test_turns_that_are_not_trained_are_context_in_windows(tmp_path: Path, tiny_qwen3: str) -> None:
    messages = dialogue(60)
    for message in messages[2::4]:
        message["train"] = False
    train = built(tmp_path, tiny_qwen3, messages, max_length=1000)
    texts = trained_texts(train, models.get_tokenizer(tiny_qwen3))
    found = Counter(plain(text) for each in texts for text in each)
    assert found == Counter(f"answer {number}" for number in range(1, 60, 2))


def test_all_tokens_have_no_turns_to_make_windows_of(tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match="all_tokens trains no messages"):
        ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=tiny_qwen3, on_long="window", train_on_what=TrainOnWhat.ALL_TOKENS
        )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.booleans()), min_size=1, max_size=25),
    st.integers(60, 300),
)
def test_any_conversation_trains_every_chosen_turn_once(
    tiny_tokenizer: Any, turns: list[tuple[int, int, bool]], max_length: int
) -> None:
    renderer = get_renderer("role_colon", tiny_tokenizer)
    messages: list[Message] = []
    weights = {}
    for number, (asked, said, is_trained) in enumerate(turns):
        messages += [
            {"role": "user", "content": f"q{number} " + "word " * asked},
            {"role": "assistant", "content": f"a{number} " + "word " * said, "trainable": is_trained},
        ]
        if is_trained:
            weights[2 * number + 1] = 1.0
    trained: Counter[str] = Counter()

    def render(some: Any, chosen: Any) -> Any:
        flagged = [{**message, "trainable": place in chosen} for place, message in enumerate(some)]
        return renderer.render_conversation(flagged, TrainOnWhat.CUSTOMIZED)

    for example in windows(messages, weights, max_length, render):
        text = tiny_tokenizer.decode(example.tokens_T[example.weights_T > 0])
        trained.update(word for word in text.replace("\n", " ").split() if word.startswith("a"))
    assert trained == Counter(f"a{number}" for number, turn in enumerate(turns) if turn[2])


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_windows_of_a_merged_log_are_the_same_from_any_batch(
    tmp_path: Path, tiny_qwen3: str, streaming: bool
) -> None:
    path = tmp_path / "log.jsonl"
    calls = [{"messages": dialogue(number)} for _ in range(2) for number in range(1, 21)]
    rows = [
        {
            "request": {"messages": call["messages"][:-1]},
            "response": {"choices": [{"message": call["messages"][-1]}]},
        }
        for call in calls
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def data() -> SupervisedDataset:
        config = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=tiny_qwen3,
            renderer_name="qwen3",
            on_long="window",
            max_length=400,
            batch_size=1,
        )
        train, _ = FromConversationFileBuilder(
            file_path=str(path),
            common_config=config,
            format="openai_log",
            repeated="merge",
            streaming=streaming,
            test_size=0,
        )()
        train.set_epoch(1)
        return train

    def tokens(train: SupervisedDataset, number: int) -> list[tuple[list[int], list[float]]]:
        batch = train.get_batch(number)
        return [(each.model_input.to_ints(), each.loss_fn_inputs["weights"].tolist()) for each in batch]

    whole = data()
    expected = [tokens(whole, number) for number in range(3 if streaming else len(whole))]
    for number in range(len(expected)):
        assert tokens(data(), number) == expected[number]
    found = [plain(text) for each in trained_texts(data(), models.get_tokenizer(tiny_qwen3)) for text in each]
    assert Counter(found) == Counter(f"answer {number}" for number in range(20))


@pytest.mark.published
@pytest.mark.parametrize(
    ("name", "tokenizer_name"),
    [
        ("qwen3", "qwen3"),
        ("qwen3_instruct_2507", "qwen3"),
        ("qwen2_5", "qwen3"),
        ("smollm3", "qwen3"),
        ("qwen3_5", "qwen3"),
        ("olmo3", "qwen3"),
        ("llama3_1", "llama3_1"),
        ("llama3_2", "llama3_1"),
    ],
)
@pytest.mark.parametrize("mode", [TrainOnWhat.ALL_ASSISTANT_MESSAGES, TrainOnWhat.LAST_ASSISTANT_TURN])
def test_windows_of_published_templates_train_what_the_whole_conversation_trains(
    name: str, tokenizer_name: str, mode: TrainOnWhat
) -> None:
    tokenizer = copy.deepcopy(chat_formats.published_tokenizer(tokenizer_name))
    tokenizer.chat_template = chat_formats.published_template(name)
    renderer = get_renderer("chat_template", tokenizer)
    messages: list[Any] = dialogue(20)
    for number in range(1, len(messages), 2):
        messages[number] = {**messages[number], "content": f"question {number} " * 10}
    messages[4] = {**messages[4], "weight": 0.5}
    messages[8] = {**messages[8], "trainable": False}

    def trained(examples: Any) -> Counter[tuple[float, str]]:
        found: Counter[tuple[float, str]] = Counter()
        for example in examples:
            pairs = zip(example.weights_T.tolist(), example.tokens_T.tolist(), strict=True)
            for weight, run in groupby(pairs, key=lambda pair: pair[0]):
                if weight > 0:
                    found[weight, tokenizer.decode([token for _, token in run])] += 1
        return found

    def render(some: Any, chosen: Any) -> Any:
        return renderer.render_conversation(*with_weights(some, chosen, mode))

    examples = windows(messages, weights_of(messages, mode), 400, render)
    assert trained(examples) == trained(renderer.render_conversation(messages, mode))
    assert max(len(example.tokens_T) for example in examples) <= 400
    if mode == TrainOnWhat.ALL_ASSISTANT_MESSAGES:
        assert len(trained(examples)) == 19
