"""Causal attention over packed sequences, registered with transformers under one name.

Shape suffixes: B rows, H heads, T tokens, D head size. Over a cache: R rows, H heads of keys and values, G
query heads that share one key head, C capacity in positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from cookbook.engine import devices
from cookbook.engine.model import tree_attention
from cookbook.engine.model.prefix_tree import Segment
from cookbook.engine.model.tree_attention import TreeLayout, VarlenTreeAttention

NAME = "cookbook_packed"

_NOT_NEEDED = {"position_ids", "input_ids", "cache_position"}
"""The tensors that models pass to every attention, and that nothing here depends on."""


class Cache(Protocol):
    """The keys and values of earlier positions. `sampling.kv_cache` documents each method."""

    is_prefill: bool

    def store(
        self, layer: torch.nn.Module, key_1HTD: Tensor, value_1HTD: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def append(
        self, layer: torch.nn.Module, key_1HTD: Tensor, value_1HTD: Tensor, sliding_window: int | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]: ...

    def is_continued(self, segment: int) -> bool: ...

    def new_states(self, batches: Sequence[Sequence[int]]) -> Sequence[Any]: ...

    def states(self, num_rows: int) -> Any: ...


@dataclass(frozen=True)
class AttentionLayout:
    """The positions of the sequences in a packed row, computed once for all layers."""

    segments: Sequence[Segment]
    """Half-open ranges of tokens: the sequences or, with a `tree`, its branches."""
    starts: Tensor
    """Where each segment begins, and the end of the last: [number of sequences + 1] int32, on the device."""
    longest: int
    windows_seen: list[int | None] | None = None
    """A list to which each call of the attention appends its sliding window, or None to record nothing."""
    cache: Cache | None = None
    """In a prefill the segments are prompts, which the cache stores, or what it lacks of them; in a decode
    pass each segment is the next token of a cached sequence."""
    tree: TreeLayout | None = None
    """What the segments see besides themselves, if the row has what several sequences share only once, or
    the cache has their beginnings."""
    around: Callable[..., Tensor] | None = None
    """What is called in a decode pass in the place of the attention: with the attention as a function of
    queries, keys, values and the cache, and with these (`sampling.decode_graphs`)."""


# The layout differs for every row, so a compiled layer would be recompiled for each row.
@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """Returns attention in which position t of a sequence sees its positions 0 to t: [B, T, H, D].

    Without a `layout` each row is one sequence. With a tree, the positions before a segment are its
    ancestors'. In a decode pass over a cache each sequence is one token, which sees the positions that the
    cache holds for it; further tokens are padding, and their result is 0. `softcap` bounds the scores (Gemma
    2). `s_aux` is one score per head without a key (the attention sinks of gpt-oss).

    On CUDA one variable-length kernel processes all sequences of a row in half precision. On other devices
    (`devices.has_varlen_attention`), and with a softcap or sinks, sequences run one at a time. In all cases
    no sequence affects another, bit for bit.
    """
    if layout is not None and layout.windows_seen is not None:
        layout.windows_seen.append(sliding_window)
        if unread := {name for name, value in further.items() if isinstance(value, Tensor)} - _NOT_NEEDED:
            raise ValueError(f"its attention depends on {min(unread)} too")
    assert attention_mask is None, "packed attention takes a layout, never a mask"
    is_plain = softcap is None and s_aux is None
    qkv = query_BHTD, key_BHTD, value_BHTD
    if layout is not None and layout.cache is not None:
        if not layout.cache.is_prefill:
            attend = functools.partial(_decode, module, scaling, sliding_window, softcap, s_aux)
            if layout.around is not None:
                return layout.around(attend, *qkv, layout.cache), None
            return attend(*qkv, layout.cache), None
        key_BHTD, value_BHTD = layout.cache.store(module, key_BHTD, value_BHTD)
        qkv = query_BHTD, key_BHTD, value_BHTD
    is_half = query_BHTD.dtype in (torch.bfloat16, torch.float16)
    is_varlen = layout is not None and is_half and devices.has_varlen_attention(query_BHTD.device)
    if is_plain and layout is not None and is_varlen:
        return _varlen(*qkv, layout, scaling, sliding_window), None

    tree = layout.tree if layout is not None else None
    if tree is not None and is_plain and tree_attention.is_supported(*qkv, tree, sliding_window):
        return tree_attention.attend(*qkv, tree, scaling).transpose(1, 2).contiguous(), None
    return _by_segment(*qkv, layout, scaling, sliding_window, softcap, s_aux), None


def _by_segment(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    layout: AttentionLayout | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Returns attention of one segment after the other over the keys that it sees: [B, T, H, D]."""
    is_plain = softcap is None and s_aux is None
    tree = layout.tree if layout is not None else None
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    if groups > 1:
        key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
        value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
    segments: Sequence[Segment] = layout.segments if layout else [(0, key_BHTD.shape[2])]
    outs = []
    for number, (start, stop) in enumerate(segments):
        query, key, value = (tensor[:, :, start:stop] for tensor in (query_BHTD, key_BHTD, value_BHTD))
        if tree is not None:
            seen = tree.keys_within(number, sliding_window)
            key, value = (
                torch.cat([tensor[:, :, begin:end] for begin, end in seen], dim=2)
                for tensor in (key_BHTD, value_BHTD)
            )
        num_queries, num_keys = query.shape[2], key.shape[2]  # over transformers' cache there are more keys
        if not is_plain:
            visible_TT = _visible(num_queries, num_keys, sliding_window, query.device)
            outs.append(_eager(query, key, value, visible_TT, scaling, softcap, s_aux))
            continue
        is_masked = num_keys > (sliding_window or num_keys) or 1 < num_queries < num_keys
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_visible(num_queries, num_keys, sliding_window, query.device) if is_masked else None,
            is_causal=num_queries > 1 and not is_masked,
            scale=scaling,
        )
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


def _decode(
    module: torch.nn.Module,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    cache: Cache,
) -> Tensor:
    """Returns attention of one new token per sequence over the cache, bucket by bucket: [B, T, H, D]."""
    num_heads = key_BHTD.shape[1]
    out_THD = value_BHTD.new_zeros(query_BHTD.shape[2], query_BHTD.shape[1], value_BHTD.shape[3])
    for tokens, key_RHCD, value_RHCD, visible_RC in cache.append(
        module, key_BHTD, value_BHTD, sliding_window
    ):
        query_RHGD = query_BHTD[0, :, tokens].transpose(0, 1).unflatten(1, (num_heads, -1))
        visible_R11C = visible_RC[:, None, None]
        if softcap is None and s_aux is None:
            out_RHGD = F.scaled_dot_product_attention(
                query_RHGD, key_RHCD, value_RHCD, attn_mask=visible_R11C, scale=scaling
            )
        else:
            out_RHGD = _eager(query_RHGD, key_RHCD, value_RHCD, visible_R11C, scaling, softcap, s_aux)
        out_THD[tokens] = out_RHGD.flatten(1, 2)
    return out_THD[None]


def _eager(
    query_BHTD: Tensor,
    key_BHCD: Tensor,
    value_BHCD: Tensor,
    visible: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Returns attention with a softcap or sinks, computed in fp32 with all scores in memory.

    `s_aux` has one score for each query head. The query heads are axis H and, over a cache, also axis T.
    """
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHTC = (query_BHTD @ key_BHCD.transpose(2, 3) * scale).float()
    if softcap is not None:
        scores_BHTC = softcap * torch.tanh(scores_BHTC / softcap)
    scores_BHTC = scores_BHTC.masked_fill(~visible, -torch.inf)
    num_keys = scores_BHTC.shape[-1]
    if s_aux is not None:
        sinks_1HT1 = s_aux.float().view(1, query_BHTD.shape[1], -1, 1)
        sinks_BHT1 = sinks_1HT1.expand(*scores_BHTC.shape[:3], 1)
        scores_BHTC = torch.cat([scores_BHTC, sinks_BHT1], dim=-1)
    return scores_BHTC.softmax(-1)[..., :num_keys].to(value_BHCD.dtype) @ value_BHCD


def _visible(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Returns the mask of the keys that each of the last `num_queries` positions sees: [T, keys], bool."""
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    return (distance >= 0) & (distance < (sliding_window or num_keys))


def _varlen(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    layout: AttentionLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Runs one row of packed sequences through the flash-attention kernel built into torch: [1, T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    value_size = value_BHTD.shape[-1]
    if value_size != (size := query_BHTD.shape[-1]):  # the kernel takes heads of one size (DeepSeek's differ)
        scaling = size**-0.5 if scaling is None else scaling
        query_BHTD, key_BHTD, value_BHTD = (
            F.pad(tensor, (0, max(size, value_size) - tensor.shape[-1]))
            for tensor in (query_BHTD, key_BHTD, value_BHTD)
        )
    query_THD, key_THD, value_THD = (
        # an index would copy all gradients once more in the backward pass
        tensor.squeeze(0).transpose(0, 1).contiguous()
        for tensor in (query_BHTD, key_BHTD, value_BHTD)
    )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    if layout.tree is not None:
        borders = layout.starts, layout.longest, layout.tree
        of_tree_THD: Tensor = VarlenTreeAttention.apply(
            query_THD, key_THD, value_THD, *borders, scaling, list(window)
        )
        return of_tree_THD[None, ..., :value_size].contiguous()
    out_THD = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        layout.starts,
        layout.starts,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=window,
        enable_gqa=True,
    )
    assert isinstance(out_THD, Tensor)
    return out_THD[None, ..., :value_size].contiguous()


AttentionInterface.register(NAME, packed_attention)
