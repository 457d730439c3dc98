"""Compares the tree of prompts with a dictionary of all beginnings."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cookbook.engine.sampling.prefill_row import plan_row
from cookbook.engine.sampling.prompt_tree import PromptTree

LAYERS = [nn.Module(), nn.Module()]
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


def keys_of(text: list[int], capacity: int = 12) -> dict[nn.Module, torch.Tensor]:
    """Returns keys [1, capacity, 1] that depend on all tokens up to each position, as a model's do."""
    values = [hash(tuple(text[: place + 1])) % 10_007 for place in range(len(text))]
    row = torch.tensor([*values, *[-1] * (capacity - len(text))], dtype=torch.float32)
    return {layer: (row + number)[None, :, None] for number, layer in enumerate(LAYERS)}


def kept(tree: PromptTree, text: list[int]) -> int:
    """Returns how much of a text is kept, after comparing the keys with the text's own."""
    path = tree.find(np.array(text))
    length = sum(part for _, part in path)
    for layer in LAYERS:
        if path:
            found = torch.cat([node.keys[layer][:, :part] for node, part in path], dim=1)
            assert torch.equal(found, keys_of(text)[layer][:, :length])
            values = torch.cat([node.values[layer][:, :part] for node, part in path], dim=1)
            assert torch.equal(values, -found)
    return length


def add(tree: PromptTree, text: list[int]) -> None:
    keys = keys_of(text)
    tree.add(np.array(text), keys, {layer: -each for layer, each in keys.items()})


def num_shared(one: list[int], other: list[int]) -> int:
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_the_longest_beginning_of_any_earlier_text_is_found(texts: list[list[int]]) -> None:
    tree = PromptTree(weakref.WeakSet())
    tree.limit(1000)
    for number, text in enumerate(texts):
        assert kept(tree, text) == max((num_shared(text, earlier) for earlier in texts[:number]), default=0)
        add(tree, text)
        assert kept(tree, text) == len(text)
    beginnings = {tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)}
    assert tree.num_tokens == len(beginnings)


@pytest.mark.slow
@given(TEXTS, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_a_limit_evicts_what_was_used_longest_ago(texts: list[list[int]], room: int) -> None:
    """Each position was last used with the last text that has it, and the deeper ones go first."""
    tree = PromptTree(weakref.WeakSet())
    tree.limit(room)
    for text in texts:
        add(tree, text)
        assert tree.num_tokens <= room
        assert tree.num_tokens == sum(len(node.tokens_T) for node in tree._nodes)
        assert kept(tree, text) == (len(text) if len(text) <= room else kept(tree, text))
        for node in tree._nodes:
            parent = node.parent() if node.parent is not None else None
            assert parent is not None, "only leaves are evicted"
            assert parent.children[int(node.tokens_T[0])] is node
    times = [node.last_used for node in tree._nodes]
    assert times == sorted(times)


def test_all_trees_share_a_limit_and_the_oldest_text_of_any_is_evicted() -> None:
    trees: weakref.WeakSet[PromptTree] = weakref.WeakSet()
    one, other = PromptTree(trees), PromptTree(trees)
    one.limit(12)
    other.limit(12)
    add(one, [1] * 5)
    add(other, [1] * 5)
    add(one, [1, 1, 2, 2])
    add(other, [2, 2])
    assert (one.num_tokens, other.num_tokens) == (4, 7)
    assert (kept(one, [1] * 5), kept(one, [1, 1, 2, 2]), kept(other, [1] * 5)) == (2, 4, 5)
    del one
    assert len(trees) == 1


def test_a_tree_is_freed_without_the_garbage_collector() -> None:
    tree = PromptTree(weakref.WeakSet())
    tree.limit(100)
    for text in ([1, 2, 3], [1, 2, 4, 5], [1, 3]):
        add(tree, text)
    nodes = [weakref.ref(node) for node in tree._nodes]
    gc.disable()
    try:
        del tree
        assert [node() for node in nodes] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.slow
@given(TEXTS, TEXTS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_the_row_of_a_prefill_has_every_beginning_once_and_each_token_sees_its_own(
    earlier: list[list[int]], texts: list[list[int]], min_shared: int
) -> None:
    tree = PromptTree(weakref.WeakSet())
    tree.limit(1000)
    for text in earlier:
        add(tree, text)
    arrays = [np.array(text) for text in texts]
    found = [tree.find(text_T[:-1]) for text_T in arrays]
    known = [path if sum(length for _, length in path) >= min_shared else [] for path in found]
    row = plan_row(arrays, known, min_shared)
    before = [int(token) for node, length in row.known for token in node.tokens_T[:length]]
    at = before + row.tokens_N.tolist()
    for number, text in enumerate(texts):
        path = [place for start, stop in row.paths[number] for place in range(start, stop)]
        assert [at[place] for place in path] == text
        own = path[sum(length for _, length in known[number]) :]
        assert row.positions_N[[place - row.num_known for place in own]].tolist() == list(
            range(len(text) - len(own), len(text))
        )
        assert row.places(number).tolist() == [place - row.num_known for place in own]
    ends = [stop for _, stop in row.segments]
    assert ends[-1] == len(row.tokens_N) == sum(map(len, texts)) - sum(row.num_reused)
    beginnings = {tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)}
    if min_shared == 1:
        new = {each for each in beginnings if kept(tree, list(each)) < len(each)}
        alone = sum(kept(tree, text) == len(text) for text in texts)  # its last token is computed
        assert len(new) <= len(row.tokens_N) <= len(new) + alone
