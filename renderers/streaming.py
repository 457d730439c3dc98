"""A reply shown while it is sampled: each piece of text once it is certain which field it belongs to.

A format declares its reply as named sections and the markers between them. Only text that may still turn out
to be markup is held back: part of a marker, white space that is dropped where a section
ends, and part of a character. The end token settles the rest by parsing the complete reply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from renderers.encoder import ESCAPE, Encoder, any_of
from renderers.messages import Message

Field: TypeAlias = Literal["content", "reasoning_content"]

START = "start"
"""The name of the section that a reply begins with."""

_HALF = "\ufffd"  # decoded from bytes that are not a whole character (yet)
_MAX_PENDING = 16  # tokens without a whole character; a character has at most 4 bytes
_CONTEXT = 8  # tokens decoded again after a run of bytes that are not characters


class Delta(NamedTuple):
    """More text of a field of the reply."""

    field: Field
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A stretch of a reply.

    Its text belongs to `field`; with None it is not shown (markup, a tool call, or text that only
    the complete reply can place). `ends` gives for each marker that ends the section the name of
    the next one; `begins` does so for markers that count only as the very first text of
    the section. Characters of `lstrip` and `rstrip` are dropped at its borders. Of a marker's
    control tokens only the tokens count: text that spells one is text.
    """

    field: Field | None
    ends: Mapping[str, str] = dataclasses.field(default_factory=dict)
    begins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lstrip: str = ""
    rstrip: str = ""


Sections: TypeAlias = Mapping[str, Section]

PLAIN: Sections = {START: Section("content")}
"""A reply that is all content."""


class ResponseStream:
    """Takes the tokens of one reply as they are sampled, in any pieces.

    The deltas of a field of a well-formed reply join to the text of that field. For a truncated
    or malformed reply they may differ from the message that `finish` returns.
    """

    def __init__(
        self,
        sections: Sections,
        encoder: Encoder,
        end_tokens: Collection[int],
        decode: Callable[[Sequence[int]], str],
        parse: Callable[[Sequence[int]], tuple[Message, bool]],
    ) -> None:
        """`parse` reads the complete reply, up to one of the `end_tokens`; `decode` spells a part of it."""
        self._end_tokens = end_tokens
        self._parse = parse
        self._tokens: list[int] = []
        self._ended = False
        self._characters = _Characters(decode)
        self._marks = _control_tokens(sections, encoder)
        self._reader = _Reader(_with_marks(sections, self._marks.values()))
        self._shown: dict[Field, list[str]] = {"reasoning_content": [], "content": []}

    def feed(self, tokens: Iterable[int]) -> list[Delta]:
        """The deltas that the new tokens add to the reply. Takes time in proportion to the new tokens."""
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
        """The message in all the tokens, as `parse_response` returns it."""
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
        """The delta with control tokens spelled that are not markers there."""
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
    """A control token that markers hold, and its placeholder in the text that is read."""

    spelling: str
    stand_in: str


def _control_tokens(sections: Sections, encoder: Encoder) -> dict[int, _Mark]:
    """The control tokens in the markers of the sections."""
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
    """The text of tokens that come one by one, in complete characters.

    Some decoders drop the space before a text, so new tokens are decoded together with some before
    them, and what the text has grown by is new.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []  # tokens since the text last ended with a whole character
        self._num_given = 0  # characters of the text of both that were returned already

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
        self._held = ""  # may be a marker, or part of one
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
                end = _first_marker(self._section.begins, text, position)
                if end is None:
                    self._held = text[position:]
                    return
                self._at_start = False
                if end > position:
                    self._enter(self._section.begins[text[position:end]])
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


def _first_marker(markers: Iterable[str], text: str, position: int) -> int | None:
    """The end of the marker at the position; the position without one, None if that is not yet certain."""
    if any(len(marker) > len(text) - position and marker.startswith(text[position:]) for marker in markers):
        return None
    return position + max((len(marker) for marker in markers if text.startswith(marker, position)), default=0)


def _start_of_a_part(markers: Iterable[str], text: str, position: int) -> int:
    """The position of a last part that could grow into a marker; the end of the text without one."""
    longest = max(map(len, markers), default=0)
    for start in range(max(position, len(text) - longest + 1), len(text)):
        tail = text[start:]
        if any(len(marker) > len(tail) and marker.startswith(tail) for marker in markers):
            return start
    return len(text)
