"""DeepSeek V3.1 (and V3.1-Terminus), as its published chat template prints it.

tinker-cookbook calls this format `deepseekv3` and `deepseekv3_thinking`; the names without `_1` are the
format of V3 and R1 here.

- The prompt for a reply to a user ends with `</think>` without thinking (`deepseekv3_1`), and with `<think>`
  with it (`deepseekv3_1_thinking`). The template prints every reply as one without thinking, so a reply with
  thinking is printed with its block only as the last message.
- After tool results the model continues without a header and without a tag. There a model that thinks opens
  its block itself (it is empty if there is no thinking), so that its replies can be parsed.
- System messages are printed first, joined by blank lines, wherever they are in the conversation.
- Of a text that contains `</think>`, the template prints what follows the first one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.formats.deepseek_tools import CALL, CALL_TOKENS, CALLS, END_CALL, END_CALLS, SEP, split_calls
from renderers.formats.deepseekv3 import (
    ASSISTANT,
    BOS,
    END,
    END_OUTPUT,
    OUTPUT,
    USER,
    DeepSeekV3Renderer,
    Seen,
)
from renderers.formats.marked_calls import (
    exact_thought_and_said,
    parse_exact_thinking,
    thought_text_and_calls,
)
from renderers.formats.tagged_calls import print_as_json, read_object
from renderers.messages import Message, PlainMessage, Tool, function_of
from renderers.rendering import Rendering
from renderers.thinking import END_THINK, THINK


class DeepSeekV3_1Renderer(DeepSeekV3Renderer):
    """Renders replies without thinking; a trained reply with thinking is refused."""

    name = "deepseekv3_1"
    frame = BOS + END + USER + ASSISTANT + CALL_TOKENS + OUTPUT + END_OUTPUT
    thinking_name = "deepseekv3_1_thinking"
    end_outputs = ""

    def _header(self, before: str) -> str:
        return f"{ASSISTANT}{THINK if self.thinks else END_THINK}" if before == "user" else ""

    def _before_output(self, seen: Seen) -> str:
        return OUTPUT

    def _both_ways(
        self, message: PlainMessage, number: int, seen: Seen
    ) -> tuple[tuple[str, str], tuple[str, str]]:
        calls = _print_calls(message, number)
        by_model = (self._header(seen.role), self._written(message, calls, seen.role))
        header = f"{ASSISTANT}{END_THINK}" if seen.role == "user" else ""
        return by_model, (header, _text_in_history(message, seen.role) + calls)

    def _written(self, message: PlainMessage, calls: str, before: str) -> str:
        thought, said = exact_thought_and_said(message)
        if self.thinks and before in ("user", "tool"):
            said = f"{'' if before == 'user' else THINK}{thought}{END_THINK}{said}"
        return said + calls

    _span_in_history = Renderer._span_in_history  # no call is printed otherwise in the history

    def _parse_calls(self, marked: str) -> list[dict[str, Any]] | None:
        calls: list[dict[str, Any]] = []
        for part in split_calls(marked):
            name, is_call, rest = part.partition(SEP)
            arguments = rest.removesuffix(END_CALL)
            if not (name and is_call) or arguments == rest:
                return None
            if any(map(self._encoder.control.search, (name, arguments))):
                return None
            name, arguments = self._encoder.unguard((name, arguments))
            parsed = read_object(arguments)
            if parsed is None:
                return None
            calls.append({"type": "function", "function": {"name": name, "arguments": parsed}})
        return calls or None


class DeepSeekV3_1ThinkingRenderer(DeepSeekV3_1Renderer):
    """Renders the last reply with its thinking, which the template drops from all earlier replies.

    The content of a message may contain the thinking in `<think>` tags.
    """

    name = "deepseekv3_1_thinking"
    thinks = True
    reply_sections = thought_text_and_calls(CALLS, begun=True)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        for index in chosen:
            before = self._states.of(messages)[index].role
            if messages[index]["role"] == "assistant" and before not in ("user", "tool"):
                raise RendererError(
                    f"Renderer `{self.name}` cannot train message {index + 1}: no user's message and no "
                    "tool's result is before it, so nothing prompts the model to think. Do not train it, or "
                    "join it with the reply before it."
                )
        return super()._render(messages, chosen, tools)

    def _parse_said(self, text: str) -> tuple[Message, bool]:
        return parse_exact_thinking(text, begun=True)


def _text_in_history(message: PlainMessage, before: str) -> str:
    content = str(message.get("content", ""))
    if message.get("tool_calls") or before == "tool" or END_THINK not in content:
        return content
    return content.partition(END_THINK)[2]


def _print_calls(message: PlainMessage, number: int) -> str:
    """Returns the calls of a message as they follow its text; "" if there are none."""
    printed: list[str] = []
    for call in message.get("tool_calls", []):
        function = function_of(call, number)
        printed.append(f"{CALL}{function['name']}{SEP}{print_as_json(function['arguments'])}{END_CALL}")
    return f"{CALLS}{''.join(printed)}{END_CALLS}" if printed else ""
