"""Kimi K2, K2 Thinking, K2.5 and K2.6, as their published chat templates print them.

- A call is printed with its id, `functions.NAME:NUMBER`, which alone has the name of the function, and a
  result with the id of its call. The calls of a conversation are numbered from 0. K2.5 and K2.6 print ids of
  this form as they are given. Any other id would teach the model calls without a name, so it is replaced with
  the call's number, as K2 does with every id.
- K2 Thinking, K2.5 and K2.6 drop the thinking of the replies up to the last one that calls no tool
  (`kimi_k26_preserve_thinking` drops none). The reply that is to be written keeps its own, although their
  templates, which render complete conversations only, print a block without text for a last reply, too.
- White space around thinking is printed as it is.
- K2.5's own tokenizer code gives its template the tools in TypeScript. The tools here are those that the
  template prints by itself, as JSON.

`kimi_k2` is the format of Kimi-K2-Instruct. tinker-cookbook's kimi_k2 is that of Kimi-K2-Thinking, which is
`kimi_k2_thinking` here; its template is known from llama.cpp's collection and from tinker-cookbook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.formats.marked_calls import (
    MarkedCallsRenderer,
    exact_thought_and_said,
    parse_exact_thinking,
    text_and_calls,
    thought_text_and_calls,
)
from renderers.formats.tagged_calls import print_as_json, read_object
from renderers.messages import Message, PlainMessage, Tool, function_of
from renderers.rendering import Draft, Rendering
from renderers.thinking import END_THINK, THINK
from renderers.unsupported import no_place

_SYSTEM, _USER, _ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
_MIDDLE, _END = "<|im_middle|>", "<|im_end|>"
_CALLS, _END_CALLS = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_HEADERS = {"system": _SYSTEM, "user": _USER, "tool": _SYSTEM}
_DEFAULT_SYSTEM = f"{_SYSTEM}system{_MIDDLE}You are Kimi, an AI assistant created by Moonshot AI.{_END}"
_ID = re.compile(r"functions\.(?P<name>.+):\d+", re.DOTALL)


class _Ids(NamedTuple):
    """The ids that are printed, by the position of the message."""

    calls: dict[int, list[str]]
    results: dict[int, str]


class _KimiRenderer(MarkedCallsRenderer):
    frame = (
        _SYSTEM + _USER + _ASSISTANT + _MIDDLE + _END + _CALLS + _END_CALLS + _CALL + _ARGUMENTS + _END_CALL
    )
    end_of_turn = _END
    calls_mark = _CALLS
    takes_tools = True

    default_system: ClassVar[str] = ""
    """What is printed before a conversation that does not begin with a system message."""
    keeps_ids: ClassVar[bool] = False
    """Whether ids of calls in the format's own form are printed as they are given."""
    json_separators: ClassVar[tuple[str, str]] = (", ", ": ")
    """The separators in the JSON of the tools."""

    def reads_key(self, role: str, key: str, value: Any) -> bool:
        return key == "name" and role in _HEADERS

    # -- rendering ----------------------------------------------------------------------------

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        trained = {index for index in chosen if messages[index]["role"] == "assistant"}
        for index in trained:
            self._check_reply(messages[index], index + 1)
        num_seen = len(messages) - (messages[-1]["role"] == "assistant")
        draft = self._draft(messages, tools, num_seen)
        return self._finish(draft, messages, tools, self._rewritten(messages, trained, num_seen))

    def _num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        before, after = (
            _last_answer(one, len(one) - (one[-1]["role"] == "assistant")) for one in (few, more)
        )
        return min(len(few) - 1, len(few) if before == after else before + 1)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        draft = self._draft(messages, tools, len(messages))
        draft.put(f"{_USER}user{_MIDDLE}" if role == "user" else self._header)
        return draft.finish()

    @property
    def _header(self) -> str:
        """The prompt for a reply."""
        return f"{_ASSISTANT}assistant{_MIDDLE}"

    def _draft(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, num_seen: int) -> Draft:
        """Returns a draft of the messages, of which the model sees the first `num_seen` as its history."""
        draft = self._latest_draft(messages, tools)
        if draft is None:
            draft = Draft()
            if tools:
                described = json.dumps(tools, ensure_ascii=False, separators=self.json_separators)
                draft.put(f"{_SYSTEM}tool_declare{_MIDDLE}{described}{_END}")
            if messages[0]["role"] != "system":
                draft.put(self.default_system)
        ids = self._ids(messages)
        last = _last_answer(messages, num_seen)
        for index, message in draft.rest_of(messages):
            role = message["role"]
            if role == "assistant":
                draft.put(self._header)
                calls = _print_calls(message, index + 1, ids.calls.get(index, []))
                draft.put_reply(index, self._text(message, is_history=index <= last) + calls + _END)
                continue
            draft.put(f"{_HEADERS[role]}{message.get('name') or role}{_MIDDLE}")
            if role == "tool":
                draft.put(f"## Return of {ids.results[index]}\n")
            draft.put_text(index, message["content"] + _END)
        return draft

    def _text(self, message: PlainMessage, is_history: bool) -> str:
        """Returns the text of a reply before its calls, as the model writes it or as it is in the history."""
        return str(message.get("content", ""))

    def _rewritten(
        self, messages: Sequence[PlainMessage], trained: Collection[int], num_seen: int
    ) -> list[int]:
        """Returns the trained replies before which, or in which, a history of `num_seen` drops thinking."""
        return []

    def _ids(self, messages: Sequence[PlainMessage]) -> _Ids:
        ids = _Ids({}, {})
        printed: dict[str, str] = {}
        waiting: list[str] = []
        number = 0
        for index, message in enumerate(messages):
            for call in message.get("tool_calls", []):
                name, given = function_of(call, index + 1)["name"], call.get("id")
                id_ = f"functions.{name}:{number}"
                found = _ID.fullmatch(given) if self.keeps_ids and isinstance(given, str) else None
                if found and found["name"] == name:
                    id_ = given
                elif self.keeps_ids and given:
                    notes.count("call", "had an id of another form, replaced with functions.NAME:NUMBER")
                number += 1
                ids.calls.setdefault(index, []).append(id_)
                waiting.append(id_)
                printed[str(given)] = id_
            if message["role"] == "tool":
                given = message.get("tool_call_id")
                answered = printed.get(given, given) if self.keeps_ids and given else None
                if answered is None:
                    unknown = f"functions.{message.get('name', 'unknown')}:{number}"
                    answered = waiting[0] if waiting else unknown
                if answered in waiting:
                    waiting.remove(answered)
                ids.results[index] = answered
        return ids

    def _check_reply(self, message: PlainMessage, number: int) -> None:
        """Raises RendererError if a reply cannot be trained."""
        calls = message.get("tool_calls", [])
        names = [f"functions.{function_of(call, number)['name']}:0" for call in calls]
        printed = _print_calls(message, number, names)
        if calls and self._parse_calls(printed.removeprefix(_CALLS)) is None:
            raise RendererError(
                f"Renderer `{self.name}` cannot train the tool calls of message {number}: their arguments "
                "are no JSON object. Give a mapping, or do not train the message."
            )

    # -- parsing ------------------------------------------------------------------------------

    def _parse_calls(self, marked: str) -> list[dict[str, Any]] | None:
        body, _, behind = marked.partition(_END_CALLS)
        before, *parts = body.split(_CALL)
        if before.strip() or behind.strip() or not parts or _END_CALLS not in marked:
            return None
        calls: list[dict[str, Any]] = []
        for part in parts:
            id_, is_call, rest = part.partition(_ARGUMENTS)
            arguments, has_end, between = rest.partition(_END_CALL)
            if not (is_call and has_end) or between.strip() or self._encoder.control.search(id_ + arguments):
                return None
            id_, arguments = self._encoder.unguard((id_.strip(), arguments))
            name = _ID.fullmatch(id_)
            parsed = read_object(arguments)
            if name is None or parsed is None:
                return None
            calls.append(
                {"id": id_, "type": "function", "function": {"name": name["name"], "arguments": parsed}}
            )
        return calls


class KimiK2Renderer(_KimiRenderer):
    """Kimi-K2-Instruct, which does not think: thinking in a trained message is refused."""

    name = "kimi_k2"
    default_system = f"{_DEFAULT_SYSTEM}\n"
    reply_sections = text_and_calls(_CALLS)

    def _check_reply(self, message: PlainMessage, number: int) -> None:
        if message.get("reasoning_content"):
            raise no_place(self.name, "thinking", number)
        super()._check_reply(message, number)


class KimiK2ThinkingRenderer(_KimiRenderer):
    """Kimi-K2-Thinking. A reply's content may contain its thinking in `<think>` tags."""

    name = "kimi_k2_thinking"
    default_system = _DEFAULT_SYSTEM
    opening: ClassVar[str] = ""
    """What of the think block is in the prompt for a reply."""
    keeps_thinking: ClassVar[bool] = False
    """Whether the history keeps all thinking."""
    reply_sections = thought_text_and_calls(_CALLS, begun=False)

    @property
    def _header(self) -> str:
        return super()._header + self.opening

    def _text(self, message: PlainMessage, is_history: bool) -> str:
        thought, said = exact_thought_and_said(message)
        thought = "" if is_history and not self.keeps_thinking else thought
        return f"{THINK}{thought}{END_THINK}{said}".removeprefix(self.opening)

    def _rewritten(
        self, messages: Sequence[PlainMessage], trained: Collection[int], num_seen: int
    ) -> list[int]:
        if self.keeps_thinking:
            return []
        rewritten: list[int] = []
        loses_thinking = False  # between the answer before a reply and the end of the reply
        first = _last_answer(messages, min(trained, default=0)) + 1
        for index in range(first, _last_answer(messages, num_seen) + 1):
            loses_thinking = loses_thinking or bool(exact_thought_and_said(messages[index])[0])
            if loses_thinking and index in trained:
                rewritten.append(index)
            if messages[index]["role"] == "assistant" and not messages[index].get("tool_calls"):
                loses_thinking = False
        return rewritten

    def _check_reply(self, message: PlainMessage, number: int) -> None:
        thought, _ = exact_thought_and_said(message)
        if THINK in thought or END_THINK in thought:
            raise RendererError(f"The thinking of message {number} holds a think tag of its own. Remove it.")
        super()._check_reply(message, number)

    def _parse_said(self, text: str) -> tuple[Message, bool]:
        return parse_exact_thinking(text.removeprefix(self.opening), begun=bool(self.opening))


class KimiK25Renderer(KimiK2ThinkingRenderer):
    """Kimi K2.5, whose prompt opens the think block."""

    name = "kimi_k25"
    default_system = ""
    opening = THINK
    keeps_ids = True
    json_separators = (",", ":")
    reply_sections = thought_text_and_calls(_CALLS, begun=True)


class KimiK25DisableThinkingRenderer(KimiK25Renderer):
    """Kimi K2.5 prompted not to think: its template with `thinking=False`. Trained thinking is refused."""

    name = "kimi_k25_disable_thinking"
    opening = THINK + END_THINK
    reply_sections = text_and_calls(_CALLS)

    def _text(self, message: PlainMessage, is_history: bool) -> str:
        return exact_thought_and_said(message)[1]

    def _rewritten(
        self, messages: Sequence[PlainMessage], trained: Collection[int], num_seen: int
    ) -> list[int]:
        return []

    def _check_reply(self, message: PlainMessage, number: int) -> None:
        if exact_thought_and_said(message)[0]:
            raise no_place(self.name, "thinking", number)
        super()._check_reply(message, number)

    def _parse_said(self, text: str) -> tuple[Message, bool]:
        return parse_exact_thinking(END_THINK + text, begun=True)


class KimiK26Renderer(KimiK25Renderer):
    """Kimi K2.6, whose format is K2.5's."""

    name = "kimi_k26"


class KimiK26DisableThinkingRenderer(KimiK25DisableThinkingRenderer):
    """Kimi K2.6 prompted not to think."""

    name = "kimi_k26_disable_thinking"


class KimiK26PreserveThinkingRenderer(KimiK25Renderer):
    """Kimi K2.6 with all thinking in its history: its template with `preserve_thinking=True`."""

    name = "kimi_k26_preserve_thinking"
    keeps_thinking = True


def _last_answer(messages: Sequence[PlainMessage], num: int) -> int:
    """Returns the last reply without tool calls among the first `num` messages; -1 if there is none."""
    answers = (
        index
        for index in range(num - 1, -1, -1)
        if messages[index]["role"] == "assistant" and not messages[index].get("tool_calls")
    )
    return next(answers, -1)


def _print_calls(message: PlainMessage, number: int, ids: Sequence[str]) -> str:
    """Returns the calls of a message as they follow its text; "" if there are none."""
    printed: list[str] = []
    for call, id_ in zip(message.get("tool_calls", []), ids, strict=True):
        arguments = function_of(call, number)["arguments"]
        printed.append(f"{_CALL}{id_}{_ARGUMENTS}{print_as_json(arguments)}{_END_CALL}")
    return f"{_CALLS}{''.join(printed)}{_END_CALLS}" if printed else ""
