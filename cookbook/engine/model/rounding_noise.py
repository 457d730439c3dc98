"""Measures how much a model's results in 16 bits depend on rounding.

Two correct ways to compute the same thing round differently. In fp32 that is far below any fault. In 16 bits
the results of some models move by much of their size, because a router chooses another expert or a state
carries the difference on. So where results of two ways differ, the difference is compared with that of the
model from itself, when its embeddings are rounded differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_DRAWS = 3
_TIMES = 4
"""How many times its own noise a difference may be: another pass rounds differently in every layer."""


def tolerance_in_16_bits(least: float, embeddings: nn.Module, own_difference: Callable[[], float]) -> float:
    """Returns the largest difference that rounding explains, but at least `least`.

    `own_difference` runs the model as it is, and returns how much its results differ from those before.
    """
    found = []
    for seed in range(_DRAWS):
        with _rounded_differently(embeddings, seed):
            found.append(own_difference())
    return max(least, _TIMES * max(found))


@contextlib.contextmanager
def _rounded_differently(embeddings: nn.Module, seed: int) -> Iterator[None]:
    """Moves each number of the embeddings by about its last bit, up or down, in the body."""
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, inputs: Any, embedded_BTD: Tensor) -> Tensor:
        signs = torch.randint(2, embedded_BTD.shape, generator=generator).to(embedded_BTD) * 2 - 1
        return embedded_BTD * (1 + signs * torch.finfo(embedded_BTD.dtype).eps)

    hook = embeddings.register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()
