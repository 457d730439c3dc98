"""Breaks a stream of text into lines between words."""

from __future__ import annotations

import re

from rich.cells import cell_len


class WordWrap:
    """Wraps text that arrives in pieces. A word is held back until its end, because it may not fit the line.

    Spaces at a break are dropped; the lines of the text itself, and their indentation, stay. A word that is
    longer than a line is left to the terminal.
    """

    def __init__(self, width: int, column: int = 0) -> None:
        """`column` is where the first line begins, behind what is printed already."""
        self._width = max(2, width)
        self._column = column
        self._spaces = ""
        self._word = ""

    def feed(self, text: str) -> str:
        """Returns what can be printed now."""
        out = []
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part == "\n":
                out.append(self._end_of_word() + "\n")
                self._column, self._spaces = 0, ""
            elif part.isspace():
                out.append(self._end_of_word())
                self._spaces += part
            else:
                self._word += part
        return "".join(out)

    def finish(self) -> str:
        """Returns the rest of the text."""
        rest = self._end_of_word() + self._spaces
        self._column += cell_len(self._spaces)
        self._spaces = ""
        return rest

    def _end_of_word(self) -> str:
        if not self._word:
            return ""
        size, between = cell_len(self._word), cell_len(self._spaces)
        fits = self._column + between + size <= self._width
        is_first = self._column == 0
        before = self._spaces if fits or is_first else "\n"
        self._column = (0 if before == "\n" else self._column + between) + size
        printed = before + self._word
        self._word = self._spaces = ""
        return printed
