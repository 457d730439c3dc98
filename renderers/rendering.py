"""A conversation on its way to tokens: prepared for a format, printed by it, and as an example."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from cookbook.types import ModelInput
from renderers.messages import PlainMessage, Tool


class Prepared(NamedTuple):
    """A conversation as it is given to the format."""

    messages: list[PlainMessage]
    tools: list[Tool] | None
    weights: dict[int, float]
    """The weight of each message to train, by its position, ascending."""
    untrained: list[int]
    """The positions of the messages whose flags exclude them from training."""


class Span(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int


class Rendering(NamedTuple):
    """A conversation as text.

    `cuts` are the positions, ascending, where a prompt ends and the model continues. `spans` hold the
    characters that are trained of each message to train, by its position. A message in `rewritten` is
    printed differently here than it was as the last one: the format changes its history.
    """

    text: str
    cuts: Sequence[int] = ()
    spans: Mapping[int, Span] = MappingProxyType({})
    rewritten: Collection[int] = ()


class Draft:
    """A rendering in the making: text, and the place of each message in it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._cuts: list[int] = []
        self._spans: dict[int, Span] = {}

    def put(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)

    def put_text(self, index: int, text: str) -> None:
        """Puts the text of message `index`, with the end-of-turn token if one closes it."""
        self._spans[index] = Span(self._length, self._length + len(text))
        self.put(text)

    def put_reply(self, index: int, text: str) -> None:
        """Puts the text of message `index`, which the model writes: a prompt ends here."""
        self._cuts.append(self._length)
        self.put_text(index, text)

    def finish(self, rewritten: list[int] | None = None) -> Rendering:
        return Rendering("".join(self._pieces), self._cuts, self._spans, rewritten or [])


class Example(NamedTuple):
    """Token ids (int32) and the weight of each in the loss (float32, unshifted)."""

    tokens_T: np.ndarray
    weights_T: np.ndarray

    def with_model_input(self) -> tuple[ModelInput, np.ndarray]:
        """The example in the types of the training API."""
        return ModelInput.from_ints(self.tokens_T), self.weights_T
