"""Compares the tree of shared beginnings with a trie of single tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cookbook.engine.model.prefix_tree import Family, branches, families, num_shared
from cookbook.engine.training.partition import partition_families, plan_families

Sequences = list[list[int]]
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)
"""Few different tokens, so that most sequences share beginnings, and some are equal or begin others."""


def arrays(texts: Sequences) -> list[np.ndarray]:
    return [np.array(text) for text in texts]


def size_of_trie(texts: Sequences) -> int:
    return len({tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)})


@given(sequences)
def test_a_row_has_each_node_of_the_tree_once_and_every_path_spells_its_sequence(texts: Sequences) -> None:
    found = families(arrays(texts), min_shared=1)
    assert sorted(index for family in found for index in family.indices) == list(range(len(texts)))
    assert sum(family.size() for family in found) == size_of_trie(texts)
    for family in found:
        grown = branches(family, start=5)
        own = [texts[index] for index in family.indices]
        row = [-1] * 5 + [token for branch in grown for token in own[branch.index][branch.first :]]
        assert len(row) == 5 + family.size()
        for branch in grown:
            path = [row[at] for start, stop in branch.path for at in range(start, stop)]
            assert path == own[branch.index]
            assert branch.first == sum(stop - start for start, stop in branch.ancestors)
            assert all(start < stop <= branch.segment[0] for start, stop in branch.ancestors)


@given(sequences, st.integers(2, 5))
def test_shorter_beginnings_are_not_shared(texts: Sequences, min_shared: int) -> None:
    for family in families(arrays(texts), min_shared):
        assert all(length >= min_shared for length in family.shared[1:])
    assert [list(family.indices) for family in families(arrays(texts), None)] == [
        [i] for i in range(len(texts))
    ]


@given(sequences)
def test_families_do_not_share_with_each_other_and_are_ordered_by_their_first_sequence(
    texts: Sequences,
) -> None:
    found = families(arrays(texts), min_shared=1)
    firsts = [{texts[index][0] for index in family.indices} for family in found]
    assert all(len(tokens) == 1 for tokens in firsts)
    assert len(set.union(*firsts)) == len(found)
    assert [min(family.indices) for family in found] == sorted(min(family.indices) for family in found)


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_shared_tokens_are_counted_from_the_beginning(one: list[int], other: list[int]) -> None:
    expected = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    assert num_shared(np.array(one), np.array(other)) == (
        min(len(one), len(other)) if expected is None else expected
    )


@given(sequences.filter(lambda texts: len(texts) > 1))
def test_a_divided_family_computes_what_both_parts_share_twice(texts: Sequences) -> None:
    for family in families(arrays(texts), min_shared=1):
        if len(family.indices) == 1:
            continue
        parts = family.divided()
        assert [*parts[0].indices, *parts[1].indices] == list(family.indices)
        sizes = [size_of_trie([texts[index] for index in part.indices]) for part in parts]
        assert [part.size() for part in parts] == sizes
        cuts = [
            max(
                size_of_trie([texts[i] for i in side])
                for side in (family.indices[:cut], family.indices[cut:])
            )
            for cut in range(1, len(family.indices))
        ]
        assert max(sizes) == min(cuts)


def test_the_longest_sequence_is_the_stem_so_a_conversation_is_in_one_piece() -> None:
    """Each example of a format that rewrites history leaves the stem where its reply begins."""
    last = list(range(100, 200))
    texts = [last[:length] + [length] * 5 for length in (20, 40, 60)] + [last]
    (family,) = families(arrays(texts), min_shared=1)
    grown = branches(family)
    assert [family.indices[branch.index] for branch in grown] == [3, 2, 1, 0]
    assert [branch.ancestors for branch in grown] == [[], [(0, 60)], [(0, 40)], [(0, 20)]]


@given(sequences, st.integers(1, 4))
def test_processes_get_every_sequence_once_and_families_whole_unless_they_are_large(
    texts: Sequences, num_parts: int
) -> None:
    found = families(arrays(texts), min_shared=1)
    parts = partition_families(found, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for family in part for i in family.indices) == list(range(len(texts)))
    total = sum(family.size() for part in parts for family in part)
    for family in found:
        kept = [one for part in parts for one in part if set(one.indices) & set(family.indices)]
        assert len(kept) == 1 or family.size() * num_parts > size_of_trie(texts)
    for part in parts:
        for family in part:
            assert len(family.indices) == 1 or family.size() * num_parts <= 1.25 * total
    assert partition_families(found, 1) == [found]


@pytest.mark.slow
@given(sequences, st.integers(1, 30), st.integers(1, 40))
def test_microbatches_divide_a_family_only_if_it_exceeds_memory(
    texts: Sequences, max_tokens: int, in_memory: int
) -> None:
    found = families(arrays(texts), min_shared=1)
    plan = plan_families(found, int, max_tokens, int, in_memory)
    assert sorted(i for batch in plan for family in batch for i in family.indices) == list(range(len(texts)))
    whole = {tuple(family.indices) for family in found if family.size() <= in_memory}
    assert whole <= {tuple(family.indices) for batch in plan for family in batch}
    for batch in plan:
        assert len(batch) == 1 or sum(family.size() for family in batch) <= max_tokens
        assert all(len(family.indices) == 1 or family.size() <= in_memory for family in batch)


def test_a_branch_counts_its_share_of_a_size_that_grows_faster_than_the_tokens() -> None:
    family = Family([0, 1], [100, 100], [0, 60])
    assert family.size() == 140
    assert family.size(lambda length: length**2) == 100**2 + 40 * 100
