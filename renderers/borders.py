"""Borders at which a tokenizer is known to part a text, without a control token.

Most tokenizers cut a text into words before they look for tokens, so a border between words is one
between tokens, and the tokens on either side depend on that side alone. Which borders are certain is
read off the layout of the tokenizer: off the pattern of its words, of which each alternative is known.
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

# None of these matches a colon with a space behind it, and none looks past that space from before
# the colon: the text before the border is matched the same whatever follows, a space or the end.
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
    """Returns whether every text with a `BORDER` is encoded as its two sides are, each alone.

    False also where that is only not known.
    """
    layout = json.loads(backend.to_str())
    return (
        layout["normalizer"] in (None, {"type": "NFC"})  # neither moves nor joins a colon or a space
        and layout["model"]["type"] == "BPE"
        and not layout["model"]["dropout"]
        and not any(":" in token["content"] for token in layout["added_tokens"])
        and _has_known_words(layout["pre_tokenizer"])
    )


def _has_known_words(pre_tokenizer: Any) -> bool:
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
            return False
    for contractions in _CONTRACTIONS:
        pattern = pattern.replace(contractions, "'s")
    alternatives = set(pattern.split("|"))
    return alternatives <= _PUNCTUATION | _OTHERS and not alternatives.isdisjoint(_PUNCTUATION)
