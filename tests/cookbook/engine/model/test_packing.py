"""Tests that datums are checked, concatenated and split again, without padding or loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cookbook.engine.model.packing import PackedLayout, TokenSequence, check_data, pack
from cookbook.errors import RequestError
from cookbook.types import Datum, ModelInput

VOCAB_SIZE = 100
CPU = torch.device("cpu")


def check(
    inputs: dict[str, Any], tokens: list[int] | None = None, required: tuple[str, ...] = ("target_tokens",)
) -> Any:
    datum = Datum(ModelInput.from_ints([1, 2, 3] if tokens is None else tokens), inputs)
    (sequence,) = check_data([datum], required, VOCAB_SIZE)
    return sequence


def test_without_weights_every_target_that_is_not_ignored_has_weight_one() -> None:
    assert check({"target_tokens": [2, -100, 4]}).weights_T.tolist() == [1.0, 0.0, 1.0]


def test_an_ignored_target_has_weight_zero_whatever_its_weight() -> None:
    sequence = check({"target_tokens": [2, -100, 4], "weights": [0.5, 3.0, 0.0]})
    assert sequence.weights_T.tolist() == [0.5, 0.0, 0.0]
    assert sequence.weights_T.dtype == np.float32
    assert sequence.targets_T.tolist() == [2, -100, 4]


def test_further_inputs_of_a_loss_are_kept_as_floats() -> None:
    sequence = check(
        {"target_tokens": [1, 2, 3], "advantages": [1, -1, 0], "logprobs": [-0.5, -1.0, 0.0]},
        required=("target_tokens", "logprobs", "advantages"),
    )
    assert sorted(sequence.extras) == ["advantages", "logprobs"]
    assert sequence.extras["advantages"].tolist() == [1.0, -1.0, 0.0]
    assert {array.dtype for array in sequence.extras.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("tokens", "inputs", "message"),
    [
        ([], {"target_tokens": []}, "The model input is empty"),
        (None, {"weights": [1, 1, 1]}, r"lacks target_tokens \(given: weights\)"),
        (None, {}, r"lacks target_tokens \(given: none\)"),
        (None, {"target_tokens": [1, 2]}, r"target_tokens has shape \[2\], the model input 3 tokens"),
        (None, {"target_tokens": [[1, 2, 3]]}, r"target_tokens has shape \[1, 3\]"),
        (None, {"target_tokens": [1, 2, 3], "weights": [1.0] * 4}, r"weights has shape \[4\]"),
        (None, {"target_tokens": [1, 100, 3]}, "target_tokens has token 100, outside the vocabulary of 100"),
        (None, {"target_tokens": [1, -1, 3]}, "target_tokens has token -1.*-100 marks a target to ignore"),
        ([1, 100, 3], {"target_tokens": [1, 2, 3]}, "model_input has token 100, outside"),
        ([1, -100, 3], {"target_tokens": [1, 2, 3]}, "model_input has token -100, outside"),
        (
            None,
            {"target_tokens": [1, 2, 3], "weights": [1, np.nan, 1]},
            "weights has a value that is not finite",
        ),
        (
            None,
            {"target_tokens": [1, 2, 3], "weights": [1, np.inf, 1]},
            "weights has a value that is not finite",
        ),
    ],
)
def test_a_datum_that_cannot_be_trained_on_is_refused(
    tokens: list[int] | None, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        check(inputs, tokens)


def test_inputs_that_the_loss_does_not_read_may_be_anything() -> None:
    """A custom loss reads such inputs from the datums themselves."""
    plain = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
    scored = Datum(
        ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "reward": [1.0], "logprobs": [0.0, -1.0]}
    )
    sequences = check_data([scored, plain], ("target_tokens",), VOCAB_SIZE, allow_unknown=True)
    assert [sequence.extras for sequence in sequences] == [{}, {}]
    assert pack(sequences, CPU, trained_only=False).extras == {}


def test_an_error_names_the_inputs_that_the_loss_needs() -> None:
    with pytest.raises(RequestError, match=r"lacks logprobs, advantages \(given: target_tokens\)"):
        check({"target_tokens": [1, 2, 3]}, required=("target_tokens", "logprobs", "advantages"))


@pytest.mark.parametrize("name", ["logprobs", "advantages"])
def test_an_input_that_is_not_finite_is_refused(name: str) -> None:
    """Even at weight 0, because 0 * nan would make the sum nan."""
    inputs = {"target_tokens": [1, 2, 3], "weights": [0, 1, 1], "logprobs": [0] * 3, "advantages": [0] * 3}
    with pytest.raises(RequestError, match=f"{name} has a value that is not finite"):
        check({**inputs, name: [np.nan, 0, 0]}, required=("target_tokens", "logprobs", "advantages"))


def test_a_refusal_names_the_datum() -> None:
    good = Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})
    bad = Datum(ModelInput.from_ints([1]), {"target_tokens": [2, 3]})
    with pytest.raises(RequestError) as caught:
        check_data([good, bad, good], ("target_tokens",), VOCAB_SIZE)
    assert caught.value.__notes__ == ["in datum 1 of 3"]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(RequestError, match="the list of Datum is empty"):
        check_data([], ("target_tokens",), VOCAB_SIZE)


def make_sequences(lengths: list[int]) -> list[TokenSequence]:
    rng = np.random.default_rng(sum(lengths))
    sequences = []
    for length in lengths:
        targets = rng.integers(0, VOCAB_SIZE, length)
        targets[rng.random(length) < 0.3] = -100
        weights = np.where(targets == -100, 0, rng.choice([0.0, 1.0], length)).astype(np.float32)
        extras = {"advantages": rng.normal(size=length).astype(np.float32)}
        sequences.append(TokenSequence(rng.integers(0, VOCAB_SIZE, length), targets, weights, extras))
    return sequences


@pytest.mark.parametrize("trained_only", [False, True])
def test_a_packed_row_concatenates_its_sequences(trained_only: bool) -> None:
    lengths = [4, 1, 7, 3]
    sequences = make_sequences(lengths)
    batch = pack(sequences, CPU, trained_only)

    assert batch.layout.segments == [(0, 4), (4, 5), (5, 12), (12, 15)]
    assert batch.tokens_1N.tolist() == [[token for s in sequences for token in s.tokens_T]]
    assert batch.positions_1N.tolist() == [[t for length in lengths for t in range(length)]]
    targets_N = [target for s in sequences for target in s.targets_T]
    weights_N = [weight for s in sequences for weight in s.weights_T]
    advantages_N = [advantage for s in sequences for advantage in s.extras["advantages"]]
    trained = [n for n, weight in enumerate(weights_N) if weight != 0]
    others = [n for n, (t, w) in enumerate(zip(targets_N, weights_N, strict=True)) if t != -100 and w == 0]
    wanted = trained if trained_only else trained + others
    assert trained
    assert others
    assert batch.layout.num_trained == len(trained)
    assert batch.layout.scored_P.tolist() == batch.scored_S.tolist() == wanted
    assert batch.targets_S.tolist() == [targets_N[n] for n in wanted]
    assert batch.weights_P.tolist() == [weights_N[n] for n in wanted]
    assert batch.extras["advantages"].tolist() == [advantages_N[n] for n in wanted]
    assert batch.attention.starts.tolist() == [0, 4, 5, 12, 15]
    assert batch.attention.longest == 7


def test_log_probabilities_are_returned_to_their_positions() -> None:
    layout = PackedLayout([(0, 3), (3, 4), (4, 6)], np.array([2, 4, 5, 0]), num_trained=3)
    rows = layout.split(np.array([-1.0, -2.0, -3.0, -4.0], np.float32))
    assert [row.tolist() for row in rows] == [[-4.0, 0.0, -1.0], [0.0], [-2.0, -3.0]]


def test_a_row_without_scored_positions_is_zero() -> None:
    layout = PackedLayout([(0, 2), (2, 3)], np.zeros(0, np.int64), num_trained=0)
    assert [row.tolist() for row in layout.split(np.zeros(0, np.float32))] == [[0.0, 0.0], [0.0]]
