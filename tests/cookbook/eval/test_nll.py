"""NLL, bits per byte and accuracy on held-out data, compared with plain transformers on the same chats."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook import Datum, ModelInput, ServiceClient, TrainingClient
from cookbook.data import FromConversationFileBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset
from cookbook.errors import DataError
from cookbook.eval.nll import MAX_TURNS, NLLEvaluator

END = "<|im_end|>"


@pytest.fixture(scope="module")
def client(tiny_qwen3: str) -> Iterator[TrainingClient]:
    with_weights = ServiceClient(device="cpu")
    yield with_weights.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    with_weights.close()


@pytest.fixture
def held_out(tmp_path: Path, tiny_qwen3: str) -> Callable[..., SupervisedDataset]:
    """Returns held-out data with one file for each list of conversations."""

    def make(*sources: list, names: tuple[str, ...] = ("a.jsonl", "b.jsonl"), **common: Any) -> Any:
        paths = []
        for name, chats in zip(names, sources, strict=False):
            paths.append(tmp_path / name)
            paths[-1].write_text(
                "".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8"
            )
        builder = FromConversationFileBuilder(
            file_path=",".join(map(str, paths)),
            eval_dataset=",".join(map(str, paths)),
            use_cache=False,
            common_config=ChatDatasetBuilderCommonConfig(
                model_name_for_tokenizer=tiny_qwen3, batch_size=5, **{"max_length": 256, **common}
            ),
        )
        _, test_data = builder()
        return test_data

    return make


class PlainTruth:
    """Scores chats one by one with transformers; the trained tokens are found in the rendered text."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model)
        self._tokenizer = tokenizer

    def turns(self, chat: list[dict[str, str]]) -> list[dict[str, float]]:
        found = []
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._tokenizer.apply_chat_template(
                chat[:number], tokenize=False, add_generation_prompt=True
            )
            prompt = self._tokenizer(before)["input_ids"]
            reply = self._tokenizer(message["content"] + END)["input_ids"]
            with torch.no_grad():
                logits = self._model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
            targets = torch.tensor(reply)
            found.append(
                {
                    "nll": float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")),
                    "tokens": len(reply),
                    "right": int((logits.argmax(-1) == targets).sum()),
                    "bytes": len(message["content"].encode()),
                }
            )
        return found


@pytest.fixture
def truth(tiny_qwen3: str, tiny_tokenizer: Any) -> PlainTruth:
    return PlainTruth(tiny_qwen3, tiny_tokenizer)


def means(turns: list[dict[str, float]], name: str) -> dict[str, float]:
    total = {key: sum(turn[key] for turn in turns) for key in turns[0]}
    return {
        f"{name}/nll": pytest.approx(total["nll"] / total["tokens"], rel=1e-5),
        f"{name}/bits_per_byte": pytest.approx(total["nll"] / math.log(2) / total["bytes"], rel=1e-5),
        f"{name}/token_accuracy": total["right"] / total["tokens"],
    }


def evaluate(client: TrainingClient, dataset: SupervisedDataset, name: str = "test") -> dict[str, float]:
    return asyncio.run(NLLEvaluator(dataset, name)(client))


def said_by_the_model(chats: list, truth: PlainTruth) -> list:
    """Returns chats whose last reply the untrained model generates, so that some tokens are predicted."""
    made = []
    for chat in chats:
        prompt = truth._tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        out = truth._model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        reply = truth._tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        made.append([*chat[:-1], {"role": "assistant", "content": reply.strip() or "yes"}])
    return made


def test_every_metric_equals_that_of_plain_transformers(
    client: TrainingClient, held_out: Any, truth: PlainTruth, chats: list
) -> None:
    chats = said_by_the_model(chats[:9], truth)
    turns = [truth.turns(chat) for chat in chats]
    found = evaluate(client, held_out(chats), "held_out")
    expected = means([turn for chat in turns for turn in chat], "held_out")
    for number in (1, 2, 3):
        those = [chat[number - 1] for chat in turns if len(chat) >= number]
        accuracy = means(those, "turn")["turn/token_accuracy"]
        expected[f"held_out/turn_{number}/token_accuracy"] = accuracy
    assert found == expected
    assert 0 < found["held_out/token_accuracy"] < 1


def test_several_sources_have_separate_metrics(
    client: TrainingClient, held_out: Any, truth: PlainTruth, chats: list
) -> None:
    one_turn = [chat for chat in chats if len(chat) == 2]
    first, second = one_turn[:4], one_turn[4:7]
    found = evaluate(client, held_out(first, second))
    scored = [[turn for chat in part for turn in truth.turns(chat)] for part in (first, second)]
    assert found == {
        **means(scored[0] + scored[1], "test"),
        **means(scored[0], "test/a.jsonl"),
        **means(scored[1], "test/b.jsonl"),
    }


def test_turns_are_numbered_across_the_examples_of_a_conversation(
    client: TrainingClient, held_out: Any, chats: list
) -> None:
    """Qwen3's format rewrites earlier turns, so each turn is a separate example."""
    chats = chats[:6]
    dataset = held_out(chats, renderer_name="qwen3")
    assert sum(len(dataset.get_batch(index)) for index in range(len(dataset))) == sum(
        len(c) // 2 for c in chats
    )
    found = evaluate(client, dataset)
    assert [path for path in found if "turn" in path] == [f"test/turn_{n}/token_accuracy" for n in (1, 2, 3)]


def test_only_the_first_turns_have_metrics(client: TrainingClient, held_out: Any) -> None:
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    found = evaluate(client, held_out([turn * (MAX_TURNS + 2)]))
    assert [path for path in found if "turn" in path] == [
        f"test/turn_{n}/token_accuracy" for n in range(1, MAX_TURNS + 1)
    ]


class OneDatum(SupervisedDataset):
    """A dataset without origins."""

    def __init__(self, datum: Datum) -> None:
        self._datum = datum

    def get_batch(self, index: int) -> list[Datum]:
        return [self._datum]

    def __len__(self) -> int:
        return 1


def test_a_users_dataset_needs_no_weights_and_no_origins(client: TrainingClient) -> None:
    tokens = [5, 6, 7, 8]
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": [6, 7, -100]})
    output = client.forward([datum]).result()
    found = evaluate(client, OneDatum(datum))
    assert found["test/nll"] == pytest.approx(output.loss, rel=1e-6)


def test_a_text_of_only_special_tokens_has_no_bits_per_byte(client: TrainingClient) -> None:
    datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [1, 2]})
    assert evaluate(client, OneDatum(datum)).keys() == {"test/nll", "test/token_accuracy"}


def test_data_without_a_trained_token_are_refused(client: TrainingClient) -> None:
    class Empty(OneDatum):
        def get_batch(self, index: int) -> list[Datum]:
            return []

    with pytest.raises(DataError, match="no trained token"):
        evaluate(client, Empty(Datum(ModelInput.from_ints([1]))))


@pytest.mark.slow
def test_a_model_with_equal_logits_has_an_accuracy_of_zero(
    tiny_qwen3: str, held_out: Callable[..., SupervisedDataset], chats: list, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_qwen3).save_pretrained(tmp_path / "model")
    service = ServiceClient(device="cpu")
    uniform = service.create_lora_training_client(str(tmp_path / "model"), rank=2, seed=0)
    found = asyncio.run(NLLEvaluator(held_out(chats[:9]))(uniform))
    assert found["test/nll"] == pytest.approx(math.log(uniform.get_info().model_data.num_logits), rel=1e-6)
    assert {path: value for path, value in found.items() if path.endswith("token_accuracy")} == {
        path: 0.0 for path in found if path.endswith("token_accuracy")
    }
    service.close()
