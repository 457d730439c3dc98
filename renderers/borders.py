"""Tells whether a tokenizer always splits a text at certain borders that are not control tokens.

Most tokenizers split a text into words before they look for tokens. A border between words is then a border
between tokens, and the tokens on either side depend on that side alone. The border is certain if every
alternative of the tokenizer's word pattern is a known one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BORDER = ": "
"""A colon and a space. The border is between the two."""

_PUNCTUATION = frozenset({r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"})
"""Patterns that match a colon followed by a space, up to the space."""

# None of these matches a line break with what follows it unless that is white space, and none looks behind.
# None of these matches a colon followed by a space, and none looks from before the colon past the space:
# the text before the border is matched the same way whether a space follows or the end.
_OTHERS = frozenset(
    {
        "'s",
        r" ?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r"\p{N}{1,3}",
        r" ?\p{N}+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    }
)
_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'s|'t|'re|'ve|'m|'ll|'d")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def parts_at_border(backend: Tokenizer) -> bool:
    """Returns whether every text with a `BORDER` is encoded as its two sides are encoded separately.

    Returns False if it is unknown.
    """
    layout = json.loads(backend.to_str())
    return _is_known(layout) and not any(":" in token["content"] for token in layout["added_tokens"])


def parts_at_lines(backend: Tokenizer) -> bool:
    """Returns whether a text is split behind each line break that no white space follows.

    What follows the border is then encoded as it is separately, and what precedes it as it is in front of any
    letter. Returns False if it is unknown.
    """
    layout = json.loads(backend.to_str())
    return _is_known(layout) and not any(
        "\n" in token["content"] or token["lstrip"] for token in layout["added_tokens"]
    )


def _is_known(layout: Any) -> bool:
    """Returns whether a tokenizer splits a text into words by known patterns, and encodes each alone."""
    return (
        layout["normalizer"] in (None, {"type": "NFC"})  # neither moves nor joins ASCII characters
        and layout["model"]["type"] == "BPE"
        and not layout["model"]["dropout"]
        and _has_known_words(layout["pre_tokenizer"])
    )


def _has_known_words(pre_tokenizer: Any) -> bool:
    words = _words(pre_tokenizer)
    return {*words} <= _PUNCTUATION | _OTHERS and not _PUNCTUATION.isdisjoint(words)


def _words(pre_tokenizer: Any) -> list[str]:
    """Returns the alternatives of the word pattern, in their order; none if there is no such pattern."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            pattern = _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            pass
        case _:
            return []
    for contractions in _CONTRACTIONS:
        pattern = pattern.replace(contractions, "'s")
    words: list[str] = pattern.split("|")
    return words
