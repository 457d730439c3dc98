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

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cookbook.errors import RendererError
from renderers.formats.chatml import END, START, ChatMLRenderer
from renderers.formats.function_tags import FUNCTION_TAGS, INSTRUCTIONS, INTRODUCTION, print_call
from renderers.formats.tagged_calls import print_as_json, print_as_python
from renderers.formats.tagged_replies import TaggedRepliesRenderer
from renderers.messages import PlainMessage, Tool, to_json
from renderers.rendering import Draft, Rendering
from renderers.streaming import PLAIN
from renderers.thinking import END_THINK, THINK, THINKING_BEGUN


class Qwen3_5Renderer(ChatMLRenderer, TaggedRepliesRenderer):
    """Renders as Qwen3.5's own template does, prompted to think."""

    name = "qwen3_5"
    call_tags = FUNCTION_TAGS
    reply_opening = f"{THINK}\n"
    reply_sections = FUNCTION_TAGS.with_sections(THINKING_BEGUN)

    needs_query: ClassVar[bool] = True
    """Whether the template refuses a conversation without a user message."""
    prints_empty_system: ClassVar[bool] = True
    """Whether a system message without text is printed."""
    effort: ClassVar[str] = ""
    """A sentence about the effort of thinking, with which the system message begins."""

    _user_before_results = f"{START}user"
    _result_frame = ("\n<tool_response>\n", "\n</tool_response>")

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        if role == "assistant" and self.needs_query and not any(map(self._is_query, messages)):
            raise RendererError(
                f"Renderer `{self.name}` cannot prompt for a reply: no message is a user's. "
                "The model's template refuses such a conversation. Begin it with a user's message."
            )
        return super()._render_prompt(messages, tools, role)

    def _is_query(self, message: PlainMessage) -> bool:
        """Returns whether a message is a user's that is not a tool result in `<tool_response>` tags."""
        said = self._said(message)
        wrapped = said.startswith("<tool_response>") and said.endswith("</tool_response>")
        return message["role"] == "user" and not wrapped

    def _said(self, message: PlainMessage) -> str:
        return str(message.get("content", "")).strip()

    def _reply_text(self, message: PlainMessage, number: int, in_history: bool) -> str:
        thought, said = self._thought_and_said(message)
        block = "" if in_history else f"{THINK}\n{thought}\n{END_THINK}\n\n"
        calls = "\n".join(self._calls(message, number))
        return block + said + ("\n\n" if said.strip() and calls else "") + calls

    def _print_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return print_call(name, arguments, self.print_value)

    def print_value(self, value: Any) -> str:
        return print_as_python(value)

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        if self.needs_query and not any(map(self._is_query, messages[:index])):
            raise RendererError(
                f"Renderer `{self.name}` cannot train message {index + 1}, which no user's message precedes: "
                "the model's template prints no prompt there. Put a user's message first, or do not train it."
            )
        super()._check_reply(messages, index)

    def _put_reply(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        text = self._reply_text(messages[index], index + 1, self._in_history(messages, index))
        self._put_reply_text(draft, index, text + END)

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

    def _has_message_before(self, messages: Sequence[PlainMessage], index: int) -> bool:
        """Returns whether a message precedes message `index` in the template's loop."""
        return index > 0

    def _put_result(self, draft: Draft, messages: Sequence[PlainMessage], index: int) -> None:
        after = messages[index + 1 : index + 2]
        begin, end = self._result_frame
        # The template prints no header for results that the conversation begins with.
        has_header = self._has_message_before(messages, index) and messages[index - 1]["role"] != "tool"
        draft.put(self._user_before_results if has_header else "")
        draft.put(begin)
        draft.put_text(index, self._said(messages[index]))
        draft.put(end)
        draft.put("" if after and after[0]["role"] == "tool" else f"{END}\n")


class Qwen3_5DisableThinkingRenderer(Qwen3_5Renderer):
    """Qwen3.5 prompted not to think, as its template does with `enable_thinking=False`.

    The prompt ends with an empty think block, so the block is not trained. Thinking in a trained message is
    refused.
    """

    name = "qwen3_5_disable_thinking"
    reply_opening = f"{THINK}\n\n{END_THINK}\n\n"
    reply_sections = FUNCTION_TAGS.with_sections(PLAIN)
    thinks = False


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


def _describe_tools(tools: Sequence[Tool]) -> str:
    return INTRODUCTION + "".join(f"\n{to_json(tool)}" for tool in tools) + INSTRUCTIONS
