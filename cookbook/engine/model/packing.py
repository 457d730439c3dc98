"""Datums to packed micro-batches: checked, laid end to end, never padded.

Shape suffixes: T tokens of one sequence, N tokens of a packed row, S scored positions of a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.attention import AttentionLayout, Segment
from cookbook.errors import RequestError
from cookbook.types import IGNORED_TARGET, Datum, TensorData
from cookbook.utils.nearest import did_you_mean


@dataclass(frozen=True)
class TokenSequence:
    """A checked Datum. Every array has one entry per position; ignored targets weigh 0."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    weights_T: np.ndarray
    extras: dict[str, np.ndarray]
    """Further float inputs that the loss asks for: `logprobs`, `advantages`."""

    def __len__(self) -> int:
        return len(self.tokens_T)


def check_data(data: Sequence[Datum], required: Iterable[str], vocab_size: int) -> list[TokenSequence]:
    """Raises RequestError naming the datum, what it holds and what it should hold."""
    if not data:
        raise RequestError("No data: the list of Datum is empty. Pass at least one.")
    sequences = []
    for index, datum in enumerate(data):
        try:
            sequences.append(_check_datum(datum, required, vocab_size))
        except RequestError as error:
            error.add_note(f"in datum {index} of {len(data)}")
            raise
    return sequences


KNOWN_INPUTS = ("target_tokens", "weights", "logprobs", "advantages")


def refuse_unknown(data: Sequence[Datum]) -> None:
    """Raises RequestError for a loss input that no built-in loss reads: most likely a slip of the pen."""
    for index, datum in enumerate(data):
        for name in datum.loss_fn_inputs:
            if name not in KNOWN_INPUTS:
                hint = did_you_mean(name, KNOWN_INPUTS, quote="'")
                raise RequestError(
                    f"loss_fn_inputs of datum {index} has {name!r}, which no built-in loss reads.{hint} "
                    f"They read {', '.join(KNOWN_INPUTS)}; forward_backward_custom takes anything."
                )


def _check_datum(datum: Datum, required: Iterable[str], vocab_size: int) -> TokenSequence:
    tokens_T = np.asarray(datum.model_input.to_ints(), dtype=np.int64)
    if not len(tokens_T):
        raise RequestError("The model input is empty. A Datum needs at least one token.")
    inputs: dict[str, np.ndarray] = {}
    for name, value in datum.loss_fn_inputs.items():
        assert isinstance(value, TensorData)
        inputs[name] = value.to_numpy()
    missing = [name for name in required if name not in inputs]
    if missing:
        have = ", ".join(inputs) or "none"
        raise RequestError(
            f"loss_fn_inputs lacks {', '.join(missing)} (given: {have}). Add one value per input token."
        )
    inputs = {name: array for name, array in inputs.items() if name in required or name == "weights"}
    for name, array in inputs.items():
        if array.shape != tokens_T.shape:
            raise RequestError(
                f"{name} has shape {list(array.shape)}, the model input {len(tokens_T)} tokens. "
                f"Give one value per input token (targets are already shifted: "
                f"input tokens[:-1], targets tokens[1:])."
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{name} has a value that is not finite.")
    targets_T = inputs.pop("target_tokens")
    ignored_T = targets_T == IGNORED_TARGET
    for name, ids in (("model_input", tokens_T), ("target_tokens", targets_T[~ignored_T])):
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise RequestError(
                f"{name} has token {outside[0]}, outside the vocabulary of {vocab_size}. "
                f"Use the tokenizer of this model"
                + (f"; {IGNORED_TARGET} marks a target to ignore." if name == "target_tokens" else ".")
            )
    weights_T = inputs.pop("weights", None)
    weights_T = np.where(ignored_T, 0.0, 1.0 if weights_T is None else weights_T).astype(np.float32)
    extras = {name: array.astype(np.float32) for name, array in inputs.items()}
    return TokenSequence(tokens_T, targets_T, weights_T, extras)


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Deals sequences into micro-batches of at most `max_tokens`, balanced by tokens.

    As few as hold them all; a longer sequence stands alone. Indices ascend within each.
    """
    num_microbatches = max(1, -(-sum(lengths) // max_tokens))
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while True:
        plan: list[list[int]] = [[] for _ in range(num_microbatches)]
        emptiest = [(0, number) for number in range(num_microbatches)]
        fits = True
        for index in by_length:
            held, number = heapq.heappop(emptiest)
            fits = fits and (not plan[number] or held + lengths[index] <= max_tokens)
            plan[number].append(index)
            heapq.heappush(emptiest, (held + lengths[index], number))
        if fits:
            return sorted(sorted(indices) for indices in plan if indices)
        num_microbatches += 1


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row lie, and which positions are scored, the trained ones first."""

    segments: list[Segment]
    scored_S: np.ndarray
    num_trained: int

    def split(self, values_S: np.ndarray) -> list[np.ndarray]:
        """One float32 array per sequence; positions that were not scored read 0.0."""
        row_N = np.zeros(self.segments[-1][1], np.float32)
        row_N[self.scored_S] = values_S
        return [row_N[start:stop] for start, stop in self.segments]


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end in one row, on the device."""

    layout: Layout
    tokens_1N: Tensor
    positions_1N: Tensor
    scored_S: Tensor
    """The scored positions: those of weight other than 0 first, as `layout` has them."""
    targets_S: Tensor
    weights_S: Tensor
    extras: dict[str, Tensor]
    """[S] each."""
    attention: AttentionLayout


def copy_to(device: torch.device, array: np.ndarray) -> Tensor:
    """Without waiting for the device."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def pack(sequences: Sequence[TokenSequence], device: torch.device, trained_only: bool) -> PackedBatch:
    """Scores every position that has a target; with `trained_only` those of weight other than 0."""

    def to_device(array: np.ndarray) -> Tensor:
        return copy_to(device, array)

    def join(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))

    lengths = [len(sequence) for sequence in sequences]
    ends = np.cumsum(lengths).tolist()
    targets_N = join(sequence.targets_T for sequence in sequences)
    weights_N = join(sequence.weights_T for sequence in sequences)
    trained_N = weights_N != 0
    trained_S = np.flatnonzero(trained_N)
    others_S = np.flatnonzero(~trained_N & (targets_N != IGNORED_TARGET))
    scored_S = trained_S if trained_only else join([trained_S, others_S])
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    return PackedBatch(
        layout=Layout(segments, scored_S, len(trained_S)),
        tokens_1N=to_device(join(sequence.tokens_T for sequence in sequences)[None]),
        positions_1N=to_device(join(np.arange(length) for length in lengths)[None]),
        scored_S=to_device(scored_S),
        targets_S=to_device(targets_N[scored_S]),
        weights_S=to_device(weights_N[scored_S]),
        extras={
            name: to_device(join(sequence.extras[name] for sequence in sequences)[scored_S])
            for name in sequences[0].extras
        },
        attention=AttentionLayout(segments, to_device(np.array([0, *ends], np.int32)), longest=max(lengths)),
    )
