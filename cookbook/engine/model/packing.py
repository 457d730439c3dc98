"""Checks datums and packs them into micro-batches: sequences are concatenated, or padded to one length.

What sequences share from their beginning may be in the row once. Then hidden states have several targets,
where sequences part, and scored positions of several sequences have one hidden state and one target.

Shape suffixes: T tokens of one sequence, N tokens of a packed row, P scored positions of the sequences, S
hidden states with their targets that are scored: the same as P unless the row has a tree, Q tokens of the
paths of all branches. Targets, weights and log-probabilities have a further axis J if positions have several
targets (soft targets); shorter rows of targets are filled with ignored ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.prefix_tree import Branch, Family, Segment, branches
from cookbook.engine.model.tree_attention import TreeLayout
from cookbook.engine.model.unembedding import TokenLoss
from cookbook.errors import RequestError
from cookbook.types import IGNORED_TARGET, Datum, TensorData
from cookbook.utils.nearest import did_you_mean


@dataclass(frozen=True)
class TokenSequence:
    """A checked Datum as numpy arrays [T], one entry per position. Ignored targets have weight 0.

    Tokens and targets are int64, weights and extras float32. Arrays that need no change are those of the
    Datum. Targets and weights are [T, J] if positions have several targets.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    weights_T: np.ndarray
    extras: dict[str, np.ndarray]
    """Further float inputs of the loss, such as `logprobs` and `advantages`."""

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def num_targets(self) -> int:
        """The number of targets of each position."""
        return 1 if self.targets_T.ndim == 1 else self.targets_T.shape[1]


KNOWN_INPUTS = (
    "target_tokens", "weights", "logprobs", "advantages", "sequence_ratio_mask", "clip_low_threshold",
    "clip_high_threshold",
)  # fmt: skip


def check_data(
    data: Sequence[Datum],
    required: Sequence[str],
    vocab_size: int,
    allow_unknown: bool = False,
    defaults: Mapping[str, float] | None = None,
) -> list[TokenSequence]:
    """Returns the Datums as sequences, after checking that `required` inputs and weights are there and fit.

    `defaults` are the values of optional inputs, which all sequences have if a Datum gives one of them.
    Inputs that no built-in loss reads are most likely typos and are refused, unless `allow_unknown` is set.
    Raises RequestError naming the datum, what it holds and what it should hold.
    """
    if not data:
        raise RequestError("No data: the list of Datum is empty. Pass at least one.")
    defaults = defaults or {}
    if not any(name in datum.loss_fn_inputs for name in defaults for datum in data):
        defaults = {}
    sequences: list[TokenSequence] = []
    for datum in data:
        try:
            _check_names(datum, required, allow_unknown)
            tokens_T = datum.model_input.to_numpy()
            if not len(tokens_T):
                raise RequestError("The model input is empty. A Datum needs at least one token.")
            takes_soft = tuple(required) == ("target_tokens",)
            inputs = {
                name: _as_array(name, value, len(tokens_T), takes_soft)
                for name, value in datum.loss_fn_inputs.items()
                if name in required or name in defaults or name == "weights"
            }
            targets_T = inputs.pop("target_tokens")
            if (weights := inputs.get("weights")) is not None and weights.shape != targets_T.shape:
                raise RequestError(
                    f"weights have shape {[*weights.shape]}, and target_tokens {[*targets_T.shape]}. Give "
                    f"one weight for each target."
                )
            ignored_T = targets_T == IGNORED_TARGET
            for name, ids in (("model_input", tokens_T), ("target_tokens", targets_T[~ignored_T])):
                outside = ids[(ids < 0) | (ids >= vocab_size)]
                if len(outside):
                    hint = f"; {IGNORED_TARGET} marks a target to ignore" if name == "target_tokens" else ""
                    raise RequestError(
                        f"{name} has token {outside[0]}, outside the vocabulary of {vocab_size}. "
                        f"Use the tokenizer of this model{hint}."
                    )
            weights_T = inputs.pop("weights", np.float32(1))
            weights_T = np.where(ignored_T, np.float32(0), weights_T)
            if ((inputs.get("sequence_ratio_mask", np.float32(0)) != 0) & (weights_T == 0)).any():
                raise RequestError(
                    "sequence_ratio_mask marks a target that has weight 0 or is ignored. Mark only tokens "
                    "that are trained."
                )
            for name, default in defaults.items():
                inputs.setdefault(name, np.full(len(tokens_T), default, np.float32))
            sequences.append(TokenSequence(tokens_T, targets_T, weights_T, inputs))
        except RequestError as error:
            error.add_note(f"in datum {len(sequences)} of {len(data)}")
            raise
    return sequences


def _as_array(name: str, value: TensorData | Any, num_tokens: int, takes_soft: bool) -> np.ndarray:
    """Returns an input of a loss, [T], or with `takes_soft` also [T, K], after checking its values."""
    assert isinstance(value, TensorData)
    array = value.to_numpy()
    is_soft = takes_soft and array.ndim == 2 and array.shape[1] > 0
    if array.shape[: 1 if is_soft else None] != (num_tokens,):
        raise RequestError(
            f"{name} has shape {list(array.shape)}, the model input {num_tokens} tokens. "
            f"Give one value per input token (targets are already shifted: "
            f"input tokens[:-1], targets tokens[1:])."
        )
    if not np.isfinite(array).all():
        raise RequestError(f"{name} has a value that is not finite.")
    return array


def _check_names(datum: Datum, required: Sequence[str], allow_unknown: bool) -> None:
    """Raises RequestError for an input that no built-in loss reads, and for one that is missing."""
    for name in () if allow_unknown else datum.loss_fn_inputs:
        if name not in KNOWN_INPUTS:
            raise RequestError(
                f"loss_fn_inputs has {name!r}, which no built-in loss reads."
                f"{did_you_mean(name, KNOWN_INPUTS)} They read "
                f"{', '.join(KNOWN_INPUTS)}; forward_backward_custom takes anything."
            )
    if missing := [name for name in required if name not in datum.loss_fn_inputs]:
        have = ", ".join(datum.loss_fn_inputs) or "none"
        raise RequestError(
            f"loss_fn_inputs lacks {', '.join(missing)} (given: {have}). Add one value per input token."
        )


@dataclass(frozen=True)
class PackedLayout:
    """The scored positions of the sequences of a row, with the trained ones first."""

    segments: list[Segment]
    """The ranges of the sequences, end to end."""
    scored_P: np.ndarray
    """The scored positions in these ranges."""
    num_trained: int

    @property
    def sequence_P(self) -> np.ndarray:
        """The number of the sequence of each scored position."""
        starts = [start for start, _ in self.segments]
        return np.searchsorted(starts, self.scored_P, side="right") - 1

    def split(self, values_P: np.ndarray) -> list[np.ndarray]:
        """Returns one float32 array per sequence. Positions that were not scored are 0.0."""
        row_N = np.zeros((self.segments[-1][1], *values_P.shape[1:]), np.float32)
        row_N[self.scored_P] = values_P
        return [row_N[start:stop] for start, stop in self.segments]


@dataclass(frozen=True)
class SharedScores:
    """Which scored positions have the same hidden state and target, so that they are scored once."""

    place_P: Tensor
    """The place in [S] of each scored position, ascending for those that are trained."""
    trained_ends_S: np.ndarray
    """How many trained positions belong to this place in [S] or an earlier one, for the trained places."""

    def by_position(self, values_S: Tensor) -> Tensor:
        """Returns the value of each scored position: [P]."""
        return values_S.index_select(0, self.place_P)

    def loss_of(self, token_loss: TokenLoss) -> TokenLoss:
        """Returns the loss as a function of the log-probabilities of trained places in [S]."""

        def loss_of_places(logprobs_C: Tensor, part: slice) -> Tensor:
            start = int(self.trained_ends_S[part.start - 1]) if part.start else 0
            positions = slice(start, int(self.trained_ends_S[part.stop - 1]))
            return token_loss(logprobs_C.index_select(0, self.place_P[positions] - part.start), positions)

        return loss_of_places


@dataclass(frozen=True)
class PackedBatch:
    """Sequences in one row, on the device: end to end, or what they share only once, or padded."""

    layout: PackedLayout
    tokens_1N: Tensor
    positions_1N: Tensor
    scored_S: Tensor
    """The scored places of the row: those that are trained first."""
    targets_S: Tensor
    weights_P: Tensor
    """In the order of `layout`: the positions with a weight other than 0 first."""
    extras: dict[str, Tensor]
    """[P] each."""
    attention: AttentionLayout
    shared: SharedScores | None = None
    """None if each scored position has its own place, so that S is P."""

    @property
    def num_trained(self) -> int:
        """The number of trained places in [S]."""
        return self.layout.num_trained if self.shared is None else len(self.shared.trained_ends_S)


def copy_to(device: torch.device, array: np.ndarray) -> Tensor:
    """Returns the array as a tensor on the device, without waiting for the copy."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def pack(
    sequences: Sequence[TokenSequence],
    device: torch.device,
    trained_only: bool,
    families: Sequence[Family] = (),
    is_padded: bool = False,
) -> PackedBatch:
    """Puts sequences in one row and copies it to the device. Nothing else converts arrays to tensors.

    The sequences are those of the `families`, one after another; what a family shares is in the row once.
    With `is_padded` all are padded on the right to the longest, so that the row is a batch too: the segments
    of `layout` are the sequences, those of `attention` have the padding. Scores every position that has a
    target or, with `trained_only`, those with a weight other than 0.
    """
    if is_padded:
        return _pack_padded(sequences, device, trained_only)
    lengths = [len(sequence.tokens_T) for sequence in sequences]
    ends = np.cumsum(lengths).tolist()
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    num_targets = max(sequence.num_targets for sequence in sequences)
    if num_targets == 1:
        targets_N = np.concatenate([sequence.targets_T.ravel() for sequence in sequences])
        weights_N = np.concatenate([sequence.weights_T.ravel() for sequence in sequences])
        is_trained_N, has_target_N = weights_N != 0, targets_N != IGNORED_TARGET
    else:
        targets_N, weights_N, is_trained_N, has_target_N = _soft_targets(sequences, num_targets)
    trained_P = scored_P = np.flatnonzero(is_trained_N)
    if not trained_only:
        scored_P = np.concatenate([trained_P, np.flatnonzero(~is_trained_N & has_target_N)])
    grown, shared = _branches(families), None
    if not grown:
        tokens_N = np.concatenate([sequence.tokens_T for sequence in sequences])
        positions_N = np.concatenate([np.arange(length) for length in lengths])
        starts = copy_to(device, np.array([0, *ends], np.int32))
        attention = AttentionLayout(segments, starts, longest=max(lengths))
        scored_S, targets_S = scored_P, targets_N[scored_P]
    else:
        tokens_N = np.concatenate([sequences[branch.index].tokens_T[branch.first :] for branch in grown])
        positions_N = np.concatenate([np.arange(branch.first, lengths[branch.index]) for branch in grown])
        attention = _tree_layout(grown, device)
        scored_P, scored_S, targets_S, place_P, trained_ends_S = _scored_once(
            grown, targets_N, scored_P, len(trained_P)
        )
        shared = SharedScores(copy_to(device, place_P), trained_ends_S)
    extras = {
        name: np.concatenate([sequence.extras[name] for sequence in sequences])[scored_P]
        for name in sequences[0].extras
    }
    return PackedBatch(
        layout=PackedLayout(segments, scored_P, len(trained_P)),
        tokens_1N=copy_to(device, tokens_N[None]),
        positions_1N=copy_to(device, positions_N[None]),
        scored_S=copy_to(device, scored_S),
        targets_S=copy_to(device, targets_S),
        weights_P=copy_to(device, weights_N[scored_P]),
        extras={name: copy_to(device, array) for name, array in extras.items()},
        attention=attention,
        shared=shared,
    )


def _soft_targets(
    sequences: Sequence[TokenSequence], num_targets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns targets and weights [N, J] of sequences with at most `num_targets` targets at a position.

    Ignored targets, and those that a position lacks, are 0 with weight 0. Also returns which positions have a
    weight other than 0, and which have a target: [N].
    """
    num_tokens, end = sum(map(len, sequences)), 0
    targets_NJ = np.full((num_tokens, num_targets), IGNORED_TARGET)
    weights_NJ = np.zeros((num_tokens, num_targets), np.float32)
    for sequence in sequences:
        start, end = end, end + len(sequence)
        for filled_NJ, array_T in ((targets_NJ, sequence.targets_T), (weights_NJ, sequence.weights_T)):
            filled_NJ[start:end, : sequence.num_targets] = array_T.reshape(-1, sequence.num_targets)
    has_target_NJ = targets_NJ != IGNORED_TARGET
    targets_NJ[~has_target_NJ] = 0
    return targets_NJ, weights_NJ, (weights_NJ != 0).any(1), has_target_NJ.any(1)


def _pack_padded(sequences: Sequence[TokenSequence], device: torch.device, trained_only: bool) -> PackedBatch:
    longest = max(map(len, sequences))
    batch = pack([_padded(sequence, longest) for sequence in sequences], device, trained_only)
    rows = [(row * longest, row * longest + len(sequence)) for row, sequence in enumerate(sequences)]
    return replace(batch, layout=replace(batch.layout, segments=rows))


def _branches(families: Sequence[Family]) -> list[Branch]:
    """Returns the branches of a row with the sequences of these families, in their order.

    There are none if no family shares anything.
    """
    row: list[Branch] = []
    if all(len(family.indices) == 1 for family in families):
        return row
    for family in families:
        num_before, start = len(row), row[-1].segment[1] if row else 0
        row += [replace(branch, index=num_before + branch.index) for branch in branches(family, start)]
    return row


def _tree_layout(grown: Sequence[Branch], device: torch.device) -> AttentionLayout:
    """Returns the layout of a row of branches. A branch without tokens of its own has no segment."""
    with_tokens = [branch for branch in grown if branch.segment[0] < branch.segment[1]]
    segments = [branch.segment for branch in with_tokens]
    rows_Q = np.concatenate([np.arange(*segment) for branch in with_tokens for segment in branch.path])
    lengths = [
        branch.first + stop - start for branch, (start, stop) in zip(with_tokens, segments, strict=True)
    ]
    tree = TreeLayout(
        segments,
        [branch.ancestors for branch in with_tokens],
        lengths,
        copy_to(device, rows_Q),
        copy_to(device, np.array([0, *np.cumsum(lengths)], np.int32)),
    )
    starts = copy_to(device, np.array([0, *(stop for _, stop in segments)], np.int32))
    return AttentionLayout(segments, starts, max(stop - start for start, stop in segments), tree=tree)


def _scored_once(
    grown: Sequence[Branch], targets_N: np.ndarray, scored_P: np.ndarray, num_trained: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the scored positions in the order of their places in [S], and what these places are.

    Returns the positions, the places in the row and the targets [S], the place in [S] of each position, and
    how many trained positions end with each trained place.
    """
    paths = {branch.index: branch.path for branch in grown}
    place_N = np.concatenate([np.arange(*segment) for index in sorted(paths) for segment in paths[index]])
    pairs_P = (place_N[scored_P] << 32) + targets_N[scored_P]
    pairs_S, place_P = np.unique(pairs_P, return_inverse=True)
    is_trained_S = np.zeros(len(pairs_S), bool)
    is_trained_S[place_P[:num_trained]] = True
    order_S = np.argsort(~is_trained_S, kind="stable")
    rank_S = np.empty_like(order_S)
    rank_S[order_S] = np.arange(len(order_S))
    place_P = rank_S[place_P]
    order_P = np.argsort(place_P[:num_trained], kind="stable")
    order_P = np.concatenate([order_P, np.arange(num_trained, len(place_P))])
    place_P = place_P[order_P]
    trained_ends_S = np.searchsorted(place_P[:num_trained], np.arange(is_trained_S.sum()), side="right")
    pairs_S = pairs_S[order_S]
    return scored_P[order_P], pairs_S >> 32, pairs_S & (2**32 - 1), place_P, trained_ends_S


def _padded(sequence: TokenSequence, length: int) -> TokenSequence:
    def padded(array_T: np.ndarray, value: int = 0) -> np.ndarray:
        missing = (length - len(array_T), *array_T.shape[1:])
        return np.concatenate([array_T, np.full(missing, value, array_T.dtype)])

    return TokenSequence(
        padded(sequence.tokens_T),
        padded(sequence.targets_T, IGNORED_TARGET),
        padded(sequence.weights_T),
        {name: padded(array_T) for name, array_T in sequence.extras.items()},
    )
