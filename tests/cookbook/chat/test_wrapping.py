"""Words stay whole at the edge of a terminal, however their text arrives."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cookbook.chat.wrapping import WordWrap

WORDS = st.lists(st.text("ab 漢é", min_size=1, max_size=7), min_size=1, max_size=12)


def wrapped(text: str, width: int, pieces: int = 1, column: int = 0) -> str:
    wrap = WordWrap(width, column)
    out = "".join(wrap.feed(text[i : i + pieces]) for i in range(0, len(text), pieces))
    return out + wrap.finish()


@pytest.mark.slow
@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=30), st.integers(1, 9))
def test_single_spaces_break_as_in_textwrap(words: list[str], pieces: int) -> None:
    text = " ".join(words)
    assert wrapped(text, 12, pieces) == "\n".join(textwrap.wrap(text, 12))


@given(WORDS, st.integers(2, 30), st.integers(1, 5))
def test_lines_fit_and_no_word_is_lost(parts: list[str], width: int, pieces: int) -> None:
    text = "".join(parts)
    found = wrapped(text, width, pieces)
    assert found.split() == text.split()
    for line in found.split("\n"):
        assert cell_len(line.strip()) <= width or " " not in line.strip()


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_lines_and_indentation_of_the_text_stay(pieces: int) -> None:
    text = "def f():\n    return 1\n\n  - a list"
    assert wrapped(text, 40, pieces) == text


def test_the_first_line_begins_behind_the_label() -> None:
    assert wrapped("one two three", 10, column=7) == "one\ntwo three"
