"""Text of a model or of data, made harmless for a terminal."""

from __future__ import annotations

_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}


def as_pictures(text: str) -> str:
    """What a terminal would obey is shown instead; line breaks and tabs stay."""
    return text.translate(_PICTURES)
