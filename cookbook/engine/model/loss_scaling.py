"""Backward passes in float16, which holds numbers from 6e-8 to 65,504 alone.

The gradient that enters the model is scaled by a power of two, so that its largest element is of the middle
of that range, and the gradients of the weights are scaled back in fp32, which is exact. If one is not finite
the pass is repeated with a smaller scale. The scale depends on the micro-batch alone, so there is no state to
save, and no step is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_LARGEST = 10
"""The exponent of two of the largest element that enters the model, at first."""
_SMALLER = 6
"""By how much the exponent is lowered when a gradient is not finite."""
_MOST_PASSES = 6
"""After so many the gradients are left as they are: activations are not finite."""


def backpropagate(output: Tensor, gradient: Tensor, weights: Sequence[nn.Parameter]) -> None:
    """Adds to the `.grad` of `weights` the gradient that `gradient`, which is by `output`, leads to.

    `output` is float16, `gradient` fp32. Waits for the device.
    """
    earlier = [weight.grad for weight in weights]
    largest = float(gradient.abs().amax())
    exponent = _LARGEST - math.frexp(largest)[1] if 0 < largest < math.inf else 0
    for number in range(_MOST_PASSES):
        is_last = number + 1 == _MOST_PASSES
        for weight in weights:
            weight.grad = None
        scaled = (gradient * 2.0**exponent).to(output.dtype)
        output.backward(scaled, retain_graph=not is_last)
        found = [weight.grad for weight in weights if weight.grad is not None]
        if is_last or not found or torch.stack([grad.isfinite().all() for grad in found]).all():
            break
        exponent -= _SMALLER
    for weight, before in zip(weights, earlier, strict=True):
        if weight.grad is None:
            weight.grad = before
            continue
        weight.grad.mul_(2.0**-exponent)
        if before is not None:
            weight.grad.add_(before)
