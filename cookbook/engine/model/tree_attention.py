"""Attention over a row in which what several sequences share stands once.

Each segment of the row has the tokens of one branch. A token sees the ancestors of its segment and the
earlier tokens of the segment itself, and nothing else. Attention over keys in several parts is exact if the
parts are merged by the logarithms of their sums (Milakov and Gimelshein, 2018): with outputs o and
log-sum-exps l,

    l = log(exp l1 + exp l2),   o = exp(l1 - l) o1 + exp(l2 - l) o2.

Given the merged o and l, the backward pass of each part is that of one call over all keys. So no mask is made
and no keys are copied.

Shape suffixes: H query heads, K heads of keys and values, G query heads that share a key head, T tokens of
the row, P tokens of the paths of all segments end to end (a path has the ancestors' and the own), D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cookbook.engine.model.prefix_tree import Segment

_BLOCK = 512
"""Ancestors are attended to in blocks of this many keys, so that neighbours that branch off at different
places share calls."""


class AttentionCall(NamedTuple):
    """One call of the kernel: consecutive queries of the row over consecutive keys."""

    queries: slice
    keys: slice
    is_causal: bool
    """Whether the keys are those of the queries' own tokens, of which each sees the earlier ones."""


@dataclass(frozen=True)
class TreeLayout:
    """What the segments of a row see besides their own tokens."""

    segments: Sequence[Segment]
    ancestors: Sequence[Sequence[Segment]]
    """For each segment, the ranges of the row with the tokens before it, in order."""
    lengths: Sequence[int]
    """The number of tokens on the path of each segment, including its own."""
    rows_P: Tensor
    """The places in the row of the tokens of each path, on the device: int64."""
    path_starts: Tensor
    """Where each path begins in [P], and the end of the last: [segments + 1] int32, on the device."""
    num_cached: int = 0
    """How many keys stand before those of the row's tokens. Ancestors and `rows_P` are places among all."""

    @cached_property
    def calls(self) -> list[AttentionCall]:
        """The calls that cover all that is seen. Those over own tokens are first and cover every query."""
        calls = [
            AttentionCall(slice(*segment), slice(*self._keys_of(segment)), True) for segment in self.segments
        ]
        last_of: dict[Segment, int] = {}
        for (start, stop), ancestors in zip(self.segments, self.ancestors, strict=True):
            for begin, end in ancestors:
                for block in range(begin, end, _BLOCK):
                    keys = (block, min(block + _BLOCK, end))
                    last = last_of.get(keys)
                    if last is not None and calls[last].queries.stop == start:
                        calls[last] = calls[last]._replace(queries=slice(calls[last].queries.start, stop))
                        continue
                    last_of[keys] = len(calls)
                    calls.append(AttentionCall(slice(start, stop), slice(*keys), False))
        return calls

    def keys_within(self, number: int, window: int | None) -> list[Segment]:
        """Returns the ranges of keys that a segment sees, without what is beyond the sliding window."""
        (start, stop), pieces = self.segments[number], list(self.ancestors[number])
        beyond = self.lengths[number] - (stop - start) - ((window or self.lengths[number]) - 1)
        while pieces and beyond > 0:
            begin, end = pieces.pop(0)
            if begin + beyond < end:
                pieces.insert(0, (begin + beyond, end))
            beyond -= end - begin
        return [*pieces, self._keys_of((start, stop))]

    def _keys_of(self, segment: Segment) -> Segment:
        return segment[0] + self.num_cached, segment[1] + self.num_cached


def is_supported(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, tree: TreeLayout, sliding_window: int | None
) -> bool:
    """Returns whether `attend` can be used: on a CPU, if no ancestors are beyond the sliding window."""
    longest = max(tree.lengths)
    return (
        query_BHTD.device.type == "cpu"
        and query_BHTD.dtype == key_BKTD.dtype == value_BKTD.dtype
        and query_BHTD.shape[-1] == value_BKTD.shape[-1]
        and longest <= (sliding_window or longest)
    )


def attend(
    query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, tree: TreeLayout, scale: float | None
) -> Tensor:
    """Returns attention in which each token sees its ancestors and its segment up to itself: [1, H, T, D]."""
    out_1HTD: Tensor = _TreeAttention.apply(query_1HTD, key_1KTD, value_1KTD, tree.calls, scale)
    return out_1HTD


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_1HTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        calls: Sequence[AttentionCall],
        scale: float | None,
    ) -> Tensor:
        query_KGTD, key_KGTD, value_KGTD = _by_key_head(query_1HTD, key_1KTD, value_1KTD)
        out_KGTD = torch.empty_like(query_KGTD, memory_format=torch.contiguous_format)
        sums_KGT = query_KGTD.new_empty(query_KGTD.shape[:3], dtype=_sum_dtype(query_1HTD))
        for queries, keys, is_causal in calls:
            part_KGTD, part_sums_KGT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_KGTD[:, :, queries],
                key_KGTD[:, :, keys],
                value_KGTD[:, :, keys],
                0.0,
                is_causal,
                scale=scale,
            )
            if is_causal:
                out_KGTD[:, :, queries], sums_KGT[:, :, queries] = part_KGTD, part_sums_KGT
                continue
            before_KGT = sums_KGT[:, :, queries]
            after_KGT = torch.logaddexp(before_KGT, part_sums_KGT)
            kept_KGT1 = (before_KGT - after_KGT).exp_()[..., None]
            added_KGT1 = (part_sums_KGT - after_KGT).exp_()[..., None]
            out_KGTD[:, :, queries].mul_(kept_KGT1).add_(part_KGTD * added_KGT1)
            sums_KGT[:, :, queries] = after_KGT
        ctx.save_for_backward(query_1HTD, key_1KTD, value_1KTD, out_KGTD, sums_KGT)
        ctx.calls, ctx.scale = calls, scale
        return out_KGTD.flatten(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_1HTD, key_1KTD, value_1KTD, out_KGTD, sums_KGT = ctx.saved_tensors
        query_KGTD, key_KGTD, value_KGTD = _by_key_head(query_1HTD, key_1KTD, value_1KTD)
        grad_KGTD = grads[0].contiguous()[0].unflatten(0, query_KGTD.shape[:2])
        grad_query_KGTD, grad_key_KTD, grad_value_KTD = (
            torch.zeros(shape, dtype=_sum_dtype(query_1HTD))
            for shape in (query_KGTD.shape, key_1KTD.shape[1:], value_1KTD.shape[1:])
        )
        for queries, keys, is_causal in ctx.calls:
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_KGTD[:, :, queries],
                query_KGTD[:, :, queries],
                key_KGTD[:, :, keys],
                value_KGTD[:, :, keys],
                out_KGTD[:, :, queries],
                sums_KGT[:, :, queries].contiguous(),
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            grad_query_KGTD[:, :, queries] += of_query
            grad_key_KTD[:, keys] += of_key.sum(1)
            grad_value_KTD[:, keys] += of_value.sum(1)
        dtype = query_1HTD.dtype
        grad_query_1HTD = grad_query_KGTD.flatten(0, 1)[None].to(dtype)
        return grad_query_1HTD, grad_key_KTD[None].to(dtype), grad_value_KTD[None].to(dtype), None, None


class VarlenTreeAttention(torch.autograd.Function):
    """The variable-length kernel of torch over the keys of each path, for tensors on CUDA.

    The keys are gathered for each pass and not kept for the backward pass: paths may have many times the
    tokens of the row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        starts: Tensor,
        longest: int,
        tree: TreeLayout,
        scale: float | None,
        window: list[int],
    ) -> Tensor:
        """`starts` and `longest` are those of the segments, `window` how many keys are seen on each side."""
        ctx.borders = (starts, tree.path_starts, longest, max(tree.lengths), window == [-1, 0])
        ctx.options = (scale, window)
        keys = (key_TKD.index_select(0, tree.rows_P), value_TKD.index_select(0, tree.rows_P))
        out_THD, sums, rng_state = torch.ops.torch_attn._varlen_attn(
            query_THD, *keys, *ctx.borders, *ctx.options, enable_gqa=True
        )
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, tree.rows_P, out_THD, sums, rng_state)
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query_THD, key_TKD, value_TKD, rows_P, out_THD, sums, rng_state = ctx.saved_tensors
        keys = (key_TKD.index_select(0, rows_P), value_TKD.index_select(0, rows_P))
        grad_query_THD, *grads_PKD = torch.ops.torch_attn._varlen_attn_backward(
            grads[0].contiguous(), query_THD, *keys, out_THD, sums, *ctx.borders, rng_state, *ctx.options
        )
        grad_key_TKD, grad_value_TKD = (
            torch.zeros(tensor.shape, dtype=_sum_dtype(tensor), device=tensor.device)
            .index_add_(0, rows_P, grad_PKD.to(_sum_dtype(tensor)))
            .to(tensor.dtype)
            for tensor, grad_PKD in zip((key_TKD, value_TKD), grads_PKD, strict=True)
        )
        return grad_query_THD, grad_key_TKD, grad_value_TKD, None, None, None, None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the type of sums over branches, of which there may be many: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_key_head(query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views [K, G, T, D] in which keys and values are repeated without a copy."""
    query_KGTD = query_1HTD[0].unflatten(0, (key_1KTD.shape[1], -1))
    num_shared = query_KGTD.shape[1]
    key_KGTD, value_KGTD = (
        tensor[0].unsqueeze(1).expand(-1, num_shared, -1, -1) for tensor in (key_1KTD, value_1KTD)
    )
    return query_KGTD, key_KGTD, value_KGTD
