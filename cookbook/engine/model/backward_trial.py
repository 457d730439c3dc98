"""Tries the backward pass of a model when it is loaded, before a run depends on it.

Shape suffixes: N tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def gradient_of_embeddings(embeddings: nn.Module, backpropagate: Callable[[], Any]) -> Tensor:
    """Returns the gradient by the output of the embeddings in a pass that `backpropagate` runs: [N, D], fp32.

    The model's weights may all be frozen. Raises ValueError if the gradient does not reach the embeddings, or
    is not finite.
    """
    leaves: list[Tensor] = []

    def start_from(module: nn.Module, inputs: Any, embedded_BTD: Tensor) -> Tensor:
        leaves.append(embedded_BTD.detach().requires_grad_())
        return leaves[-1]

    hook = embeddings.register_forward_hook(start_from)
    try:
        backpropagate()
    finally:
        hook.remove()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not gradients:
        raise ValueError("its backward pass does not reach the embeddings")
    gradient_ND = gradients[0].flatten(0, -2).float()
    if not gradient_ND.isfinite().all():
        raise ValueError("its backward pass has values that are not finite")
    return gradient_ND


def relative_difference(found_ND: Tensor, expected_ND: Tensor) -> float:
    """Returns the norm of the difference, as a share of the norm of what is expected."""
    return float((found_ND - expected_ND).norm() / expected_ND.norm().clamp_min(1e-30))
