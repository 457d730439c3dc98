"""A rendering written message by message, for formats spelled out in code."""

from __future__ import annotations

from renderers.base import Rendering, Span


class Draft:
    """Text that knows, as it grows, where each message's own text lies."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._cuts: list[int] = []
        self._spans: dict[int, Span] = {}

    def put(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)

    def put_text(self, index: int, text: str) -> None:
        """The text of message `index`, with the end-of-turn token if one closes it."""
        self._spans[index] = Span(self._length, self._length + len(text))
        self.put(text)

    def put_reply(self, index: int, text: str) -> None:
        """The same for a message that the model writes from here on."""
        self._cuts.append(self._length)
        self.put_text(index, text)

    def finish(self, rewritten: list[int] | None = None) -> Rendering:
        return Rendering("".join(self._pieces), self._cuts, self._spans, rewritten or [])
