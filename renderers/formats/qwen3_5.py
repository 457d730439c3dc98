"""Qwen3.5 and Qwen3.6, as their published chat templates print them.

Every prompt ends with a think block: one that is open, or with `enable_thinking=False` an empty one. (The
small models of Qwen3.5 do not think by default; otherwise their template is the same.) A reply after the last
user message is printed with its block, which is empty if it has no thinking. Earlier replies are printed
without one, so most conversations of several turns rewrite their history. White space around contents is not
printed. A conversation without a user message is refused, as the template does.

Qwen3.6 prints the arguments of calls that are not strings as JSON (`true`), Qwen3.5 prints those that are
neither mappings nor lists as Python does (`True`). Qwen3.6 can also keep the thinking of all replies
(`preserve_thinking`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, ClassVar

from cookbook.errors import RendererError
from renderers.formats.argument_values import print_as_json, print_as_python
from renderers.formats.chatml import END, START, ChatMLRenderer
from renderers.formats.function_tags import (
    INSTRUCTIONS,
    INTRODUCTION,
    parse_calls,
    print_call,
    with_call_sections,
    with_calls,
)
from renderers.formats.qwen3 import loses_text, thought_and_said
from renderers.messages import Message, PlainMessage, Tool, function_of, to_json
from renderers.rendering import Draft, Rendering
from renderers.reply_text import marked_text
from renderers.streaming import PLAIN
from renderers.thinking import END_THINK, THINK, THINKING_BEGUN, parse_thinking, said_without_thinking
from renderers.unsupported import no_place


class Qwen3_5Renderer(ChatMLRenderer):
    """Renders as Qwen3.5's own template does, prompted to think.

    A reply's content may contain its thinking in `<think>` tags. Arguments of calls may be mappings or JSON.
    """

    name = "qwen3_5"
    reply_opening = f"{THINK}\n"
    reply_sections = with_call_sections(THINKING_BEGUN)

    other_openings: ClassVar[Mapping[str, str]] = {}
    """What other prompts of the model end with, and the renderer of each: a reply may follow one of them."""
    keeps_thinking: ClassVar[bool] = False
    """Whether earlier replies keep their think block."""
    needs_query: ClassVar[bool] = True
    """Whether the template refuses a conversation without a user message."""
    prints_empty_system: ClassVar[bool] = True
    """Whether a system message without text is printed."""
    effort: ClassVar[str] = ""
    """A sentence about the effort of thinking, with which the system message begins."""

    _user_before_results = f"{START}user"
    _result_frame = ("\n<tool_response>\n", "\n</tool_response>")
    _latest: tuple[Sequence[PlainMessage] | None, int] = (None, -1)
    """The messages that were rendered last, and the position of the last query among them."""

    # -- rendering ----------------------------------------------------------------------------

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        rewritten: list[int] = []
        for index in chosen:
            if messages[index]["role"] == "assistant":
                self._check_reply(messages, index)
                as_last, printed = (
                    self._reply_text(messages[index], index + 1, in_history)
                    for in_history in (False, self._in_history(messages, index))
                )
                if as_last != printed:
                    rewritten.append(index)
        return self._draft(messages, tools).finish(rewritten)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        if role == "assistant" and self.needs_query and not any(map(is_query, messages)):
            raise RendererError(
                f"Renderer `{self.name}` cannot prompt for a reply: no message is a user's. "
                "The model's template refuses such a conversation. Begin it with a user's message."
            )
        return super()._render_prompt(messages, tools, role)

    def _in_history(self, messages: Sequence[PlainMessage], index: int) -> bool:
        """Returns whether a user's message follows message `index`, so that its thinking is not printed."""
        latest, last_query = self._latest
        if latest is not messages:
            last_query = max(
                (i for i, message in enumerate(messages) if is_query(message)), default=len(messages)
            )
            self._latest = (messages, last_query)
        return not self.keeps_thinking and index <= last_query

    def _thought_and_said(self, message: PlainMessage) -> tuple[str, str]:
        thought, said = thought_and_said({**message, "content": self._said(message)})
        return thought.strip(), said

    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        """Returns what follows the header of a reply, up to its end token."""
        thought, said = self._thought_and_said(message)
        block = "" if in_history else f"{THINK}\n{thought}\n{END_THINK}\n\n"
        calls = "\n".join(self._calls(message, number))
        return block + said + ("\n\n" if said.strip() and calls else "") + calls

    def _calls(self, message: PlainMessage, number: int) -> list[str]:
        calls: list[str] = []
        for tool_call in message.get("tool_calls", []):
            function = function_of(tool_call, number)
            calls.append(print_call(function["name"], self._mapping(function, number), self.print_value))
        return calls

    def _mapping(self, function: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """Returns the arguments of a call of message `number`; there are none if they are an empty string."""
        arguments = {} if function["arguments"] == "" else self._arguments(function, number)
        if isinstance(arguments, Mapping) and all(isinstance(key, str) for key in arguments):
            return arguments
        raise RendererError(
            f"Renderer `{self.name}` cannot render the tool call of message {number}: its arguments are "
            f"{arguments!r}. Give a mapping with strings as keys."
        )

    def print_value(self, value: Any) -> str:
        """Returns the value of an argument of a call as the format prints it."""
        return print_as_python(value)

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        """Raises RendererError if message `index` cannot be trained."""
        message, number = messages[index], index + 1
        if self.needs_query and not any(map(is_query, messages[:index])):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {number}, which no user's message precedes: "
                "the model's template prints no prompt there. Put a user's message first, or do not train it."
            )
        self._check_thinking(message, number)
        for call in self._calls(message, number):
            if [self._printed(one) for one in parse_calls(call, self.print_value) or []] != [call]:
                raise RendererError(
                    f"Renderer `{self.name}` cannot train a tool call of message {number}, which would not "
                    f"be read as the same call: {self._encoder.unguard(call)!r}. Give names without `>`, and "
                    "values without closing tags, or remove the message."
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

    def _printed(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        return print_call(function["name"], function["arguments"], self.print_value)

    def _opening_of(self, reply: str) -> str | None:
        """Returns the end of the prompt that the text of a reply begins with; None if it begins with none."""
        return next(filter(reply.startswith, (self.reply_opening, *self.other_openings)), None)

    def _put_reply(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        text = self._reply_text(messages[index], index + 1, self._in_history(messages, index))
        opening = self._opening_of(text)
        if opening is None:
            draft.put_text(index, text + END)
            return
        draft.put(opening)
        draft.put_reply(index, text.removeprefix(opening) + END)

    def _said(self, message: PlainMessage) -> str:
        return str(message.get("content", "")).strip()

    def _put_system(
        self, draft: Draft, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        for index, message in enumerate(messages):
            if index > 0 and message["role"] == "system":
                raise RendererError(
                    f"Renderer `{self.name}` cannot render the system message {index + 1}: the model's "
                    "template has a place for one at the beginning only. Join the two, or remove it."
                )
        has_system = messages[0]["role"] == "system"
        said = self._said(messages[0]) if has_system else ""
        opening = "\n\n".join(filter(None, [self.effort, _describe_tools(tools) if tools else ""]))
        is_printed = opening or said or (has_system and self.prints_empty_system)
        if is_printed:
            draft.put(f"{START}system\n{opening}" + ("\n\n" if opening and said else ""))
        if has_system:
            draft.put_text(0, said)
        draft.put(f"{END}\n" if is_printed else "")

    def _put_result(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        before, after = messages[:index][-1:], messages[index + 1 : index + 2]
        begin, end = self._result_frame
        # The template prints no header for results that the conversation begins with.
        draft.put(self._user_before_results if before and before[0]["role"] != "tool" else "")
        draft.put(begin)
        draft.put_text(index, self._said(messages[index]))
        draft.put(end)
        draft.put("" if after and after[0]["role"] == "tool" else f"{END}\n")

    # -- parsing ------------------------------------------------------------------------------

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        malformed: Message = {"role": "assistant", "content": text}
        reply = list(takewhile(lambda token: token != self._end_id, tokens))
        marked = marked_text(self.tokenizer, self._encoder, reply)
        if marked is None:
            return malformed, False
        message, closed = self._parse_thinking(marked)
        message, well_formed = with_calls(message, self.print_value)
        if not (closed and well_formed):
            return malformed, False
        return self._encoder.unguard(message), ended

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        """Returns the message in a reply's text, and whether its think block is closed."""
        return parse_thinking(text, begun=True)


class Qwen3_5DisableThinkingRenderer(Qwen3_5Renderer):
    """Qwen3.5 prompted not to think, as its template does with `enable_thinking=False`.

    The prompt ends with an empty think block, so the block is not trained. Thinking in a trained message is
    refused.
    """

    name = "qwen3_5_disable_thinking"
    reply_opening = f"{THINK}\n\n{END_THINK}\n\n"
    reply_sections = with_call_sections(PLAIN)

    def _parse_thinking(self, text: str) -> tuple[Message, bool]:
        return said_without_thinking(text), True


class Qwen3_5PreserveThinkingRenderer(Qwen3_5Renderer):
    """Qwen3.5 with the think blocks of all replies, so that no conversation rewrites its history."""

    name = "qwen3_5_preserve_thinking"
    keeps_thinking = True


class Qwen3_6Renderer(Qwen3_5Renderer):
    """Renders as Qwen3.6's own template does, prompted to think."""

    name = "qwen3_6"

    def print_value(self, value: Any) -> str:
        return print_as_json(value)


class Qwen3_6DisableThinkingRenderer(Qwen3_5DisableThinkingRenderer, Qwen3_6Renderer):
    """Qwen3.6 prompted not to think."""

    name = "qwen3_6_disable_thinking"


class Qwen3_6PreserveThinkingRenderer(Qwen3_6Renderer):
    """Qwen3.6 with the think blocks of all replies, as its template prints with `preserve_thinking=True`."""

    name = "qwen3_6_preserve_thinking"
    keeps_thinking = True


def is_query(message: PlainMessage) -> bool:
    """Returns whether a message is a user's that is not a tool result in `<tool_response>` tags."""
    said = message.get("content", "").strip()
    wrapped = said.startswith("<tool_response>") and said.endswith("</tool_response>")
    return message["role"] == "user" and not wrapped


def _describe_tools(tools: Sequence[Tool]) -> str:
    return INTRODUCTION + "".join(f"\n{to_json(tool)}" for tool in tools) + INSTRUCTIONS
