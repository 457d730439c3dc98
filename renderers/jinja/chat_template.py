"""Renders with any tokenizer's own chat template, and finds the trained spans by comparing renderings.

A template does not declare which of its text the model wrote, so this is inferred from what it prints. Let
R(m) be the rendering of messages m, and P(m) the same with the generation prompt. Then:

- The text of message i begins where P(m[:i]) ends, which must be how R(m) begins.
- It ends with the end-of-turn token of R(m[:i+1]). If R(m[:i+1]) ends as a plain reply does, that is the same
  token. If not, exactly one of the control tokens at its end, which may be separated by white space, must be
  one that ends turns. What follows that token is printed by the template.
- If R(m) does not continue P(m[:i]) with the same text, the template rewrites its history.

The content of any other message is the text that changes when a sentinel replaces it. If these renderings
disagree, or the template does not print all of a reply, the conversation is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.base import Renderer
from renderers.encoder import ESCAPE, SENTINEL, Encoder, any_of
from renderers.formats.hermes_tools import with_call_sections, with_calls
from renderers.jinja.chat import Chat
from renderers.jinja.template import CALL, Template, stand_in_for
from renderers.messages import ROLES, Message, PlainMessage, Tool, map_strings
from renderers.rendering import CharSpan, Rendering
from renderers.streaming import PLAIN
from renderers.thinking import END_THINK, THINK, THINKING, THINKING_BEGUN, parse_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: PlainMessage = {"role": "user", "content": "x"}
_REPLY: PlainMessage = {"role": "assistant", "content": SENTINEL}
_ONLY_CONTENT = {"role", "content"}
_MOST_KEPT_KWARGS = 16
_JOINERS = "_-./\u2581 "
_TAG = re.compile(f"{THINK}|{END_THINK}")


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

    Tool calls in `<tool_call>` tags and thinking in `<think>` tags are parsed if the template prints them
    that way; calls in any other markup remain in the content as text.
    """

    name = "chat_template"
    roles = ROLES

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
        text = self._template.text
        prompt = text([_USER], prompt=True)
        self._after_last = text([_USER, _REPLY]).partition(SENTINEL)[2]
        after_earlier = text([_USER, _REPLY, _USER]).partition(SENTINEL)[2]
        frame = prompt + self._after_last + after_earlier
        used = self._template.all_text()
        self._encoder = Encoder(tokenizer, frame, template=used)
        self._length_of_end = self._end_after(self._after_last).end()
        stops = [self._end_after(self._after_last)[1], *self._end_of_a_tool_call()]
        self._ends = {*stops, self._end_after(after_earlier)[1]}
        self._encoder = Encoder(tokenizer, frame, self._ends, used)
        self._stops = {end: self._encoder.ids[end] for end in stops}
        self._end = re.compile(rf"\s*({any_of(self._ends).pattern})")
        controls = [control for control in self._encoder.ids if self._encoder.control.fullmatch(control)]
        self._part_of_control = any_of(sorted(set().union(*map(_marks_of, controls))))
        self.takes_tools = self._template.prints_tools()
        self._thinks = END_THINK in str(tokenizer.chat_template)
        self._thinks_in_prompt = self._thinks and prompt.rstrip("\n").endswith(THINK)
        self._parses_calls = self._prints_calls_as_hermes()
        sections = PLAIN if not self._thinks else THINKING_BEGUN if self._thinks_in_prompt else THINKING
        self.reply_sections = with_call_sections(sections) if self._parses_calls else sections

    def _end_after(self, text: str) -> re.Match[str]:
        """Returns the end-of-turn token at the start of `text`, which the template prints after a reply."""
        match = re.match(rf"\s*({self._encoder.control.pattern})", text)
        if match is None:
            raise RendererError(
                f"The chat template ends a reply with {text[:40]!r}, not with a special token of this "
                "tokenizer, so the model could not learn to stop. Use another template or renderer."
            )
        return match

    def _end_of_a_tool_call(self) -> list[str]:
        if not self._template.prints_calls:
            return []
        call = self._template.adapted(CALL)
        with suppress(RendererError):
            start = len(self._template.text([_USER], prompt=True))
            tail = self._tail(self._template.text([_USER, call]), start)
            return [tail[0][0]] if len(tail) == 1 else []
        return []

    def _prints_calls_as_hermes(self) -> bool:
        """Returns whether calls that this template prints can be parsed as Hermes calls."""
        calls: list[dict[str, Any]] = [
            {"type": "function", "function": {"name": name, "arguments": {"k": [name, 1]}}} for name in "fg"
        ]
        message: Message = {"role": "assistant", "content": "x", "tool_calls": calls}
        with suppress(RendererError):
            chat = Chat(self._template, [_USER, dict(message)], None)
            reply = self._reply(chat, 1, chat.prompt_before(1))
            return self._parse(reply.removesuffix(self._end_after(self._after_last)[0]), True) == (
                message,
                True,
            )
        return False

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> Renderer:
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

    def reads_key(self, role: str, key: str, value: Any) -> bool:
        return self._template.reads(role, key, value)

    # -- rendering ----------------------------------------------------------------------------

    def _with_calls_for_format(self, messages: list[PlainMessage]) -> list[PlainMessage]:
        """Returns the messages with JSON arguments as mappings if the template cannot print JSON."""
        if not self._template.prints_calls or self._template.prints_json_arguments:
            return messages
        adapted = list(messages)
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                calls = [self._with_mapping(call, index + 1) for call in message["tool_calls"]]
                adapted[index] = {**message, "tool_calls": calls}
        return adapted

    def _with_mapping(self, call: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Returns a call with JSON arguments parsed to a mapping."""
        function = call.get("function") or call
        if not isinstance(function.get("arguments"), str):
            return dict(call)
        parsed = {**function, "arguments": self._arguments(function, number)}
        return {**call, "function": parsed} if "function" in call else parsed

    def _chat(self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None) -> Chat:
        """Returns the messages as a chat: a prefix of the latest chat, if they are one."""
        found = self._latest.beginning(messages, tools) if self._latest else None
        if found is None:
            found = self._latest = Chat(self._template, messages, tools)
        return found

    def _render(
        self, messages: Sequence[PlainMessage], chosen: Collection[int], tools: Sequence[Tool] | None
    ) -> Rendering:
        chat = self._chat(messages, tools)
        text = self._checked_text(chat)
        cuts: list[int] = []
        spans: dict[int, CharSpan] = {}
        rewritten: list[int] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = chat.prompt_before(index)
                if prompt and text.startswith(prompt):
                    cuts.append(len(prompt))
                if index in chosen:
                    reply = self._reply(chat, index, prompt)
                    if text.startswith(f"{prompt}{reply}"):
                        spans[index] = CharSpan(cuts[-1], cuts[-1] + len(reply))
                    else:
                        rewritten.append(index)
            elif index in chosen:
                spans[index] = self._content_span(chat, index)
        return Rendering(text, cuts, spans, rewritten)

    def _render_prompt(
        self, messages: Sequence[PlainMessage], tools: Sequence[Tool] | None, role: str
    ) -> Rendering:
        if role != "assistant":
            raise self._refuse_role(role, ["assistant"])
        chat = self._chat(messages, tools)
        text = self._checked_text(chat, prompt=True)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [chat.prompt_before(index) for index in turns]
        return Rendering(text, cuts=[len(prompt) for prompt in prompts if prompt and text.startswith(prompt)])

    def _checked_text(self, chat: Chat, prompt: bool = False) -> str:
        """Returns the text of all messages.

        Raises RendererError for a message or call that is not printed, for escapes that are not printed like
        the text they stand for, and for a control token that is formed from parts that messages spell.
        """
        prints = self._template.prints
        for number, message in enumerate(chat.messages, 1):
            if not prints(message["role"]):
                supported = ", ".join(role for role in ROLES if self._template.prints(role))
                raise RendererError(
                    f"The chat template does not print messages of role `{message['role']}` "
                    f"(message {number}). Supported: {supported}."
                )
            if message.get("tool_calls") and not self._template.prints_calls:
                raise RendererError(
                    f"The chat template does not print tool calls (message {number}). Write them into the "
                    "content, as tools_in_system=True does, or use the renderer of a format that has them."
                )
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
        if chat.tools or any(
            message.keys() != _ONLY_CONTENT or marks.search(message["content"]) for message in chat.messages
        ):
            parted = chat.changed(self._parted)
            is_changed = (parted.messages, parted.tools) != (chat.messages, chat.tools)
            find = self._encoder.control.findall
            if is_changed and find(parted.text(len(chat.messages), prompt)) != find(text):
                raise RendererError(
                    "The chat template makes a control token of parts that a message spells. Remove them."
                )
        return text

    def _parted(self, value: Any) -> Any:
        """Returns the value with sentinels next to everything in it that may be part of a control token."""

        def part(string: str) -> str:
            apart, found = self._part_of_control.subn(rf"\g<0>{SENTINEL}", string)
            return f"{SENTINEL}{apart}{SENTINEL}" if found else string

        return map_strings(part, value)

    # -- spans --------------------------------------------------------------------------------

    def _reply(self, chat: Chat, index: int, prompt: str | None) -> str:
        """Returns the text that the model must write as message `index`, including its end-of-turn token."""
        if prompt is None:
            raise RendererError(
                f"The chat template renders no prompt before the assistant's message {index + 1}, so it "
                "cannot be trained. Begin with a user's message, or do not train this one."
            )
        whole = chat.text(index + 1)
        if not whole.startswith(prompt):
            raise RendererError(
                f"The chat template's generation prompt ends with {prompt[-40:]!r}, but that is not how the "
                f"template then renders message {index + 1}. A model trained on it would be sampled from "
                "other prompts. Use another template."
            )
        message, printed = chat.messages[index], whole[len(prompt) :]
        if message.keys() != _ONLY_CONTENT or message["content"].strip() not in printed:
            self._check_nothing_is_lost(chat, index, printed)
        if whole.endswith(self._after_last, len(prompt)):
            return whole[len(prompt) : len(whole) - len(self._after_last) + self._length_of_end]
        tail = self._tail(whole, len(prompt))
        known = [match for match in tail if match[0] in self._ends] if len(tail) > 1 else tail
        if len(known) != 1:
            found = "more than one" if known else "no"
            raise RendererError(
                f"The chat template ends message {index + 1} with {whole[-40:]!r}, which holds {found} "
                "end-of-turn token, so the model could not learn to stop."
            )
        return whole[len(prompt) : known[0].end()]

    def _check_nothing_is_lost(self, chat: Chat, index: int, printed: str) -> None:
        message = chat.messages[index]
        thought, content = message.get("reasoning_content", ""), message.get("content", "")
        lost = [
            key
            for key, parts in (("reasoning_content", [thought]), ("content", _TAG.split(content)))
            if not all(part.strip() in printed for part in parts)
        ]
        if not lost and (thought or message.get("tool_calls")):
            stand_in, sentinels = stand_in_for(message)
            text = chat.text_with(index, stand_in, index + 1)
            lost = [what for what, sentinel in sentinels.items() if sentinel not in text]
        if lost:
            remove = "Remove it (drop_thinking=True does so)" if "reasoning" in lost[0] else "Remove it"
            raise RendererError(
                f"The chat template does not print the `{lost[0]}` of message {index + 1} as it is. "
                f"{remove}, or do not train the message."
            )

    def _tail(self, text: str, start: int) -> list[re.Match[str]]:
        """Returns the control tokens, separated only by white space, that end the text from `start` on."""
        tail: list[re.Match[str]] = []
        end = len(text)
        for match in reversed(list(self._encoder.control.finditer(text, start))):
            if text[match.end() : end].strip():
                break
            tail.insert(0, match)
            end = match.start()
        return tail

    def _span_in_history(
        self,
        messages: Sequence[PlainMessage],
        rendering: Rendering,
        index: int,
        tools: Sequence[Tool] | None,
    ) -> CharSpan:
        chat = self._chat(messages, tools)
        prompt = chat.prompt_before(index) or ""
        span = self._around(chat, index, _REPLY)
        end = self._end.match(rendering.text, span.end)
        if end is None or len(prompt) > span.start or not rendering.text.startswith(prompt):
            raise RendererError(
                f"The chat template rewrites message {index + 1} once other messages follow it. "
                "Use build_supervised_examples, which trains every turn as the model meets it."
            )
        return CharSpan(len(prompt), end.end())

    def _content_span(self, chat: Chat, index: int) -> CharSpan:
        span = self._around(chat, index, {**chat.messages[index], "content": SENTINEL})
        end = self._end.match(chat.text(len(chat.messages)), span.end)
        return CharSpan(span.start, end.end() if end else span.end)

    def _around(self, chat: Chat, index: int, stand_in: PlainMessage) -> CharSpan:
        """Returns the span of text that changes when `stand_in`, which has a sentinel, replaces a message."""
        text = chat.text(len(chat.messages))
        changed = chat.text_with(index, stand_in, len(chat.messages))
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

    # -- sampling -----------------------------------------------------------------------------

    def get_stop_sequences(self) -> list[int]:
        return list(self._stops.values())

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = self._decode(tokens, self._stops.values())
        message, well_formed = self._parse(text, self._parses_calls)
        return (message, ended) if well_formed else ({"role": "assistant", "content": text}, False)

    def _parse(self, text: str, parses_calls: bool) -> tuple[Message, bool]:
        message: Message = {"role": "assistant", "content": text}
        closed = well_formed = True
        if self._thinks:
            message, closed = parse_thinking(text, self._thinks_in_prompt)
        if parses_calls:
            message, well_formed = with_calls(message)
        return message, closed and well_formed


def _marks_of(control: str) -> set[str]:
    """Returns the characters of a control token that are unusual in words, or its start if it has none."""
    marks = {character for character in control if not character.isalnum() and character not in _JOINERS}
    return marks or {control[:2]}
