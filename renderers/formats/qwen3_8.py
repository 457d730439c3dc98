"""Qwen3.8, as its published chat template prints it.

The format is that of Qwen3.6, with three differences. A sentence about the effort of thinking, `xhigh` (the
default) or `low`, begins the system message; `medium` has no sentence, nor has a prompt not to think. The
think blocks of all replies are kept (`preserve_thinking` is on by default), so no conversation rewrites its
history. Think tags in the content of a reply are text: only `reasoning_content` is thinking.

Source: the template of Qwen/Qwen3.8-27B, which trl 1.16 carries as `trl/chat_templates/qwen3_8.jinja`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cookbook.utils import notes
from renderers.formats.qwen3_5 import Qwen3_5DisableThinkingRenderer, Qwen3_6Renderer
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Prepared
from renderers.thinking import END_THINK
from renderers.train_on_what import TrainOnWhat


class Qwen3_8Renderer(Qwen3_6Renderer):
    """Renders as Qwen3.8's own template does by default, with the effort `xhigh`."""

    name = "qwen3_8"
    keeps_thinking = True
    prints_empty_system = False
    effort: ClassVar[str] = (
        "Reasoning effort is set to xhigh. Please think carefully through the task, validate key "
        "assumptions, consider plausible alternatives, and prioritize correctness, consistency, and clarity "
        "in the final answer."
    )

    def _prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        train_on_what: TrainOnWhat | None = None,
    ) -> Prepared:
        prepared = super()._prepare(messages, tools, train_on_what)
        for index in prepared.weights:
            message = prepared.messages[index]
            if message["role"] == "assistant" and END_THINK in message.get("content", ""):
                notes.count(
                    "message",
                    "had think tags in the content, which Qwen3.8 prints as text: give thinking as "
                    "`reasoning_content`",
                )
        return prepared

    def _thought_and_said(self, message: PlainMessage) -> tuple[str, str]:
        return message.get("reasoning_content", "").strip(), self._said(message)

    def _check_thinking(self, message: PlainMessage, number: int) -> None:
        # Tags in the content are text, so none of it can be lost.
        super()._check_thinking({"reasoning_content": "", **message}, number)


class Qwen3_8XHighRenderer(Qwen3_8Renderer):
    """`qwen3_8` under the name that says its effort."""

    name = "qwen3_8_xhigh_reasoning"


class Qwen3_8MediumRenderer(Qwen3_8Renderer):
    """Qwen3.8 with the effort `medium`, for which the template prints no sentence."""

    name = "qwen3_8_medium_reasoning"
    effort = ""


class Qwen3_8LowRenderer(Qwen3_8Renderer):
    """Qwen3.8 with the effort `low`."""

    name = "qwen3_8_low_reasoning"
    effort = (
        "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the "
        "conclusion without unnecessary elaboration."
    )


class Qwen3_8DisableThinkingRenderer(Qwen3_5DisableThinkingRenderer, Qwen3_8Renderer):
    """Qwen3.8 prompted not to think, as its template does with `enable_thinking=False`."""

    name = "qwen3_8_disable_thinking"
    effort = ""
