"""Qwen3-VL Instruct, text alone, as its published chat template prints it.

The format is that of Qwen3-Instruct-2507, with one place for a system message, at the beginning. There is no
thinking. The models that think (Qwen3-VL Thinking) have another template, whose prompt opens a think block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from renderers.formats.qwen3_instruct import Qwen3InstructRenderer
from renderers.messages import PlainMessage, Tool
from renderers.rendering import Draft
from renderers.thinking import THINK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Qwen3VLRenderer(Qwen3InstructRenderer):
    """Renders as Qwen3-VL Instruct's own template does. Images are not supported."""

    name = "qwen3_vl"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if THINK in str(tokenizer.chat_template or ""):
            raise RendererError(
                f"Renderer `{self.name}` is for Qwen3-VL Instruct, but this tokenizer's chat template prints "
                f"{THINK}. Use `chat_template`, the model's own template."
            )

    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft:
        for index, message in enumerate(messages):
            if index > 0 and message["role"] == "system":
                raise RendererError(
                    f"Renderer `{self.name}` cannot render the system message {index + 1}: the model's "
                    "template prints one at the beginning only. Join the two, or remove it."
                )
        return super()._draft(messages, tools)


class Qwen3VLInstructRenderer(Qwen3VLRenderer):
    """`qwen3_vl` under the name that says its models."""

    name = "qwen3_vl_instruct"
