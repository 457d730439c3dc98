"""Decodes a sampled reply so that its control tokens differ from text that only spells them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from cookbook.utils.token_ids import known_tokens
from renderers.encoder import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marked_text(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, tokens: Sequence[int], ends: Collection[int] = ()
) -> str | None:
    """Returns the decoded tokens, in which a control token is spelled only where it was sampled as one.

    They are those before the first of `ends`. Text that spells a control token is escaped; `encoder.unguard`
    restores it. Returns None for ids that the tokenizer does not have, and for text that renderers reserve.
    """
    tokens = list(takewhile(lambda token: token not in ends, tokens))
    if known_tokens(tokenizer, tokens) != tokens:
        return None
    spellings = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in set(tokens)}
    controls = {
        token: spelling
        for token, spelling in spellings.items()
        if encoder.ids.get(spelling) == token and encoder.control.fullmatch(spelling)
    }
    pieces: list[str] = []
    for is_control, run in groupby(tokens, controls.__contains__):
        if is_control:
            pieces.extend(controls[token] for token in run)
            continue
        text = tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        try:
            (guarded,) = encoder.guard([{"role": "user", "content": str(text)}])
        except RendererError:
            return None
        pieces.append(guarded["content"])
    return "".join(pieces)
