"""Renders each prefix of one conversation with a chat template once, and keeps the texts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from cookbook.errors import RendererError
from renderers.jinja.loop_records import Memory
from renderers.jinja.template import Template, json_type
from renderers.messages import PlainMessage, Tool
from renderers.tokens import length_of_common_start

_LONG = 24
"""The number of messages from which a conversation's prefixes are rendered together."""

_MOST_CHARACTERS = 1 << 25
"""The number of characters of text that is kept per conversation."""

_LONG_TEXT = 4096
"""The number of characters above which only the difference from another text is kept."""


@dataclass
class _Texts:
    """The texts of a conversation.

    Of a long text only what follows its common prefix with the first text (usually that of all messages) is
    kept.
    """

    first: str = ""
    kept: dict[tuple[int, bool], tuple[int, str] | RendererError] = field(default_factory=dict)
    """By number of messages and whether the prompt is included: the length of the common prefix and the rest
    of the text, or the error of the template."""
    num_characters: int = 0


@dataclass
class Borders:
    """Where the prompts for replies end in the latest text of a conversation."""

    text: str = ""
    lengths: list[int] = field(default_factory=list)
    """For each message, the length of the longest prompt up to the one for it."""
    ends: dict[int, int] = field(default_factory=dict)
    """The lengths of the prompts that the text begins with, by message."""

    def go_back(self, num_messages: int, text: str = "") -> None:
        """Keeps what is the same for another text, of the first messages at most."""
        if text:
            num_messages = min(
                num_messages, bisect_right(self.lengths, length_of_common_start(self.text, text))
            )
            self.text = text
        del self.lengths[num_messages:]
        while self.ends and next(reversed(self.ends)) >= num_messages:
            self.ends.popitem()


class Chat:
    """One conversation under a template. Each text is rendered once and kept."""

    def __init__(
        self, template: Template, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        """`given` keeps the messages, and `given_tools` the tools, as they were before they were adapted."""
        self.messages = [template.adapted(message) for message in messages]
        self.tools = [json_type(tool) for tool in tools] if tools else None
        self.given, self.given_tools = messages, tools
        self._template = template
        self._is_long = len(self.messages) >= _LONG
        self._start_anew()

    def _start_anew(self) -> None:
        self._all_messages = self.messages
        self._texts = _Texts()
        self._memory = Memory()
        self._changed: dict[Callable[[Any], Any], Chat] = {}
        self._in_modes: dict[Template, Chat] = {}
        self.turns: dict[int, Any] = {}
        """What `Replies` found for each reply: it depends on the messages up to it alone."""
        self.known: set[str] = set()
        """What is known of every message."""
        self.borders = Borders()

    @property
    def is_whole(self) -> bool:
        """Whether these are all messages of the conversation."""
        return len(self.messages) == len(self._all_messages)

    def beginning(self, num_messages: int) -> Chat:
        """Returns a chat of the first messages that shares the kept texts."""
        if num_messages == len(self.messages):
            return self
        beginning = Chat.__new__(Chat)  # quicker than `copy`, and there is one for each message
        vars(beginning).update(vars(self), messages=self.messages[:num_messages])
        return beginning

    def changed(self, change: Callable[[Any], Any]) -> Chat:
        """Returns this chat with `change` applied to the tools and every message.

        A message that remains equal remains the same object.
        """
        if change not in self._changed:
            changed = copy(self)
            new = [change(message) for message in self._all_messages]
            changed.messages = [b if a != b else a for a, b in zip(self._all_messages, new, strict=True)]
            changed.tools = change(self.tools)
            changed._start_anew()
            self._changed[change] = changed
        return self._changed[change].beginning(len(self.messages))

    def under(self, template: Template) -> Chat:
        """Returns this chat under another mode of its template."""
        if template is self._template:
            return self
        if template not in self._in_modes:
            other = copy(self)
            other._template = template
            other.messages = self._all_messages
            other._start_anew()
            self._in_modes[template] = other
        return self._in_modes[template].beginning(len(self.messages))

    def text(self, num_messages: int, prompt: bool = False) -> str:
        """Returns the text of the first messages. Raises RendererError if the template refuses them."""
        key, texts = (num_messages, prompt), self._texts
        kept = texts.kept.get(key)
        if isinstance(kept, RendererError):
            raise kept
        if kept is not None:
            num_common, rest = kept
            return f"{texts.first[:num_common]}{rest}" if num_common else rest
        try:
            text = self._traced_text(self.messages[:num_messages], prompt) if self._is_long else None
            if text is None:
                text = self._template.text(self.messages[:num_messages], self.tools, prompt)
        except RendererError as error:
            texts.kept[key] = error
            raise
        if texts.num_characters > _MOST_CHARACTERS:
            texts.kept.clear()
            texts.num_characters = 0
        num_common = 0
        if len(text) > _LONG_TEXT:
            texts.first = texts.first or text
            num_common = length_of_common_start(texts.first, text)
        texts.kept[key] = num_common, text[num_common:]
        texts.num_characters += len(text) - num_common
        return text

    def text_with(self, index: int, stand_in: PlainMessage, num_messages: int, prompt: bool = False) -> str:
        """Returns the text of the first messages, with `stand_in` in place of message `index` or after it."""
        messages = [*self.messages[:index], stand_in, *self.messages[index + 1 : num_messages]]
        text = self._traced_text(messages, prompt) if self._is_long else None
        return self._template.text(messages, self.tools, prompt) if text is None else text

    def _traced_text(self, messages: Sequence[PlainMessage], prompt: bool) -> str | None:
        return self._template.traced_text(messages, self.tools, prompt, self._memory)

    def prompt_before(self, index: int) -> str | None:
        """Returns the prompt for message `index`, or None if the template renders none."""
        if index == 0:
            return None
        try:
            return self.text(index, prompt=True)
        except RendererError:
            return None
