"""Which ids a tokenizer can decode.

A model has a row for each id up to the size of its embeddings, which is often padded, and may sample any of
them. Some tokenizers raise for an id that they do not have.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def known_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> list[int]:
    """Returns those of `tokens` that the tokenizer has. Its ids may have gaps."""
    ids = _ids(tokenizer, len(tokenizer))
    return [token for token in tokens if token in ids]


@functools.lru_cache(maxsize=8)
def _ids(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> frozenset[int]:
    return frozenset(tokenizer.get_vocab().values())
