"""Chooses the beginnings of prompts after which the states of recurrent layers are kept.

Keys and values of any beginning of an earlier prompt can be used again. States are known only where a pass
ended, and each that is kept takes memory. So a prompt is computed in more than one pass where earlier ones,
or others that are computed now, show that its beginning occurs again: up to where it leaves them. That of the
next turn of a conversation is also computed up to shortly before its end: the last tokens open the reply, and
often are not in the next prompt.

Shape suffixes: T tokens of one text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cookbook.engine.model.prefix_tree import Family, families, num_shared

_SPACING = 4
"""How many times the shortest reused beginning has to be between two kept states."""
_ALONGSIDE_OTHERS = 16
"""How many times as long a beginning has to be if several texts are computed together: one that is continued
is not in one batch with texts of other lengths, which costs some 256 tokens (`benchmarks/hybrids.py`)."""
_SEEN_OF_NEXT_TURN = 1 / 3
"""The share of a prompt that was seen before if it is taken for the next turn of a conversation."""


@dataclass(frozen=True)
class Beginning:
    """Some first tokens of texts, which are computed in a pass of their own."""

    tokens_T: np.ndarray
    texts: list[int]
    """The texts that begin with them."""


def min_continued(min_shared: int, num_texts: int) -> int:
    """Returns the shortest known beginning that is worth continuing, for one of several texts."""
    return min_shared if num_texts == 1 else _ALONGSIDE_OTHERS * min_shared


def plan_beginnings(
    texts: Sequence[np.ndarray], num_known: Sequence[int], num_seen: Sequence[int], min_shared: int
) -> list[list[Beginning]]:
    """Returns the beginnings that are to be computed first, those of each pass in a list.

    Of each text it is given after how many tokens states are known, and how many it shares with an earlier
    one. `min_shared` is the shortest beginning that is reused.
    """
    branch_points: list[set[int]] = [set() for _ in texts]
    for family in families(texts, min_shared):
        for place, index in enumerate(family.indices):
            branch_points[index] = _branch_points(family, place)
    spacing, shortest = _SPACING * min_shared, min_continued(min_shared, len(texts))
    least = max(spacing, shortest)
    chosen: dict[bytes, np.ndarray] = {}
    for text_T, known, seen, points in zip(texts, num_known, num_seen, branch_points, strict=True):
        seen, before_reply, last, cuts = min(seen, len(text_T) - 1), len(text_T) - min_shared, known, []
        for point in sorted(points):
            if min(point, len(text_T) - 1) - last >= least:
                last = min(point, len(text_T) - 1)
                cuts.append(last)
        is_next_turn = seen > known and seen >= _SEEN_OF_NEXT_TURN * len(text_T)
        if is_next_turn and before_reply >= max(shortest, seen, last + spacing):
            cuts.append(before_reply)
        elif seen - last >= least:
            cuts.append(seen)
        chosen |= {text_T[:cut].tobytes(): text_T[:cut] for cut in cuts}
    return _in_passes(sorted(chosen.values(), key=len), texts)


def _branch_points(family: Family, place: int) -> set[int]:
    """Returns how many tokens one of the texts of a family shares with each of the others."""
    before, after = family.shared[place:0:-1], family.shared[place + 1 :]
    return {*itertools.accumulate(before, min), *itertools.accumulate(after, min)}


def _in_passes(tokens: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> list[list[Beginning]]:
    """Returns beginnings, sorted by length, so that each is in a later pass than those that it continues."""

    def begins(text_T: np.ndarray, tokens_T: np.ndarray) -> bool:
        return num_shared(text_T, tokens_T) == len(tokens_T)

    passes: list[list[Beginning]] = []
    for tokens_T in tokens:
        number = 1 + max(
            (at for at, each in enumerate(passes) if any(begins(tokens_T, one.tokens_T) for one in each)),
            default=-1,
        )
        if number == len(passes):
            passes.append([])
        members = [index for index, text_T in enumerate(texts) if begins(text_T, tokens_T)]
        passes[number].append(Beginning(tokens_T, members))
    return passes
