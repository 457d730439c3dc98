"""Finds what the model must write as each reply of a conversation, and the prompt that it is sampled with.

A reply begins where its prompt ends, so the prompt must be how the template prints the conversation. Where it
is not, because the prompt opens another mode than the conversation shows (thinking or not), these are tried
in order:

1. the conversation in another mode of the template, after the usual prompt;
2. the usual prompt, if all that it has in addition is an empty thought, which templates print before a reply
   only in the prompt: it is part of the prompt;
3. the usual prompt, if the template prints the messages before the reply in another way only than in the
   conversation: what it prints behind them is the same, or has an empty thought in addition;
4. prompt and conversation in another mode, also as in 2 and 3;
5. the usual prompt, if it opens a thought that the conversation does not show: the model must close it, and
   write its thinking first if the template prints none (there prompts of other modes are tried too);
6. a prompt, of any mode, that the conversation begins with but for white space;
7. for an empty reply that the template does not print, what it prints for one with text, without the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from cookbook.errors import RendererError
from renderers.encoder import SENTINEL, Encoder
from renderers.jinja.chat import Chat
from renderers.jinja.modes import modes_of, own_variables
from renderers.jinja.template import CALL, Template, stand_in_for
from renderers.jinja.turn_ends import REPLY, USER, Ending
from renderers.messages import PlainMessage
from renderers.thinking import END_THINK, THINK, USUAL, Tags, tags_in

_ONLY_CONTENT = {"role", "content"}
_THOUGHT, _BEFORE = f"{SENTINEL}0;", f"{SENTINEL}2;"
_CHANNEL = re.compile("[a-z_]*")
"""The name of a channel behind a control token."""
_MARK = r"[<\[\u25c1][^\s<>\[\]\u25c1\u25b7]+[>\]\u25b7]"
"""A tag: `<think>`, `[THINK]`, or one of Kimi-VL's in triangles."""
_EMPTY_THOUGHTS = (
    re.compile(rf"(?P<opening>{_MARK})\s*\w*\s*(?P<closing>{_MARK})\s*\Z"),
    re.compile(rf"(?P<opening>)(?P<closing>{END_THINK})\s*\Z"),
)
_ONLY_IN_PROMPT = "followed an empty thought that only the prompt has"
_CLOSED = "closed a thought that the prompt opens, as they had no thinking"


class ReplyTurn(NamedTuple):
    """A reply as it is trained."""

    prompt: str
    said: str
    """What the model must write, including the end of its turn."""
    behind: str
    """What the template prints behind that if the reply is the last message."""
    printed_by: Template
    prompted_by: Template
    finding: str = ""
    """What a note says about the reply, if the template does not print it like this."""


class _OtherPromptError(RendererError):
    """The template does not print the conversation as it begins the prompt."""


class Replies:
    """Finds the turns of conversations under one template."""

    def __init__(
        self, template: Template, encoder: Encoder, plain: Ending, calls: Sequence[Ending], ends: set[str]
    ) -> None:
        """`ends` are all tokens that end turns, also those that are no stop tokens."""
        self._template = template
        self._encoder = encoder
        self._plain = plain
        self._calls = calls
        self._ends = ends
        self.stops = dict.fromkeys([plain.stop, *(call.stop for call in calls)])

    @cached_property
    def modes(self) -> list[Template]:
        """The other modes of the template."""
        return modes_of(self._template)

    @cached_property
    def _tags(self) -> tuple[str, str]:
        """The tags around a thought: those of `<think>`, or of another tag that the prompt ends with.

        The template must know the tag that closes the other one, which has a slash (EXAONE Deep's
        `<thought>`), and must not know `</think>`. Else they are those of `known_tags`.
        """
        source = self._template.source
        prompt = self._template.trial([self._template.adapted(USER)], prompt=True)
        last = re.search(rf"(?P<first>{_MARK})\s*\Z", prompt)
        opening = last["first"] if last else ""
        closing = f"{opening[:1]}/{opening[1:]}"
        return (
            (opening, closing)
            if opening and END_THINK not in source and closing in source
            else self.known_tags or USUAL
        )

    @cached_property
    def known_tags(self) -> Tags | None:
        """The tags around a thought that the template knows, or the tokenizer, as tokens of its own."""
        named = tags_in(self._template.source) or tags_in("\n".join(self._encoder.ids))
        return named or self._printed_tags() or (USUAL if self._opening_modes(THINK) else None)

    def _opening_modes(self, opening: str) -> list[Template]:
        """Returns the modes whose prompt ends with the tag that opens a thought."""
        found = []
        for mode in (self._template, *self.modes):
            with suppress(RendererError):
                if mode.trial([mode.adapted(USER)], prompt=True).rstrip().endswith(opening):
                    found.append(mode)
        return found

    def _printed_tags(self) -> Tags | None:
        """Returns the tags between which the template prints a thought, whatever their names.

        They are control tokens, with a word behind them if they begin a channel (Gemma 4), and the opening
        one is the first behind the prompt.
        """
        for mode, before, between in self._around_thought():
            found = [*self._encoder.control.finditer(before)]
            closed = self._encoder.control.match(between.lstrip())
            if not found or not closed or self._ends.intersection((found[-1][0], closed[0])):
                continue
            opening = before[found[-1].start() :].rstrip("\n")
            closing = closed[0] + _CHANNEL.match(between.lstrip()[closed.end() :])[0]  # type: ignore[index]
            headers = [_squeezed(header) for header in (self._header, _header_of(mode)) if header.strip()]
            is_first = any(_squeezed(before).endswith(header + _squeezed(opening)) for header in headers)
            is_tag = _CHANNEL.fullmatch(opening.removeprefix(found[-1][0]).rstrip(" "))
            if is_first and is_tag and opening != closing:
                return opening, closing
        return None

    def _around_thought(
        self, further: Mapping[str, Any] = MappingProxyType({})
    ) -> Iterator[tuple[Template, str, str]]:
        """Yields what each mode prints before a thought and between it and the reply's text.

        The reply has the `further` keys.
        """
        content = f"{SENTINEL}1;"
        message = {"role": "assistant", "content": content, "reasoning_content": _THOUGHT, **further}
        for mode in (self._template, *self.modes):
            with suppress(RendererError):
                text = mode.trial([mode.adapted(USER), mode.adapted(message)])
                before, thought, behind = text.partition(_THOUGHT)
                between, said, _ = behind.partition(content)
                if thought and said:
                    yield mode, before, between

    @cached_property
    def tags_if_inline(self) -> Tags | None:
        """The tags between which a reply has its thinking in its text; None if it has a key, or no tags.

        In no mode may the template print `reasoning_content` (SmolLM3, Phi-4-reasoning, Llama-Nemotron). If a
        prompt opens a thought, which the reply continues, the template must not know the tag that closes it:
        then it prints the text of a reply as it is (Cogito).
        """
        if self.known_tags is None or not self._template.prints("assistant"):
            return None
        if self._tags[1] in self._template.source and self._opening_modes(self._tags[0]):
            return None
        reply = {**REPLY, "content": "x", "reasoning_content": _THOUGHT}
        user = self._template.adapted(USER)
        for mode in (self._template, *self.modes):
            for message in (reply, {**reply, "tool_calls": CALL["tool_calls"]}):  # Kimi K2 Thinking
                with suppress(RendererError):
                    if _THOUGHT in mode.trial([user, mode.adapted(message)]):
                        return None
        return self._tags

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._tags)))

    @cached_property
    def has_variables(self) -> bool:
        """Whether the template reads variables of its own, which may give it other modes."""
        return bool(own_variables(self._template))

    @cached_property
    def _header(self) -> str:
        """What the prompt for a reply adds to a user's message."""
        return _header_of(self._template)

    def missing_header(self, chat: Chat, num_messages: int) -> str:
        """Returns the header of a second reply in a row, if the template prints it but not in the prompt."""
        if chat.messages[num_messages - 1]["role"] != "assistant" or not self._header:
            return ""
        said = chat.text(num_messages)
        if chat.text(num_messages, prompt=True) != said:
            return ""
        followed = chat.text_with(num_messages, self._template.adapted(REPLY), num_messages + 1)
        return self._header if followed.startswith(said + self._header) else ""

    def turn(self, chat: Chat, index: int) -> ReplyTurn:
        """Returns message `index`, a reply, as it is trained.

        Raises RendererError for a reply that the template prints no prompt or no end for, or not all of.
        """
        found = chat.turns.get(index)
        if found is None:
            errors: list[RendererError] = []
            for attempt in self._attempts(chat, index):
                try:
                    found = attempt()
                    break
                except RendererError as error:
                    errors.append(error)
            else:
                others = (error for error in errors if not isinstance(error, _OtherPromptError))
                found = next(others, errors[0])
            chat.turns[index] = found
        if isinstance(found, RendererError):
            raise found
        return found

    def _attempts(self, chat: Chat, index: int) -> Iterator[Callable[[], ReplyTurn]]:
        """Yields the ways to print a reply, in the order in which they are tried."""
        if index == 0:
            raise _no_prompt(index)
        usual = self._template
        if self._tags[1] in chat.given[index].get("content", "") and self.tags_if_inline:
            for mode in self._opening_modes(self._tags[0]):
                yield partial(self._printed, chat, index, mode, mode)
        yield partial(self._printed, chat, index, usual, usual)
        for mode in self.modes:
            yield partial(self._printed, chat, index, mode, usual)
        thinks_not = self._has_no_thought(chat.given[index])
        if thinks_not:
            yield partial(self._behind_empty_thought, chat, index, usual)
        yield partial(self._behind_own_prompt, chat, index, usual)
        for mode in self.modes:
            yield partial(self._printed, chat, index, mode, mode)
            if thinks_not:
                yield partial(self._behind_empty_thought, chat, index, mode)
            yield partial(self._behind_own_prompt, chat, index, mode)
        if thinks_not or chat.given[index].get("reasoning_content"):
            yield partial(self._begun_thought, chat, index)
        for mode in (usual, *self.modes):
            yield partial(self._but_for_spaces, chat, index, mode)
        for opens, mode in product((True, False), (usual, *self.modes)):
            if opens or self._tags[1] in usual.source:
                yield partial(self._stripped_thought, chat, index, mode, opens)
        if thinks_not and not (
            chat.given[index].get("content", "").strip() or "tool_calls" in chat.given[index]
        ):
            yield partial(self._empty, chat, index)
        if chat.given[index].get("reasoning_content") and not chat.given[index].get("tool_calls"):
            yield partial(self._filled_thought, chat, index)

    def _has_no_thought(self, message: PlainMessage) -> bool:
        """Returns whether a reply has no thinking; tags that the template does not know are its text."""
        closing = self._tags[1]
        is_inline = closing in message.get("content", "") and closing in self._template.source
        return not message.get("reasoning_content") and not is_inline

    def _opens_thought(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self._tags[0])

    # -- the ways to print a reply ------------------------------------------------------------

    def _printed(self, chat: Chat, index: int, mode: Template, prompt_mode: Template) -> ReplyTurn:
        """Returns the reply as the template prints it in this mode."""
        prompt = self._prompt(chat.under(prompt_mode), index)
        whole = chat.under(mode).text(index + 1)
        is_closed = not self._opens_thought(prompt) or self._tags[1] in whole[len(prompt) :]
        if not whole.startswith(prompt) or (not is_closed and self._has_no_thought(chat.given[index])):
            raise self._other_prompt(chat, index, prompt)
        return self._made(chat, index, prompt, whole, (mode, prompt_mode, ""))

    def _behind_empty_thought(self, chat: Chat, index: int, mode: Template) -> ReplyTurn:
        """Returns the reply behind a prompt with an empty thought that the conversation does not show."""
        prompt = self._prompt(chat.under(mode), index)
        for printed_by, before, after in self._with_thought(chat, index, mode):
            closing = self._closing
            if closing and after.startswith(closing) and _squeezed(before + closing) == _squeezed(prompt):
                whole = prompt + after.removeprefix(closing)
                return self._made(chat, index, prompt, whole, (printed_by, mode, _ONLY_IN_PROMPT))
        raise self._other_prompt(chat, index, prompt)

    def _behind_own_prompt(self, chat: Chat, index: int, mode: Template) -> ReplyTurn:
        """Returns the reply behind a prompt that prints the messages before it in its own way.

        Mistral's templates print the system message only in front of a last user's message, so in the prompt
        and never in a conversation that ends with the reply. What the prompt has behind the message before
        the reply must be what the conversation has there, but for an empty thought.
        """
        prompt = self._prompt(chat.under(mode), index)
        header, printed = self._behind_previous(chat.under(mode), index)
        finding = "followed messages that the template prints like this only in a prompt"
        is_closed = not self._opens_thought(header) or self._tags[1] in printed[len(header) :]
        if not is_closed and self._has_no_thought(chat.given[index]):
            raise self._other_prompt(chat, index, prompt)
        if not printed.startswith(header):
            begun = self._before_empty_thought(chat.given[index], header, printed)
            if begun is not None:
                header, finding = begun, _ONLY_IN_PROMPT
            elif self._header and header.endswith(self._header) and self._is_framed(printed):
                header = printed.partition(self._header)[0] + self._header
            elif self._is_continued(header, printed):
                header = header.removesuffix(self._header)
                finding = "followed a header that the template prints there only in a prompt"
            else:
                raise self._other_prompt(chat, index, prompt)
        return self._made(chat, index, prompt, prompt + printed[len(header) :], (mode, mode, finding))

    def _before_empty_thought(self, message: PlainMessage, header: str, printed: str) -> str | None:
        """Returns how the conversation begins a reply for which the prompt has an empty thought.

        That is a pair of tags, or `</think>`. None if the prompt ends in another way.
        """
        for empty in filter(None, (pattern.search(header) for pattern in _EMPTY_THOUGHTS)):
            begun = header[: empty.start()]
            tags = (empty["opening"] or THINK, empty["closing"])
            if (
                tags[0] != tags[1]
                and all(tag in (THINK, END_THINK) or self._encoder.control.fullmatch(tag) for tag in tags)
                and self._has_no_thought(message)
                and printed.startswith(begun)
                and not printed.startswith(tags[0], len(begun))
            ):
                closed = begun + empty["closing"]  # DeepSeek V3.2 prints it behind a tool's result
                return closed if printed.startswith(closed) else begun
        return None

    def _is_framed(self, printed: str) -> bool:
        """Returns whether only control tokens precede a header: Bielik's template loses that of a result."""
        before, header, _ = printed.partition(self._header)
        return bool(header) and not self._encoder.control.sub("", before).strip()

    def _is_continued(self, header: str, printed: str) -> bool:
        """Returns whether the conversation continues a turn for which the prompt opens another one.

        Apertus' template prints the results of tools inside the turn of the reply that called them.
        """
        begun, opened = header.removesuffix(self._header), self._encoder.control.match(self._header)
        return (
            opened is not None
            and header.endswith(self._header)
            and printed.startswith(begun)
            and not printed.startswith(opened[0], len(begun))
        )

    def _behind_previous(self, chat: Chat, index: int) -> tuple[str, str]:
        """Returns what the template prints behind the message before a reply: in the prompt, and with it."""
        stand_in = self._template.adapted({**chat.given[index - 1], "content": _BEFORE})
        prompted = chat.text_with(index - 1, stand_in, index, prompt=True)
        printed = chat.text_with(index - 1, stand_in, index + 1)
        header = prompted.rpartition(_BEFORE)[2] + self.missing_header(chat, index)
        if (
            _BEFORE not in prompted
            or _BEFORE not in printed
            or not self._prompt(chat, index).endswith(header)
        ):
            raise self._other_prompt(chat, index, prompted)
        return header, printed.rpartition(_BEFORE)[2]

    def _but_for_spaces(self, chat: Chat, index: int, mode: Template) -> ReplyTurn:
        """Returns the reply behind a prompt that the conversation begins with but for white space."""
        prompt, whole = self._prompt(chat.under(mode), index), chat.under(mode).text(index + 1)
        begun = re.match(r"\s*".join(map(re.escape, _squeezed(prompt))), whole.lstrip())
        if begun is None:
            raise self._other_prompt(chat, index, prompt)
        rest = whole.lstrip()[begun.end() :]
        rest = rest.removeprefix(prompt[len(prompt.rstrip()) :])
        if self._opens_thought(prompt) and self._tags[1] not in rest:
            raise self._other_prompt(chat, index, prompt)
        finding = "followed white space that the template prints like this only in a prompt"
        return self._made(chat, index, prompt, prompt + rest, (mode, mode, finding))

    def _begun_thought(self, chat: Chat, index: int) -> ReplyTurn:
        """Returns the reply for a prompt that opens a thought, or begins it with words, in every mode.

        A reply without thinking closes it. The words are those of Apriel's prompts.
        """
        prompt = self._prompt(chat, index)
        thought = chat.given[index].get("reasoning_content", "")
        for printed_by, before, after in self._with_thought(chat, index, self._template):
            spaces, words = before.removeprefix(prompt), prompt.removeprefix(before)
            is_opened = before.startswith(prompt) and not spaces.strip()
            is_begun = prompt.startswith(before) and not (
                self._encoder.control.search(words) or self._tag.search(words)
            )
            if is_opened or is_begun:
                finding = "" if thought else _CLOSED
                whole = prompt + (spaces if is_opened else "") + thought + after
                return self._made(chat, index, prompt, whole, (printed_by, self._template, finding))
        raise self._other_prompt(chat, index, prompt)

    def _stripped_thought(self, chat: Chat, index: int, mode: Template, opens: bool) -> ReplyTurn:
        """Returns the reply with its thinking under a template that prints none, and whose prompt `opens` it.

        The templates of DeepSeek R1's distilled models open `<think>` in the prompt and print only what
        follows `</think>` in a conversation. The model writes the thinking and closes it. That of
        Llama-Nemotron Super removes it too, but its prompt opens none: the model writes both tags.
        """
        prompt, message = self._prompt(chat.under(mode), index), chat.given[index]
        header, printed = self._behind_previous(chat.under(mode), index)
        opening, closing = self._tags
        begun = header if printed.startswith(header) else header[: header.rfind(opening)] if opens else header
        begun = begun if printed.startswith(begun) else begun.rstrip()
        content = printed[len(begun) :].removeprefix(closing)  # DeepSeek V3.1 prints the end of a thought
        thought, is_inline, text = message.get("content", "").rpartition(closing)
        may_think = self._opens_thought(header) if opens else is_inline and not self._tag.search(header)
        if not (may_think and printed.startswith(begun)) or self._tag.search(content):
            raise self._other_prompt(chat, index, prompt)
        spaces = text[: len(text) - len(text.lstrip())]
        if is_inline:
            thought = thought.lstrip()
            thought = thought.removeprefix(opening).lstrip("\n") if opens else thought
        else:
            thought, spaces = f"{message.get('reasoning_content', '')}\n", "\n\n"
        said = f"{thought}{closing}{'' if is_inline and content.startswith(spaces) else spaces}{content}"
        finding = "kept the thinking that the chat template removes" if thought.strip() else _CLOSED
        without_thought = {**message, "reasoning_content": ""}
        return self._made(chat, index, prompt, prompt + said, (mode, mode, finding), without_thought)

    def _filled_thought(self, chat: Chat, index: int) -> ReplyTurn:
        """Returns the reply with its thinking in the empty thought that the template prints in front of it.

        The template of Kimi K2 Thinking prints thinking of replies with calls alone.
        """
        without = {key: value for key, value in chat.given[index].items() if key != "reasoning_content"}
        turn = self.turn(Chat(self._template, [*chat.given[:index], without], chat.given_tools), index)
        opening, closing = self._thought_beside_calls
        if not opening or not turn.said.startswith(opening + closing):
            raise self._other_prompt(chat, index, turn.prompt)
        said = opening + chat.given[index]["reasoning_content"] + turn.said.removeprefix(opening)
        return turn._replace(
            said=said, finding="kept the thinking that the chat template prints beside calls"
        )

    @cached_property
    def _thought_beside_calls(self) -> tuple[str, str]:
        """What the template prints around the thinking of a reply with calls; empty if it prints none."""
        prompt = self._template.trial([self._template.adapted(USER)], prompt=True)
        found = next(self._around_thought({"tool_calls": CALL["tool_calls"]}), None)
        if found is None or not found[1].startswith(prompt):
            return "", ""
        return found[1].removeprefix(prompt), found[2]

    def _empty(self, chat: Chat, index: int) -> ReplyTurn:
        """Returns an empty reply as a reply with text is printed, without the text.

        It ends the turn at once, or behind the end of a thought that the prompt opens.
        """
        turn = self.turn(Chat(self._template, [*chat.given[:index], REPLY], chat.given_tools), index)
        return turn._replace(
            said=turn.said.replace(SENTINEL, ""), finding=turn.finding or "had no text, and only ended"
        )

    def _with_thought(self, chat: Chat, index: int, mode: Template) -> Iterator[tuple[Template, str, str]]:
        """Yields what the template prints before and after a thought that the reply is given, by mode."""
        thoughtful = {**chat.given[index], "reasoning_content": _THOUGHT}
        for printed_by in dict.fromkeys((mode, self._template, *self.modes)):
            try:
                text = chat.under(printed_by).text_with(index, printed_by.adapted(thoughtful), index + 1)
            except RendererError:
                continue
            if text.count(_THOUGHT) == 1:
                before, _, after = text.partition(_THOUGHT)
                yield printed_by, before, after

    @cached_property
    def _closing(self) -> str:
        """What the template prints between the thinking and the text of a reply; empty if it prints none."""
        return next((between for _, _, between in self._around_thought()), "")

    def trial_turn(self, message: PlainMessage) -> ReplyTurn:
        """Returns the reply as the only one of a conversation."""
        messages = [*self._template.opening, USER, message]
        return self.turn(Chat(self._template, messages, None), len(messages) - 1)

    @cached_property
    def before_content(self) -> str:
        """What the model must write in front of the text of a reply without thinking, behind any thought.

        A template may print a channel there (`<|START_RESPONSE|>`), or white space that its prompt does not
        end with (`Assistant:`).
        """
        with suppress(RendererError):
            turn = self.trial_turn(REPLY)
            before = turn.said.partition(SENTINEL)[0]
            thought, closing, behind = before.rpartition(self.known_tags[1] if self.known_tags else SENTINEL)
            is_thought = closing and (thought.strip() or self._opens_thought(turn.prompt))
            return behind.lstrip("\n") if is_thought else before
        return ""

    # -- the parts of a turn --------------------------------------------------------------------

    def _prompt(self, chat: Chat, index: int) -> str:
        prompt = chat.prompt_before(index)
        if prompt is None:
            raise _no_prompt(index)
        return prompt + self.missing_header(chat, index)

    def _other_prompt(self, chat: Chat, index: int, prompt: str) -> _OtherPromptError:
        tried = "".join(f", nor with {mode.setting}" for mode in self.modes)
        return _OtherPromptError(
            f"The chat template's generation prompt ends with {prompt[-40:]!r}, but that is not how the "
            f"template then renders message {index + 1}{tried}. A model trained on it would be sampled from "
            "other prompts. Give the reply's thinking if the prompt opens it, or use another template."
        )

    def _made(
        self,
        chat: Chat,
        index: int,
        prompt: str,
        whole: str,
        how: tuple[Template, Template, str],
        message: PlainMessage | None = None,
    ) -> ReplyTurn:
        """Returns the turn of a reply whose text follows the prompt in `whole`; `how` has its last fields.

        Raises RendererError if text of the reply, or of `message` in its place, is missing, and for a text
        without one end.
        """
        message, start = message or chat.given[index], len(prompt)
        if message.keys() != _ONLY_CONTENT or message["content"].strip() not in whole[start:]:
            self._check_nothing_is_lost(chat.under(how[0]), index, whole[start:], message)
        calls = bool(chat.messages[index].get("tool_calls"))
        endings = [*self._calls, self._plain] if calls else [self._plain, *self._calls]
        for ending in sorted(endings, key=lambda ending: ending.is_appended) if calls else endings:
            if whole.endswith(ending.printed, start):
                said = whole[start : len(whole) - len(ending.printed)] + ending.written
                behind = "" if ending.is_appended else ending.printed.removeprefix(ending.written)
                break
        else:
            tail = self._tail(whole, start)
            known = [match for match in tail if match[0] in self._ends]
            if len(known) != 1:
                found = "more than one" if known else "no"
                raise RendererError(
                    f"The chat template ends message {index + 1} with {whole[-40:]!r}, which holds {found} "
                    "end-of-turn token, so the model could not learn to stop."
                )
            said, behind = whole[start : known[0].end()], whole[known[0].end() :]
        tokens = self._encoder.control.findall(said)
        inside = [token for token in tokens[:-1] if token in self.stops]
        if inside:
            raise RendererError(
                f"The chat template prints {inside[0]!r} inside message {index + 1}. This token also ends "
                "turns, so sampling would stop there. Split the message, or do not train it."
            )
        return ReplyTurn(prompt, said, behind, *how)

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

    def _check_nothing_is_lost(self, chat: Chat, index: int, printed: str, message: PlainMessage) -> None:
        """Raises RendererError if text of `message`, in place of message `index`, is not printed."""
        thought, content = message.get("reasoning_content", ""), message.get("content", "")
        lost = [
            key
            for key, parts in (("reasoning_content", [thought]), ("content", self._tag.split(content)))
            if not all(part.strip() in printed for part in parts)
        ]
        if not lost and (thought or message.get("tool_calls")):
            stand_in, sentinels = stand_in_for(message)
            text = chat.text_with(index, self._template.adapted(stand_in), index + 1)
            lost = [what for what, sentinel in sentinels.items() if sentinel not in text]
        if lost:
            remove = "Remove it (drop_thinking=True does so)" if "reasoning" in lost[0] else "Remove it"
            raise RendererError(
                f"The chat template does not print the `{lost[0]}` of message {index + 1} as it is. "
                f"{remove}, or do not train the message."
            )


def _no_prompt(index: int) -> RendererError:
    return RendererError(
        f"The chat template renders no prompt before the assistant's message {index + 1}, so it "
        "cannot be trained. Begin with a user's message, or do not train this one."
    )


def _header_of(template: Template) -> str:
    """Returns what the prompt for a reply adds to a user's message."""
    user = template.adapted(USER)
    prompt, said = template.trial([user], prompt=True), template.trial([user])
    return prompt.removeprefix(said) if prompt.startswith(said) else ""


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
