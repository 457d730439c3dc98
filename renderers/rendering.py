"""The stages of a conversation from messages to tokens: prepared for a format, rendered, and an example."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np

from cookbook.types import ModelInput
from renderers.messages import PlainMessage, Tool
from renderers.tokens import Trail, length_of_common_start


class Prepared(NamedTuple):
    """A conversation as it is passed to the format."""

    messages: list[PlainMessage]
    tools: list[Tool] | None
    weights: dict[int, float]
    """The weight of each message to train, by its position, ascending."""
    untrained: list[int]
    """The positions of the messages whose flags exclude them from training."""


class CharSpan(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int


class Rendering(NamedTuple):
    """A conversation as text."""

    text: str
    cuts: Sequence[int] = ()
    """The positions in the text, ascending, where a prompt ends and the model continues."""
    spans: Mapping[int, CharSpan] = MappingProxyType({})
    """The trained characters of each message to train, by the position of the message."""
    rewritten: Collection[int] = ()
    """The messages to train that the format printed differently when they were the last message."""


class Draft:
    """Builds a rendering: its text, and the span of each message in it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._cuts: list[int] = []
        self._spans: dict[int, CharSpan] = {}
        self._marks: list[tuple[int, int, int]] = []

    def rest_of(self, messages: Sequence[PlainMessage]) -> Iterator[tuple[int, PlainMessage]]:
        """Yields each message that is not in the draft yet, with its number, to be put there."""
        for index in range(len(self._marks), len(messages)):
            self._marks.append((len(self._pieces), self._length, len(self._cuts)))
            yield index, messages[index]

    def go_back(self, num_messages: int) -> None:
        """Removes the messages behind the first ones, and all that was put there later."""
        num_pieces, self._length, num_cuts = self._marks[num_messages]
        del self._pieces[num_pieces:], self._cuts[num_cuts:], self._marks[num_messages:]
        while self._spans and next(reversed(self._spans)) >= num_messages:
            self._spans.popitem()

    def put(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)

    def put_text(self, index: int, text: str) -> None:
        """Appends the text of message `index`, with its end-of-turn token if it has one."""
        self._spans[index] = CharSpan(self._length, self._length + len(text))
        self.put(text)

    def put_reply(self, index: int, text: str) -> None:
        """Appends the text of message `index`, a reply. The prompt for it ends where the text begins."""
        self._cuts.append(self._length)
        self.put_text(index, text)

    def finish(self, rewritten: list[int] | None = None) -> Rendering:
        return Rendering("".join(self._pieces), [*self._cuts], {**self._spans}, rewritten or [])


Run: TypeAlias = tuple[int, int, float]
"""Tokens `start` to `end`, whose weight in the loss is not 0, and that weight."""


@dataclass(slots=True, eq=False)
class Example:
    """Token ids (int32) and the weight of each in the loss (float32, unshifted).

    Examples of one conversation begin alike. An example keeps its own tokens, behind those that it shares
    with an earlier example, and its trained runs, so the memory of all grows with the conversation.
    """

    own_T: np.ndarray
    """The tokens behind those that it shares."""
    runs: list[Run]
    """The trained runs, ascending; two that touch have different weights."""
    base: Example | None = None
    """The example that it shares its first tokens with."""
    num_shared: int = 0

    @classmethod
    def of(cls, tokens_T: np.ndarray, weights_T: np.ndarray) -> Example:
        """Returns an example that shares nothing."""
        return cls(tokens_T, runs_of(weights_T))

    @property
    def num_tokens(self) -> int:
        return self.num_shared + len(self.own_T)

    @property
    def tokens_T(self) -> np.ndarray:
        """All token ids, in a new array if some are shared."""
        if self.base is None:
            return self.own_T
        tokens_T = np.empty(self.num_tokens, self.own_T.dtype)
        example, end = self, self.num_tokens
        while True:
            start = example.num_shared
            if start < end:
                tokens_T[start:end] = example.own_T[: end - start]
                end = start
            if example.base is None:
                return tokens_T
            example = example.base

    @property
    def weights_T(self) -> np.ndarray:
        """The weight of each token, in a new array."""
        weights_T = np.zeros(self.num_tokens, np.float32)
        for start, end, weight in self.runs:
            weights_T[start:end] = weight
        return weights_T

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the token ids and the weights."""
        yield self.tokens_T
        yield self.weights_T

    def with_model_input(self) -> tuple[ModelInput, np.ndarray]:
        """Returns the example in the types of the training API."""
        return ModelInput.from_ints(self.tokens_T), self.weights_T


@dataclass
class Line:
    """Examples of a conversation, each of which begins like the one before."""

    trail: Trail = field(default_factory=Trail)
    """The text of the latest."""
    example: Example | None = None


class ExampleLines:
    """The latest examples of a conversation, of which the next ones continue one.

    There are several if a format prints all of a conversation in another way for some turns, as a template
    does whose system message says whether to think.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def nearest(self, text: str) -> Line:
        """Returns the line whose latest text begins most like another text, to be continued with that."""
        if not self._lines:
            self._lines.append(Line())
            return self._lines[-1]
        shared = [length_of_common_start(line.trail.text, text) for line in self._lines]
        found = max(range(len(shared)), key=shared.__getitem__)
        line = self._lines.pop(found)
        if shared[found] < len(line.trail.text) // 2 and len(self._lines) < _MOST_LINES:
            self._lines.append(line)
            line = Line(example=line.example)
            line.trail.continue_from(self._lines[-1].trail)
        self._lines.append(line)
        return line


_MOST_LINES = 4


def runs_of(weights_T: np.ndarray) -> list[Run]:
    """Returns the runs of consecutive tokens with the same weight other than 0."""
    edges = np.flatnonzero(np.diff(weights_T, prepend=np.float32(0), append=np.float32(0))).tolist()
    starts = [(start, end) for start, end in pairwise(edges) if weights_T[start] != 0]
    return [(start, end, float(weights_T[start])) for start, end in starts]


def joined_runs(runs: Sequence[Run], num_tokens: int) -> list[Run]:
    """Returns the runs as `runs_of` does: without those of no token, and with those joined that touch.

    Where runs overlap, the later one counts.
    """
    if len(runs) == 1 and runs[0][0] < runs[0][1] and runs[0][2] == 1:
        return [*runs]
    joined: list[Run] = []
    for start, end, weight in runs:
        if joined and start < joined[-1][1]:  # they are not in order
            weights_T = np.zeros(num_tokens, np.float32)
            for start, end, weight in runs:
                weights_T[start:end] = weight
            return runs_of(weights_T)
        weight = float(np.float32(weight))
        if joined and joined[-1][1:] == (start, weight):
            joined[-1] = (joined[-1][0], end, weight)
        elif start < end and weight:
            joined.append((start, end, weight))
    return joined
