"""Text of tokens while they are sampled, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
_MAX_PENDING = 16
"""After so many tokens without a complete character, what they decode to is shown as it is."""


class TextStream:
    """Decodes tokens to complete characters. New tokens are decoded behind some that precede them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0
        """The first token that is decoded again."""
        self._num_shown = 0

    def feed(self, token: int) -> str:
        """Returns the characters that a token completes."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        if text.endswith(_HALF) and len(self._tokens) - self._num_shown < _MAX_PENDING:
            return ""
        return self._shown(text)

    def finish(self) -> str:
        """Returns the rest, in which a character may be incomplete."""
        return self._shown(self._decode(self._tokens[self._start :]))

    def _shown(self, text: str) -> str:
        before = self._decode(self._tokens[self._start : self._num_shown])
        self._start, self._num_shown = self._num_shown, len(self._tokens)
        return text[len(before) :]


class StopCutter:
    """Passes text on up to the first stop string, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.is_cut = False

    def feed(self, text: str) -> str:
        if not self._stop or self.is_cut:
            return "" if self.is_cut else text
        text = self._held + text
        places = [place for one in self._stop if (place := text.find(one)) >= 0]
        if places:
            self.is_cut, self._held = True, ""
            return text[: min(places)]
        keep = max(self._num_begun(text, one) for one in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns what was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _num_begun(text: str, stop: str) -> int:
        """Returns how many characters at the end of the text are a beginning of the stop string."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
