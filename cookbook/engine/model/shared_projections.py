"""Runs the projections of a recurrent layer once for tokens that several sequences of a row share.

A recurrent layer runs every sequence as a whole, so it sees what sequences share several times
(`recurrence`). Its scan and its convolution have to. Its projections do not: what they make of a token
depends on that token alone or, behind the scan, on those before it. So a projection of the layer's input is
run on the row, and its results are copied to every sequence; one that makes the layer's result is run on the
tokens that are joined again.

Shape suffixes: N tokens of the row, R sequences of a batch, L tokens of the longest of them, D, O sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class SharedProjections:
    """The projections of one recurrent layer."""

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer
        self._makes_result: set[str] = set()
        """The projections whose result was seen to be that of the layer."""

    @contextlib.contextmanager
    def in_use(
        self, part_RLD: Tensor, places: Tensor, project: Callable[[str, Callable[..., Tensor]], Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """Shares the projections in the body, which runs the layer on `part_RLD`, a batch of the row.

        `places` are those in the batch [R * L] of the tokens that are joined again. `project(name, forward)`
        returns a projection of the layer's input for the batch. Yields the results of other projections, by
        name; the caller passes them to `remember`.
        """
        made: dict[str, Tensor] = {}

        def shared(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(x_RLD: Tensor) -> Tensor:
                if x_RLD is part_RLD:
                    return project(name, forward)
                if name not in self._makes_result or x_RLD.shape[:2] != part_RLD.shape[:2]:
                    made[name] = forward(x_RLD)
                    return made[name]
                out_1NO = forward(x_RLD.flatten(0, 1).index_select(0, places)[None])
                out = out_1NO.new_zeros(part_RLD.shape[:2].numel(), out_1NO.shape[-1])
                return out.index_copy(0, places, out_1NO[0]).unflatten(0, part_RLD.shape[:2])

            return run

        projections = dict(_projections(self._mixer))
        own = {name: module.__dict__.get("forward") for name, module in projections.items()}
        for name, module in projections.items():
            module.forward = shared(name, module.forward)
        try:
            yield made
        finally:
            for name, module in projections.items():
                del module.forward
                if own[name] is not None:  # a fused LoRA
                    module.forward = own[name]  # type: ignore[assignment]

    def remember(self, made: dict[str, Tensor], result: Any) -> None:
        """Finds the projection that made the result of the layer."""
        result = result[0] if isinstance(result, tuple) else result
        self._makes_result |= {name for name, out in made.items() if out is result}


def _projections(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear layers with their adapters, and their names."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Linear, BaseTunerLayer)):
            yield f"{prefix}{name}", child
        else:
            yield from _projections(child, f"{prefix}{name}.")
