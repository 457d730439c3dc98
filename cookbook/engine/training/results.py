"""What passes and steps come to: numbers that may still be on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from cookbook.engine.model.packing import Layout, TokenSequence
from cookbook.engine.training.readback import Readback
from cookbook.types import ForwardBackwardOutput, OptimStepResponse, TensorData


@dataclass(frozen=True)
class Scored:
    """What some micro-batches came to, still on the device: one entry for each."""

    plan: list[list[int]]
    """Which sequences are in it."""
    layouts: list[Layout]
    logprobs: list[Tensor]
    losses: list[Tensor]
    likeliest: list[Tensor]
    """Empty where nobody asked."""


@dataclass(frozen=True)
class PassResult:
    """A pass whose numbers may still be on the device; `output` waits for them."""

    sequences: list[TokenSequence]
    plan: list[list[int]]
    """Which sequences are in each micro-batch."""
    layouts: list[Layout]
    scored_logprobs: Readback
    losses: Readback
    custom_loss: float | None = None
    custom_metrics: Mapping[str, float] = field(default_factory=dict)
    likeliest: Readback = field(default_factory=lambda: Readback([]))
    """Of each micro-batch, where the request asked for it."""

    @staticmethod
    def of(sequences: list[TokenSequence], scored: Scored) -> PassResult:
        return PassResult(
            sequences,
            scored.plan,
            scored.layouts,
            Readback(scored.logprobs),
            Readback(scored.losses),
            likeliest=Readback(scored.likeliest),
        )

    def logprobs(self) -> list[np.ndarray]:
        """One float32 array per datum; positions that were not scored read 0.0."""
        return self._by_datum(self.scored_logprobs.arrays())

    def _by_datum(self, scored: list[np.ndarray]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for indices, layout, values_S in zip(self.plan, self.layouts, scored, strict=True):
            found.update(zip(indices, layout.split(values_S), strict=True))
        return [found[index] for index in range(len(self.sequences))]

    def output(self) -> ForwardBackwardOutput:
        logprobs = self.logprobs()
        weights = [sequence.weights_T.astype(np.float64) for sequence in self.sequences]
        weight_sum = float(sum(weights_T.sum() for weights_T in weights))
        nll_sum = -sum(float(weights_T @ lp_T) for weights_T, lp_T in zip(weights, logprobs, strict=True))
        loss_sum = sum(float(loss) for loss in self.losses.arrays())
        loss = nll_sum / weight_sum if weight_sum else 0.0
        if self.custom_loss is not None:
            loss = loss_sum = self.custom_loss
        outputs = [{"logprobs": TensorData(lp_T)} for lp_T in logprobs]
        if likeliest := self.likeliest.arrays():
            for found, is_argmax_T in zip(outputs, self._by_datum(likeliest), strict=True):
                found["is_argmax"] = TensorData(is_argmax_T, dtype="int64")
        return ForwardBackwardOutput(
            loss=loss,
            loss_fn_outputs=[*outputs],
            metrics={"loss:sum": loss_sum, "weights:sum": weight_sum, **self.custom_metrics},
        )


@dataclass(frozen=True)
class StepResult:
    grad_norm: Readback

    def output(self) -> OptimStepResponse:
        return OptimStepResponse(metrics={"grad_norm": float(self.grad_norm.arrays()[0])})
