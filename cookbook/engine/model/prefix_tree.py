"""Finds the beginnings that token sequences share, so that each can be computed once.

Examples of one conversation, the two answers of a preference pair and the samples of one prompt begin with
the same tokens. A causal model computes the same states for them. Sorted by their tokens, the sequences below
any node of their prefix tree are neighbours, and the lengths that neighbours share describe the whole tree:
two sequences share the least of the lengths between them.

Shape suffixes: T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Segment = tuple[int, int]
"""A half-open range of the tokens of a row."""

MIN_SHARED_TOKENS = 16
"""Shorter beginnings, such as a header of the chat format, are computed for each sequence: a branch costs
about as much as a few tokens (`benchmarks/shared_prefixes.py`)."""


@dataclass(frozen=True)
class Family:
    """Sequences that share beginnings with each other, sorted by their tokens, or one sequence alone."""

    indices: Sequence[int]
    lengths: Sequence[int]
    shared: Sequence[int]
    """How many tokens each sequence shares with the one before it; 0 for the first."""

    def size(self, size_of: Callable[[int], int] = int) -> int:
        """Returns the size of the tokens that are computed.

        `size_of` maps the length of a sequence to its size. A sequence that has only a part of its tokens to
        be computed counts as that part of its size.
        """
        return sum(
            -(-size_of(length) * (length - shared) // length)
            for length, shared in zip(self.lengths, self.shared, strict=True)
        )

    def divided(self) -> tuple[Family, Family]:
        """Returns two parts of a family of several sequences, so that the larger one is as small as possible.

        What both parts share is computed in each, so this divides at a short beginning rather than a long
        one.
        """
        own = [length - shared for length, shared in zip(self.lengths, self.shared, strict=True)]
        before, total = np.cumsum(own), sum(own)
        larger = np.maximum(before[:-1], total - before[:-1] + np.asarray(self.shared[1:]))
        cut = int(larger.argmin()) + 1
        return self._part(slice(0, cut)), self._part(slice(cut, None))

    def _part(self, part: slice) -> Family:
        return Family(self.indices[part], self.lengths[part], [0, *self.shared[part][1:]])


def families(
    sequences: Sequence[np.ndarray], min_shared: int | None, kinds: Sequence[int] | None = None
) -> list[Family]:
    """Returns the sequences in families, ordered by their first sequence. With None each is alone.

    `sequences` are arrays of token ids [T] of at least one token. Beginnings of less than `min_shared` tokens
    do not count. Sequences of different `kinds` share nothing.
    """
    if min_shared is None:
        return [Family([index], [len(tokens_T)], [0]) for index, tokens_T in enumerate(sequences)]
    kinds = [0] * len(sequences) if kinds is None else kinds
    keys = [(kind, tokens_T.astype(">u4").tobytes()) for kind, tokens_T in zip(kinds, sequences, strict=True)]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    found: list[Family] = []
    first = 0
    shared = [0]
    for place in range(1, len(order) + 1):
        length = 0
        if place < len(order) and kinds[order[place - 1]] == kinds[order[place]]:
            length = num_shared(sequences[order[place - 1]], sequences[order[place]])
        if length >= min_shared:
            shared.append(length)
            continue
        indices = order[first:place]
        found.append(Family(indices, [len(sequences[index]) for index in indices], shared))
        first, shared = place, [0]
    return sorted(found, key=lambda family: min(family.indices))


def num_shared(one_T: np.ndarray, other_T: np.ndarray) -> int:
    """Returns how many tokens two sequences share from their beginning."""
    length = min(len(one_T), len(other_T))
    if not length or one_T[0] != other_T[0]:
        return 0
    differs_T = one_T[:length] != other_T[:length]
    place = int(differs_T.argmax())
    return place if differs_T[place] else length


@dataclass(frozen=True)
class Branch:
    """The tokens of one sequence that are in the row for it alone. They follow those of its ancestors."""

    index: int
    """The place of the sequence in its family, or in the row."""
    first: int
    """The position of the first of its tokens in the sequence, which may be all that the sequence has."""
    segment: Segment
    """Its tokens in the row."""
    ancestors: Sequence[Segment]
    """The ranges of the row with the tokens before them, in order."""

    @property
    def path(self) -> list[Segment]:
        """The ranges of the row with all tokens of the sequence."""
        return [*self.ancestors, self.segment] if self.segment[0] < self.segment[1] else list(self.ancestors)


def branches(family: Family, start: int = 0) -> list[Branch]:
    """Returns the branches of a family in the order of the row, whose part for it begins at `start`.

    The longest sequence below a node is the stem there, and the others branch off from it. Each branch
    follows its parent, the one that leaves it last first, so that the longest beginnings are in few pieces.
    """
    leaders = list(range(len(family.indices)))
    firsts, parents = [0] * len(leaders), [-1] * len(leaders)

    def leader_of(place: int) -> int:
        while leaders[place] != place:
            leaders[place] = place = leaders[leaders[place]]
        return place

    # Joining the neighbours that share most first, each sequence but one loses the lead of its group once.
    for place in sorted(range(1, len(leaders)), key=lambda place: -family.shared[place]):
        one, other = leader_of(place - 1), leader_of(place)
        stem, branch = (one, other) if family.lengths[one] >= family.lengths[other] else (other, one)
        leaders[branch], parents[branch], firsts[branch] = stem, stem, family.shared[place]
    children: list[list[int]] = [[] for _ in leaders]
    for place, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(place)
    found: dict[int, Branch] = {}
    waiting, end = [parents.index(-1)], start
    while waiting:
        place = waiting.pop()
        first, stop = firsts[place], end + family.lengths[place] - firsts[place]
        ancestors = [] if parents[place] < 0 else _beginning(found[parents[place]].path, first)
        found[place] = Branch(place, first, (end, stop), ancestors)
        end = stop
        waiting += sorted(children[place], key=lambda child: firsts[child])
    return list(found.values())


def _beginning(path: Iterable[Segment], length: int) -> list[Segment]:
    """Returns the ranges of the first `length` tokens of a path."""
    beginning: list[Segment] = []
    for start, stop in path:
        stop = min(stop, start + length)
        if start < stop:
            beginning.append((start, stop))
        length -= stop - start
    return beginning
