"""Tests that invisible and control characters are shown, and that letters of every script are unchanged."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from cookbook.utils.control_characters import visible, visible_entry, visible_line

SEEN_FORMAT_CHARACTERS = {
    *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD,  # signs above or below numbers
    *range(0x13430, 0x13440),  # controls for stacking hieroglyphs
}  # fmt: skip
JOINERS = {0x200C, 0x200D}


@pytest.mark.slow
def test_exactly_the_invisible_characters_are_replaced() -> None:
    """The truth is Unicode's categories: controls, formats, surrogates and separators except the space."""
    kept = {0x09, 0x0A, *JOINERS, *SEEN_FORMAT_CHARACTERS}
    unseen = {
        code
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in kept
    }
    replaced = {code for code in range(sys.maxunicode + 1) if visible(chr(code)) != chr(code)}
    assert unseen - replaced == set()
    assert {unicodedata.category(chr(code)) for code in replaced - unseen} <= {"Cn"}, (
        "the others are unassigned"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07", "a␛[2Jb␇"),
        ("a\rb\x08\x7f\x00", "a␍b␈␡␀"),
        ("\x9b2J\x85", "<U+009B>2J<U+0085>"),
        ("safe\u202etxt.exe\u202c", "safe<U+202E>txt.exe<U+202C>"),
        ("\u2066a\u2069\u200e\u200f\u061c", "<U+2066>a<U+2069><U+200E><U+200F><U+061C>"),
        ("a\u200bb\ufeff\u2028c\u2029", "a<U+200B>b<U+FEFF><U+2028>c<U+2029>"),
        ("\U000e0041\udc9b\ud800", "<U+E0041><U+DC9B><U+D800>"),
        ("one\n\ttwo", "one\n\ttwo"),
    ],
)
def test_a_character_is_shown_as_its_picture_or_by_its_number(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "مرحبا بالعالم",
        "שלום עולם",
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d👩\u200d👧",
        "❤\ufe0f",
        "日本語 Ünïcödé",
        "[/INST]",
    ],
)
def test_text_in_any_script_is_unchanged(text: str) -> None:
    assert visible(text) == visible_line(text) == visible_entry(text) == text


def test_a_text_of_one_line_remains_one_line() -> None:
    for code in range(0x3000):
        assert len(visible_line(f"a{chr(code)}b").splitlines()) == 1
    assert visible_line("a\n\tb") == "a␊␉b"


def test_no_line_within_an_entry_looks_like_another_entry() -> None:
    forged = "2026-01-01 00:00:00,000 ERROR cookbook: all is lost"
    for separator in ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\n\u3000"):
        lines = visible_entry(f"name{separator}{forged}").splitlines()
        assert all(line.startswith("  ") for line in lines[1:]), separator
    assert visible_entry("a\n  b\n\tc\n\nd\n") == "a\n  b\n\tc\n\n  d\n"


def test_a_text_in_pieces_is_shown_like_the_whole_text() -> None:
    text = "a\x1b]0;owned\x07\x9b31m\u202eb\U000e0041"
    for index in range(len(text) + 1):
        assert visible(text[:index]) + visible(text[index:]) == visible(text)
