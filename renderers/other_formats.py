"""Control tokens of well-known chat formats, to detect data that were rendered for another model."""

from __future__ import annotations

from collections.abc import Container

from cookbook.utils import notes
from renderers.encoder import any_of

_TOKENS = any_of(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_sep|>",
        "<|endoftext|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eot|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|turn>",
        "<turn|>",
        "<bos>",
        "<eos>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CALLS]",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|observation|>",
        "[gMASK]",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|return|>",
        "<|call|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|start_of_role|>",
        "<|end_of_role|>",
    ]
)


ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<end_of_turn>",
        "<turn|>",
        "<eos>",
        "</s>",
        "<|end|>",
        "<|return|>",
        "<｜end▁of▁sentence｜>",
        "<|END_OF_TURN_TOKEN|>",
    }
)
"""The tokens that end a turn or a text in any format, including the end tokens of base models."""


def note_tokens_of_other_formats(noun: str, text: str, own: Container[str]) -> None:
    """Counts a text (a `noun`) for each token of another format in it that this tokenizer does not have.

    A text without `<` and `[` has none.
    """
    for token in sorted({token for token in _TOKENS.findall(text) if token not in own}):
        notes.count(noun, "Control tokens of other chat formats, which are plain text here", token)
