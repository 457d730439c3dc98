"""Keys and values of earlier positions, for sequences of different lengths.

A sequence is in the length bucket with the smallest sufficient capacity. So no row of more than 256 tokens is
padded by more than half, and the computation of a row depends on its own length alone. `KVCache` is the cache
of `attention.packed_attention`: it stores the keys and values of a prefill, and in a decode pass appends the
newest position of every sequence.

Shape suffixes: R rows of a bucket, H heads of keys and values, T tokens of a packed row, C capacity of a
bucket, D head size.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.packing import copy_to
from cookbook.engine.model.prefix_tree import Segment
from cookbook.engine.sampling.prompt_tree import KnownPart
from cookbook.engine.sampling.recurrent_states import RecurrentStates
from cookbook.engine.sampling.sequence import CachedText

_CAPACITIES = [64, 128, *sorted({size << power for power in range(24) for size in (256, 384)})]
"""There are few short ones: each bucket is a call of the attention, which costs more than the padding."""

Layer: TypeAlias = torch.nn.Module


@dataclass(eq=False)
class LengthBucket:
    """The sequences of one capacity. `keys` and `values` are [allocated rows, H, C, D] for each layer.

    Beyond its length a row holds zeros, not remains of an earlier sequence: attention gives these positions
    no weight, but zero times nan is nan.
    """

    capacity: int
    sequences: list[CachedText] = field(default_factory=list)
    """By row."""
    keys: dict[Layer, Tensor] = field(default_factory=dict)
    values: dict[Layer, Tensor] = field(default_factory=dict)
    newest: tuple[Tensor, Tensor] | None = None
    """In a decode pass, the rows [R] and the newest position of each [R]."""
    visible: dict[int | None, Tensor] = field(default_factory=dict)
    """In a decode pass, the positions that each row sees for each sliding window: [R, C] bool."""

    def allocate(self, tensor: Tensor | None, new_HTD: Tensor) -> Tensor:
        """Returns the tensor of one layer, or a larger copy if the bucket has more sequences than rows."""
        num_rows = 0 if tensor is None else len(tensor)
        if tensor is not None and num_rows >= len(self.sequences):
            return tensor
        num_heads, _, head_size = new_HTD.shape
        # A row is read once a sequence has it, which then has all of it written.
        larger_RHCD = new_HTD.new_empty(
            max(len(self.sequences), 2 * num_rows), num_heads, self.capacity, head_size
        )
        if tensor is not None:
            larger_RHCD[:num_rows] = tensor
        return larger_RHCD

    def free(self, rows: Iterable[int]) -> None:
        """Removes rows. The last rows move to their places."""
        freed = {*rows}
        num_left = len(self.sequences) - len(freed)
        holes = sorted(row for row in freed if row < num_left)
        moved = [row for row in range(num_left, len(self.sequences)) if row not in freed]
        for hole, row in zip(holes, moved, strict=True):
            self.sequences[hole], self.sequences[row].row = self.sequences[row], hole
        del self.sequences[num_left:]
        for tensor in (*self.keys.values(), *self.values.values()) if holes else ():
            if len(holes) == 1:
                tensor[holes[0]] = tensor[moved[0]]
            else:
                tensor.index_copy_(0, _rows(tensor.device, holes), tensor[_rows(tensor.device, moved)])


class KVCache:
    """All length buckets. Sequences are added, grow and are removed only between passes of the model."""

    def __init__(self) -> None:
        self.is_prefill = False
        """Whether the pass is over prompts, which use the attention of packed rows."""
        self._buckets: dict[int, LengthBucket] = {}
        self._groups: Sequence[Sequence[CachedText]] = []
        """The groups of the prefill."""
        self._paths: list[list[Segment]] = []
        """The places of each group's text among the keys of the prefill."""
        self._known: list[KnownPart] = []
        """The keys of the prefill that stand before those of its row."""
        self._states_before: Sequence[RecurrentStates | None] = ()
        """The states that each group's text is continued from."""
        self._order: list[CachedText] = []
        """The sequences of the decode pass, in the order of their tokens."""
        self._states: list[tuple[RecurrentStates, dict[CachedText, int]]] = []
        """States of recurrent layers, and the row of each sequence in them: those of the last decode pass,
        then those of later prefills."""

    # -- between passes ---------------------------------------------------------------------

    def begin_prefill(
        self,
        groups: Sequence[Sequence[CachedText]],
        paths: list[list[Segment]],
        known: list[KnownPart],
        states_before: Sequence[RecurrentStates | None] = (),
    ) -> None:
        """Prepares for a pass over prompts: the sequences of group i get the keys and values of path i.

        A path has the places of the text's tokens: among the tokens of the `known` nodes, which stand first,
        and of the row. `states_before` are those after the known tokens of each text, for recurrent layers.
        """
        self.is_prefill, self._groups, self._paths, self._known = True, groups, paths, known
        self._states_before = states_before
        for sequence in (sequence for group in groups for sequence in group):
            self._place(sequence)

    def place(self, group: Sequence[CachedText], path: list[KnownPart]) -> None:
        """Gives sequences the keys, values and states of a text that is known whole."""
        length, end = sum(part for _, part in path), path[-1][0].end
        assert end is not None
        self.begin_prefill([group], [[(0, length)]], path)
        for layer, key_HTD in path[0][0].keys.items():
            self.store(layer, key_HTD[None, :, :0], path[0][0].values[layer][None, :, :0])
        self._states.append((end.states.row(0), dict.fromkeys(group, 0)))

    def begin_decode(self, sequences: Sequence[CachedText]) -> list[int]:
        """Prepares for a pass over the newest token of each sequence in the cache.

        Returns the order of their tokens in the packed row, as indices of `sequences`.
        """
        self.is_prefill, self._groups, self._paths, self._known = False, [], [], []
        self._states_before = ()
        grown = [sequence for sequence in sequences if sequence.length > sequence.capacity]
        for capacity in {sequence.capacity: None for sequence in grown}:
            self._grow([sequence for sequence in grown if sequence.capacity == capacity])
        for bucket in self._buckets.values():
            bucket.newest = None
            bucket.visible.clear()
        indices = {sequence: index for index, sequence in enumerate(sequences)}
        self._order = [sequence for bucket in self._buckets.values() for sequence in bucket.sequences]
        return [indices[sequence] for sequence in self._order]

    def _grow(self, sequences: list[CachedText]) -> None:
        """Moves sequences of one bucket to that of their length, in one copy for each layer."""
        old, rows = self._buckets[sequences[0].capacity], [sequence.row for sequence in sequences]
        buckets = [self._place(sequence) for sequence in sequences]
        assert len({*map(id, buckets)}) == 1, "a sequence grows by one token"
        bucket, first = buckets[0], sequences[0].row
        for to, tensors in ((bucket.keys, old.keys), (bucket.values, old.values)):
            for layer, tensor in tensors.items():
                to[layer] = bucket.allocate(to.get(layer), tensor[0])
                new_RHCD = to[layer][first : first + len(rows)]
                old_RHCD = (
                    tensor[rows[0]] if len(rows) == 1 else tensor.index_select(0, _rows(tensor.device, rows))
                )
                new_RHCD[:, :, : old.capacity] = old_RHCD
                new_RHCD[:, :, old.capacity :] = 0
        self._free(old, rows)

    def remove(self, sequence: CachedText) -> None:
        """Frees the keys and values of a sequence."""
        self._free(self._buckets[sequence.capacity], [sequence.row])
        sequence.capacity, sequence.row = 0, -1
        for _, rows in self._states:
            rows.pop(sequence, None)
        self._states = [(states, rows) for states, rows in self._states if rows]

    def bytes_held(self) -> tuple[int, int]:
        """Returns the bytes of one position's keys and values, and of one sequence's states."""
        per_position = 0
        for bucket in [*self._buckets.values()][:1]:
            for tensor in (*bucket.keys.values(), *bucket.values.values()):
                per_position += tensor.nbytes // (len(tensor) * bucket.capacity)
        states = [states for states, _ in self._states if states.num_rows]
        return per_position, states[0].num_bytes // states[0].num_rows if states else 0

    def of(self, sequence: CachedText) -> tuple[dict[Layer, Tensor], dict[Layer, Tensor]]:
        """Returns views of a sequence's keys and values, [H, C, D] for each layer."""
        bucket, row = self._buckets[sequence.capacity], sequence.row
        keys, values = (
            {layer: tensor[row] for layer, tensor in tensors.items()}
            for tensors in (bucket.keys, bucket.values)
        )
        return keys, values

    def states_of(self, sequence: CachedText) -> RecurrentStates:
        """Returns a copy of a sequence's states."""
        return next(states.row(rows[sequence]) for states, rows in self._states if sequence in rows)

    def _place(self, sequence: CachedText) -> LengthBucket:
        capacity = capacity_for(sequence.length)
        bucket = self._buckets.setdefault(capacity, LengthBucket(capacity))
        sequence.capacity, sequence.row = capacity, len(bucket.sequences)
        bucket.sequences.append(sequence)
        return bucket

    def _free(self, bucket: LengthBucket, rows: list[int]) -> None:
        bucket.free(rows)
        if not bucket.sequences:
            del self._buckets[bucket.capacity]  # frees its memory

    # -- within a pass of the model ---------------------------------------------------------

    def is_continued(self, segment: int) -> bool:
        """Returns, in a prefill, whether a segment continues states that are known."""
        return segment < len(self._states_before) and self._states_before[segment] is not None

    def new_states(self, batches: Sequence[Sequence[int]]) -> list[RecurrentStates]:
        """Returns, in a prefill, the states before each batch, given the segments of its rows.

        All segments of a batch continue known states, or none does.
        """
        added = []
        for segments in batches:
            rows = {
                sequence: row
                for row, segment in enumerate(segments)
                if segment < len(self._groups)  # the last segment may be padding
                for sequence in self._groups[segment]
            }
            states = RecurrentStates()
            if self.is_continued(segments[0]):
                before = [self._states_before[segment] for segment in segments]
                sources = [(each, {row: 0}) for row, each in enumerate(before) if each is not None]
                states = RecurrentStates.gathered(sources, range(len(before)), len(before))
            added.append((states, rows))
        self._states += [(states, rows) for states, rows in added if rows]
        return [states for states, _ in added]

    def states(self, num_rows: int) -> RecurrentStates:
        """Returns, in a decode pass, the states of the sequences in their order, and further rows of 0."""
        states, rows = self._states[0]
        is_in_order = list(rows) == self._order and list(rows.values()) == list(range(len(rows)))
        if len(self._states) > 1 or not is_in_order or states.num_rows != num_rows:
            states = RecurrentStates.gathered(self._states, self._order, num_rows)
            self._states = [(states, {sequence: row for row, sequence in enumerate(self._order)})]
        return states

    def store(self, layer: Layer, key_1HTD: Tensor, value_1HTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores, in a prefill, the keys and values of a layer for every sequence of each group.

        Returns those of the known positions, followed by the given ones.
        """
        if self._known:
            known_keys = [node.keys[layer][None, :, :length] for node, length in self._known]
            known_values = [node.values[layer][None, :, :length] for node, length in self._known]
            key_1HTD = torch.cat([*known_keys, key_1HTD], dim=2)
            value_1HTD = torch.cat([*known_values, value_1HTD], dim=2)
        for group, path in zip(self._groups, self._paths, strict=True):
            bucket = self._buckets[group[0].capacity]
            rows = slice(group[0].row, group[-1].row + 1)
            for tensors, new_1HTD in ((bucket.keys, key_1HTD), (bucket.values, value_1HTD)):
                tensors[layer] = bucket.allocate(tensors.get(layer), new_1HTD[0])
                end = 0
                for start, stop in path:
                    place, end = end, end + stop - start
                    tensors[layer][rows, :, place:end] = new_1HTD[0, :, start:stop]
                tensors[layer][rows, :, end:] = 0
        return key_1HTD, value_1HTD

    def append(
        self, layer: Layer, key_1HTD: Tensor, value_1HTD: Tensor, sliding_window: int | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Stores, in a decode pass, the newest position of each sequence, one length bucket after another.

        Yields for each bucket the slice of its tokens in the packed row, the keys and values of its sequences
        [R, H, C, D], and the positions that each of them sees [R, C].
        """
        first, device = 0, key_1HTD.device
        for bucket in self._buckets.values():
            num_rows = len(bucket.sequences)
            tokens = slice(first, first + num_rows)
            first += num_rows
            if bucket.newest is None:
                newest = np.array([sequence.length - 1 for sequence in bucket.sequences])
                bucket.newest = (torch.arange(num_rows, device=device), copy_to(device, newest))
            row_R, newest_R = bucket.newest
            if sliding_window not in bucket.visible:
                position_C = torch.arange(bucket.capacity, device=device)
                visible_RC = position_C <= newest_R[:, None]
                if sliding_window is not None:
                    visible_RC &= position_C > newest_R[:, None] - sliding_window
                bucket.visible[sliding_window] = visible_RC
            key_RHCD, value_RHCD = bucket.keys[layer], bucket.values[layer]
            key_RHCD[row_R, :, newest_R] = key_1HTD[0, :, tokens].transpose(0, 1)
            value_RHCD[row_R, :, newest_R] = value_1HTD[0, :, tokens].transpose(0, 1)
            yield tokens, key_RHCD[:num_rows], value_RHCD[:num_rows], bucket.visible[sliding_window]


def _rows(device: torch.device, rows: list[int]) -> Tensor:
    return copy_to(device, np.array(rows))


def capacity_for(length: int) -> int:
    """Returns the capacity of the length bucket for sequences of `length` tokens."""
    return _CAPACITIES[bisect.bisect_left(_CAPACITIES, length)]
