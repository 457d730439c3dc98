"""Gemma 4, as its published chat templates print it (text only).

- A system turn stands first if there is a system message, a tool, or the mode that thinks, which it marks
  with `<|think|>`. Tools are described at its end.
- A reply is its thinking in a `thought` channel, its calls, and its text. After calls it ends with
  `<|tool_response>`, with which the first result begins, and the next reply continues the same turn.
- Text beside calls is printed behind the results. There the template closes the turn, so a reply behind such
  results has no prompt and is refused if it is trained. The message itself is trained as the last one.
- Replies before the last user message lose their thinking (`gemma4_preserve_thinking` keeps that of calls).
- The prompt not to think of the larger models (12B, 26B-A4B, 31B) ends with an empty thought channel, which
  is not printed in the history. The templates of E2B and E4B print none. The tokenizer's template tells them
  apart.
- Behind results the prompt to think opens the thought channel.

A second reply in a row continues the first without an end token or a prompt between the two, so it is refused
if it is trained. A result that follows no call is refused, because the template would leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from cookbook.errors import RendererError
from renderers.base import Renderer
from renderers.formats.gemma4_tools import CALL, END_CALL, QUOTE, describe_tool, print_call, read_call
from renderers.formats.queries import LastQueries, last_of_each
from renderers.messages import THINKING_KEYS, Message, PlainMessage, Tool, function_of
from renderers.rendering import Draft, Prepared, Rendering
from renderers.reply_text import marked_text
from renderers.streaming import START as FIRST
from renderers.streaming import Section, Sections
from renderers.train_on_what import TrainOnWhat
from renderers.unsupported import no_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM_ROLES = ("system", "developer")
_START, _END = "<|turn>", "<turn|>"
_CHANNEL, _END_CHANNEL = "<|channel>", "<channel|>"
_RESULT, _END_RESULT = "<|tool_response>", "<tool_response|>"
_TOOL, _END_TOOL = "<|tool>", "<tool|>"
_THINK = "<|think|>"
_THOUGHT = f"{_CHANNEL}thought\n"
_NO_THOUGHT = f"{_THOUGHT}{_END_CHANNEL}"
_NO_THOUGHT_IN_TEMPLATE = re.compile(rf"{re.escape(_CHANNEL)}thought(?:\\n|\n){re.escape(_END_CHANNEL)}")
_INLINE = re.compile(
    rf"\s*{re.escape(_THOUGHT)}(?P<thought>.*?)\n?{re.escape(_END_CHANNEL)}(?P<said>.*)", re.DOTALL
)
_ONE_CALL = re.compile(f"{re.escape(CALL)}(?P<call>.*?){re.escape(END_CALL)}", re.DOTALL)


def _sections(first: Section) -> Sections:
    said = Section("content", ends={CALL: "call"})
    ends = {f"\n{_END_CHANNEL}": "said", _END_CHANNEL: "said"}
    return {
        FIRST: replace(first, begins={_THOUGHT: "thinking"}),
        "thinking": Section("reasoning_content", ends=ends),
        "said": said,
        "call": Section(None, ends={END_CALL: "said"}),
    }


class Gemma4Renderer(Renderer):
    """Renders as the templates of Gemma 4 do by default: prompted not to think.

    Thinking in a trained message is refused. A reply's content may begin with its thought channel. Arguments
    of calls may be given as mappings or as JSON.
    """

    name = "gemma4"
    roles = ("system", "developer", "user", "assistant", "tool")
    frame = (
        _START + _END + _CHANNEL + _END_CHANNEL + _RESULT + _END_RESULT + CALL + END_CALL + QUOTE
        + _TOOL + _END_TOOL + _THINK
    )  # fmt: skip
    guards_replies = True
    takes_tools = True
    reply_sections = _sections(Section("content", ends={CALL: "call"}))

    thinks: ClassVar[bool] = False
    keeps_thinking: ClassVar[bool] = False
    """Whether calls before the last user message keep their thinking."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._stops = [self._token_id(token) for token in (_END, _RESULT)]
        self._token_id(_START)
        has_opening = _NO_THOUGHT_IN_TEMPLATE.search(str(tokenizer.chat_template or ""))
        self._prompt_opening = _NO_THOUGHT if has_opening and not self.thinks else ""
        """What the prompt for a new turn ends with after its header."""

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops)

    def reads_key(self, role: str, key: str, value: Any) -> bool:
        return key == "name" and role == "tool"

    # -- rendering ----------------------------------------------------------------------------

    def _prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        train_on_what: TrainOnWhat | None = None,
    ) -> Prepared:
        if isinstance(messages, (list, tuple)):
            messages = [_with_thinking_apart(message) for message in messages]
        return super()._prepare(messages, tools, train_on_what)

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        replies = [index for index in chosen if messages[index]["role"] == "assistant"]
        draft = self._draft(messages, tools)
        for index in replies:
            self._check_reply(messages, index)
        return self._finish(draft, messages, tools, self._rewritten(messages, replies))

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools, role)
        if role == "user":
            draft.put(f"{_START}user\n")
        elif messages[-1]["role"] == "tool":
            draft.put(_THOUGHT if self.thinks else "")
        elif not messages[-1].get("tool_calls"):
            draft.put(f"{_START}model\n{self._prompt_opening}")
        return draft.finish()

    @cached_property
    def _users(self) -> LastQueries:
        return LastQueries(partial(last_of_each, _is_user))

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        return self._users.num_alike(few, more)

    def _draft(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, next_role: str | None = None
    ) -> Draft:
        """Returns a draft of the conversation, which a message of `next_role` follows if it is given."""
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            draft.put(str(self.tokenizer.bos_token or ""))
            self._put_system(draft, messages, tools)
        last_user = self._users.of(messages)[len(messages)]
        for index, message in draft.rest_of(messages):
            role, before = message["role"], messages[index - 1] if index else None
            follows = "user" if next_role == "user" else ""
            if index + 1 < len(messages):
                follows = messages[index + 1]["role"]
            if role == "assistant":
                continues = before is not None and before["role"] in ("assistant", "tool")
                draft.put("" if continues else f"{_START}model\n")
                is_last = index + 1 == len(messages) and next_role is None
                draft.put(self._prompt_opening if is_last and not continues else "")
                has_thinking = index > last_user or (self.keeps_thinking and message.get("tool_calls"))
                self._put_reply(draft, messages, index, follows, bool(has_thinking))
            elif role == "tool":
                self._put_result(draft, messages, index, follows)
            elif index > 0 or role not in _SYSTEM_ROLES:
                draft.put(f"{_START}{role}\n")
                draft.put_text(index, _said(message) + _END)
                draft.put("\n")
        return draft

    def _put_system(
        self, draft: Draft, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None
    ) -> None:
        has_system = messages[0]["role"] in _SYSTEM_ROLES
        if not (has_system or tools or self.thinks):
            return
        draft.put(f"{_START}system\n" + (f"{_THINK}\n" if self.thinks else ""))
        if has_system:
            draft.put_text(0, _said(messages[0]) + ("" if tools else _END))
        if tools or not has_system:
            draft.put("".join(f"{_TOOL}{describe_tool(tool)}{_END_TOOL}" for tool in tools or ()) + _END)
        draft.put("\n")

    def _put_reply(
        self,
        draft: Draft,
        messages: Sequence[PlainMessage],
        index: int,
        follows: str,
        has_thinking: bool,
    ) -> None:
        """Appends a reply, before a message of the role `follows` ("" if there is none)."""
        message = messages[index]
        thought, said, calls = (
            message.get("reasoning_content", ""),
            _said(message),
            self._calls(message, index),
        )
        text = f"{_THOUGHT}{thought}\n{_END_CHANNEL}" if thought and has_thinking else ""
        if index > 0 and messages[index - 1]["role"] == "tool" and self.thinks and text:
            draft.put(_THOUGHT)
            text = text.removeprefix(_THOUGHT)
        text += "".join(calls)
        if calls and follows == "tool":
            draft.put_reply(index, text + _RESULT)
            return
        end = _RESULT if calls else "" if follows == "assistant" else _END
        draft.put_reply(index, text + said + end)
        draft.put("\n" if end == _END else "")

    def _put_result(self, draft: Draft, messages: Sequence[PlainMessage], index: int, follows: str) -> None:
        """Appends a tool's result, and behind the last one of a reply the text beside its calls."""
        asked = next(i for i in range(index - 1, -2, -1) if i < 0 or messages[i]["role"] != "tool")
        if asked < 0 or not messages[asked].get("tool_calls"):
            raise RendererError(
                f"Renderer `{self.name}` cannot render the tool result in message {index + 1}: the model's "
                "template prints results only behind the calls that they answer. Remove it, or put the "
                "message with the call before it."
            )
        result, said = messages[index], _said(messages[asked])
        draft.put("" if asked == index - 1 else _RESULT)
        draft.put(f"response:{_name_of(result, messages[asked])}{{value:{QUOTE}")
        draft.put_text(index, str(result["content"]))
        draft.put(f"{QUOTE}}}{_END_RESULT}")
        if follows != "tool":
            draft.put(said)
            draft.put(f"{_END}\n" if follows != "assistant" and (said or follows) else "")

    def _rewritten(self, messages: Sequence[PlainMessage], replies: Sequence[int]) -> list[int]:
        """Returns the trained replies that, or before which, the format prints otherwise later on."""
        users = self._users.of(messages)
        last_user = users[len(messages)]
        found: list[int] = []
        loses_thinking = False
        # a user's message begins anew, so what is before the last one does not matter
        for index in range(max(users[min(replies)], 0), max(replies) + 1) if replies else ():
            message = messages[index]
            if message["role"] == "user":
                loses_thinking = False
            if message["role"] != "assistant":
                continue
            calls, follows = message.get("tool_calls"), messages[index + 1 : index + 2]
            is_dropped = index < last_user and not (self.keeps_thinking and calls)
            loses_thinking |= bool(message.get("reasoning_content")) and is_dropped
            loses_opening = bool(self._prompt_opening and follows) and not self._continues(messages, index)
            moves_text = bool(calls and _said(message) and follows and follows[0]["role"] == "tool")
            loses_end = bool(not calls and follows and follows[0]["role"] == "assistant")
            if index in replies and (loses_thinking or loses_opening or moves_text or loses_end):
                found.append(index)
        return found

    def _continues(self, messages: Sequence[PlainMessage], index: int) -> bool:
        """Returns whether a reply continues the turn of the reply before it."""
        return index > 0 and messages[index - 1]["role"] in ("assistant", "tool")

    def _calls(self, message: PlainMessage, index: int) -> list[str]:
        """Returns the printed calls of a message."""
        calls: list[str] = []
        for tool_call in message.get("tool_calls", []):
            function = function_of(tool_call, index + 1)
            has_arguments = function["arguments"] is not None
            arguments = self._named_arguments(function, index + 1) if has_arguments else {}
            calls.append(print_call(function["name"], arguments))
        return calls

    def _check_reply(self, messages: Sequence[PlainMessage], index: int) -> None:
        """Raises RendererError if message `index` cannot be trained."""
        message, number = messages[index], index + 1
        cannot = f"Renderer `{self.name}` cannot train message {number}"
        if message.get("reasoning_content") and not self.thinks:
            raise no_place(self.name, "thinking", number)
        before = messages[index - 1]["role"] if index else ""
        if before == "assistant":
            raise RendererError(
                f"{cannot}, which follows another reply: the model's template prints it as the continuation "
                "of that reply. Join the two, or do not train it."
            )
        if before == "tool":
            if not message.get("reasoning_content") and self.thinks:
                raise RendererError(
                    f"{cannot}: behind tool results the model is prompted to think, and the message has no "
                    "thinking. Use renderer `gemma4`, or do not train the message."
                )
            asked = next(one for one in reversed(messages[:index]) if one["role"] != "tool")
            if _said(asked):
                raise RendererError(
                    f"{cannot}: the message with the call that it follows has text too, which the model's "
                    "template prints behind the results, where it closes the turn. Remove that text or give "
                    "it as thinking, or do not train the message."
                )
        spelled = str(self._encoder.unguard(_said(message)))
        if _CHANNEL in spelled or _END_CHANNEL in spelled:
            raise RendererError(
                f"{cannot}: the model's template would lose text around the {_CHANNEL} and {_END_CHANNEL} of "
                "its content. Give the thinking as `reasoning_content`."
            )
        for call in self._calls(message, index):
            read = read_call(call.removeprefix(CALL).removesuffix(END_CALL))
            if read is None or print_call(*read) != call:
                raise RendererError(
                    f"Renderer `{self.name}` cannot train a tool call of message {number}, which would not "
                    f"be read as the same call: {self._encoder.unguard(call)!r}. Give names and keys without "
                    "`{` and `:`, or remove the message."
                )

    # -- parsing ------------------------------------------------------------------------------

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, self._stops)
        malformed: Message = {"role": "assistant", "content": text}
        marked = marked_text(self.tokenizer, self._encoder, tokens, self._stops)
        if marked is None:
            return malformed, False
        thought, closing, said = marked.rpartition(_END_CHANNEL)
        if closing or marked.startswith(_THOUGHT):
            # Behind results the prompt has opened the channel.
            has_opening = thought.startswith(_THOUGHT)
            thought = thought.removeprefix(_THOUGHT).removesuffix("\n")
            if not (closing and (has_opening or self.thinks)):
                return malformed, False
        calls = [read_call(match["call"]) for match in _ONE_CALL.finditer(said)]
        content = _ONE_CALL.sub("", said)
        if None in calls or self._encoder.control.search(content + thought):
            return malformed, False
        message: Message = {"role": "assistant", "content": content}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in filter(None, calls)
            ]
        elif ended and tokens[-1] == self._stops[1]:
            return malformed, False
        parsed: Message = self._encoder.unguard(message)
        return parsed, ended


class Gemma4ThinkingRenderer(Gemma4Renderer):
    """Gemma 4 prompted to think, as its templates do with `enable_thinking=True`."""

    name = "gemma4_thinking"
    thinks = True
    # Behind results a reply begins inside the channel, so its first text is shown when its field is known.
    reply_sections = _sections(Section(None, ends={_END_CHANNEL: "said", CALL: "call"}))


class Gemma4PreserveThinkingRenderer(Gemma4ThinkingRenderer):
    """Gemma 4 prompted to think, with the thinking of all calls in its history (`preserve_thinking=True`)."""

    name = "gemma4_preserve_thinking"
    keeps_thinking = True


def _said(message: PlainMessage) -> str:
    return str(message.get("content", "")).strip()


def _is_user(message: PlainMessage) -> bool:
    return bool(message["role"] == "user")


def _name_of(result: PlainMessage, asked: PlainMessage) -> str:
    """Returns the name of the function that a result is from: that of the call with its id, if any has it."""
    named = [call for call in asked.get("tool_calls", []) if call.get("id") == result.get("tool_call_id")]
    if named:
        return str((named[-1].get("function") or named[-1])["name"])
    return str(result.get("name") or "unknown")


def _with_thinking_apart(message: Message) -> Message:
    """Returns a reply with the thought channel that its content begins with apart."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str) or any(message.get(key) is not None for key in THINKING_KEYS):
        return message
    found = _INLINE.fullmatch(content)
    if message.get("role") != "assistant" or found is None or _CHANNEL in found["thought"] + found["said"]:
        return message
    apart: Message = {**message, "content": found["said"]}
    return {**apart, "reasoning_content": found["thought"]} if found["thought"].strip() else apart
