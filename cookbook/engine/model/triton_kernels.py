"""Kernels written in Triton. `kernels` makes operators of them; nothing else imports this module.

All compute in fp32 and round what they write once. None uses atomics, so results do not depend on the order
in which programs run.
"""

# Triton compiles functions whose arguments are pointers and tensors of its own, without types of Python.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARP_ELEMENTS = 1024
"""The elements of a row for each warp of 32 threads, which hold them in registers."""
_GATED_BLOCK = 1024
"""The elements of a row for each program of a gated product: 16 bytes for a thread of 4 warps in bfloat16."""


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _num_warps(num_elements: int) -> int:
    return min(32, max(4, triton.next_power_of_2(num_elements) // _WARP_ELEMENTS))


# -- RoPE ------------------------------------------------------------------------------------


@triton.jit
def _rotate_heads(
    x, out, first, first_out, head_stride, head_stride_out, cos1, sin1, cos2, sin2, pairs,
    num_heads: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of a token. The sines are those of the second half of a head, and of the first."""
    heads = tl.arange(0, HEADS)[:, None]
    is_in = (heads < num_heads) & (pairs < half)[None, :]
    places = first + heads * head_stride + pairs[None, :]
    places_out = first_out + heads * head_stride_out + pairs[None, :]
    x1 = tl.load(x + places, mask=is_in, other=0).to(tl.float32)
    x2 = tl.load(x + places + half, mask=is_in, other=0).to(tl.float32)
    tl.store(out + places_out, x1 * cos1 - x2 * sin1, mask=is_in)
    tl.store(out + places_out + half, x2 * cos2 + x1 * sin2, mask=is_in)


@triton.jit
def _rotate(
    q, k, out_q, out_k, cos, sin, num_tokens,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    out_q_stride_b, out_q_stride_h, out_q_stride_t, out_k_stride_b, out_k_stride_h, out_k_stride_t,
    angle_stride_b, angle_stride_t,
    num_heads_q: tl.constexpr, num_heads_k: tl.constexpr, half: tl.constexpr,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HALF: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program rotates one token, or rotates its gradient by the negative angle."""
    sequence = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    pairs = tl.arange(0, HALF)
    angles = sequence * angle_stride_b + token * angle_stride_t + pairs
    is_in = pairs < half
    cos1 = tl.load(cos + angles, mask=is_in, other=0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + angles, mask=is_in, other=0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + angles + half, mask=is_in, other=0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + angles + half, mask=is_in, other=0).to(tl.float32)[None, :]
    if IS_BACKWARD:
        sin1, sin2 = -sin2, -sin1
    _rotate_heads(
        q, out_q, sequence * q_stride_b + token * q_stride_t,
        sequence * out_q_stride_b + token * out_q_stride_t, q_stride_h, out_q_stride_h,
        cos1, sin1, cos2, sin2, pairs, num_heads_q, half, HEADS_Q,
    )  # fmt: skip
    _rotate_heads(
        k, out_k, sequence * k_stride_b + token * k_stride_t,
        sequence * out_k_stride_b + token * out_k_stride_t, k_stride_h, out_k_stride_h,
        cos1, sin1, cos2, sin2, pairs, num_heads_k, half, HEADS_K,
    )  # fmt: skip


def rotate(
    q_BHTE: Tensor, k_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, is_backward: bool
) -> tuple[Tensor, Tensor]:
    q_BHTE, k_BHTE, cos_BTE, sin_BTE = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTE, k_BHTE, cos_BTE, sin_BTE)
    )
    sin_BTE = sin_BTE if sin_BTE.stride() == cos_BTE.stride() else sin_BTE.contiguous()
    cos_BTE = cos_BTE if sin_BTE.stride() == cos_BTE.stride() else cos_BTE.contiguous()
    outs = torch.empty_like(q_BHTE), torch.empty_like(k_BHTE)
    batch, num_heads_q, num_tokens, size = q_BHTE.shape
    num_heads_k = k_BHTE.shape[1]
    angle_stride_b = cos_BTE.stride(0) if len(cos_BTE) > 1 else 0
    heads = triton.next_power_of_2(num_heads_q), triton.next_power_of_2(num_heads_k)
    half = triton.next_power_of_2(size // 2)
    with _on_device_of(q_BHTE):
        _rotate[(batch * num_tokens,)](
            q_BHTE, k_BHTE, *outs, cos_BTE, sin_BTE, num_tokens,
            *q_BHTE.stride()[:3], *k_BHTE.stride()[:3], *outs[0].stride()[:3], *outs[1].stride()[:3],
            angle_stride_b, cos_BTE.stride(1),
            num_heads_q, num_heads_k, size // 2, *heads, half, is_backward,
            num_warps=_num_warps(heads[0] * half),
        )  # fmt: skip
    return outs


# -- the gated product of an MLP -------------------------------------------------------------


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Returns the share of the gate that the activation lets through, and the activation's derivative."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2 x)
        square = gate * gate
        share = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * square))
        slope = share + gate * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    return share, slope


@triton.jit
def _gated_product(
    gate, up, out, size, gate_stride, up_stride, out_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = columns < size
    x = tl.load(gate + row * gate_stride + columns, mask=is_in, other=0).to(tl.float32)
    y = tl.load(up + row * up_stride + columns, mask=is_in, other=0).to(tl.float32)
    share, _ = _activate(x, ACTIVATION)
    tl.store(out + row * out_stride + columns, x * share * y, mask=is_in)


@triton.jit
def _gated_product_backward(
    gate, up, grad, size, gate_stride, up_stride, grad_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program replaces a block of a row of gate and of up by their gradients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = columns < size
    gates, ups = gate + row * gate_stride + columns, up + row * up_stride + columns
    x = tl.load(gates, mask=is_in, other=0).to(tl.float32)
    y = tl.load(ups, mask=is_in, other=0).to(tl.float32)
    slope_out = tl.load(grad + row * grad_stride + columns, mask=is_in, other=0).to(tl.float32)
    share, slope = _activate(x, ACTIVATION)
    tl.store(gates, slope_out * y * slope, mask=is_in)
    tl.store(ups, slope_out * x * share, mask=is_in)


def _launch_by_rows(kernel, activation: str, *tensors_NI: Tensor) -> None:
    num_rows, size = tensors_NI[0].shape
    assert all(x_NI.stride(1) == 1 or size == 1 for x_NI in tensors_NI)
    block = min(_GATED_BLOCK, triton.next_power_of_2(size))
    with _on_device_of(tensors_NI[0]):
        kernel[(num_rows, triton.cdiv(size, block))](
            *tensors_NI, size, *(x_NI.stride(0) for x_NI in tensors_NI), activation, block
        )


def gated_product(gate_NI: Tensor, up_NI: Tensor, activation: str) -> Tensor:
    out_NI = gate_NI.new_empty(gate_NI.shape)
    _launch_by_rows(_gated_product, activation, gate_NI, up_NI, out_NI)
    return out_NI


def gated_product_backward(gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor, activation: str) -> None:
    _launch_by_rows(_gated_product_backward, activation, gate_NI, up_NI, grad_NI)


# -- a block of the softmax over the vocabulary ----------------------------------------------


@triton.jit
def _softmax_block(
    logits, terms, targets, target_logits, highest, total, shrink, first, size, softcap, num_targets,
    logits_stride, terms_stride,
    HAS_SOFTCAP: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program holds one row of the block in registers. `terms` may be in the memory of the row: the
    reductions end after all of it has been read."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_in = columns < size
    x = tl.load(logits + row * logits_stride + columns, mask=is_in, other=-float("inf"))
    slope = x
    if HAS_SOFTCAP:
        share = 2 * tl.sigmoid(2 * x / softcap) - 1
        slope = 1 - share * share
        x = tl.where(is_in, share * softcap, -float("inf"))
    for number in range(num_targets):
        place = row * num_targets + number
        here = tl.load(targets + place) - first
        if (here >= 0) & (here < size):
            tl.store(target_logits + place, tl.sum(tl.where(columns == here, x, 0.0)))
    before = tl.load(highest + row)
    higher = tl.maximum(before, tl.max(x))
    factor = tl.exp(before - higher)
    x = tl.exp(x - higher)
    tl.store(total + row, tl.load(total + row) * factor + tl.sum(x))
    tl.store(highest + row, higher)
    tl.store(shrink + row, factor)
    if WRITES:
        if HAS_SOFTCAP:
            x = x * slope
        tl.store(terms + row * terms_stride + columns, x, mask=is_in)


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
    shrink_C1 = torch.empty_like(highest_C1)
    num_rows, size = logits_CK.shape
    written_CK = logits_CK if terms_CK is None else terms_CK
    block = triton.next_power_of_2(size)
    with _on_device_of(logits_CK):
        _softmax_block[(num_rows,)](
            logits_CK, written_CK, targets_CJ, target_logits_CJ, highest_C1, total_C1, shrink_C1,
            first, size, softcap or 1.0, targets_CJ.shape[1], logits_CK.stride(0), written_CK.stride(0),
            softcap is not None, terms_CK is not None, block, num_warps=_num_warps(block),
        )  # fmt: skip
    return shrink_C1
