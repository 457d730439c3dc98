"""Llama 3 and 3.1, as their published chat templates print them.

3.1 differs from 3: it opens every conversation with a system message of its own that contains a date, and it
supports tools, which it describes at the start of the first user message. A tokenizer whose chat template
prints that opening is rendered as 3.1, any other as 3. The date is always the default of 3.1's template, 26
Jul 2024, so a conversation has the same tokens on any day. For templates that ask for today's date, as that
of 3.2 does, use the `chat_template` renderer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.jinja.today import TODAY
from renderers.messages import Message, PlainMessage, Tool, function_of, to_json
from renderers.rendering import Draft, Rendering
from renderers.streaming import PLAIN, START, Section, Sections
from renderers.unsupported import check_thinking, no_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOS, _END = "<|begin_of_text|>", "<|eot_id|>"
_START_HEADER, _END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
_CUTOFF = "Cutting Knowledge Date"
_OPENING = f"{_CUTOFF}: December 2023\nToday Date: {TODAY:%d %b %Y}\n\n"
_OPENING_WITH_TOOLS = f"Environment: ipython\n{_OPENING}"

_CALL = '{"name": '
_CALLING: Sections = {START: Section("content", begins={_CALL: "call"}), "call": Section(None)}


class Llama3Renderer(Renderer):
    """Renders as the template of Llama 3 or 3.1 does; white space around a message is trimmed.

    A reply of 3.1 is either text or one tool call, never both, and neither format has a place for thinking.
    A trained message with fields that its format does not support is refused. Arguments given as a JSON
    string are printed as the object they encode.
    """

    name = "llama3"
    frame = _BOS + _START_HEADER + _END_HEADER + _END + "<|eom_id|><|python_tag|><|end_of_text|>"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._end_id = self._token_id(_END)
        self._is_3_1 = _CUTOFF in str(tokenizer.chat_template)
        self.roles = (
            ("system", "user", "assistant", "tool") if self._is_3_1 else ("system", "user", "assistant")
        )
        self.takes_tools = self._is_3_1
        self.reply_sections = _CALLING if self._is_3_1 else PLAIN

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        check_thinking(self.name, messages, chosen)
        for index in chosen:
            if messages[index].get("tool_calls") and messages[index].get("content", "").strip():
                raise no_place(self.name, "text beside the tool call", index + 1)
            self._check_call(messages[index], index + 1)
        return self._draft(messages, tools).finish()

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools)
        draft.put(_header(role))
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Draft:
        draft = Draft()
        draft.put(_BOS)
        has_system = messages[0]["role"] == "system"
        if self._is_3_1:
            draft.put(_header("system") + (_OPENING_WITH_TOOLS if tools else _OPENING))
            if not has_system:
                draft.put(_END)
        tools_at = self._place_of_tools(messages) if tools else None
        for index, message in enumerate(messages):
            role = message["role"]
            if index > 0 or not (self._is_3_1 and has_system):
                draft.put(_header("ipython" if role == "tool" else role))
            if tools and index == tools_at:
                draft.put(_describe(tools))
            if role == "assistant":
                draft.put_reply(index, self._reply(message, index + 1) + _END)
            elif role == "tool":
                draft.put('"')
                draft.put_text(index, to_json(message["content"])[1:-1])
                draft.put(f'"{_END}')
            else:
                draft.put_text(index, message["content"].strip() + _END)
        return draft

    def _place_of_tools(self, messages: Sequence[PlainMessage]) -> int:
        index = 1 if messages[0]["role"] == "system" else 0
        if messages[index : index + 1] and messages[index]["role"] == "user":
            return index
        found = f"a message of role `{messages[index]['role']}`" if messages[index:] else "nothing"
        raise RendererError(
            f"Renderer `{self.name}` describes tools in a user's message that opens the conversation, but "
            f"message {index + 1} is {found}. Begin with a user's message, or remove the tools."
        )

    def _reply(self, message: PlainMessage, number: int) -> str:
        if not (tool_calls := message.get("tool_calls")):
            return message.get("content", "").strip()
        if not self._is_3_1 or len(tool_calls) != 1:
            raise RendererError(
                f"Renderer `{self.name}` cannot render the {len(tool_calls)} tool calls of message {number}. "
                f"Supported: {'one' if self._is_3_1 else 'none'} in a message."
            )
        function = function_of(tool_calls[0], number)
        parameters = to_json(self._arguments(function, number))
        return f'{{"name": "{function["name"]}", "parameters": {parameters}}}'

    def _check_call(self, message: PlainMessage, number: int) -> None:
        """Raises RendererError for a call that could not be parsed if the model wrote it."""
        for tool_call in message.get("tool_calls", []):
            function = function_of(tool_call, number)
            meant = {"name": function["name"], "arguments": self._arguments(function, number)}
            if _parse_call(self._reply(message, number)) != meant:
                raise RendererError(
                    f"Renderer `{self.name}` cannot train the tool call of message {number}: its name "
                    f"{function['name']!r} and arguments {function['arguments']!r} do not make a JSON object "
                    "that reads as the same call. Give a name without quotes and arguments that are a "
                    "mapping with strings as keys, or remove the message."
                )

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        function = _parse_call(text) if self._is_3_1 else None
        if function is None:
            return {"role": "assistant", "content": text}, ended
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}, ended


def _header(role: str) -> str:
    return f"{_START_HEADER}{role}{_END_HEADER}\n\n"


def _describe(tools: Sequence[Tool]) -> str:
    """Returns the description of the tools, which precedes the text of the first user message."""
    schemas = "".join(f"{json.dumps(tool, ensure_ascii=False, indent=4)}\n\n" for tool in tools)
    return (
        "Given the following functions, please respond with a JSON for a function call "
        "with its proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name '
        "and its value}."
        f"Do not use variables.\n\n{schemas}"
    )


def _parse_call(text: str) -> dict[str, object] | None:
    if not text.startswith(_CALL):
        return None
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if set(call) != {"name", "parameters"}:
        return None
    if not (isinstance(call["name"], str) and isinstance(call["parameters"], dict)):
        return None
    return {"name": call["name"], "arguments": call["parameters"]}
