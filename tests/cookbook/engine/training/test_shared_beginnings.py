"""Tests training on sequences that share beginnings, which a row has once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cookbook.engine.model.packing import PackedBatch
from cookbook.engine.training.trainer import Trainer
from cookbook.types import AdamParams, Datum, ModelInput

ADAM = AdamParams(learning_rate=1e-2)
LENGTHS = (90, 40, 55, 31, 90)
NUM_TOKENS, NUM_COMPUTED = 306, 90 + (40 - 20) + (55 - 30) + (31 - 25)
"""The tokens of the sequences, and those of the row. The last sequence is the first one again."""


def make_tree(vocab_size: int, seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    stem = rng.integers(3, vocab_size, 91)
    data = []
    for length, num_shared in zip(LENGTHS, (91, 20, 30, 25, 91), strict=True):
        own = rng.integers(3, vocab_size, length + 1 - min(num_shared, length))
        tokens = np.concatenate([stem[:num_shared], own])[: length + 1]
        weights = rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        data.append(
            Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


def passes_of(trainer: Trainer) -> list[PackedBatch]:
    """Returns a list to which each pass with gradients adds its micro-batch."""
    seen: list[PackedBatch] = []
    backpropagate = trainer.base.backpropagate

    def run(batch: PackedBatch, *rest: Any) -> Any:
        seen.append(batch)
        return backpropagate(batch, *rest)

    trainer.base.backpropagate = run  # type: ignore[method-assign]
    return seen


def step(trainer: Trainer, data: list[Datum]) -> list[np.ndarray]:
    result = trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    trainer.optim_step(ADAM)
    return result.logprobs()


def test_a_row_has_what_sequences_share_once(tiny_qwen3: str, make_trainer: Any) -> None:
    trainer = make_trainer(tiny_qwen3)
    seen = passes_of(trainer)
    step(trainer, make_tree(trainer.base.vocab_size))
    (batch,) = seen
    assert sum(LENGTHS) == NUM_TOKENS
    assert batch.tokens_1N.shape == (1, NUM_COMPUTED)


@pytest.mark.slow
def test_a_resumed_trainer_continues_on_shared_beginnings_to_the_bit(
    tiny_qwen3: str, make_trainer: Any, tmp_path: Path
) -> None:
    trainer, resumed = make_trainer(tiny_qwen3), make_trainer(tiny_qwen3, seed=1)
    data = [make_tree(trainer.base.vocab_size, seed) for seed in range(4)]
    for batch in data[:2]:
        step(trainer, batch)
    trainer.save(tmp_path / "state", with_optimizer=True)
    resumed.load(str(tmp_path / "state"), with_optimizer=True)
    for batch in data[2:]:
        for one, other in zip(step(trainer, batch), step(resumed, batch), strict=True):
            assert one.tobytes() == other.tobytes()
    for name, weight in trainer.adapter.weights.items():
        assert torch.equal(weight, resumed.adapter.weights[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param({"compile": True}, marks=pytest.mark.slow), {"gradient_checkpointing": "on"}],
    ids=str,
)
def test_compiled_and_checkpointed_layers_share_too(
    options: dict[str, Any], tiny_qwen3: str, make_trainer: Any, gradients_of: Any, assert_close: Any
) -> None:
    trainer, plain = make_trainer(tiny_qwen3, options=options), make_trainer(tiny_qwen3)
    plain.base.min_shared_tokens = None
    data = make_tree(trainer.base.vocab_size)
    seen = passes_of(trainer)
    for each in (trainer, plain):
        each.forward_backward(each.check(data, "cross_entropy", None))
    assert seen[0].tokens_1N.shape == (1, NUM_COMPUTED)
    for name, gradient in gradients_of(plain).items():
        assert_close(gradients_of(trainer)[name], gradient)


@pytest.mark.slow
def test_a_custom_loss_may_couple_the_sequences_of_a_tree(
    tiny_qwen3: str, make_trainer: Any, gradients_of: Any, assert_close: Any
) -> None:
    """As DPO couples the answers of a pair."""

    def margin(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        sums = torch.stack([logprobs_T.sum() for logprobs_T in logprobs])
        return -torch.nn.functional.logsigmoid(0.1 * (sums[1] - sums[2]) + 0.1 * (sums[0] - sums[3])), {}

    found = []
    for min_shared in (16, None):
        trainer = make_trainer(tiny_qwen3)
        assert trainer.base.min_shared_tokens == 16
        trainer.base.min_shared_tokens = min_shared
        data = make_tree(trainer.base.vocab_size)
        result = trainer.forward_backward_custom(data, trainer.check(data, "cross_entropy", None), margin)
        found.append((result.custom_loss, gradients_of(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        assert_close(found[0][1][name], gradient)


def test_with_dropout_each_sequence_has_its_own_masks_and_is_computed_alone(
    tiny_qwen3: str, make_trainer: Any
) -> None:
    trainer = make_trainer(tiny_qwen3, dropout=0.2)
    seen = passes_of(trainer)
    step(trainer, make_tree(trainer.base.vocab_size))
    assert sum(batch.tokens_1N.shape[1] for batch in seen) == NUM_TOKENS
    assert all(batch.shared is None for batch in seen)


@pytest.mark.slow
def test_a_tree_may_have_more_tokens_than_are_useful_in_a_micro_batch_but_not_more_than_fit_in_memory(
    tiny_qwen3: str, make_trainer: Any
) -> None:
    trainer = make_trainer(tiny_qwen3)
    data = make_tree(trainer.base.vocab_size)
    seen = passes_of(trainer)
    trainer.limits.current = replace(trainer.limits.current, max_tokens=50, max_in_memory=2**62)
    whole = step(trainer, data)
    assert [batch.tokens_1N.shape[1] for batch in seen] == [NUM_COMPUTED]
    other = make_trainer(tiny_qwen3)
    seen = passes_of(other)
    other.limits.current = replace(other.limits.current, max_tokens=50, max_in_memory=100)
    cut = step(other, data)
    sizes = [batch.tokens_1N.shape[1] for batch in seen]
    assert len(sizes) > 1
    assert max(sizes) <= 100
    assert NUM_COMPUTED < sum(sizes) < NUM_TOKENS
    for one, one_cut in zip(whole, cut, strict=True):
        np.testing.assert_allclose(one_cut, one, rtol=1e-5, atol=1e-6)


def test_a_tree_that_runs_out_of_memory_is_divided(
    tiny_qwen3: str, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, plain = make_trainer(tiny_qwen3), make_trainer(tiny_qwen3)
    backpropagate, sizes = trainer.base.backpropagate, []

    def run(batch: PackedBatch, *rest: Any) -> Any:
        result = backpropagate(batch, *rest)
        sizes.append(batch.tokens_1N.shape[1])
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("full")
        return result

    trainer.base.backpropagate = run
    data = make_tree(trainer.base.vocab_size)
    found, expected = step(trainer, data), step(plain, data)
    assert sizes[0] == NUM_COMPUTED
    assert max(sizes[1:]) <= 100
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert "does not fit in memory: continuing with" in caplog.text
