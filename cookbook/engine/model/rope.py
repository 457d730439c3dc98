"""Rotary position embeddings in one kernel for queries and keys on CUDA, forward and backward.

transformers rotates with a copy of both halves, a negation, two products and a sum, and its backward pass
pads the gradient of each half to the whole size. Here the backward pass is the rotation by the negative
angle. Without the kernel (`kernels`), three for a tensor add the products of the halves in place. Only a
function of the known formula is replaced, as with `fused`; on other devices it stays what it is.

Shape suffixes: B sequences, H heads, T tokens, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model import kernels
from cookbook.engine.model.replaced_functions import ReplacedFunctions

_NAME = "apply_rotary_pos_emb"


def install(decoder: nn.Module) -> None:
    """Replaces the function in the code of the decoder's layers, for all models of these classes."""
    ReplacedFunctions(decoder, [_NAME], _replacement).install()


def _replacement(name: str, theirs: Any) -> Any:
    return theirs if isinstance(theirs, _Rotation) or not _is_known(theirs) else _Rotation(theirs)


class _Rotation:
    """The function of transformers, with fewer kernels on CUDA."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self._theirs = theirs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Models may rotate queries alone, or lay heads out in another way (Qwen4's indexer).
        if kwargs or len(args) != 4 or not all(isinstance(each, Tensor) for each in args):
            return self._theirs(*args, **kwargs)
        q, k, cos, sin = args
        is_plain = cos.ndim == 3 and cos.dtype == sin.dtype == q.dtype == k.dtype
        if not (is_plain and q.is_cuda and cos.shape[-1] == q.shape[-1] == k.shape[-1]):
            return self._theirs(*args)
        if kernels.is_used("rotate", q.device):
            return rotated_together(q, k, cos, sin)
        cos_B1TE, sin_B1TE = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotated(q, cos_B1TE, sin_B1TE), rotated(k, cos_B1TE, sin_B1TE)


@torch.no_grad()
def _is_known(theirs: Callable[..., Any]) -> bool:
    """Returns whether it is `x * cos + (-x2, x1) * sin` on both tensors; x1, x2 are halves of a head."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    try:
        found = theirs(q, k, cos, sin)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    expected = [rotated(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k)]
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        for one, other in zip(found, expected, strict=True)
    )


def rotated_together(
    q_BHTE: Tensor, k_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns queries and keys as `rotated` does, from one kernel. In fewer than 32 bits it rounds once."""
    outs: tuple[Tensor, Tensor] = _RotatedTogether.apply(q_BHTE, k_BHTE, cos_BTE, sin_BTE)
    return outs


class _RotatedTogether(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BTE, sin_BTE)
        outs: tuple[Tensor, Tensor] = kernels.rotate(q_BHTE, k_BHTE, cos_BTE, sin_BTE, False)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        return *kernels.rotate(*grads, *ctx.saved_tensors, True), None, None


def rotated(x_BHTE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor) -> Tensor:
    """Returns `x * cos + (-x2, x1) * sin`; in fewer than 32 bits it is rounded twice and not three times."""
    out_BHTE: Tensor = _Rotated.apply(x_BHTE, cos_B1TE, sin_B1TE)
    return out_BHTE


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_B1TE, sin_B1TE)
        half = x_BHTE.shape[-1] // 2
        out_BHTE = x_BHTE * cos_B1TE
        out_BHTE[..., :half].addcmul_(x_BHTE[..., half:], sin_B1TE[..., :half], value=-1)
        out_BHTE[..., half:].addcmul_(x_BHTE[..., :half], sin_B1TE[..., half:])
        return out_BHTE

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cos_B1TE, sin_B1TE = ctx.saved_tensors
        (grad_BHTE,) = grads
        half = grad_BHTE.shape[-1] // 2
        grad_x_BHTE = grad_BHTE * cos_B1TE
        grad_x_BHTE[..., :half].addcmul_(grad_BHTE[..., half:], sin_B1TE[..., half:])
        grad_x_BHTE[..., half:].addcmul_(grad_BHTE[..., :half], sin_B1TE[..., :half], value=-1)
        return grad_x_BHTE, None, None
