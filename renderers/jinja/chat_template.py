"""Renders with any tokenizer's own chat template, and finds the trained spans by comparing renderings.

A template does not declare which of its text the model wrote, so this is inferred from what it prints. Let
R(m) be the rendering of messages m, and P(m) the same with the generation prompt. Then:

- The text of message i begins where P(m[:i]) ends, which must be how R(m) begins.
- It ends with the last of the tokens that end a turn (`turn_ends.py`) in R(m[:i+1]), behind which is what the
  template prints by itself. Some templates print it only in front of another message; then it is added.
- P and R may need values for variables of the template, to be of the same mode (`replies.py`).
- If R(m) does not continue P(m[:i]) with the same text, the template rewrites its history.

The content of any other message is the text that changes when a sentinel replaces it. If these renderings
disagree, or the template does not print all of a reply, the conversation is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.base import Renderer
from renderers.encoder import ESCAPE, SENTINEL, Encoder, any_of
from renderers.formats.hermes_tools import with_call_sections, with_calls
from renderers.jinja.call_forms import PrintedCalls
from renderers.jinja.chat import Chat
from renderers.jinja.modes import note_prompt
from renderers.jinja.printed_calls import find
from renderers.jinja.replies import Replies, ReplyTurn
from renderers.jinja.template import Template, call_with_id
from renderers.jinja.turn_ends import REPLY, USER, call_endings, control_at_start, plain_ending
from renderers.messages import ROLES, THINKING_KEYS, Message, PlainMessage, Tool, map_strings
from renderers.rendering import CharSpan, Rendering
from renderers.streaming import PLAIN, START, Section, Sections, with_section_behind_content
from renderers.thinking import inline, parse_thinking, tags_in, thinking_sections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONLY_CONTENT = {"role", "content"}
_MOST_KEPT_KWARGS = 16
_JOINERS = "_-./\u2581 "


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's chat template, token for token as `apply_chat_template` does.

    There are some exceptions:

    - A control token that a message spells is encoded as text.
    - If a token would span the end of a generation prompt and the start of the reply (as when a reply begins
      with a newline), the two are encoded separately, as they are when sampling.
    - A template that asks for the date always gets `renderers.jinja.today.TODAY`.
    - If a template refuses arguments of a tool call that are not a string, they are passed as JSON. If it
      cannot print JSON, they are passed as a mapping. If it refuses a reply without content, the content is
      empty.

    Thinking in tags is parsed, and so are tool calls in the forms of `printed_calls`, which are found by
    trying the template. Calls in any other form remain in the content as text.
    """

    name = "chat_template"
    roles = ROLES
    prompted_roles = ("assistant",)

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """`template_kwargs` are values for variables of the template, such as `enable_thinking`."""
        if not tokenizer.chat_template:
            raise RendererError("This tokenizer has no chat template. Use a renderer such as `role_colon`.")
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._template = Template(tokenizer, self.template_kwargs)
        self._with_kwargs: dict[str, ChatTemplateRenderer] = {}
        self._latest: Chat | None = None
        self._find_ends()
        controls = [control for control in self._encoder.ids if self._encoder.control.fullmatch(control)]
        self._part_of_control = any_of(sorted(set().union(*map(_marks_of, controls))))
        self.takes_tools = self._template.prints_tools()
        self._thinks = self._replies.known_tags
        prompt = self._template.trial([self._template.adapted(USER)], prompt=True)
        self._thinks_in_prompt = bool(self._thinks and prompt.rstrip("\n").endswith(self._thinks[0]))
        self._begun = self._replies.before_content
        self._parses_calls, self._calls = self._prints_calls_as_hermes(), None
        sections = thinking_sections(self._thinks, self._thinks_in_prompt) if self._thinks else PLAIN
        if self._thinks and self._thinks[0] in sections[START].begins:  # GLM-4.5 begins with a new line
            start = sections[START]
            begins = {**start.begins, f"\n{self._thinks[0]}": start.begins[self._thinks[0]]}
            sections = {**sections, START: dataclasses.replace(start, begins=begins)}
        sections = _with_beginning(sections, self._begun) if self._begun else sections
        if self._parses_calls:
            sections = with_call_sections(sections)
        elif self._template.prints_calls and (calls := find(self._printed_reply)) is not None:
            with_calls = _with_calls(sections, calls, self._begun)
            self._calls, sections = (calls, with_calls) if with_calls else (None, sections)
        if self._before_stop:
            sections = with_section_behind_content(sections, "ended", [self._before_stop])
        self.reply_sections = sections

    def _find_ends(self) -> None:
        """Finds the tokens that end turns, by trying the template. Then its control tokens are known."""
        text, eos = self._template.trial, self.tokenizer.eos_token
        user, reply = self._template.adapted(USER), self._template.adapted(REPLY)
        prompt = text([user], prompt=True)
        behind_last = text([user, reply]).partition(SENTINEL)[2]
        behind_earlier = text([user, reply, user]).partition(SENTINEL)[2]
        frame, used = prompt + behind_last + behind_earlier, self._template.all_text()
        # Special tokens that a reply may spell, because it may hold its thinking.
        spoken = tags_in(self._template.source) or ()
        encoder = Encoder(self.tokenizer, frame, template=used, spoken=spoken)
        plain = plain_ending(behind_last, behind_earlier, encoder, eos)
        calls = call_endings(self._template, encoder, eos)
        earlier = control_at_start(behind_earlier, encoder)
        printed = {*encoder.control.findall(plain.written)} if not plain.is_appended else set()
        printed |= {call.stop for call in calls if not call.is_appended}
        printed |= {earlier["stop"]} if earlier is not None and not plain.is_appended else set()
        ends = {*printed, plain.stop, *(call.stop for call in calls)}
        self._encoder = Encoder(self.tokenizer, frame, ends, used, spoken)
        self._replies = Replies(self._template, self._encoder, plain, calls, ends)
        self._plain, self._ends = plain, ends
        self._kept_in_replies = re.compile(f"{self._encoder.spoken.pattern}|{any_of(spoken).pattern}")
        self._before_stop = plain.written.removesuffix(plain.stop)
        self._end = re.compile(rf"\s*({re.escape(plain.written.lstrip())}|{any_of(ends).pattern})")
        self._end_of_others = re.compile(rf"\s*({any_of(printed).pattern})")
        self._stops = {stop: self._encoder.ids[stop] for stop in self._replies.stops}

    def _prints_calls_as_hermes(self) -> bool:
        """Returns whether calls that this template prints can be parsed as Hermes calls."""
        calls: list[dict[str, Any]] = [
            {"type": "function", "function": {"name": name, "arguments": {"k": [name, 1]}}} for name in "fg"
        ]
        message: Message = {"role": "assistant", "content": "x", "tool_calls": calls}
        with suppress(RendererError):
            said = self._replies.trial_turn(dict(message)).said
            return self._parse(said.removesuffix(self._plain.written), True) == (message, True)
        return False

    def _printed_reply(self, text: str, calls: Sequence[Mapping[str, Any]]) -> str | None:
        """Returns what the template prints for a reply, without thought and end; None if it raises."""
        message: Any = {"role": "assistant", "content": text, "tool_calls": calls}
        with suppress(RendererError):
            messages: list[Any] = [*self._template.opening, USER, message]
            prepared = self._prepare(messages, None)
            said = self._replies.trial_turn(prepared.messages[-1]).said
            stop = next((stop for stop in self._stops if said.endswith(stop)), "")
            said = said.removesuffix(stop).removesuffix(self._before_stop)
            return str(self._parse(said, False)[0]["content"])
        return None

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> ChatTemplateRenderer:
        if not template_kwargs:
            return self
        for name in sorted(set(template_kwargs) - self._template.variables_read):
            notes.count("row", "chat_template_kwargs that the chat template does not read", name)
        kwargs = {**self.template_kwargs, **template_kwargs}
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._with_kwargs:
            if len(self._with_kwargs) >= _MOST_KEPT_KWARGS:
                self._with_kwargs.clear()
            self._with_kwargs[key] = ChatTemplateRenderer(self.tokenizer, kwargs)
        renderer = self._with_kwargs[key]
        renderer.system_prompt, renderer.tools_in_system = self.system_prompt, self.tools_in_system
        return renderer

    def unread_template_kwargs(self) -> list[str]:
        return sorted(self.template_kwargs.keys() - self._template.variables_read)

    def template_kwargs_of(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> Mapping[str, Any]:
        prepared = self._prepare(messages, tools)
        chat = self._chat(prepared.messages, prepared.tools)
        return dict(self._replies.turn(chat, len(prepared.messages) - 1).prompted_by.chosen)

    def reads_key(self, role: str, key: str, value: Any) -> bool:
        is_inline = role == "assistant" and key in THINKING_KEYS and self._replies.tags_if_inline is not None
        return is_inline or self._template.reads(role, key, value)

    # -- rendering ----------------------------------------------------------------------------

    def _adapted_to_format(self, messages: list[PlainMessage]) -> list[PlainMessage]:
        """Returns the messages with thinking, arguments and ids of calls in the form the template prints."""
        messages = [self._with_inline_thinking(message) for message in messages]
        if self._template.prints_calls_by_id:
            messages = _with_ids(messages)
        if not self._template.prints_calls or self._template.prints_json_arguments:
            return messages
        adapted = list(messages)
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                calls = [self._with_mapping(call, index + 1) for call in message["tool_calls"]]
                adapted[index] = {**message, "tool_calls": calls}
        return adapted

    def _with_inline_thinking(self, message: PlainMessage) -> PlainMessage:
        """Returns a reply with its thinking in its text, under a template that has it only there."""
        thought = message.get("reasoning_content")
        tags = self._replies.tags_if_inline if thought and message["role"] == "assistant" else None
        if not tags or not isinstance(message.get("content", ""), str):
            return message
        notes.count(
            "message",
            f"got thinking between {tags[0]} and {tags[1]} in the text: the chat template has no key",
        )
        rest = {key: value for key, value in message.items() if key not in THINKING_KEYS}
        return {**rest, "content": inline(str(thought), message.get("content", ""), tags)}

    def _with_mapping(self, call: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Returns a call with JSON arguments parsed to a mapping."""
        function = call.get("function") or call
        if not isinstance(function.get("arguments"), str):
            return dict(call)
        parsed = {**function, "arguments": self._arguments(function, number)}
        return {**call, "function": parsed} if "function" in call else parsed

    def _chat(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Chat:
        """Returns the messages as a chat: a prefix of the latest chat, if they are one."""
        latest = self._latest
        if (
            latest is None
            or tools is not latest.given_tools
            or len(messages) > len(latest.given)
            or not all(map(is_, messages, latest.given))
        ):
            latest = self._latest = Chat(self._template, messages, tools)
        return latest.beginning(len(messages))

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        chat = self._chat(messages, tools)
        self._check_is_printed(chat)
        chat.text(len(messages))  # an error of the template is the first to be raised
        turns: dict[int, ReplyTurn] = {}
        for index in sorted(chosen):
            if messages[index]["role"] == "assistant":
                is_new = index not in chat.turns
                turns[index] = self._replies.turn(chat, index)
                if is_new:
                    note_prompt(turns[index].prompted_by, self._replies.has_variables)
                    if turns[index].finding:
                        notes.count("turn", turns[index].finding)
        last = turns[max(turns)] if turns else None
        mode = last.printed_by if last else self._template
        text = self._checked_text(chat.under(mode))
        if last and len(messages) - 1 in turns:
            if not text.startswith(last.prompt):
                before = self._chat(messages[:-1], tools).under(last.prompted_by)
                self._checked_text(before, prompt=True)
            text = last.prompt + last.said + last.behind
        # A prompt ends with a border between tokens, and where the prompts for earlier replies end depends on
        # the mode that the model is sampled in. The borders are those of the last trained reply's mode. A
        # reply of another mode, whose borders differ in front of it, needs a sequence of its own.
        usual = last.prompted_by if last else self._template
        known = {
            index: turn.prompt
            for index, turn in turns.items()
            if turn is last or turn.prompted_by is usual is self._template
        }
        borders = {usual: {i: len(prompt) for i, prompt in known.items() if text.startswith(prompt)}}
        if any(one["role"] == "assistant" and index not in known for index, one in enumerate(messages)):
            borders[usual] = self._borders(messages, tools, text, usual, known)
        spans: dict[int, CharSpan] = {}
        rewritten: list[int] = []
        for index in sorted(chosen):
            turn = turns.get(index)
            if turn is None:
                spans[index] = self._content_span(chat.under(mode), index)
                continue
            if turn.prompted_by not in borders:
                borders[turn.prompted_by] = self._borders(messages, tools, text, turn.prompted_by)
            shown, sampled = borders[usual], borders[turn.prompted_by]
            start = len(turn.prompt)
            if (
                shown.get(index) == start
                and text.startswith(f"{turn.prompt}{turn.said}")
                and (shown is sampled or all(shown.get(i) == sampled.get(i) for i in range(index)))
            ):
                spans[index] = CharSpan(start, start + len(turn.said))
            else:
                rewritten.append(index)
        return Rendering(text, sorted(borders[usual].values()), spans, rewritten)

    def _borders(
        self,
        messages: Sequence[PlainMessage],
        tools: Sequence[Tool] | None,
        text: str,
        mode: Template,
        known: Mapping[int, str] = MappingProxyType({}),
    ) -> dict[int, int]:
        """Returns where the prompts for replies, as this mode prints them, end in the text, by message.

        A reply that cannot be trained has the template's usual prompt. `known` are some of the prompts.
        """
        sampled = self.with_template_kwargs(mode.chosen)
        chat = sampled._chat(messages, tools)
        borders = chat.borders  # those of the text before, of which most are the same
        borders.go_back(len(messages), text)
        for index in range(len(borders.lengths), len(messages)):
            prompt = known.get(index)
            if prompt is None and messages[index]["role"] == "assistant":
                try:
                    prompt = sampled._replies.turn(chat, index).prompt
                except RendererError:
                    prompt = chat.prompt_before(index)
            borders.lengths.append(max([len(prompt or ""), *borders.lengths[-1:]]))
            if prompt and text.startswith(prompt):
                borders.ends[index] = len(prompt)
        found = dict(borders.ends)
        borders.go_back(min(known, default=len(messages)))
        return found

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        chat = self._chat(messages, tools)
        self._check_is_printed(chat)
        text = self._checked_text(chat, prompt=True) + self._replies.missing_header(chat, len(messages))
        return Rendering(text, list(self._borders(messages, tools, text, self._template).values()))

    def _check_is_printed(self, chat: Chat) -> None:
        """Raises RendererError for a message or a tool call that the template does not print."""
        prints = self._template.prints
        if "printed" in chat.known:
            return
        for number, message in enumerate(chat.messages, 1):
            if not prints(message["role"]):
                supported = ", ".join(role for role in ROLES if prints(role))
                raise RendererError(
                    f"The chat template does not print messages of role `{message['role']}` "
                    f"(message {number}). Supported: {supported}."
                )
            if message.get("tool_calls") and not self._template.prints_calls:
                why = f" ({self._template.refusal_of_calls})" if self._template.refusal_of_calls else ""
                raise RendererError(
                    f"The chat template does not print tool calls (message {number}){why}. Write them in the "
                    "content, as tools_in_system=True does, or use the renderer of a format that has them."
                )
        if (
            chat.tools
            and self._template.needs_system_for_tools
            and all(message["role"] != "system" for message in chat.messages)
        ):
            raise RendererError(
                f"The chat template prints tools only behind a system message ({len(chat.tools)} given). "
                "Add a system message, or remove the tools."
            )
        if chat.is_whole:
            chat.known.add("printed")

    def _checked_text(self, chat: Chat, prompt: bool = False) -> str:
        """Returns the text of all messages.

        Raises RendererError for escapes that are not printed like the text they stand for, and for a control
        token that is formed from parts that messages spell.
        """
        text = chat.text(len(chat.messages), prompt)
        unguarded = chat.changed(self._encoder.unguard) if ESCAPE in text else chat
        if unguarded is not chat and self._encoder.unguard(text) != unguarded.text(
            len(chat.messages), prompt
        ):
            raise RendererError(
                "A message spells control tokens that the chat template itself looks for. Remove them."
            )
        # A template may join parts of messages, or a part and its own text, to a control token.
        marks = self._part_of_control
        has_parts = chat.tools or (
            "no parts of control tokens" not in chat.known
            and any(
                message.keys() != _ONLY_CONTENT
                or not isinstance(message["content"], str)
                or marks.search(message["content"])
                for message in chat.messages
            )
        )
        if chat.is_whole and not has_parts:
            chat.known.add("no parts of control tokens")
        if has_parts:
            parted = chat.changed(self._parted)
            is_changed = (parted.messages, parted.tools) != (chat.messages, chat.tools)
            find = self._encoder.control.findall
            if is_changed and find(parted.text(len(chat.messages), prompt)) != find(text):
                raise RendererError(
                    "The chat template makes a control token of parts that a message spells. Remove them."
                )
        return text

    def _parted(self, value: Any) -> Any:
        """Returns the value with sentinels next to everything in it that may be part of a control token.

        A reply keeps the control tokens that it may spell.
        """

        def part(string: str) -> str:
            apart, found = self._part_of_control.subn(rf"\g<0>{SENTINEL}", string)
            return f"{SENTINEL}{apart}{SENTINEL}" if found else string

        def part_reply(string: str) -> str:
            kept = self._kept_in_replies.finditer(string)
            edges = [0, *(edge for match in kept for edge in match.span()), len(string)]
            pieces = [string[start:end] for start, end in pairwise(edges)]
            return "".join(piece if odd % 2 else part(piece) for odd, piece in enumerate(pieces))

        is_reply = isinstance(value, dict) and value.get("role") == "assistant"
        return map_strings(part_reply if is_reply else part, value)

    # -- spans --------------------------------------------------------------------------------

    def _span_in_history(
        self,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        index: int,
        tools: Sequence[Tool] | None,
    ) -> CharSpan:
        chat = self._chat(messages, tools)
        modes = (self._template, *self._replies.modes)
        shown = next(
            (mode for mode in modes if chat.under(mode).text(len(messages)) == rendering.text), modes[0]
        )
        span = self._around(chat.under(shown), index, REPLY)
        end = self._end.match(rendering.text, span.end)
        prompts = [chat.under(mode).prompt_before(index) for mode in (shown, *modes)]
        prompt = next((one for one in prompts if one and rendering.text.startswith(one)), None)
        if end is None or prompt is None or len(prompt) > span.start:
            raise RendererError(
                f"The chat template rewrites message {index + 1} once other messages follow it. "
                "Use build_supervised_examples, which trains every turn as the model meets it."
            )
        return CharSpan(len(prompt), end.end())

    def _content_span(self, chat: Chat, index: int) -> CharSpan:
        span = self._around(chat, index, {**chat.given[index], "content": SENTINEL})
        end = self._end_of_others.match(chat.text(len(chat.messages)), span.end)
        return CharSpan(span.start, end.end() if end else span.end)

    def _around(self, chat: Chat, index: int, stand_in: PlainMessage) -> CharSpan:
        """Returns the span of text that changes when `stand_in`, which has a sentinel, replaces a message."""
        text = chat.text(len(chat.messages))
        changed = chat.text_with(index, self._template.adapted(stand_in), len(chat.messages))
        before, _, after = changed.partition(SENTINEL)
        start, end = len(before), len(text) - len(after)
        if changed.count(SENTINEL) == 1 and text.startswith(before) and text.endswith(after) and start <= end:
            return CharSpan(start, end)
        raise RendererError(
            f"The chat template does not print the text of message "
            f"{index + 1} in one piece, so it cannot be distinguished from the rest. "
            "Train on assistant messages, with build_supervised_examples."
        )

    @cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        return tuple({*super()._end_tokens, *self._ends})

    def _completed(self, completion: str) -> str:
        written = self._plain.written.strip()
        ends = [match.end() for match in self._encoder.control.finditer(written)][:-1]
        begun = next((end for end in reversed(ends) if completion.rstrip().endswith(written[:end])), None)
        if begun is None or completion.rstrip().endswith(written):
            return super()._completed(completion)
        return completion.rstrip() + written[begun:]

    @cached_property
    def _end_of_turn(self) -> str:
        return self._plain.written

    # -- sampling -----------------------------------------------------------------------------

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops.values())

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, self._stops.values())
        text = text.removesuffix(self._before_stop)
        message, well_formed = self._parse(text, self._parses_calls)
        if self._calls is not None and well_formed:
            message, well_formed = self._with_printed_calls(message, self._calls, tokens)
        return (message, ended) if well_formed else ({"role": "assistant", "content": text}, False)

    def _parse(self, text: str, parses_calls: bool) -> tuple[Message, bool]:
        text = text if self._thinks_in_prompt else text.removeprefix(self._begun)
        message: Message = {"role": "assistant", "content": text}
        closed = well_formed = True
        if self._thinks:
            text = text[1:] if text.startswith(f"\n{self._thinks[0]}") else text
            message, closed = parse_thinking(text, self._thinks_in_prompt, self._thinks)
            if self._begun.strip() and message["content"] != text:
                message = {**message, "content": str(message["content"]).removeprefix(self._begun)}
        if parses_calls:
            message, well_formed = with_calls(message)
        return message, closed and well_formed

    def _with_printed_calls(
        self, message: Message, calls: PrintedCalls, tokens: Sequence[int]
    ) -> tuple[Message, bool]:
        """Returns a message with the calls in its content, and whether they are well-formed.

        Text that spells the control tokens of calls holds none.
        """
        given = {*tokens}

        def controls_of(*markups: str) -> set[int]:
            found = (self._encoder.control.findall(markup) for markup in markups)
            return {self._encoder.ids[control] for controls in found for control in controls}

        if not any(controls_of(markup) <= given for markup in (*calls.marks, *calls.markups)):
            return message, True
        found = calls.parse(str(message["content"]))
        if found is None:  # tags around a text may hold something else than calls
            begun = controls_of(*calls.marks)
            return message, not begun or not begun <= given or bool(calls.before)
        return {**message, "content": found[0], "tool_calls": found[1]}, True


def _with_calls(sections: Sections, calls: PrintedCalls, begun: str) -> Sections | None:
    """Returns the sections with those of calls, or None if a stream could not tell calls from text."""
    start = sections[START]
    if not calls.alone.first.strip():  # a reply of calls begins with no mark
        if start.field != "content":
            return None
        opening = calls.alone.opening
        if opening:
            sections = {
                **sections,
                START: dataclasses.replace(start, begins={**start.begins, opening: "calls"}),
            }
        elif begun.strip():  # one that is text has another beginning
            sections = {**sections, START: dataclasses.replace(start, field=None)}
        else:
            return None
    elif start.field == "content" and calls.alone.first not in calls.marks:  # gpt-oss
        begins = {**start.begins, calls.alone.first: "calls"}
        sections = {**sections, START: dataclasses.replace(start, begins=begins)}
    if calls.before:
        sections = _with_beginning(sections, calls.before)
    return with_section_behind_content(sections, "calls", calls.marks, rstrip=calls.spaces)


def _with_beginning(sections: Sections, begun: str) -> Sections:
    """Returns the sections with what the model writes in front of a reply's text, which is not shown."""
    changed = dict(sections)
    if sections[START].field == "content":
        changed["text"] = sections[START]
        changed[START] = dataclasses.replace(
            sections[START], begins={**sections[START].begins, begun: "text"}
        )
    if "said" in sections and begun.strip():
        changed["replied"] = Section("content")
        changed["said"] = dataclasses.replace(sections["said"], begins={begun: "replied"})
    return changed


def _with_ids(messages: list[PlainMessage]) -> list[PlainMessage]:
    """Returns the messages with ids that name the called functions, numbered through the conversation."""
    changed: dict[Any, str] = {}
    number = 0
    adapted: list[PlainMessage] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            calls.append(call_with_id(call, number))
            if calls[-1] is not call:
                changed[call.get("id")] = calls[-1]["id"]
            number += 1
        if calls:
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and message.get("tool_call_id") in changed:
            message = {**message, "tool_call_id": changed[message.get("tool_call_id")]}
        adapted.append(message)
    if changed:
        what = "got an id with the function's name, since the chat template prints calls by their ids"
        notes.count("tool call", what, number=len(changed))
    return adapted


def _marks_of(control: str) -> set[str]:
    """Returns the characters of a control token that are unusual in words, or its start if it has none."""
    marks = {character for character in control if not character.isalnum() and character not in _JOINERS}
    return marks or {control[:2]}
