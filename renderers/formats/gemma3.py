"""Gemma 3, as its published chat template prints it (text only).

There is no system role: a system message is printed in the first user message, before its text. White space
is trimmed around every message except the system message. Content of several parts is joined first and then
trimmed as one text, as in every renderer; the template trims each part, and so joins the words of two parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Draft, Rendering
from renderers.unsupported import check_thinking, check_tool_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START, _END = "<start_of_turn>", "<end_of_turn>"


class Gemma3Renderer(Renderer):
    """Renders as Gemma 3's own template does.

    The user and the assistant take turns, the user first. A system message is trained without an end-of-turn
    token, because none follows it; the text of the user message around it has a span of its own.
    """

    name = "gemma3"
    roles = ("system", "user", "assistant")
    frame = _START + _END

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._token_id(_START)
        self._end_id = self._token_id(_END)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        check_thinking(self.name, messages, chosen)
        return self._draft(messages).finish()

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages)
        draft.put(f"{_START}{'model' if role == 'assistant' else role}\n")
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage]) -> Draft:
        self._check_turns(messages)
        check_tool_calls(self.name, messages)
        draft = Draft()
        draft.put(str(self.tokenizer.bos_token or ""))
        has_system = messages[0]["role"] == "system"
        for index, message in enumerate(messages[has_system:], has_system):
            text = message.get("content", "").strip() + _END
            if message["role"] == "assistant":
                draft.put(f"{_START}model\n")
                draft.put_reply(index, text)
            else:
                draft.put(f"{_START}user\n")
                if has_system and index == 1:
                    draft.put_text(0, messages[0]["content"])
                    draft.put("\n\n")
                draft.put_text(index, text)
            draft.put("\n")
        return draft

    def _check_turns(self, messages: Sequence[PlainMessage]) -> None:
        has_system = messages[0]["role"] == "system"
        if has_system and len(messages) == 1:
            raise RendererError(
                f"Renderer `{self.name}` prints a system message inside the user's first message, but no "
                "message follows it. Add a user's message."
            )
        for position, message in enumerate(messages[has_system:]):
            expected = "assistant" if position % 2 else "user"
            if message["role"] != expected:
                raise RendererError(
                    f"Renderer `{self.name}` cannot render role `{message['role']}` as message "
                    f"{position + has_system + 1}: user and assistant take turns, the user first, so "
                    f"`{expected}` is expected. Join messages of one role that follow each other, and put a "
                    "system message before all others."
                )

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        return {"role": "assistant", "content": text}, ended
