"""DeepSeek V3 and R1, as the chat template published for both prints them.

Surprising properties of that template:

- Its generation prompt ends with `<think>` and a newline, yet it prints every reply without a think block.
  There are therefore two renderers. `deepseekv3` prompts without the block, for models that do not think (V3,
  V3-0324), and renders conversations as the template does. `deepseekv3_thinking` prompts as the template
  does, for models that think (R1). It renders the last reply with its think block (empty if it has no
  thinking), and everything else as the template does.
- System messages are printed first, joined by blank lines, wherever they are in the conversation.
- After tool results only the end of the results is printed. The model continues there without a header and
  without `<think>`, so a model that thinks opens its block itself.
- Only the first tool calls of a conversation are printed with a header, their text and an opening token, and
  only the first result with the token that opens results. Later calls are printed after a newline alone, and
  their text is lost. A model does not write calls that way after its prompt. A turn of later calls is
  therefore trained as the last message, printed like the first calls, and is printed the short way once other
  messages follow.

V3.1 has a different format (`deepseekv3_1`), which is the one that tinker-cookbook calls deepseekv3. V3.2 and
later ones have others again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cookbook.errors import RendererError
from renderers.formats.deepseek_tools import CALL_TOKENS, CALLS, END_CALLS, parse_calls, print_calls
from renderers.formats.marked_calls import MarkedCallsRenderer, text_and_calls
from renderers.formats.queries import Beginnings
from renderers.messages import Message, PlainMessage, Tool
from renderers.rendering import CharSpan, Draft, Rendering
from renderers.streaming import Section, Sections
from renderers.thinking import END_THINK, THINK, THINKING_BEGUN, parse_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_OUTPUTS, _END_OUTPUTS = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, END_OUTPUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
_THINKING: Sections = {
    **THINKING_BEGUN,
    "said": replace(THINKING_BEGUN["said"], ends={CALLS: "calls"}),
    "calls": Section(None),
}


class DeepSeekV3Renderer(MarkedCallsRenderer):
    """Renders replies without thinking; a trained reply with thinking is refused.

    Arguments given as a dict are printed as JSON, those given as a string unchanged. The format has no place
    for the descriptions of tools.
    """

    name = "deepseekv3"
    end_of_turn = END
    calls_mark = CALLS
    frame = BOS + END + USER + ASSISTANT + CALL_TOKENS + _OUTPUTS + _END_OUTPUTS + OUTPUT + END_OUTPUT
    reply_sections = text_and_calls(CALLS)
    thinking_name: ClassVar[str] = "deepseekv3_thinking"
    thinks: ClassVar[bool] = False
    """Whether the prompt opens a think block."""
    end_outputs: ClassVar[str] = _END_OUTPUTS
    """What is printed behind the tool results that a text ends with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        for token in (BOS, USER, ASSISTANT):
            self._token_id(token)

    # -- rendering ----------------------------------------------------------------------------

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        for index in chosen:
            if messages[index]["role"] == "assistant":
                self._check_trained(messages[index], index + 1)
        last = len(messages) - 1
        writes_last = messages[last]["role"] == "assistant" and (self.thinks or last in chosen)
        written = last if writes_last else None
        draft = self._draft(messages, tools, written)
        draft.put(self.end_outputs if self._states.of(messages)[len(messages)].role == "tool" else "")
        replies = [index for index in chosen if messages[index]["role"] == "assistant"]
        rewritten = [index for index in replies if self._is_rewritten(messages, index, written)]
        return self._finish(draft, messages, tools, rewritten)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools, None)
        before = self._states.of(messages)[len(messages)].role
        draft.put(self._header(before) if role == "assistant" else USER)
        return draft.finish()

    @cached_property
    def _states(self) -> Beginnings[Seen]:
        return Beginnings(_states)

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        states = self._states.of(more)
        return len(few) - 1 if states[len(few)].last_system == states[len(more)].last_system else 0

    def _check_trained(self, message: PlainMessage, number: int) -> None:
        thought, _ = _thought_and_said(message)
        if thought and not self.thinks:
            raise RendererError(
                f"Renderer `{self.name}` has no place for the thinking of message {number}. Remove it, do "
                f"not train the message, or use renderer `{self.thinking_name}`."
            )
        if thought.startswith(THINK) or END_THINK in thought:
            raise RendererError(f"The thinking of message {number} holds a think tag of its own. Remove it.")

    def _header(self, before: str) -> str:
        """Returns the prompt for a reply to a message of role `before`."""
        if before == "tool":
            return self.end_outputs
        return f"{ASSISTANT}{THINK}\n" if self.thinks else ASSISTANT

    def _draft(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, written: int | None
    ) -> Draft:
        """Returns a draft of the messages as history, with message `written` as the model writes it."""
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            draft.put(BOS)
            systems = [index for index, message in enumerate(messages) if message["role"] == "system"]
            for index in systems:
                draft.put("" if index == systems[0] else "\n\n")
                draft.put_text(index, messages[index]["content"])
        states = self._states.of(messages)
        for index, message in draft.rest_of(messages):
            match message["role"]:
                case "user":
                    draft.put(USER)
                    draft.put_text(index, message["content"])
                case "tool":
                    draft.put(self._before_output(states[index]))
                    draft.put_text(index, message["content"])
                    draft.put(END_OUTPUT)
                case "assistant":
                    by_model, in_history = self._both_ways(message, index + 1, states[index])
                    header, text = by_model if index == written else in_history
                    draft.put(header)
                    draft.put_reply(index, text + END)
        return draft

    def _is_rewritten(self, messages: Sequence[PlainMessage], index: int, written: int | None) -> bool:
        """Returns whether a reply is not printed as the model writes it, or after another prompt."""
        states = self._states.of(messages)
        by_model, in_history = self._both_ways(messages[index], index + 1, states[index])
        return states[len(messages)].last_system > index or (index != written and in_history != by_model)

    def _before_output(self, seen: Seen) -> str:
        """Returns what is printed before a tool's result."""
        return OUTPUT if seen.has_outputs else _OUTPUTS + OUTPUT

    def _both_ways(
        self, message: PlainMessage, number: int, seen: Seen
    ) -> tuple[tuple[str, str], tuple[str, str]]:
        """Returns the header and the text of a reply as the model writes it, and as the history has it."""
        calls = print_calls(message, number)
        by_model = (self._header(seen.role), self._written(message, calls, seen.role))
        return by_model, _in_history(message, calls, seen.has_called, seen.role)

    def _written(self, message: PlainMessage, calls: str, before: str) -> str:
        """Returns the text that the model writes after the prompt for this message."""
        thought, said = _thought_and_said(message)
        if self.thinks:
            opening = f"{THINK}\n" if before == "tool" else ""
            said = "{}{}\n{}\n\n{}".format(opening, thought, END_THINK, said.lstrip("\n"))
        return f"{said}{CALLS}{calls}{END_CALLS}" if calls else said

    def _span_in_history(
        self,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        index: int,
        tools: Sequence[Tool] | None,
    ) -> CharSpan:
        if messages[index].get("tool_calls") and any(m.get("tool_calls") for m in messages[:index]):
            raise RendererError(
                f"Renderer `{self.name}` prints the tool calls of message {index + 1} without their header "
                "once other messages follow. Use build_supervised_examples, which trains every turn as the "
                "model meets it."
            )
        return rendering.spans[index]

    # -- parsing ------------------------------------------------------------------------------

    def _parse_calls(self, marked: str) -> list[dict[str, Any]] | None:
        return parse_calls(marked, self._encoder)


class DeepSeekV3ThinkingRenderer(DeepSeekV3Renderer):
    """Renders the last reply with its thinking, which the template drops from all earlier replies.

    Newlines around the thinking belong to the format. The content of a message may contain the thinking in
    `<think>` tags.
    """

    name = "deepseekv3_thinking"
    thinks = True
    reply_sections = _THINKING

    def _parse_said(self, text: str) -> tuple[Message, bool]:
        return parse_thinking(text, begun=True)


class Seen(NamedTuple):
    """What the printing of a message depends on: what is before it."""

    role: str = ""
    """The role of the message before, without system messages; "" for the first one."""
    last_system: int = -1
    has_called: bool = False
    has_outputs: bool = False


def _states(messages: Sequence[PlainMessage]) -> list[Seen]:
    """Returns for each n the state behind the first n messages."""
    found = [Seen()]
    for index, message in enumerate(messages):
        role, seen = message["role"], found[-1]
        if role == "system":
            found.append(seen._replace(last_system=index))
            continue
        has_called = seen.has_called or (role == "assistant" and bool(message.get("tool_calls")))
        found.append(Seen(role, seen.last_system, has_called, seen.has_outputs or role == "tool"))
    return found


def _thought_and_said(message: PlainMessage) -> tuple[str, str]:
    content = message.get("content", "")
    if "reasoning_content" in message or END_THINK not in content:
        return message.get("reasoning_content", "").strip("\n"), content
    thought, _, said = content.rpartition(END_THINK)
    return thought.lstrip("\n").removeprefix(THINK).strip("\n"), said


def _in_history(message: PlainMessage, calls: str, has_called: bool, before: str) -> tuple[str, str]:
    """Returns the header and the text that the template prints for a reply in the history."""
    content = message.get("content", "")
    if calls and has_called:
        return "\n", calls + END_CALLS
    if calls:
        return ASSISTANT, f"{content}{CALLS}{calls}{END_CALLS}"
    return (_END_OUTPUTS, content) if before == "tool" else (ASSISTANT, content.split(END_THINK)[-1])
