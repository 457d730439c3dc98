"""Parses a reply while it is sampled, and returns each piece of text once its field is certain.

A format declares its reply as named sections and the markers between them. Only text that may still turn out
to be markup is held back: part of a marker, white space that is dropped at the end of a section, and part of
a character. At the end token the complete reply is parsed, and the rest of its text is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from renderers.encoder import ESCAPE, Encoder, any_of
from renderers.messages import Message

Field: TypeAlias = Literal["content", "reasoning_content"]

START = "start"
"""The name of the section that a reply begins with."""

_HALF = "\ufffd"  # decoded from bytes that are not yet a complete character
_MAX_PENDING = 16  # tokens without a complete character; a character has at most 4 bytes
_CONTEXT = 8  # tokens decoded again after a run of bytes that are not characters


class Delta(NamedTuple):
    """New text of a field of the reply."""

    field: Field
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A stretch of a reply.

    A control token in a marker matches only the token: text that spells it is text.
    """

    field: Field | None
    """The field of its text; None for text that is not shown (markup, a tool call, or text whose field only
    the complete reply shows)."""
    ends: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The name of the next section, by the marker that ends this one."""
    begins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The same for markers that count only at the start of the section, behind what `lstrip` drops there."""
    lstrip: str = ""
    """Characters that are dropped at the start of the section."""
    rstrip: str = ""
    """Characters that are dropped at the end of the section."""


Sections: TypeAlias = Mapping[str, Section]

PLAIN: Sections = {START: Section("content")}
"""The sections of a reply that is only content."""


def with_section_behind_content(
    sections: Sections, name: str, markers: Iterable[str], **changes: Any
) -> Sections:
    """Returns these sections with one more, whose text is not shown, which the markers end the content for.

    `changes` are made to the sections of the content.
    """
    ends = dict.fromkeys(markers, name)
    changed = {
        key: dataclasses.replace(section, ends={**section.ends, **ends}, **changes)
        if section.field == "content"
        else section
        for key, section in sections.items()
    }
    return {**changed, name: Section(None)}


class ResponseStream:
    """Parses one reply from its tokens, which are fed in pieces of any size.

    The deltas of a field of a well-formed reply concatenate to the text of that field. For a truncated or
    malformed reply they may differ from the message that `finish` returns.
    """

    def __init__(
        self,
        sections: Sections,
        encoder: Encoder,
        end_tokens: Collection[int],
        decode: Callable[[Sequence[int]], str],
        parse: Callable[[Sequence[int]], tuple[Message, bool]],
    ) -> None:
        """`decode` decodes a part of the reply; `parse` parses all of it, up to one of `end_tokens`."""
        self._end_tokens = end_tokens
        self._parse = parse
        self._tokens: list[int] = []
        self._ended = False
        self._characters = _Characters(decode)
        self._marks = _control_tokens(sections, encoder)
        self._reader = _Reader(_with_marks(sections, self._marks.values()))
        self._shown: dict[Field, list[str]] = {"reasoning_content": [], "content": []}

    def feed(self, tokens: Iterable[int]) -> list[Delta]:
        """Returns the deltas that the new tokens add to the reply, in time proportional to their number."""
        text: list[str] = []
        rest: list[Delta] = []
        for token in tokens:
            self._tokens.append(token)
            if self._ended:
                continue
            if token in self._end_tokens:
                self._ended = True
                rest = self._show(self._reader.feed("".join(text)))
                text = []
                rest += self._show(self._unshown())
            else:
                text.append(self._text(token))
        return _joined([*rest, *self._show(self._reader.feed("".join(text)))])

    def finish(self) -> tuple[Message, bool]:
        """Returns the message in all tokens so far, as `parse_response` does."""
        return self._parse(self._tokens)

    def _text(self, token: int) -> str:
        text = self._characters.feed(token)
        if (mark := self._marks.get(token)) is None:
            return text
        return text.removesuffix(mark.spelling) + mark.stand_in

    def _show(self, deltas: Iterable[Delta]) -> list[Delta]:
        shown = [self._spelled(delta) for delta in deltas if delta.text]
        for delta in shown:
            self._shown[delta.field].append(delta.text)
        return shown

    def _spelled(self, delta: Delta) -> Delta:
        """Returns the delta with control tokens spelled out that are not markers at their place."""
        if ESCAPE not in delta.text:
            return delta
        text = delta.text
        for mark in self._marks.values():
            text = text.replace(mark.stand_in, mark.spelling)
        return Delta(delta.field, text)

    def _unshown(self) -> Iterator[Delta]:
        message, well_formed = self.finish()
        for name, pieces in self._shown.items():
            whole, shown = str(message.get(name) or ""), "".join(pieces)
            if well_formed and whole.startswith(shown):
                yield Delta(name, whole[len(shown) :])


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    joined: list[Delta] = []
    for delta in deltas:
        if joined and joined[-1].field == delta.field:
            joined[-1] = Delta(delta.field, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined


class _Mark(NamedTuple):
    """A control token that occurs in markers, and its placeholder in the text that is parsed."""

    spelling: str
    stand_in: str


def _control_tokens(sections: Sections, encoder: Encoder) -> dict[int, _Mark]:
    """Returns the control tokens in the markers of the sections, by id."""
    markers = "\n".join(
        marker for section in sections.values() for marker in (*section.ends, *section.begins)
    )
    spellings = {match[0] for match in encoder.control.finditer(markers)}
    return {encoder.ids[text]: _Mark(text, f"{ESCAPE}{encoder.ids[text]};") for text in spellings}


def _with_marks(sections: Sections, marks: Iterable[_Mark]) -> Sections:
    def marked(markers: Mapping[str, str]) -> dict[str, str]:
        changed = dict(markers)
        for mark in marks:
            changed = {marker.replace(*mark): name for marker, name in changed.items()}
        return changed

    return {
        name: dataclasses.replace(section, ends=marked(section.ends), begins=marked(section.begins))
        for name, section in sections.items()
    }


class _Characters:
    """Decodes tokens one by one to complete characters.

    Some decoders drop the space before a text. New tokens are therefore decoded together with some that
    precede them, and the text that is added is returned.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []  # tokens since the text last ended with a complete character
        self._num_given = 0  # characters of the decoded context and pending tokens that were returned

    def feed(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode([*self._context, *self._pending])
        end = len(text.rstrip(_HALF))
        if end < len(text) and len(self._pending) > _MAX_PENDING:
            end = len(text) - 1
            new = text[self._num_given : end]
            self._begin_with(self._pending[-_CONTEXT:])
            self._num_given -= 1
            return new
        new = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        if end == len(text):
            self._begin_with(self._pending)
        return new

    def _begin_with(self, context: list[int]) -> None:
        self._context, self._pending = context, []
        self._num_given = len(self._decode(context))


class _Reader:
    """Follows a text from section to section."""

    def __init__(self, sections: Sections) -> None:
        self._sections = sections
        self._patterns = {name: any_of(sorted(s.ends, key=len, reverse=True)) for name, s in sections.items()}
        self._held = ""  # text that may be a marker or part of one
        self._enter(START)

    def _enter(self, name: str) -> None:
        self._name, self._section = name, self._sections[name]
        self._at_start = bool(self._section.begins)
        self._is_empty = True
        self._trailing: list[str] = []  # white space, dropped if the section ends here

    def feed(self, text: str) -> Iterator[Delta]:
        text = self._held + text
        position = 0
        while True:
            if self._at_start:
                start = len(text) - len(_lstripped(text[position:], self._section.lstrip))
                end = _first_marker(self._section.begins, text, start)
                if end is None:
                    self._held = text[position:]
                    return
                self._at_start = False
                if end > start:
                    self._enter(self._section.begins[text[start:end]])
                    position = end
                    continue
            hold = _start_of_a_part(self._section.ends, text, position)
            match = self._patterns[self._name].search(text, position) if self._section.ends else None
            if match is None or match.start() >= hold:
                self._held = text[hold:]
                yield from self._put(text[position:hold])
                return
            yield from self._put(text[position : match.start()])
            self._enter(self._section.ends[match[0]])
            position = match.end()

    def _put(self, text: str) -> Iterator[Delta]:
        section = self._section
        if section.field is None:
            return
        text = text.lstrip(section.lstrip) if self._is_empty else text
        if not text:
            return
        self._is_empty = False
        body = text.rstrip(section.rstrip)
        if body:
            yield Delta(section.field, "".join([*self._trailing, body]))
            self._trailing.clear()
        if len(body) < len(text):
            self._trailing.append(text[len(body) :])


def _lstripped(text: str, characters: str) -> str:
    return text.lstrip(characters) if characters else text


def _first_marker(markers: Iterable[str], text: str, position: int) -> int | None:
    """Returns the end of the marker at the position, the position if there is none, None if uncertain."""
    if any(len(marker) > len(text) - position and marker.startswith(text[position:]) for marker in markers):
        return None
    return position + max((len(marker) for marker in markers if text.startswith(marker, position)), default=0)


def _start_of_a_part(markers: Iterable[str], text: str, position: int) -> int:
    """Returns the position of a final part that may become a marker; the end of the text if there is none."""
    longest = max(map(len, markers), default=0)
    for start in range(max(position, len(text) - longest + 1), len(text)):
        tail = text[start:]
        if any(len(marker) > len(tail) and marker.startswith(tail) for marker in markers):
            return start
    return len(text)
