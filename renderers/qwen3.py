"""Qwen3 (the hybrid-thinking models), as its published chat template prints it.

Replies before the last user message lose their thinking. The last message of a conversation gets
a think block, empty if it has no thinking; between the two, replies of a chain of tool calls keep
a block that holds something. So most conversations of several turns rewrite their history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from cookbook.errors import RendererError
from renderers.base import Renderer, Rendering
from renderers.draft import Draft
from renderers.messages import Message, PlainMessage, Tool, function_of, to_json
from renderers.thinking import END_THINK, THINK, message_with_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START, _END = "<|im_start|>", "<|im_end|>"
_TOOL_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


class Qwen3Renderer(Renderer):
    """Renders as Qwen3's own template does.

    An assistant's content may hold its thinking between `<think>` tags. A result of a tool is
    trained without the `<tool_response>` tags around it.
    """

    name = "qwen3"
    frame = _START + _END

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._end_id = self._token_id(_END)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        rewritten: list[int] = []
        for index in chosen:
            if messages[index]["role"] != "assistant":
                continue
            context, turn = messages[:index], messages[: index + 1]
            if index > 0 and _prints_thinking(context, index - 1) != _prints_thinking(turn, index - 1):
                raise RendererError(
                    f"Renderer `{self.name}` cannot train message {index + 1}, a reply right after a reply: "
                    "Qwen3 shows the first differently in the prompt and afterwards. Join the two."
                )
            if _thought_and_said(messages[index])[0] and not _prints_thinking(turn, index):
                raise RendererError(
                    f"Renderer `{self.name}` has no place for the thinking of message {index + 1}, which no "
                    "user's message precedes. Remove it, or leave the message out of the training."
                )
            if _prints_thinking(messages, index) != _prints_thinking(turn, index):
                rewritten.append(index)
        return self._draft(messages).finish(rewritten)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        if role not in ("assistant", "user"):
            raise self._refuse_role(role, ["assistant", "user"])
        draft = self._draft(messages)
        draft.put(f"{_START}{role}\n")
        return draft.finish()

    def _draft(self, messages: Sequence[PlainMessage]) -> Draft:
        draft = Draft()
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "tool":
                before, after = messages[:index][-1:], messages[index + 1 : index + 2]
                draft.put("" if before and before[0]["role"] == "tool" else f"{_START}user")
                draft.put("\n<tool_response>\n")
                draft.put_text(index, message["content"])
                draft.put("\n</tool_response>")
                draft.put("" if after and after[0]["role"] == "tool" else f"{_END}\n")
                continue
            draft.put(f"{_START}{role}\n")
            if role == "assistant":
                text = _reply(message, index + 1, thinks=_prints_thinking(messages, index))
                draft.put_reply(index, text + _END)
            else:
                draft.put_text(index, message["content"] + _END)
            draft.put("\n")
        return draft

    def get_stop_sequences(self) -> list[int]:
        return [self._end_id]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, [self._end_id])
        body = text
        tool_calls: list[dict[str, Any]] = []
        if (first := _TOOL_CALL.search(text)) is not None:
            body = text[: first.start()]
            tool_calls = [call for found in _TOOL_CALL.findall(text) if (call := _parse_tool_call(found))]
            if _TOOL_CALL.sub("", text) != body or len(tool_calls) != len(_TOOL_CALL.findall(text)):
                return {"role": "assistant", "content": text}, False
        message = message_with_thinking(body)
        return ({**message, "tool_calls": tool_calls} if tool_calls else message), ended


def _last_query(messages: Sequence[PlainMessage]) -> int:
    """The last user message that is not a tool's result in disguise; without one, the last message."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index].get("content", "")
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index]["role"] == "user" and not wrapped:
            return index
    return len(messages) - 1


def _prints_thinking(messages: Sequence[PlainMessage], index: int) -> bool:
    """Whether message `index` is a reply with a think block."""
    message = messages[index]
    if message["role"] != "assistant" or index <= _last_query(messages):
        return False
    return index == len(messages) - 1 or bool(_thought_and_said(message)[0])


def _thought_and_said(message: PlainMessage) -> tuple[str, str]:
    content = message.get("content", "")
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    if END_THINK not in content:
        return "", content
    thought = content.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return thought, content.split(END_THINK)[-1].lstrip("\n")


def _reply(message: PlainMessage, number: int, thinks: bool) -> str:
    thought, said = _thought_and_said(message)
    block = "{}\n{}\n{}\n\n".format(THINK, thought.strip("\n"), END_THINK)
    text = block + said.lstrip("\n") if thinks else said
    for position, tool_call in enumerate(message.get("tool_calls", [])):
        function = function_of(tool_call, number)
        arguments = function["arguments"]
        printed = arguments if isinstance(arguments, str) else to_json(arguments)
        text += "\n" if said or position > 0 else ""
        text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {printed}}}\n</tool_call>'
    return text


def _parse_tool_call(text: str) -> dict[str, Any] | None:
    try:
        function = json.loads(text)
    except ValueError:
        return None
    if not isinstance(function, dict) or set(function) != {"name", "arguments"}:
        return None
    return {"type": "function", "function": function}
