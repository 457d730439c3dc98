"""Adds rows to a model's embeddings and projection for tokens that a user added to its tokenizer.

A row begins as the mean of the rows that the tokenizer had before, so the new token is neither likely nor
unlikely and looks like no other. Tokens that the tokenizer had already keep their rows.

Shape suffixes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cookbook.errors import ConfigError


def add_rows(model: Any, tokenizer: Any, base_tokenizer: Any, add_tokens: Sequence[str], name: str) -> None:
    """Gives every one of `add_tokens` a row. `base_tokenizer` is the tokenizer without them.

    Raises ConfigError if the model cannot have more rows.
    """
    known = base_tokenizer.get_vocab()
    new = sorted(tokenizer.convert_tokens_to_ids(token) for token in add_tokens if token not in known)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    if head is None or (not is_tied and getattr(head, "bias", None) is not None):
        what = "none" if head is None else "one with a bias, of which PEFT trains no rows"
        raise ConfigError(
            f"add_tokens={list(add_tokens)} needs rows in the projection to the vocabulary, and {name} has "
            f"{what}. Remove add_tokens."
        )
    if not new:
        return
    num_rows, num_logits = model.get_input_embeddings().weight.shape[0], head.weight.shape[0]
    if new[-1] >= num_logits != num_rows:
        raise ConfigError(
            f"add_tokens={list(add_tokens)} needs row {new[-1]:,} of the embeddings and of the projection to "
            f"the vocabulary. {name} has {num_rows:,} and {num_logits:,} rows, which transformers does not "
            f"resize together. Remove add_tokens."
        )
    if new[-1] >= num_rows:
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    used = sorted(index for index in known.values() if index < new[0])
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight_VD = module.weight
            weight_VD[new] = weight_VD[used].float().mean(0).to(weight_VD.dtype)


def rows_to_train(model: Any, tokenizer: Any, add_tokens: Sequence[str]) -> dict[str, list[int]] | None:
    """Returns the rows of the tokens, by the modules to train them in; None without tokens.

    PEFT trains one row for both where the projection is tied to the embeddings.
    """
    if not add_tokens:
        return None
    rows = sorted({tokenizer.convert_tokens_to_ids(token) for token in add_tokens})
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(model.config, "tie_word_embeddings", False)  # PEFT decides by this, too
    parts = [embeddings] if is_tied else [embeddings, head]
    return {name: rows for name, module in model.named_modules() if any(module is part for part in parts)}
