"""Keeps the keys and values of texts, so that a prompt that begins like one of them is not computed again.

A radix tree over token ids: what texts share from their beginning is in it once. The keys and values of a
position depend on the tokens up to it and on the weights alone, so each snapshot of weights has its own tree,
and all trees of a model share one limit.

The states of recurrent layers are known at the end of some nodes alone. From there a text can be continued.
They are as large as the keys and values of hundreds of tokens, so they are evicted by themselves: those
inside a long conversation go before its end does.

Shape suffixes: T tokens of a text or a node, H heads of keys and values, D head size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.prefix_tree import num_shared
from cookbook.engine.sampling.recurrent_states import RecurrentStates

_CLOCK = itertools.count()


@dataclass(eq=False)
class TextEnd:
    """What a model with recurrent layers needs to continue a text."""

    states: RecurrentStates
    """The states after the text, in one row."""
    logits_V: Tensor | None
    """The logits after the text, if they were computed: the same text again needs no pass."""
    last_used: int = 0


@dataclass(eq=False)
class PromptNode:
    """Some tokens of texts, with the keys and values of each layer at their positions: [H, T, D]."""

    tokens_T: np.ndarray
    keys: dict[torch.nn.Module, Tensor]
    values: dict[torch.nn.Module, Tensor]
    parent: weakref.ref[PromptNode] | None
    """None for the root. It is weak, so that a tree is freed without the garbage collector."""
    children: dict[int, PromptNode] = field(default_factory=dict)
    """By their first token."""
    last_used: int = 0
    end: TextEnd | None = None
    """What continues the text up to the last of the tokens."""

    def between(self, start: int, stop: int, parent: PromptNode) -> PromptNode:
        """Returns a copy with a part of the tokens, below another node. It does not share memory."""
        keys, values = (
            {layer: tensor_HTD[:, start:stop].clone() for layer, tensor_HTD in tensors.items()}
            for tensors in (self.keys, self.values)
        )
        return PromptNode(self.tokens_T[start:stop], keys, values, weakref.ref(parent))


KnownPart = tuple[PromptNode, int]
"""A node, and how many of its tokens a text has."""


class PromptTree:
    """The texts of one snapshot of weights. All calls are made on the engine's thread."""

    def __init__(self, trees: weakref.WeakSet[PromptTree], end_positions: int = 0) -> None:
        """`trees` are all trees of the model, to which this one is added.

        `end_positions` is how many cached positions take the memory of a `TextEnd`.
        """
        self._root = PromptNode(np.zeros(0, np.int64), {}, {}, None)
        self._nodes: OrderedDict[PromptNode, None] = OrderedDict()
        """All nodes but the root, in the order of their last use. A node is used before those that it follows
        are, so the first one always is a leaf."""
        self._ends: OrderedDict[PromptNode, None] = OrderedDict()
        """All nodes with an end, in the order of its last use."""
        self._trees = trees
        self._end_positions = end_positions
        self._room = 0
        self.num_tokens = 0
        trees.add(self)

    @property
    def num_positions(self) -> int:
        """How many cached positions take the memory of the tree."""
        return self.num_tokens + len(self._ends) * self._end_positions

    def has_room(self, texts: Sequence[np.ndarray]) -> bool:
        """Returns whether so many texts may be kept with their ends, if nothing else is."""
        return sum(len(text_T) + self._end_positions for text_T in texts) <= self._room

    def limit(self, room: int) -> None:
        """Sets how many positions all trees of the model may take together, and evicts the oldest others."""
        self._room = room
        while sum(tree.num_positions for tree in self._trees) > room:
            oldest = min((tree for tree in self._trees if tree._nodes), key=PromptTree._time_of_oldest)
            oldest._evict()

    def clear(self) -> None:
        self._root.children.clear()
        self._nodes.clear()
        self._ends.clear()
        self.num_tokens = 0

    def find(self, text_T: np.ndarray) -> list[KnownPart]:
        """Returns the longest beginning of the text that is in the tree, as the nodes along it."""
        node, start = self._root, 0
        found: list[KnownPart] = []
        while start < len(text_T):
            child = node.children.get(int(text_T[start]))
            if child is None:
                break
            length = num_shared(child.tokens_T, text_T[start:])
            found.append((child, length))
            start += length
            if length < len(child.tokens_T):
                break
            node = child
        return found

    def find_end(self, text_T: np.ndarray) -> list[KnownPart]:
        """Returns the nodes along the longest beginning of the text that can be continued.

        It is the whole text if the logits after it are known.
        """
        path = self.find(text_T)
        while path:
            node, length = path[-1]
            if node.end is not None and length == len(node.tokens_T):
                is_whole = sum(part for _, part in path) == len(text_T)
                if not is_whole or node.end.logits_V is not None:
                    break
            path.pop()
        return path

    def use(self, path: list[KnownPart]) -> None:
        """Notes that the nodes along a path, and the end of the last one, were used now."""
        for node, _ in reversed(path):
            node.last_used = next(_CLOCK)
            self._nodes.move_to_end(node)
        if path and (end := path[-1][0].end) is not None:
            end.last_used = path[-1][0].last_used
            self._ends.move_to_end(path[-1][0])

    def add(
        self,
        text_T: np.ndarray,
        keys: Mapping[torch.nn.Module, Tensor],
        values: Mapping[torch.nn.Module, Tensor],
        end: TextEnd | None = None,
    ) -> None:
        """Copies the keys and values of a text's positions, unless they are there or have no room.

        For each layer they are [H, C, D], of which the first T positions are those of the text. Its end is
        kept as it is, unless one with logits is there.
        """
        if len(text_T) + (self._end_positions if end is not None else 0) > self._room:
            return
        path = self.find(text_T)
        start = sum(length for _, length in path)
        if path and (start < len(text_T) or end is not None):
            node, length = path[-1]
            if length < len(node.tokens_T):
                path[-1] = (self._split(node, length), length)
        if start < len(text_T):
            parent = path[-1][0] if path else self._root
            whole = PromptNode(text_T, dict(keys), dict(values), None)
            child = whole.between(start, len(text_T), parent)
            parent.children[int(text_T[start])] = child
            self._nodes[child] = None
            self.num_tokens += len(text_T) - start
            path.append((child, len(text_T) - start))
        last = path[-1][0]
        if end is not None and (last.end is None or last.end.logits_V is None):
            last.end = end
            self._ends[last] = None
        self.use(path)
        self.limit(self._room)

    def _split(self, node: PromptNode, length: int) -> PromptNode:
        """Moves the first `length` tokens of a node to a new one before it, which is returned."""
        parent = node.parent() if node.parent is not None else None
        assert parent is not None
        first = node.between(0, length, parent)
        rest = node.between(length, len(node.tokens_T), first)
        node.tokens_T, node.keys, node.values, node.parent = (
            rest.tokens_T,
            rest.keys,
            rest.values,
            rest.parent,
        )
        first.children[int(node.tokens_T[0])] = node
        parent.children[int(first.tokens_T[0])] = first
        self._nodes[first] = None
        return first

    def _time_of_oldest(self) -> float:
        return min(next(iter(self._nodes)).last_used, self._time_of_oldest_end())

    def _time_of_oldest_end(self) -> float:
        oldest = next(iter(self._ends), None)
        return math.inf if oldest is None or oldest.end is None else oldest.end.last_used

    def _evict(self) -> None:
        """Removes what was used longest ago: an end, or the tokens of a leaf."""
        if self._time_of_oldest_end() <= next(iter(self._nodes)).last_used:
            node, _ = self._ends.popitem(last=False)
            node.end = None
            return
        node, _ = self._nodes.popitem(last=False)
        self._ends.pop(node, None)
        parent = node.parent() if node.parent is not None else None
        assert parent is not None
        assert not node.children
        del parent.children[int(node.tokens_T[0])]
        self.num_tokens -= len(node.tokens_T)
