"""The base class of the Qwen family's formats: ChatML with Hermes tool calls.

Tool results are printed in a user message, consecutive results in the same one. Tools are described at the
end of the system message, which every conversation with tools has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from renderers.base import Renderer
from renderers.formats.hermes_tools import describe_tools
from renderers.messages import PlainMessage, Tool
from renderers.rendering import Draft, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"


class ChatMLRenderer(Renderer):
    """A ChatML format. A tool result is trained without the `<tool_response>` tags around it."""

    frame = START + END
    takes_tools = True

    default_system: str | None = None
    """The system message of a conversation that does not begin with one."""

    reply_opening: ClassVar[str] = ""
    """What the prompt for a reply ends with after its header."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._end_id = self._token_id(END)

    @abstractmethod
    def _put_reply(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        """Appends what follows the header of message `index`, a reply, up to its end token."""

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools)
        draft.put(f"{START}{role}\n")
        draft.put(self.reply_opening if role == "assistant" else "")
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft:
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            self._put_system(draft, messages, tools)
        for index, message in draft.rest_of(messages):
            role = message["role"]
            if role == "tool":
                self._put_result(draft, messages, index)
            elif index > 0 or role != "system":
                draft.put(f"{START}{role}\n")
                if role == "assistant":
                    self._put_reply(draft, messages, index)
                else:
                    draft.put_text(index, self._said(message) + END)
                draft.put("\n")
        return draft

    def _said(self, message: PlainMessage) -> str:
        """Returns the text of a message of another role as the format prints it."""
        return str(message.get("content", ""))

    def _put_system(
        self, draft: Draft, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        """Appends the system message that a conversation begins with."""
        if messages[0]["role"] != "system":
            opening = [self.default_system or "", describe_tools(tools) if tools else ""]
            if any(opening):
                draft.put(f"{START}system\n" + "\n\n".join(filter(None, opening)) + f"{END}\n")
            return
        draft.put(f"{START}system\n")
        if tools:
            draft.put_text(0, messages[0]["content"])
            draft.put(f"\n\n{describe_tools(tools)}{END}\n")
        else:
            draft.put_text(0, messages[0]["content"] + END)
            draft.put("\n")

    def _put_result(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        before, after = messages[:index][-1:], messages[index + 1 : index + 2]
        draft.put("" if before and before[0]["role"] == "tool" else f"{START}user")
        draft.put("\n<tool_response>\n")
        draft.put_text(index, messages[index]["content"])
        draft.put("\n</tool_response>")
        draft.put("" if after and after[0]["role"] == "tool" else f"{END}\n")

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]
