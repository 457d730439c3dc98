"""Operators of torch that are one kernel on CUDA: rotations, gated products, a block of the softmax.

They are written in Triton (`triton_kernels`) and registered with torch: it then knows what they return
without running them, as on the fake device of `benchmarks`. Callers ask `is_used` first, and else compute the
same with several kernels.

Shape suffixes: B sequences, H heads, T tokens, E size of a head; N tokens, I the inner size of an MLP; C
positions, K logits of a block of the vocabulary, J targets of a position.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cookbook.engine import devices

logger = logging.getLogger(__name__)

NAMES = ("rotate", "softmax_block", "gated_product")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""The activations of gated products."""


def is_used(name: str, device: torch.device) -> bool:
    """Returns whether a kernel of `NAMES` runs on the device and computes the right results there.

    torch's builds for CUDA on Linux bring Triton along. The first call for a device runs the kernel on a few
    numbers. One that fails, as without a C compiler for what launches it, is a warning.
    """
    return device.type == "cuda" and _passes_trial(name, device)


@functools.cache
def _passes_trial(name: str, device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None or not devices.has_varlen_attention(device):
        return False
    try:
        problem = None if _TRIALS[name](device) else "its results are wrong"
    except Exception as error:  # of a compiler, a driver, a library: whatever it is, there is another way
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning("The kernel %s is not used on %s, which is slower: %s", name, device, problem)
    return problem is None


# -- the operators ---------------------------------------------------------------------------


@torch.library.custom_op("cookbook::rotate", mutates_args=())
def rotate(
    q_BHTE: Tensor, k_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, is_backward: bool
) -> tuple[Tensor, Tensor]:
    """Returns `x * cos + (-x2, x1) * sin` of queries and keys, x1 and x2 being the halves of a head.

    With `is_backward` their gradients are given, and those by x are returned.
    """
    from cookbook.engine.model import triton_kernels

    return triton_kernels.rotate(q_BHTE, k_BHTE, cos_BTE, sin_BTE, is_backward)


@rotate.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, is_backward: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@torch.library.custom_op("cookbook::gated_product", mutates_args=())
def gated_product(gate_NI: Tensor, up_NI: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up. The rows of both may be anywhere in memory."""
    from cookbook.engine.model import triton_kernels

    return triton_kernels.gated_product(gate_NI, up_NI, activation)


@gated_product.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("cookbook::gated_product_backward", mutates_args=("gate_NI", "up_NI"))
def gated_product_backward(gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor, activation: str) -> None:
    """Writes the gradients by gate and up in their place."""
    from cookbook.engine.model import triton_kernels

    triton_kernels.gated_product_backward(gate_NI, up_NI, grad_NI, activation)


@gated_product_backward.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None: ...


@torch.library.custom_op(
    "cookbook::softmax_block", mutates_args=("terms_CK", "target_logits_CJ", "highest_C1", "total_C1")
)
def softmax_block(
    logits_CK: Tensor,
    terms_CK: Tensor | None,
    targets_CJ: Tensor,
    target_logits_CJ: Tensor,
    highest_C1: Tensor,
    total_C1: Tensor,
    first: int,
    softcap: float | None,
) -> Tensor:
    """Adds a block of logits, those of the vocabulary from `first` on, to a running softmax.

    Updates the highest logit and the sum of the terms `exp(logit - highest)`, and sets the logits of those
    targets that are in the block. Returns the factor [C, 1] of all earlier terms. With `terms_CK` the terms
    are written there, times the derivative of the softcap; it may be in the memory of the logits, row by row.
    All but the terms and the targets are fp32.
    """
    from cookbook.engine.model import triton_kernels

    return triton_kernels.softmax_block(
        logits_CK, terms_CK, targets_CJ, target_logits_CJ, highest_C1, total_C1, first, softcap
    )


@softmax_block.register_fake
def _(
    logits: Tensor,
    terms: Tensor | None,
    targets: Tensor,
    target_logits: Tensor,
    highest: Tensor,
    total: Tensor,
    first: int,
    softcap: float | None,
) -> Tensor:
    return torch.empty_like(highest)


# -- the trials ------------------------------------------------------------------------------


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.float().cpu(), expected.float(), rtol=0.02, atol=0.02)


def _draw(*shape: int) -> Tensor:
    """Returns numbers that bfloat16 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def _try_rotate(device: torch.device) -> bool:
    q, k, cos, sin = _draw(1, 3, 5, 16), _draw(1, 1, 5, 16), _draw(1, 5, 16), _draw(1, 5, 16)
    found = rotate(*(x.to(device) for x in (q, k, cos, sin)), False)
    expected = [x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k)]
    return all(map(_is_close, found, expected))


def _try_gated_product(device: torch.device) -> bool:
    for activation, function in ACTIVATIONS.items():
        halves, grad = _draw(4, 64), _draw(4, 32)
        leaves = [x.float().requires_grad_() for x in halves.chunk(2, 1)]
        with torch.enable_grad():
            expected = function(leaves[0]) * leaves[1]
            gradients = torch.autograd.grad(expected, leaves, grad.float())
        gate, up = halves.to(device).chunk(2, 1)
        out = gated_product(gate, up, activation)
        gated_product_backward(gate, up, grad.to(device), activation)
        if not all(map(_is_close, (out, gate, up), (expected.detach(), *gradients))):
            return False
    return True


def _try_softmax_block(device: torch.device) -> bool:
    logits = _draw(4, 40).float()
    targets = torch.tensor([[3], [39], [0], [20]])
    highest, total = torch.full((4, 1), -torch.inf, device=device), torch.zeros(4, 1, device=device)
    found = torch.zeros(4, 1, device=device)
    terms = []
    for first in (0, 25):
        part = logits[:, first : first + 25].to(device, copy=True)
        room = part.view(torch.bfloat16)[:, : part.shape[1]]
        softmax_block(part, room, targets.to(device), found, highest, total, first, None)
        terms.append(room)
    logprobs = found.cpu() - highest.cpu() - total.cpu().log()
    last = (logits[:, 25:] - logits.amax(1, keepdim=True)).exp()
    expected = logits.log_softmax(1).gather(1, targets)
    return _is_close(logprobs, expected) and _is_close(terms[-1], last)


_TRIALS: dict[str, Callable[[torch.device], bool]] = {
    "rotate": _try_rotate,
    "gated_product": _try_gated_product,
    "softmax_block": _try_softmax_block,
}
