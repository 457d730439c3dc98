"""Runs the projections of a recurrent layer once for each token of a row, where several sequences share
tokens.

A recurrent layer runs every sequence as a whole, so it sees what sequences share several times
(`recurrence`). Its scan and its convolution have to. Its projections do not: what they make of a token
depends on that token alone or, behind the scan, on those before it. So a projection of the layer's input is
run on the row, and its results are copied to every sequence; one that makes the layer's result is run on the
tokens that are joined again.

Shape suffixes: N tokens of the row, R sequences of a batch, L tokens of the longest of them, D, O sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class Batches(Protocol):
    """The batches of a row (`recurrence.SplitRow`)."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]: ...

    def split(self, value: Any) -> list[Any]: ...

    def own_places(self, number: int) -> Tensor: ...


class SharedProjections:
    """The projections of one recurrent layer."""

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer
        self._makes_result: set[str] = set()
        """The projections whose result was seen to be that of the layer."""

    @contextlib.contextmanager
    def in_use(
        self,
        batches: Batches,
        number: int,
        input_1ND: Tensor,
        part_RLD: Tensor,
        of_row: dict[str, list[Tensor]],
    ) -> Iterator[dict[str, Tensor]]:
        """Shares the projections in the body, which runs the layer on batch `number`, `part_RLD` of the row.

        `of_row` keeps the projections of the row for all of its batches. Yields the other projections, by
        name; the caller passes them to `remember`.
        """
        made: dict[str, Tensor] = {}
        projections = dict(_projections(self._mixer))
        own = {name: module.__dict__.get("forward") for name, module in projections.items()}
        for name, module in projections.items():
            module.forward = self._shared(
                name, module.forward, batches, number, input_1ND, part_RLD, of_row, made
            )
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

    def _shared(
        self,
        name: str,
        forward: Callable[..., Tensor],
        batches: Batches,
        number: int,
        input_1ND: Tensor,
        part_RLD: Tensor,
        of_row: dict[str, list[Tensor]],
        made: dict[str, Tensor],
    ) -> Callable[..., Tensor]:
        def run(x_RLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x_RLD is part_RLD:
                if name not in of_row:
                    of_row[name] = batches.split(forward(input_1ND, *args, **kwargs))
                return of_row[name][number]
            if name not in self._makes_result or x_RLD.shape[:2] != batches.shapes[number]:
                made[name] = forward(x_RLD, *args, **kwargs)
                return made[name]
            places = batches.own_places(number)
            out_1NO = forward(x_RLD.flatten(0, 1).index_select(0, places)[None], *args, **kwargs)
            num_places = x_RLD.shape[0] * x_RLD.shape[1]
            out = out_1NO.new_zeros(num_places, out_1NO.shape[-1]).index_copy(0, places, out_1NO[0])
            return out.unflatten(0, x_RLD.shape[:2])

        return run


def _projections(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear layers with their adapters, and their names."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Linear, BaseTunerLayer)):
            yield f"{prefix}{name}", child
        else:
            yield from _projections(child, f"{prefix}{name}.")
