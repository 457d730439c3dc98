"""Encoded texts: the tokens of one, and what is known of a text when the next one begins like it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeAlias, TypeVar

import numpy as np

TOKEN_DTYPE = np.dtype(np.int32)
"""The type of token ids up to the training API: every vocabulary fits, in half the space of int64."""

Control: TypeAlias = tuple[int, int, int]
"""A control token: its start and end in the text, and its index among all tokens."""

Text = TypeVar("Text", str, list[int])


@dataclass(slots=True)
class Tokens:
    """The ids (int32) of a text, behind those that it shares with the text before, and where each begins."""

    ids: np.ndarray
    starts: Sequence[int] = ()
    """The position in the text of each of `ids`; empty if only `known` positions are needed."""
    known: Mapping[int, int] = field(default_factory=dict)
    """The index, among all tokens of the text, of the token that begins at a position."""
    num_shared: int = 0
    """The number of tokens before `ids`."""
    num_before: int = 0
    """The number of tokens before those of `starts`."""

    def index(self, position: int) -> int:
        """Returns the index of the first token that begins at or after a position of the text."""
        found = self.known.get(position)
        return self.num_before + bisect_left(self.starts, position) if found is None else found


@dataclass(slots=True)
class Trail:
    """The latest encoded text of a conversation, from which the next one continues.

    A control token splits a text, so what is before one has the same tokens in every text that begins alike.
    """

    text: str = ""
    cuts: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    apart_from: int = -1
    """The position because of which the text was encoded with the copy of the tokenizer; -1 if it was not."""

    def num_shared(self, num_characters: int, cuts: Sequence[int], first_position: int) -> int:
        """Returns the number of first control tokens before the last of which another text is the same.

        Their first `num_characters` are the same. The text from that last one on is to be encoded;
        `first_position` and other cuts than those of this text are in there.
        """
        num = bisect_right(self.controls, num_characters, key=_end)
        num = min(num, bisect_right(self.controls, first_position, key=_start))
        if num == 0:
            return 0
        start = self.controls[num - 1][0]
        num_cuts = bisect_right(cuts, start)
        if num_cuts != bisect_right(self.cuts, start) or cuts[:num_cuts] != self.cuts[:num_cuts]:
            pairs = zip([*cuts, num_characters], [*self.cuts, num_characters], strict=False)
            other = next(min(pair) for pair in pairs if pair[0] != pair[1])
            num = min(num, bisect_left(self.controls, other, key=_start))
        return num if num and self.apart_from < self.controls[num - 1][0] else 0

    def first(self, num: int) -> Trail:
        """Returns a new trail up to the last of the first `num` control tokens; this one is not changed."""
        place = self.controls[num - 1][2] if num else 0
        return Trail("", (), self.ids[:place], self.controls[: max(num - 1, 0)])

    def continue_from(self, other: Trail) -> None:
        """Begins with the text of another trail, which is not changed."""
        self.text, self.cuts, self.apart_from = other.text, other.cuts, other.apart_from
        self.ids, self.controls = other.ids.copy(), other.controls.copy()

    def go_back(self, num: int) -> None:
        """Removes what follows the last of the first `num` control tokens, and that token."""
        del self.ids[self.controls[num - 1][2] if num else 0 :]
        del self.controls[max(num - 1, 0) :]


_start, _end = itemgetter(0), itemgetter(1)


def length_of_common_start(one: Text, other: Text) -> int:
    """Returns how many first characters or ids two texts have in common."""
    least, most = 0, min(len(one), len(other))
    end = min(64, most)
    while one[least:end] == other[least:end]:
        if end == most:
            return most
        least, end = end, min(4 * end, most)
    while end - least > 1:
        middle = (least + end) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            end = middle
    return least
