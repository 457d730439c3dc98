"""Keys and values of the positions so far, for continuations of different lengths.

Continuations lie in slabs by length: a slab holds all those for which its capacity is the least that
suffices, so no row is padded by more than half, and what is computed for a row depends on its own length
alone. `KVCache` plays the part of a cache in `attention.packed_attention`: it keeps what a prompt leaves
behind, and answers the newest position of every row.

Shape suffixes: R rows of a slab, H heads of keys and values, G query heads that share one of them,
C capacity of a slab, D head size.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

_CAPACITIES = sorted({size << power for power in range(26) for size in (64, 96)})

Layer: TypeAlias = torch.nn.Module


@dataclass(eq=False)
class Row:
    """One continuation: where it lies, and how many positions it has."""

    length: int
    slab: Slab | None = None
    place: int = -1


@dataclass(eq=False)
class Slab:
    """The rows of one capacity; `keys` and `values` are [rows there is room for, H, C, D] by layer.

    Behind its length a row has zeros, not what an earlier row in its place left: attention gives those
    positions no weight, but no weight times nan is nan.
    """

    capacity: int
    rows: list[Row] = field(default_factory=list)
    keys: dict[Layer, Tensor] = field(default_factory=dict)
    values: dict[Layer, Tensor] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        row.slab, row.place = self, len(self.rows)
        self.rows.append(row)

    def remove_from(self, place: int) -> None:
        """The last row moves to the place that is left."""
        last = self.rows.pop()
        if place == len(self.rows):
            return
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[place] = tensor[last.place]
        self.rows[place], last.place = last, place

    def with_room(self, tensor: Tensor | None, like_HTD: Tensor) -> Tensor:
        """The tensor of one layer, or a larger copy of it where there are more rows than it has."""
        num_there = 0 if tensor is None else len(tensor)
        if tensor is not None and num_there >= len(self.rows):
            return tensor
        num_heads, _, head_size = like_HTD.shape
        grown_RHCD = like_HTD.new_zeros(
            max(len(self.rows), 2 * num_there), num_heads, self.capacity, head_size
        )
        if tensor is not None:
            grown_RHCD[:num_there] = tensor
        return grown_RHCD


class KVCache:
    """All rows. Between passes of the model rows come, grow and go; within one nothing moves."""

    def __init__(self) -> None:
        self._slabs: dict[int, Slab] = {}
        self._arriving: Sequence[Sequence[Row]] = ()
        """The rows that each sequence of the prompt pass leaves behind."""
        self._visible: dict[tuple[int, int | None], Tensor] = {}

    # -- between passes ---------------------------------------------------------------------

    def expect_prompts(self, rows: Sequence[Sequence[Row]]) -> None:
        """The next pass is over prompts: sequence i of its layout leaves its keys and values to `rows[i]`."""
        self._arriving = rows
        for row in (row for each in rows for row in each):
            self._slab_for(row.length).add(row)

    def expect_tokens(self, rows: Sequence[Row]) -> list[int]:
        """The next pass is over one token of each of these rows, which are all that there are.

        Returns the order in which the tokens have to come, as indices of `rows`.
        """
        self._arriving = ()
        for row in rows:
            row.length += 1
            assert row.slab is not None
            if row.length > row.slab.capacity:
                self._move(row, self._slab_for(row.length))
        self._visible = {}
        numbers = {id(row): number for number, row in enumerate(rows)}
        return [numbers[id(row)] for slab in self._filled_slabs() for row in slab.rows]

    def remove(self, row: Row) -> None:
        assert row.slab is not None
        self._leave(row.slab, row.place)
        row.slab = None

    def _slab_for(self, length: int) -> Slab:
        capacity = capacity_for(length)
        return self._slabs.setdefault(capacity, Slab(capacity))

    def _filled_slabs(self) -> list[Slab]:
        return [slab for _, slab in sorted(self._slabs.items())]

    def _move(self, row: Row, to: Slab) -> None:
        source, place = row.slab, row.place
        assert source is not None
        to.add(row)
        for target, origin in ((to.keys, source.keys), (to.values, source.values)):
            for layer, tensor in origin.items():
                target[layer] = to.with_room(target.get(layer), tensor[place])
                target[layer][row.place, :, : source.capacity] = tensor[place]
                target[layer][row.place, :, source.capacity :] = 0
        self._leave(source, place)

    def _leave(self, slab: Slab, place: int) -> None:
        slab.remove_from(place)
        if not slab.rows:
            del self._slabs[slab.capacity]  # and its memory

    # -- within a pass of the model ---------------------------------------------------------

    @property
    def is_filling(self) -> bool:
        """Whether the pass is over prompts, whose attention is that of any packed row."""
        return bool(self._arriving)

    def keep(
        self, layer: Layer, segments: Sequence[tuple[int, int]], key_1HTD: Tensor, value_1HTD: Tensor
    ) -> None:
        """Of a pass over prompts: the keys and values of a layer, to be there for what follows."""
        for rows, (start, stop) in zip(self._arriving, segments, strict=False):  # the row may be padded
            slab, places = rows[0].slab, slice(rows[0].place, rows[-1].place + 1)
            assert slab is not None
            for kept, new_1HTD in ((slab.keys, key_1HTD), (slab.values, value_1HTD)):
                new_HTD = new_1HTD[0, :, start:stop]
                kept[layer] = slab.with_room(kept.get(layer), new_HTD)
                kept[layer][places, :, : stop - start] = new_HTD
                kept[layer][places, :, stop - start :] = 0

    def attend(
        self,
        layer: Layer,
        query_1HTD: Tensor,
        key_1HTD: Tensor,
        value_1HTD: Tensor,
        sliding_window: int | None,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Of a pass over one token of each row: [1, T, query heads, D], T in the order of `expect_tokens`.

        `attend(query_RHGD, key_RHCD, value_RHCD, visible_RC)` does the arithmetic of one slab.
        Positions beyond the rows, with which a pass may be padded, come out as zeros.
        """
        num_query_heads, num_heads = query_1HTD.shape[1], key_1HTD.shape[1]
        num_tokens, head_size = query_1HTD.shape[2], value_1HTD.shape[3]
        out_THD = value_1HTD.new_zeros(num_tokens, num_query_heads, head_size)
        first = 0
        for slab in self._filled_slabs():
            num_rows = len(slab.rows)
            part = slice(first, first + num_rows)
            first += num_rows
            lengths_R = self._lengths(slab, key_1HTD.device)
            row_R = torch.arange(num_rows, device=key_1HTD.device)
            for kept, new_1HTD in ((slab.keys, key_1HTD), (slab.values, value_1HTD)):
                kept[layer][row_R, :, lengths_R - 1] = new_1HTD[0, :, part].transpose(0, 1)
            query_RHGD = query_1HTD[0, :, part].transpose(0, 1).unflatten(1, (num_heads, -1))
            out_RHGD = attend(
                query_RHGD,
                slab.keys[layer][:num_rows],
                slab.values[layer][:num_rows],
                self._visible_in(slab, sliding_window, key_1HTD.device),
            )
            out_THD[part] = out_RHGD.reshape(num_rows, num_query_heads, -1)
        return out_THD[None]

    def _lengths(self, slab: Slab, device: torch.device) -> Tensor:
        key = (slab.capacity, -1)
        if key not in self._visible:
            self._visible[key] = torch.tensor([row.length for row in slab.rows], device=device)
        return self._visible[key]

    def _visible_in(self, slab: Slab, sliding_window: int | None, device: torch.device) -> Tensor:
        """Which positions each row sees: [R, C], the same for all layers of one window."""
        key = (slab.capacity, sliding_window)
        if key not in self._visible:
            position_C = torch.arange(slab.capacity, device=device)
            distance_RC = self._lengths(slab, device)[:, None] - 1 - position_C
            self._visible[key] = (distance_RC >= 0) & (distance_RC < (sliding_window or slab.capacity))
        return self._visible[key]


def capacity_for(length: int) -> int:
    """Of the slab for rows of so many positions."""
    return _CAPACITIES[bisect.bisect_left(_CAPACITIES, length)]
