"""A tokenizer's chat template: text of messages, and what it has places for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from renderers.encoder import SENTINEL
from renderers.messages import PlainMessage, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: PlainMessage = {"role": "user", "content": "x"}

CALL: PlainMessage = {
    "role": "assistant",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
"""A reply that calls a tool."""


class Template:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._printed_roles: dict[str, bool] = {}

    def text(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None = None, prompt: bool = False
    ) -> str:
        """What the template prints of the messages, with the generation prompt if asked for."""
        render = self._tokenizer.apply_chat_template
        described = list(tools) if tools else None
        try:
            return str(
                render(list(messages), tools=described, tokenize=False, add_generation_prompt=prompt)  # type: ignore[arg-type]
            )
        except Exception as error:  # a template is foreign code, and whatever it raises is its refusal
            roles = ", ".join(message["role"] for message in messages)
            raise RendererError(f"The chat template refuses messages of roles {roles}: {error}") from error

    def prints(self, role: str) -> bool:
        """Whether the template prints a message of this role, as far as it can be tried out."""
        if role not in self._printed_roles:
            message: PlainMessage = {"role": role, "content": SENTINEL}
            result = {"role": "tool", "content": SENTINEL, "name": "f", "tool_call_id": "call00001"}
            probes = {
                "system": [[message, _USER]],
                "developer": [[message, _USER]],
                "tool": [[_USER, message], [_USER, CALL, result]],
            }
            texts: list[str] = []
            for probe in probes.get(role, [[_USER, message]]):
                with suppress(RendererError):
                    texts.append(self.text(probe))
            self._printed_roles[role] = not texts or any(SENTINEL in text for text in texts)
        return self._printed_roles[role]

    def prints_tools(self) -> bool:
        """Whether the template prints the tools it is given."""
        function = {
            "name": "f",
            "description": SENTINEL,
            "parameters": {"type": "object", "properties": {}},
        }
        with suppress(RendererError):
            return SENTINEL in self.text([_USER], [{"type": "function", "function": function}])
        return False


class Chat:
    """One conversation under a template. What was rendered once is kept."""

    def __init__(
        self, template: Template, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        self.messages = messages
        self.tools = tools
        self._template = template
        self._texts: dict[tuple[int, bool], str | RendererError] = {}

    def text(self, num_messages: int, prompt: bool = False) -> str:
        """The text of the first messages."""
        key = (num_messages, prompt)
        if key not in self._texts:
            try:
                self._texts[key] = self._template.text(self.messages[:num_messages], self.tools, prompt)
            except RendererError as error:
                self._texts[key] = error
        found = self._texts[key]
        if isinstance(found, RendererError):
            raise found
        return found

    def prompt_before(self, index: int) -> str | None:
        """The prompt for message `index`, or None where the template renders none."""
        if index == 0:
            return None
        with suppress(RendererError):
            return self.text(index, prompt=True)
        return None
