"""Phi 3, as its published chat template prints it.

A conversation that is not a prompt ends with the end-of-text token. That token is not trained: a reply ends
with `<|end|>`, and in later prompts no end-of-text token follows it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from renderers.base import Renderer
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Draft, Rendering
from renderers.unsupported import check_thinking, check_tool_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END = "<|end|>"


class Phi3Renderer(Renderer):
    """Renders as Phi 3's own template does. Messages of any role may follow each other.

    Phi 3's own tokenizer drops white space after each of its special tokens, and therefore at the start of
    each message.
    """

    name = "phi3"
    roles = ("system", "user", "assistant")
    frame = "".join(f"<|{role}|>" for role in roles) + _END

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._token_id("<|assistant|>")
        self._end_id = self._token_id(_END)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        check_thinking(self.name, messages, chosen)
        draft = self._draft(messages)
        draft.put(str(self.tokenizer.eos_token or ""))
        return draft.finish()

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages)
        draft.put(f"<|{role}|>\n")
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage]) -> Draft:
        check_tool_calls(self.name, messages)
        draft = Draft()
        for index, message in enumerate(messages):
            role, text = message["role"], message.get("content", "") + _END
            draft.put(f"<|{role}|>\n")
            if role == "assistant":
                draft.put_reply(index, text)
            else:
                draft.put_text(index, text)
            draft.put("\n")
        return draft

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        return {"role": "assistant", "content": text}, ended
