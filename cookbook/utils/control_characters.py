"""Shows control characters in text from data, models, paths and errors, for a terminal, a log and a page.

A character that a terminal obeys, that turns the direction of text, or that is not seen at all is shown:
as its picture where Unicode has one (`␛`), otherwise by its number (`<U+202E>`). Letters of every script
stay, and so do the joiners U+200C and U+200D, which Persian and emoji are written with.
"""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line break, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of text
    "\u2028\u2029"  # separators of lines and paragraphs
    "\u00ad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # no width
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # no width either: shorthand, music
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags
    "\ud800-\udfff"  # surrogates, which are not text
    "]"
)
_UNSEEN_IN_A_LINE = re.compile(f"{_UNSEEN.pattern[:-1]}\t\n]")
_START_OF_A_FURTHER_LINE = re.compile(r"\n(?=[^ \t\n])")


def visible(text: object) -> str:
    """The text with its invisible characters shown; line breaks and tabs stay."""
    return _UNSEEN.sub(_shown, str(text))


def visible_line(text: object) -> str:
    """The same of a text that is one line, such as a title or the cell of a table."""
    return _UNSEEN_IN_A_LINE.sub(_shown, str(text))


def visible_entry(text: object) -> str:
    """The same of one entry in a log: lines after the first are indented, so that none looks like another."""
    return _START_OF_A_FURTHER_LINE.sub("\n  ", visible(text))


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 32:
        return chr(0x2400 + code)
    return "␡" if code == 127 else f"<U+{code:04X}>"
