"""Results of passes, whose numbers may still be on the device.

Shape suffixes: T tokens of one sequence, N positions of all sequences end to end, P scored positions of a
micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.packing import PackedLayout, TokenSequence, copy_to
from cookbook.engine.processes import World
from cookbook.types import IGNORED_TARGET, ForwardBackwardOutput, LossFnOutput, TensorData


class MicrobatchResult(NamedTuple):
    """The results of one micro-batch, still on the device."""

    indices: Sequence[int]
    """The indices of its sequences in the request."""
    layout: PackedLayout
    logprobs_P: Tensor
    """[P] or, with several targets of a position, [P, J]; with `loss_only` the weighted sum, the minimum and
    the maximum of the log-probabilities: [3], fp64."""
    is_argmax_P: Tensor | None
    """Whether each target is the most likely token, if that was requested."""
    loss: Tensor


def empty_summary(device: torch.device) -> Tensor:
    """Returns the weighted sum, the minimum and the maximum of no log-probabilities: [3], fp64."""
    summary_3 = torch.zeros(3, dtype=torch.float64, device=device)
    summary_3[1].fill_(math.inf)  # a tensor of these numbers would be copied to the device, which waits
    summary_3[2].fill_(-math.inf)
    return summary_3


def all_reduce_summaries(
    world: World, results: list[MicrobatchResult], device: torch.device
) -> list[MicrobatchResult]:
    """Returns the summaries of all processes as one micro-batch, whose `logprobs_P` is [processes, 3]."""
    rows = torch.stack([empty_summary(device), *(result.logprobs_P for result in results)])
    summaries = torch.zeros(world.size, 3, dtype=torch.float64, device=device)
    summaries[world.rank] = torch.stack([rows[:, 0].sum(), rows[:, 1].min(), rows[:, 2].max()])
    loss = torch.stack([torch.zeros((), device=device), *(result.loss for result in results)]).sum()
    world.all_reduce_sum([summaries, loss])  # each process fills in its own row
    return [MicrobatchResult((), PackedLayout([], np.zeros(0, np.int64), 0), summaries, None, loss)]


def all_reduce_results(
    world: World,
    results: list[MicrobatchResult],
    sequences: Sequence[TokenSequence],
    device: torch.device,
    argmax: bool,
) -> list[MicrobatchResult]:
    """Returns the results of all processes as one micro-batch with all sequences of the request.

    Each process fills in its part of a row of zeros, and the rows are summed, which is exact because x + 0 is
    x.
    """
    lengths = [len(sequence) for sequence in sequences]
    num_targets = max(sequence.num_targets for sequence in sequences)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    num_tokens = int(ends[-1])
    logprobs_NJ = torch.zeros(num_tokens, num_targets, device=device)
    is_argmax_N = torch.zeros(num_tokens if argmax else 0, device=device)
    loss = torch.zeros((), device=device)
    for result in results:
        segments = result.layout.segments  # with padding between them, or none
        row = np.zeros(segments[-1][1], np.int64)
        for index, (start, stop) in zip(result.indices, segments, strict=True):
            row[start:stop] = np.arange(starts[index], ends[index])
        places_P = copy_to(device, row[result.layout.scored_P])
        logprobs_PJ = result.logprobs_P.view(len(places_P), -1)
        logprobs_NJ[:, : logprobs_PJ.shape[1]].index_copy_(0, places_P, logprobs_PJ)
        if result.is_argmax_P is not None:
            is_argmax_N.index_copy_(0, places_P, result.is_argmax_P.float())
        loss += result.loss
    world.all_reduce_sum([logprobs_NJ, is_argmax_N, loss])
    all_segments = list(zip(starts.tolist(), ends.tolist(), strict=True))
    layout = PackedLayout(all_segments, np.arange(num_tokens), num_tokens)
    indices = range(len(lengths))
    logprobs_N = logprobs_NJ[:, 0] if num_targets == 1 else logprobs_NJ
    return [MicrobatchResult(indices, layout, logprobs_N, is_argmax_N if argmax else None, loss)]


class Readback:
    """Starts copying tensors to host memory at once. `arrays()` waits for the copies.

    On CUDA the copies go into pinned memory after the kernels that are already queued, so the worker can
    queue the next step meanwhile.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = [tensor.detach() for tensor in tensors]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            self._host = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in self._host
            ]
            # The current stream is that of the thread's device, on which these tensors may not be.
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def arrays(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


@dataclass(frozen=True)
class PassResult:
    """The result of a pass. `output` waits for the numbers that are still on the device."""

    sequences: list[TokenSequence]
    places: list[tuple[Sequence[int], PackedLayout]]
    """For each micro-batch, the indices of its sequences and their layout."""
    scored_logprobs: Readback
    is_argmax: Readback
    """`scored_logprobs` and `is_argmax` are by micro-batch. The latter is empty if it was not requested."""
    losses: Readback
    is_loss_only: bool = False
    """Whether `scored_logprobs` are weighted sums, minima and maxima."""
    custom_loss: float | None = None
    custom_metrics: Mapping[str, float] = field(default_factory=dict)

    def logprobs(self) -> list[np.ndarray]:
        """Returns one float32 array in the shape of the targets per datum.

        Positions that were not scored, and ignored targets of others, are 0.0.
        """
        found = self._by_datum(self.scored_logprobs.arrays())
        return [self._of_targets(sequence, one) for sequence, one in zip(self.sequences, found, strict=True)]

    def _of_targets(self, sequence: TokenSequence, logprobs_T: np.ndarray) -> np.ndarray:
        targets_T = sequence.targets_T
        if logprobs_T.ndim == 1:
            return logprobs_T.reshape(targets_T.shape)
        logprobs_TJ = logprobs_T[:, : sequence.num_targets].reshape(targets_T.shape)
        return np.where(targets_T == IGNORED_TARGET, np.float32(0), logprobs_TJ)

    def _by_datum(self, values: list[np.ndarray]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for (indices, layout), values_P in zip(self.places, values, strict=True):
            found.update(zip(indices, layout.split(values_P), strict=True))
        return [found[index] for index in range(len(self.sequences))]

    def output(self) -> ForwardBackwardOutput:
        weights = [sequence.weights_T.astype(np.float64) for sequence in self.sequences]
        weight_sum = float(sum(weights_T.sum() for weights_T in weights))
        logprobs: list[np.ndarray] = []
        metrics = dict(self.custom_metrics)
        if self.is_loss_only:
            rows = np.concatenate([row.reshape(-1, 3) for row in self.scored_logprobs.arrays()])
            sums, lowest, highest = rows.T
            nll_sum = -float(sums.sum())
            if lowest.min() != np.inf:  # at least one target is trained
                metrics |= {"logprobs:min": float(lowest.min()), "logprobs:max": float(highest.max())}
        else:
            logprobs = self.logprobs()
            nll_sum = -sum(
                float(weights_T.ravel() @ lp_T.ravel())
                for weights_T, lp_T in zip(weights, logprobs, strict=True)
            )
        loss_sum = sum(float(loss) for loss in self.losses.arrays())
        loss = nll_sum / weight_sum if weight_sum else 0.0
        if self.custom_loss is not None:
            loss = loss_sum = self.custom_loss
        outputs: list[LossFnOutput] = [{"logprobs": TensorData(lp_T)} for lp_T in logprobs]
        if is_argmax := self.is_argmax.arrays():
            outputs = [
                {**found, "is_argmax": TensorData(is_argmax_T, "int64")}
                for found, is_argmax_T in zip(outputs, self._by_datum(is_argmax), strict=True)
            ]
        return ForwardBackwardOutput(
            loss=loss,
            loss_fn_outputs=outputs,
            metrics={"loss:sum": loss_sum, "weights:sum": weight_sum, **metrics},
        )
