"""Holds the weights of linear layers and experts in 8 bits (float8 e4m3) with a scale for each row.

A weight is a byte and the scale of its row a power of two, so a weight that is dequantised is the same number
in float32, bfloat16 and float16. The bytes are kept as uint8, which neither PEFT nor transformers takes for a
dtype to compute in.

On CUDA with kernels for it a layer multiplies in 8 bits: each row of its input is rounded to float8 with a
scale of its own, and sums are float32. The backward pass takes the dequantised weight and the gradient in the
engine's dtype, so gradients are those of the layer with its rounded weight, and are not rounded to 8 bits
themselves. Elsewhere, and for experts, weights are dequantised for both products, and not kept in between.

Shape suffixes: N tokens, I inputs, O outputs, E experts, R and C rows and columns as stored, X anything
before the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16
"""What the kernels need both sides of a weight to be a multiple of."""


def quantize(weight_XC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight as bytes, and the scales of its rows: uint8 [X, C] and float32 [X, 1]."""
    largest_X1 = weight_XC.detach().abs().amax(dim=-1, keepdim=True).float()
    mantissa_X1, exponent_X1 = torch.frexp(largest_X1 / _LARGEST)
    exponent_X1 = torch.where(mantissa_X1 == 0.5, exponent_X1 - 1, exponent_X1)
    scale_X1 = torch.ldexp(torch.ones_like(largest_X1), exponent_X1)
    return (weight_XC.detach() / scale_X1).to(FP8).view(torch.uint8), scale_X1


def dequantized(bytes_XC: Tensor, scale_X1: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight in `dtype`: [X, C]."""
    return bytes_XC.view(FP8).to(dtype).mul_(scale_X1)


class Fp8Linear(nn.Linear):
    """A linear layer whose weight is uint8 [O, I], the bytes of float8 numbers."""

    weight_scale: Tensor
    """The scales of the rows: float32 [O, 1]."""

    def forward(self, x_XI: Tensor) -> Tensor:
        # A view that is made in a function of autograd cannot be changed in place behind it, as some models
        # do. So it is made here, and only where it is one: a LoRA's function calls this with rows.
        if x_XI.ndim == 2:
            out_NO: Tensor = _Fp8Product.apply(x_XI, self)
            return out_NO
        out_NO = _Fp8Product.apply(x_XI.reshape(-1, x_XI.shape[-1]), self)
        return out_NO.view(*x_XI.shape[:-1], -1)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return dequantized(self.weight, self.weight_scale, dtype)


class _Fp8Product(torch.autograd.Function):
    """x W^T + bias. Only x gets a gradient, and the dequantised weight is not kept for it."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        if has_fp8_products(x_NI, layer):
            return scaled_product(x_NI, layer)
        return F.linear(x_NI, layer.weight_in(x_NI.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> Any:
        return grad_NO @ ctx.layer.weight_in(grad_NO.dtype), None


def has_fp8_products(x_NI: Tensor, layer: Fp8Linear) -> bool:
    """Returns whether the device multiplies in 8 bits: compute capability 8.9 and above, in bfloat16."""
    if not x_NI.is_cuda or x_NI.dtype != torch.bfloat16 or x_NI.numel() == 0:
        return False
    if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
        return False
    return torch.cuda.get_device_capability(x_NI.device) >= (8, 9)


def scaled_product(x_NI: Tensor, layer: Fp8Linear) -> Tensor:
    """Returns the product in 8 bits: [N, O], in bfloat16."""
    x8_NI, scale_N1 = rows_in_fp8(x_NI)
    return torch._scaled_mm(
        x8_NI,
        layer.weight.view(FP8).T,  # column-major, as the kernels take it
        scale_a=scale_N1,
        scale_b=layer.weight_scale.T,
        bias=layer.bias,
        out_dtype=torch.bfloat16,
    )


def rows_in_fp8(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows in float8 and their scales, float32 [N, 1]. A row of zeros has the smallest scale."""
    x_NI = x_NI.contiguous()  # the kernels take rows in one piece
    largest_N1 = torch.linalg.vector_norm(x_NI, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale_N1 = largest_N1.clamp_(min=torch.finfo(torch.float32).tiny * _LARGEST).div_(_LARGEST)
    return (x_NI / scale_N1).to(FP8), scale_N1


# -- experts --------------------------------------------------------------------------------

SCALE = "_scale"
"""The ending of the buffer with the scales of a weight, behind the weight's name."""


@dataclass(frozen=True)
class StackInFp8:
    """The stacked weights [E, R, C] of experts, whose matrices are dequantised as they are asked for."""

    bytes_ERC: Tensor
    scale_ER1: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.bytes_ERC.shape

    def matrix(self, expert: int) -> Tensor:
        """Returns the dequantised matrix of an expert: [R, C]."""
        return dequantized(self.bytes_ERC[expert], self.scale_ER1[expert], self.dtype)

    def first(self, num_experts: int) -> Tensor:
        """Returns the dequantised matrices of the first experts, for a product of all of them."""
        return dequantized(self.bytes_ERC[:num_experts], self.scale_ER1[:num_experts], self.dtype)


def stack_of(experts: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> StackInFp8 | None:
    """Returns the stacked weights of this name, or None if they are not held in 8 bits."""
    scale_ER1 = experts._buffers.get(name + SCALE)
    if scale_ER1 is None:
        return None
    return StackInFp8(getattr(experts, name), scale_ER1, dtype)
