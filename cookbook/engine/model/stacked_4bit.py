"""Holds the stacked weights of experts in 4 bits, and dequantises one expert's matrix at a time.

Shape suffixes: E experts, B bytes of one expert's matrix, R and C its rows and columns as stored, I inputs
and O outputs of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.fp8 import StackInFp8


class StackedIn4Bits(Tensor):
    """The weights [E, R, C] of all experts. Each expert's matrix is quantised on its own.

    It has the shape, the dtype and the device of the weights that it stands for, and is made a parameter in
    their place. Indexing it by an expert returns that expert's matrix, dequantised. Other operations fail.
    Weights [E*R, C] are viewed as [E, R, C] first, and an expert's matrix [R, C] is in 4 bits then.
    """

    packed_EB: Tensor
    states: list[Any]
    is_of_flat: bool
    """Whether it is a view of weights [E*R, C]."""

    @staticmethod
    def __new__(
        cls,
        packed_EB: Tensor,
        states: list[Any],
        shape: torch.Size,
        dtype: torch.dtype,
        is_of_flat: bool = False,
    ) -> StackedIn4Bits:
        stacked: StackedIn4Bits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed_EB.device
        )
        stacked.packed_EB, stacked.states, stacked.is_of_flat = packed_EB, states, is_of_flat
        return stacked

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StackedIn4Bits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        stacked = args[0]
        if func is torch.ops.aten.detach.default:
            return cls(stacked.packed_EB, stacked.states, stacked.shape, stacked.dtype, stacked.is_of_flat)
        if func is torch.ops.aten.view.default and stacked.ndim == 2:
            num_experts = len(stacked.states)
            shape = torch.Size([num_experts, stacked.shape[0] // num_experts, stacked.shape[1]])
            return cls(stacked.packed_EB, stacked.states, shape, stacked.dtype, is_of_flat=True)
        if func is torch.ops.aten.select.int and args[1] == 0 and stacked.is_of_flat:
            one = slice(args[2], args[2] + 1)
            return cls(stacked.packed_EB[one], stacked.states[one], stacked.shape[1:], stacked.dtype)
        if func is torch.ops.aten.select.int and args[1] == 0:
            return stacked.matrix(args[2])
        raise TypeError(
            f"{func} was asked of experts' weights in 4 bits, which are read one expert at a time. Use "
            f"quantization=None."
        )

    def matrix(self, expert: int) -> Tensor:
        """Returns the dequantised matrix of an expert: [R, C]."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed_EB[expert][:, None], self.states[expert]).to(self.dtype)


class Matrices:
    """The weights of a product, [E, I, O], whose matrices are dequantised as they are read."""

    def __init__(self, stacked: StackedIn4Bits | StackInFp8, is_transposed: bool) -> None:
        num_experts, rows, columns = stacked.shape
        self._stacked, self._is_transposed = stacked, is_transposed
        self.shape = (num_experts, columns, rows) if is_transposed else (num_experts, rows, columns)

    def __getitem__(self, expert: int) -> Tensor:
        matrix = self._stacked.matrix(expert)
        return matrix.T if self._is_transposed else matrix


def quantize(
    weight: Tensor, dtype: torch.dtype, num_experts: int | None = None, **settings: Any
) -> nn.Parameter:
    """Returns the weights of experts as a parameter in 4 bits.

    The weights are [E, R, C], or [E*R, C] with a number of experts. `settings` are those of `quantize_4bit`.
    """
    from bitsandbytes.functional import quantize_4bit

    packed: list[Tensor] = []
    states: list[Any] = []
    for matrix_RC in weight if num_experts is None else weight.view(num_experts, -1, weight.shape[1]):
        packed_B1, state = quantize_4bit(matrix_RC.contiguous(), **settings)
        packed.append(packed_B1[:, 0])
        if states:  # tables of the same 16 and 256 values
            state.code = states[0].code
            if state.nested:
                state.state2.code = states[0].state2.code
        states.append(state)
    stacked = StackedIn4Bits(torch.stack(packed), states, weight.shape, dtype)
    return nn.Parameter(stacked, requires_grad=False)
