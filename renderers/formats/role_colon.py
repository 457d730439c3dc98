"""Plain text for base models: `User: ...`, blank line, `Assistant: ...`.

A reply ends with the blank line and `User:` that begin the next user message, so a model that has never seen
a chat token can stop.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import Draft, Rendering
from renderers.streaming import START, Section, Sections

_LABELS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
_STOP = "\n\nUser:"
_SECTIONS: Sections = {
    START: Section("content", begins={" ": "said"}, ends={_STOP: "over"}),
    "said": Section("content", ends={_STOP: "over"}),
    "over": Section(None),
}


class RoleColonRenderer(Renderer):
    """Renders without a template or special tokens, except for the tokenizer's BOS token if it has one.

    Only a user message may follow a reply, and no message may contain a label (such as a blank line and
    `User:`), because labels end turns.
    """

    name = "role_colon"
    roles = prompted_roles = tuple(_LABELS)
    reply_sections = _SECTIONS

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        return self._draft(messages).finish()

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages)
        if messages[-1]["role"] != "assistant":
            draft.put(f"\n\n{_LABELS[role]}")
        elif role != "user":
            raise RendererError(
                f"Renderer `{self.name}` cannot prompt for `{role}` after a reply, only for `user`."
            )
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage]) -> Draft:
        draft = Draft()
        draft.put(str(self.tokenizer.bos_token or ""))
        before = None
        for index, message in enumerate(messages):
            role = message["role"]
            self._check(message, index + 1, before)
            if before != "assistant":  # a reply ends with the label of what follows it
                draft.put(("\n\n" if before else "") + _LABELS[role])
            if role == "assistant":
                draft.put_reply(index, f" {message['content']}{_STOP}")
            else:
                draft.put_text(index, f" {message['content']}")
            before = role
        return draft

    def _check(self, message: PlainMessage, number: int, before: str | None) -> None:
        if before == "assistant" and message["role"] != "user":
            raise RendererError(
                f"Renderer `{self.name}` cannot render role `{message['role']}` right after the assistant "
                f"(message {number}). Supported there: user."
            )
        for key in ("tool_calls", "reasoning_content"):
            if message.get(key):
                raise RendererError(
                    f"Renderer `{self.name}` cannot render `{key}` (message {number}). Remove it."
                )
        for label in _LABELS.values():
            if f"\n\n{label}" in message["content"]:
                raise RendererError(
                    f"Message {number} contains a blank line and {label!r}, which end a turn for renderer "
                    f"`{self.name}`. Remove them."
                )

    def get_stop_sequences(self) -> list[str]:
        return [_STOP]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, _ = self._decode(tokens, [])
        content, stop, rest = text.partition(_STOP)
        return {"role": "assistant", "content": content.removeprefix(" ")}, bool(stop) and not rest
