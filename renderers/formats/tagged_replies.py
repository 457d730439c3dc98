"""The base class of formats whose replies have a think block, and calls with arguments between tags.

A model has several prompts: one opens the block, another closes it at once. The text of a reply begins with
the end of the prompt that it follows, so the prompt is known from the text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.base import Renderer
from renderers.formats.queries import LastQueries, last_of_each
from renderers.formats.qwen3 import loses_text, thought_and_said
from renderers.formats.tagged_calls import CallTags, print_as_json
from renderers.messages import Message, PlainMessage, Tool, function_of
from renderers.rendering import Draft, Prepared, Rendering
from renderers.reply_text import marked_text
from renderers.thinking import END_THINK, THINK, parse_thinking, said_without_thinking
from renderers.train_on_what import TrainOnWhat
from renderers.unsupported import no_place


class TaggedRepliesRenderer(Renderer):
    """Arguments of calls may be given as mappings or as JSON; a reply's content may contain its thinking."""

    takes_tools = True

    call_tags: ClassVar[CallTags]
    reply_opening: ClassVar[str]
    """What the prompt for a reply ends with after its header."""
    thinks: ClassVar[bool] = True
    """Whether that opens a think block, which the reply continues."""
    other_openings: ClassVar[Mapping[str, str]] = {}
    """What other prompts of the model end with that a reply may follow, and the renderer of each."""
    all_openings: ClassVar[Sequence[str]] = ()
    """What all prompts of the model end with: the tokens of a reply are the same in every mode's prompts."""
    keeps_thinking: ClassVar[bool] = False
    """Whether replies before the last user message keep their thinking."""

    @cached_property
    def _queries(self) -> LastQueries:
        return LastQueries(partial(last_of_each, self._is_query))

    # -- what a format defines ----------------------------------------------------------------

    @abstractmethod
    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft:
        """Returns a draft of the conversation."""

    @abstractmethod
    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        """Returns what follows the header of a reply, up to its end token."""

    @abstractmethod
    def _print_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Returns one call of a reply."""

    def print_value(self, value: Any) -> str:
        """Returns the value of an argument of a call as the format prints it."""
        return print_as_json(value)

    def _said(self, message: PlainMessage) -> str:
        """Returns the content of a message as the format reads it."""
        return str(message.get("content", ""))

    def _thought_and_said(self, message: PlainMessage) -> tuple[str, str]:
        thought, said = thought_and_said({**message, "content": self._said(message)})
        return thought.strip(), said

    def _is_query(self, message: PlainMessage) -> bool:
        """Returns whether earlier replies lose their thinking because of this message."""
        return bool(message["role"] == "user")

    # -- rendering ----------------------------------------------------------------------------

    def _prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        train_on_what: TrainOnWhat | None = None,
    ) -> Prepared:
        prepared = super()._prepare(messages, tools, train_on_what)
        for index in prepared.weights if self.other_openings else ():
            message = prepared.messages[index]
            if message["role"] == "assistant":
                opening = self._opening_of(self._reply_text(message, index + 1, in_history=False))
                if opening is not None and opening in self.other_openings:
                    notes.count(
                        "message",
                        f"had no thinking, trained behind the prompt of `{self.other_openings[opening]}`: "
                        "sample such replies with that renderer",
                    )
        return prepared

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        replies = [index for index in chosen if messages[index]["role"] == "assistant"]
        for index in replies:
            self._check_reply(messages, index)
        rewritten = [index for index in replies if self._is_rewritten(messages, index)]
        return self._finish(self._draft(messages, tools), messages, tools, rewritten)

    def _is_rewritten(self, messages: Sequence[PlainMessage], index: int) -> bool:
        in_history = self._in_history(messages, index)
        as_last, printed = (
            self._reply_text(messages[index], index + 1, history) for history in (False, in_history)
        )
        return as_last != printed

    def _in_history(self, messages: Sequence[PlainMessage], index: int) -> bool:
        """Returns whether a user's message follows message `index`, so that its thinking is not printed."""
        return not self.keeps_thinking and index <= self._queries.of(messages)[len(messages)]

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        return self._queries.num_alike(few, more)

    def _put_reply_text(self, draft: Draft, index: int, text: str) -> None:
        """Appends a reply with its end token. The end of a prompt that it begins with is not trained."""
        opening = _longest_start(text, (self.reply_opening, *self.all_openings))
        if opening is None:
            draft.put_text(index, text)
        else:
            draft.put(opening)
            draft.put_reply(index, text.removeprefix(opening))

    def _opening_of(self, reply: str) -> str | None:
        """Returns the end of the prompt that the text of a reply begins with; None if it begins with none."""
        return _longest_start(reply, (self.reply_opening, *self.other_openings))

    def _calls(self, message: PlainMessage, number: int) -> list[str]:
        """Returns the printed calls of a message."""
        functions = (function_of(call, number) for call in message.get("tool_calls", []))
        return [self._print_call(one["name"], self._named_arguments(one, number)) for one in functions]

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        """Raises RendererError if message `index` cannot be trained."""
        message, number = messages[index], index + 1
        self._check_thinking(message, number)
        for call in self._calls(message, number):
            read = [one["function"] for one in self.call_tags.parse(call, self.print_value) or []]
            if [self._print_call(one["name"], one["arguments"]) for one in read] != [call]:
                raise RendererError(
                    f"Renderer `{self.name}` cannot train a tool call of message {number}, which would not "
                    f"be read as the same call: {self._encoder.unguard(call)!r}. Give names without tags "
                    "and values without closing tags, or remove the message."
                )

    def _check_thinking(self, message: PlainMessage, number: int) -> None:
        if loses_text({**message, "content": self._said(message)}):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {number}: the model's template would lose text "
                f"around the {THINK} and {END_THINK} of its content. Give the thinking as "
                '`reasoning_content`, "" if there is none.'
            )
        thought, _ = self._thought_and_said(message)
        if thought.startswith(THINK) or END_THINK in thought:
            raise RendererError(f"The thinking of message {number} has a think tag of its own. Remove it.")
        if self._opening_of(self._reply_text(message, number, in_history=False)) is None:
            raise no_place(self.name, "thinking", number)

    # -- parsing ------------------------------------------------------------------------------

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        ends = [end for end in self.get_stop_sequences() if isinstance(end, int)]
        text, ended = self._decode(tokens, ends)
        malformed: Message = {"role": "assistant", "content": text}
        marked = marked_text(self.tokenizer, self._encoder, tokens, ends)
        if marked is None:
            return malformed, False
        message, closed = self._parse_thinking(marked)
        message, well_formed = self.call_tags.with_calls(message, self.print_value)
        if not (closed and well_formed):
            return malformed, False
        parsed: Message = self._encoder.unguard(message)
        return parsed, ended

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        """Returns the message in a reply's text, and whether its think block is closed."""
        return parse_thinking(text, begun=True) if self.thinks else (said_without_thinking(text), True)


def _longest_start(text: str, starts: Sequence[str]) -> str | None:
    """Returns the longest of the `starts` that the text begins with; None if there is none."""
    return max(filter(text.startswith, starts), key=len, default=None)
