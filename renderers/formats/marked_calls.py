"""The base class of formats whose tool calls follow the text of a reply, between control tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from renderers.base import Renderer
from renderers.messages import Message, PlainMessage
from renderers.reply_text import marked_text
from renderers.streaming import START, Section, Sections
from renderers.thinking import END_THINK, THINK, said_without_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_and_calls(mark: str) -> Sections:
    """Returns the sections of a reply without thinking, whose calls begin with `mark`."""
    return {START: Section("content", ends={mark: "calls"}), "calls": Section(None)}


def thought_text_and_calls(mark: str, begun: bool) -> Sections:
    """Returns the sections of a reply with a think block, which the prompt opens if `begun`."""
    thinking = Section("reasoning_content", ends={END_THINK: "said"})
    plain = Section("content", begins={THINK: "thinking"}, ends={mark: "calls"})
    return {
        START: replace(thinking, begins={THINK: "thinking"}) if begun else plain,
        "thinking": thinking,
        "said": Section("content", ends={mark: "calls"}),
        "calls": Section(None),
    }


class MarkedCallsRenderer(Renderer):
    """A format whose tokens need not be special tokens: text that spells them is escaped in replies too."""

    guards_replies = True
    end_of_turn: ClassVar[str]
    calls_mark: ClassVar[str]
    """The token with which the calls of a reply begin."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._end_id = self._token_id(self.end_of_turn)

    @abstractmethod
    def _parse_calls(self, marked: str) -> list[dict[str, Any]] | None:
        """Returns the calls in the marked text of a reply after `calls_mark`; None if it is malformed."""

    def _parse_said(self, text: str) -> tuple[Message, bool]:
        """Returns a message of the text before the calls, and whether its think block is closed."""
        return {"role": "assistant", "content": text}, True

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        malformed: Message = {"role": "assistant", "content": text}
        marked = marked_text(self.tokenizer, self._encoder, tokens, [self._end_id])
        if marked is None:
            return malformed, False
        said, opening, calls = marked.partition(self.calls_mark)
        tool_calls = self._parse_calls(calls) if opening else []
        if tool_calls is None or self._encoder.control.search(said):
            return malformed, False
        message, closed = self._parse_said(self._encoder.unguard(said))
        if not closed:
            return malformed, False
        return ({**message, "tool_calls": tool_calls} if tool_calls else message), ended


def parse_exact_thinking(text: str, begun: bool) -> tuple[Message, bool]:
    """Returns the message in a reply's text, and False if a think block that it begins with is not closed.

    No white space around the thinking belongs to the format. `begun` says whether the prompt opens the block,
    though the reply may open it again.
    """
    if not begun and not text.startswith(THINK):
        return said_without_thinking(text), True
    thought, closing, said = text.partition(END_THINK)
    thought, message = thought.removeprefix(THINK), said_without_thinking(said)
    return ({**message, "reasoning_content": thought} if thought else message), bool(closing)


def exact_thought_and_said(message: PlainMessage) -> tuple[str, str]:
    """Returns the thinking and the text of a reply, whose content may begin with its thinking in tags."""
    content = message.get("content", "")
    if message["role"] != "assistant" or "reasoning_content" in message or END_THINK not in content:
        return message.get("reasoning_content", ""), content
    thought, _, said = content.partition(END_THINK)
    return thought.removeprefix(THINK), said
