"""Causal attention over packed sequences, registered with transformers under one name.

Shape suffixes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "cookbook_packed"

Segment = tuple[int, int]


def packed_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """Attention in which position t of a segment sees positions 0 to t of that segment.

    `segments` are the half-open token ranges of the sequences packed into a row; without them
    the row is one sequence. With a key-value cache the queries are the newest position of each
    row and see all of it. Segments go through the kernel one at a time, so nothing that a
    segment holds can reach another, to the bit.
    """
    assert attention_mask is None, "packed attention takes segments, never a mask"
    assert unsupported.get("softcap") is None
    assert unsupported.get("s_aux") is None
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    if groups > 1:
        key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
        value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)

    num_queries, num_keys = query_BHTD.shape[2], key_BHTD.shape[2]
    if num_queries < num_keys:
        assert num_queries == 1, "with a cache, one new position at a time"
        first = 0 if sliding_window is None else max(0, num_keys - sliding_window)
        out = F.scaled_dot_product_attention(
            query_BHTD, key_BHTD[:, :, first:], value_BHTD[:, :, first:], scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None

    outs = [
        _causal(
            query_BHTD[:, :, start:stop],
            key_BHTD[:, :, start:stop],
            value_BHTD[:, :, start:stop],
            scaling,
            sliding_window,
        )
        for start, stop in segments or [(0, num_queries)]
    ]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def _causal(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    length = query_BHTD.shape[2]
    if sliding_window is None or length <= sliding_window:
        return F.scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, is_causal=True, scale=scaling)
    position = torch.arange(length, device=query_BHTD.device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance < sliding_window)
    return F.scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, packed_attention)
