"""Plans the row of a prefill: the tokens of several texts that have to be computed, each of them once.

A text continues a beginning whose keys and values are known, and texts that continue the same one share in
the row what they have in common.

Shape suffixes: N tokens of the row, T tokens of one text, P tokens of the paths of all segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cookbook.engine.model.prefix_tree import Segment, branches, families
from cookbook.engine.sampling.prompt_tree import KnownPart, PromptNode


@dataclass(frozen=True)
class PrefillRow:
    """The tokens to compute, and what each of them sees.

    Its keys are those of the `known` positions, followed by those of the row. Paths and ancestors are ranges
    of keys.
    """

    tokens_N: np.ndarray
    positions_N: np.ndarray
    segments: list[Segment]
    """The ranges of the row that belong to one text alone, and to those that branch off from it later."""
    ancestors: list[list[Segment]]
    """The keys that each segment sees besides its own."""
    lengths: list[int]
    """The number of tokens of each segment's text."""
    known: list[KnownPart]
    num_known: int
    """The number of known positions."""
    paths: list[list[Segment]]
    """The keys of each text."""
    num_reused: list[int]
    """How many tokens of each text are not computed for it."""

    @property
    def has_shared(self) -> bool:
        return any(self.ancestors)

    def places(self, text: int) -> np.ndarray:
        """Returns the places in the row of the text's tokens that are not among the known ones: [T]."""
        places_T = np.concatenate([np.arange(start, stop) for start, stop in self.paths[text]])
        return places_T[places_T >= self.num_known] - self.num_known


def plan_row(
    texts: Sequence[np.ndarray], known: Sequence[list[KnownPart]], min_shared: int | None
) -> PrefillRow:
    """Returns the row of the texts, of which a beginning may be known, but not the last token.

    Texts share beginnings of at least `min_shared` tokens in the row, or none if it is None.
    """
    lengths_by_node: dict[PromptNode, int] = {}
    for node, length in (part for path in known for part in path):
        lengths_by_node[node] = max(length, lengths_by_node.get(node, 0))
    num_known, start_of = 0, {}
    for node, length in lengths_by_node.items():
        start_of[node] = num_known
        num_known += length
    before = [_joined([(start_of[node], start_of[node] + length) for node, length in path]) for path in known]
    num_before = [sum(length for _, length in path) for path in known]
    # Texts with different known beginnings have nothing else in common: it would be known too.
    kinds: dict[KnownPart | None, int] = {}
    kind_of = [kinds.setdefault(path[-1] if path else None, len(kinds)) for path in known]
    rest = [text_T[length:] for text_T, length in zip(texts, num_before, strict=True)]
    tokens, positions = [], []
    segments: list[Segment] = []
    ancestors: list[list[Segment]] = []
    lengths: list[int] = []
    paths: list[list[Segment]] = [[] for _ in texts]
    num_reused = [0] * len(texts)
    end = 0
    for family in families(rest, min_shared, kind_of):
        for branch in branches(family, end):
            text = family.indices[branch.index]
            first, (start, end) = num_before[text] + branch.first, branch.segment
            earlier = before[text] + [(num_known + at, num_known + to) for at, to in branch.ancestors]
            paths[text], num_reused[text] = earlier, first
            if start < end:
                tokens.append(texts[text][first:])
                positions.append(np.arange(first, len(texts[text])))
                segments.append((start, end))
                ancestors.append(earlier)
                lengths.append(len(texts[text]))
                paths[text] = [*earlier, (num_known + start, num_known + end)]
    return PrefillRow(
        np.concatenate(tokens),
        np.concatenate(positions),
        segments,
        ancestors,
        lengths,
        list(lengths_by_node.items()),
        num_known,
        paths,
        num_reused,
    )


def _joined(ranges: list[Segment]) -> list[Segment]:
    """Returns the ranges with each that follows its predecessor joined to it."""
    joined: list[Segment] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
