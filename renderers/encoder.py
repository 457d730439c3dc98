"""Encodes rendered text to token ids, with control tokens only where the format put them.

Messages and format share one string, so text that spells a control token is escaped before it is rendered
(`guard`). Most rendered text is then encoded by the tokenizer as it is. If a message spells a control token,
or a token would span the end of the prompt and the start of the reply, a copy of the tokenizer is used. In
the copy the control tokens are spelled by their escapes, so that their usual spelling is ordinary text. The
copy also has a token that separates its neighbours, the cut, which is dropped from the result.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import groupby, pairwise, repeat
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.borders import BORDER, parts_at_border, parts_at_lines
from renderers.messages import PlainMessage, Tool, map_strings
from renderers.tokens import TOKEN_DTYPE, Control, Tokens, Trail, length_of_common_start

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

ESCAPE = "\U000f5a3c"
"""A private-use character with which every placeholder begins."""

SENTINEL = f"{ESCAPE}text;"
"""Text that occurs in no message and in no format."""

_CUT = f"{ESCAPE}cut;"

_KEYS = ("role", "content")
_ONLY_CONTENT = set(_KEYS)

_NAMED_FOR_THE_USER = ("sep_token", "cls_token", "mask_token")
"""Names in transformers for tokens that a chat model uses only if its template does."""


class _Found(NamedTuple):
    """An encoded text, or the end of one."""

    ids: list[int]
    controls: list[Control]
    tokens: Tokens
    """The tokens of that text, or of its end."""


class _RepeatedPart(NamedTuple):
    """A part of a text whose tokens are known."""

    start: int
    end: int
    ids: list[int]


_LEAST_REPEATED = 24
"""The characters by which a repeated part is looked for, and about its least length."""
_LETTER = "x"
"""Stands for the text behind a line, where some tokenizers look."""
_end_of = itemgetter(1)


class Encoder:
    """Encodes rendered text for one tokenizer.

    The control tokens are the special tokens that the format uses, and any other added tokens of the
    tokenizer that occur in `frame`, the text that the format prints around a plain message. The format uses a
    special token if it occurs in `frame` or in `template`, or if the tokenizer names it (`eos_token`,
    `image_token`, but not `sep_token` and the like, which are left to the user). Without a `template` it uses
    all of them.
    Any other added token, such as Qwen's `<tool_call>` or one that the user added, is ordinary vocabulary.
    Text of a reply is encoded as a special token only if it is one of the `spoken`, such as a tag around its
    thinking, and never as one of the `ends`, which end turns.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame: str = "",
        ends: Collection[str] = (),
        template: str | None = None,
        spoken: Collection[str] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise RendererError(
                f"{type(tokenizer).__name__} does not report the offsets of its tokens. "
                "Load a fast tokenizer (one with a tokenizer.json)."
            )
        added = tokenizer.added_tokens_decoder
        named = {
            str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if not isinstance(token, list) and name not in _NAMED_FOR_THE_USER
        }
        special = [
            token.content
            for token in added.values()
            if token.special
            and (template is None or token.content in named or token.content in frame + template)
        ]
        framing = [
            token.content for token in added.values() if token.content.strip() and token.content in frame
        ]
        controls = sorted({*special, *framing})
        self._tokenizer = tokenizer
        if piece := next((text for text in controls if text and any(text in key for key in _KEYS)), None):
            raise RendererError(
                f"The tokenizer has the special token {piece!r}, a part of ordinary words. Remove it."
            )
        self._controls = controls
        self._escapes = {text: f"{ESCAPE}{index};" for index, text in enumerate(controls)}
        self.ids = {token.content: index for index, token in added.items()}
        self._control_ids = frozenset(self.ids[text] for text in controls)
        self._is_control = np.zeros(max(self._control_ids, default=0) + 2, bool)
        """By id. The last entry, False, is for all higher ids."""
        self._is_control[[*self._control_ids]] = True
        self.control = any_of(controls)
        self._marks = re.compile(f"{ESCAPE}(?P<index>\\d+);|(?P<control>{self.control.pattern})")
        reserved = f"{ESCAPE}(?:\\d+|cut|text);"
        self._reserved = re.compile(reserved)
        foreign = {*special, *ends} - ({*spoken} - {*ends})
        self.spoken = any_of([text for text in controls if text not in foreign])
        """The control tokens that a reply may spell."""
        self._foreign_to_a_reply = re.compile(f"{reserved}|{any_of(foreign).pattern}")
        self._foreign_elsewhere = re.compile(f"{reserved}|{self.control.pattern}")
        self._controls_part = all(_parts(self.ids[text], added) for text in controls)
        self._controls_take_space = any(added[self.ids[text]].lstrip for text in controls)
        self._encode_tail = lru_cache(maxsize=1024)(self._ids)
        self._encode_stretch = lru_cache(maxsize=4096)(self._stretch)
        self._splits_apart = self._controls_part and not self._controls_take_space
        self._latest = Trail()

    # -- text that spells control tokens ------------------------------------------------------

    def guard(
        self, messages: Sequence[PlainMessage], replies_like_others: bool = False
    ) -> list[PlainMessage]:
        """Returns the messages with text that spells a control token escaped, and counts such messages.

        Text of the assistant keeps the tokens of the frame that are not special, and the `spoken` ones,
        because in some formats the model itself writes them (`<think>`). With `replies_like_others` they are
        escaped as well.
        """
        guarded: list[PlainMessage] = []
        for number, message in enumerate(messages, 1):
            is_reply = message["role"] == "assistant" and not replies_like_others
            pattern = self._foreign_to_a_reply if is_reply else self._foreign_elsewhere
            if message.keys() == _ONLY_CONTENT and pattern.search(message["content"]) is None:
                guarded.append(message)
                continue
            escaped = map_strings(partial(pattern.sub, partial(self._escape, number)), message)
            if escaped != message:
                notes.count("message", "spelled a control token, trained as text")
            guarded.append(escaped)
        return guarded

    def check_verbatim(self, text: str) -> None:
        """Raises RendererError for text that contains one of the placeholders that renderers reserve."""
        if (found := self._reserved.search(text)) is not None:
            raise RendererError(f"The text contains {found[0]!r}, which renderers reserve. Remove it.")

    def guard_tools(self, tools: Sequence[Tool]) -> list[Tool]:
        """Returns the descriptions of tools with control tokens escaped."""
        return [
            map_strings(partial(self._foreign_elsewhere.sub, partial(self._escape, 0)), tool)
            for tool in tools
        ]

    def _escape(self, number: int, match: re.Match[str]) -> str:
        if match[0] not in self._escapes:
            where = f"Message {number}" if number else "A tool"
            raise RendererError(f"{where} contains {match[0]!r}, which renderers reserve. Remove it.")
        return self._escapes[match[0]]

    def unguard(self, value: Any) -> Any:
        """Returns a text, or messages, with the escapes of `guard` undone."""
        return map_strings(partial(self._marks.sub, self._spell), value)

    def _spell(self, match: re.Match[str]) -> str:
        return match["control"] or self._controls[int(match["index"])]

    # -- encoding -----------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        cuts: Sequence[int] = (),
        positions: Collection[int] = (),
        trail: Trail | None = None,
    ) -> Tokens:
        """Encodes escaped text so that the ids before each cut are those of the text before it alone.

        The result equals that of encoding the full text at once, unless that would violate this rule or let
        text in a message become a control token. `cuts` are in ascending order. `Tokens.index` finds the cuts
        and `positions` in the result. With a `trail`, the ids are those behind the ones that its text has,
        and it then continues with this text.
        """
        cuts = list(cuts)
        is_first = trail is None or not trail.ids
        before = self._latest if trail is None or is_first else trail
        # What precedes the last control token that both texts begin with is known, and the rest is encoded.
        num = num_alike = 0
        if before.text and self._controls_part and (before.apart_from < 0 or self._splits_apart):
            num_alike = length_of_common_start(before.text, text)
            num = before.num_shared(num_alike, cuts, min(positions, default=len(text)))
        start, _, place = before.controls[num - 1] if num else (0, 0, 0)
        found, apart_from = None, before.apart_from if num else -1
        if apart_from < 0:
            repeated = self._repeated(before, text, start, num_alike) if num_alike > start else None
            found, apart_from = self._encode_whole(text, cuts, positions, start, place, repeated)
            if found is None:
                num = start = place = 0
        ids, controls, tokens = found or self._encode_apart(text, cuts, start, place)
        if is_first:
            self._latest = before = before.first(num)
            if place:
                tokens.ids = np.array(before.ids + ids, TOKEN_DTYPE)
        else:
            num_alike = length_of_common_start(before.ids[place:], ids)
            tokens.num_shared = place + num_alike
            tokens.ids = tokens.ids[num_alike:].copy()
            before.go_back(num)
        before.text, before.cuts, before.apart_from = text, cuts, apart_from
        before.ids += ids
        before.controls += controls
        if trail is not None and is_first:
            trail.continue_from(before)
        return tokens

    def _repeated(self, before: Trail, text: str, begin: int, num_alike: int) -> _RepeatedPart | None:
        """Returns a part of the text from `begin` on that the text before has too, at a later place.

        So a reply stands behind its thinking first, and then in the history without it. The part is the rest
        of the line in which the texts begin to differ, and what follows, up to the end of a control token.
        """
        if not (before.controls and before.apart_from < 0 and self._parts_at_lines):
            return None
        first = text.rfind("\n", begin, num_alike) + 1
        at = before.text.find(text[first : first + _LEAST_REPEATED], num_alike)
        if first <= begin or at < 1 or before.text[at - 1] != "\n" or text[first : first + 1].isspace():
            return None
        end = at + length_of_common_start(before.text[at:], text[first:])
        last = bisect_right(before.controls, end, key=_end_of) - 1
        num = bisect_right(before.controls, at, key=_end_of)
        if last < num or num == 0:
            return None
        _, start, place = before.controls[num - 1]
        place += len(self._encode_tail(before.text[start:at] + _LETTER))
        _, end, last_place = before.controls[last]
        return _RepeatedPart(first, first + end - at, before.ids[place : last_place + 1])

    def _encode_whole(
        self,
        text: str,
        cuts: Sequence[int],
        positions: Collection[int],
        begin: int,
        place: int,
        repeated: _RepeatedPart | None,
    ) -> tuple[_Found | None, int]:
        """Encodes the text from `begin` on with the tokenizer itself; `place` tokens precede it.

        The tokens of a part of it may be known. Returns the position because of which the copy is needed
        instead, or -1.
        """
        if (escaped := text.find(ESCAPE, begin)) >= 0:
            return None, escaped
        edges: list[int] = []
        spelled: list[int] = []
        for match in self.control.finditer(text, begin):
            edges += match.span()
            spelled.append(self.ids[match[0]])
        borders: list[int] = []  # where the text is certain to be split
        if self._parts_at_border and text.find(BORDER, begin) >= 0:
            borders = sorted(
                {at for at in (*cuts, *positions) if at > begin and text[at - 1 : at + 1] == BORDER}
            )
        needs_offsets = not {begin, len(text), *cuts, *edges, *borders}.issuperset(positions)
        if needs_offsets or borders:
            repeated = None
        ids, starts, before = self._encode_parts(text, [begin, *borders], needs_offsets, repeated)
        known = {first: place + number for first, number in before.items()}
        ids_T = np.array(ids, TOKEN_DTYPE)
        places = np.flatnonzero(self._is_control.take(ids_T, mode="clip")).tolist()
        if [ids[at] for at in places] != spelled:
            return None, len(text)
        known.update(zip(edges, [place + edge for at in places for edge in (at, at + 1)], strict=True))
        known[begin], known[len(text)] = place, place + len(ids)
        # A control token splits the text in any case, so only what follows the last one before a cut can
        # differ. Every other edge is the end of a control token.
        for cut in cuts[bisect_right(cuts, begin) if begin else 0 :]:
            if cut in borders:
                continue
            num_before = bisect_right(edges, cut) // 2 * 2
            start = edges[num_before - 2] if num_before else begin
            tail = self._encode_tail(text[start:cut])
            first, end = known[start] - place, known[start] + len(tail)
            if not tail or ids[first : end - place] != tail or known.setdefault(cut, end) != end:
                return None, cut
        controls = [
            (start, end, place + at) for start, end, at in zip(edges[::2], edges[1::2], places, strict=True)
        ]
        return _Found(ids, controls, Tokens(ids_T, starts, known, num_before=place)), -1

    def _encode_parts(
        self, text: str, firsts: list[int], needs_offsets: bool, repeated: _RepeatedPart | None
    ) -> tuple[list[int], list[int], dict[int, int]]:
        """Encodes the parts of a text that begin at `firsts` separately, or those around a repeated one.

        Returns the tokens, where each begins if that is needed, and the number of tokens before each part.
        """
        if repeated is None:
            parts = [text[first:end] for first, end in pairwise([*firsts, len(text)])]
        else:
            parts = [text[firsts[0] : repeated.start] + _LETTER, text[repeated.end :]]
            firsts = [firsts[0], repeated.end]
        backend = self._ready_backend()
        encode = backend.encode_batch if needs_offsets else backend.encode_batch_fast  # offsets are slow
        try:
            encodings = encode(parts, add_special_tokens=False)
        except BaseException as error:
            _raise_panic(error, text[firsts[0] :])
            raise
        ids: list[int] = []
        starts: list[int] = []
        before: dict[int, int] = {}
        for first, encoding in zip(firsts, encodings, strict=True):
            if repeated is not None and first == repeated.end:
                ids[-1:] = repeated.ids  # in the place of the letter
            before[first] = len(ids)
            ids += encoding.ids
            if needs_offsets:
                starts += [first + start for start, _ in encoding.offsets]
        return ids, starts, before

    def _ids(self, text: str) -> list[int]:
        try:
            (encoding,) = self._ready_backend().encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            _raise_panic(error, text)
            raise
        ids: list[int] = encoding.ids
        return ids

    def _ready_backend(self) -> Tokenizer:
        """Returns the backend, after removing truncation and padding that other code may have set on it."""
        backend = self._backend
        if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False
        return backend

    def _encode_apart(self, text: str, cuts: Sequence[int], begin: int, place: int) -> _Found:
        """Encodes with the copy: control tokens by their escapes, and escapes as the text they represent.

        A control token splits a text, so the stretches between control tokens are encoded separately. Their
        results are cached, because a conversation whose history is rewritten is encoded many times with the
        same prefix.
        """
        if cuts and not self._copy_parts_cleanly:
            raise RendererError(
                "A message begins with text that this tokenizer joins to the end of the prompt, "
                "and it cannot separate the two without adding a space. "
                "Strip the white space around the message."
            )
        edges = [0, len(text)]
        matches: list[re.Match[str]] = []
        if self._splits_apart:
            matches = list(self.control.finditer(text, begin))
            edges = [*sorted({begin, *(match.start() for match in matches)}), len(text)]
        ids: list[int] = []
        starts: list[int] = []
        known: dict[int, int] = {}
        next_cut = bisect_left(cuts, begin)
        for start, end in pairwise(edges):
            first_cut = next_cut
            while next_cut < len(cuts) and cuts[next_cut] < end:
                next_cut += 1
            inner = tuple(cut - start for cut in cuts[first_cut:next_cut])
            known[start] = place + len(ids)
            found, positions = self._encode_stretch(text[start:end], inner)
            ids += found
            starts += [start + position for position in positions]
        controls = [(*match.span(), known[match.start()]) for match in matches]
        return _Found(ids, controls, Tokens(np.array(ids, TOKEN_DTYPE), starts, num_before=place))

    def _stretch(self, text: str, cuts: tuple[int, ...]) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the ids of a text that the copy encodes at once, and the position where each begins."""
        pieces: list[str] = []
        origins: list[int] = []  # for each character of the pieces, its position in the text

        def put(piece: str, positions: Iterable[int]) -> None:
            pieces.append(piece)
            origins.extend(positions)

        for start, end in pairwise([0, *cuts, len(text)]):
            if start > 0:
                put(_CUT, repeat(start, len(_CUT)))
            for match in self._marks.finditer(text, start, end):
                put(text[start : match.start()], range(start, match.start()))
                piece = self._escapes.get(match["control"]) or self._controls[int(match["index"])]
                put(piece, repeat(match.start(), len(piece)))
                start = match.end()
            put(text[start:end], range(start, end))
        origins.append(len(text))

        copy, originals = self._copy
        try:
            encoding = copy.encode("".join(pieces), add_special_tokens=False)
        except BaseException as error:
            _raise_panic(error, text)
            raise
        ids: list[int] = []
        starts: list[int] = []
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control_ids and token not in originals:
                spelling = self._tokenizer.convert_ids_to_tokens(token)
                raise RendererError(f"This tokenizer makes {spelling!r} of ordinary text. Remove it.")
            if (original := originals.get(token, token)) is not None:
                ids.append(original)
                starts.append(origins[start])
        return ids, starts

    # -- the tokenizers -------------------------------------------------------------------------

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer's backend, or a copy if its post-processor drops white space from the offsets."""
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        probe = "a  b\n c"
        offsets = backend.encode(probe, add_special_tokens=False).offsets
        if all(end == start for (_, end), (start, _) in pairwise([*offsets, (len(probe), len(probe))])):
            return backend
        return _rebuild(backend, str)

    @cached_property
    def _parts_at_border(self) -> bool:
        return parts_at_border(self._tokenizer.backend_tokenizer)

    @cached_property
    def _parts_at_lines(self) -> bool:
        is_certain = self._controls_part and parts_at_lines(self._tokenizer.backend_tokenizer)
        return is_certain and len(self._ids(_LETTER)) == 1

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int | None, int | None]]:
        """The copy, and for each of its added tokens the id in the tokenizer (None for the cut)."""
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        copy = _rebuild(backend, lambda text: self._escapes.get(text, text))
        copy.add_special_tokens([_CUT])
        ids: dict[int | None, int | None] = {copy.token_to_id(_CUT): None}
        for text, index in self.ids.items():
            ids[copy.token_to_id(self._escapes.get(text, text))] = index
        return copy, ids

    @cached_property
    def _copy_parts_cleanly(self) -> bool:
        """Whether a cut adds nothing to the text: some tokenizers add a space wherever a new text begins."""
        copy, _ = self._copy
        tokens = copy.encode(f"a{_CUT}a", add_special_tokens=False).ids
        return copy.decode(tokens, skip_special_tokens=True) == "aa"


def _raise_panic(error: BaseException, text: str) -> None:
    """Raises RendererError for a panic of the tokenizers library, such as a regex that takes too long.

    A panic is not an Exception, so it would end threads and processes without naming the text.
    """
    if type(error).__name__ == "PanicException":
        raise RendererError(
            f"The tokenizer cannot encode {text[:60]!r}: {error}. Give another text, or another tokenizer."
        ) from None


def _parts(control: int, added: Mapping[int, AddedToken]) -> bool:
    """Returns whether a control token is found wherever it is spelled, regardless of what surrounds it."""
    token = added[control]
    others = [other.content for index, other in added.items() if index != control]
    return not (token.normalized or token.single_word or any(token.content in other for other in others))


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the texts, and of several that match the longest."""
    return re.compile(_source_of_any(sorted(set(texts))) if texts else "(?!)")


def _source_of_any(texts: Sequence[str]) -> str:
    """Returns the source of a pattern that factors out common prefixes: trying hundreds of texts is slow."""
    start = commonprefix(texts)  # noqa: RUF071 - of characters, not of paths
    rests = [text[len(start) :] for text in texts]
    branches = [
        _source_of_any(list(alike)) for first, alike in groupby(rests, lambda rest: rest[:1]) if first
    ]
    ends = "" if not branches else f"(?:{'|'.join(branches)})"
    return re.escape(start) + ends + ("?" if branches and "" in rests else "")


def _rebuild(backend: Tokenizer, rename: Callable[[str], str]) -> Tokenizer:
    """Returns a copy that does not post-process, pad or truncate, with its added tokens renamed.

    A renamed token is matched before normalization: text that a normalizer changes to it is not that token.
    """
    layout = json.loads(backend.to_str())
    layout.update(post_processor=None, padding=None, truncation=None)
    for token in layout["added_tokens"]:
        name = rename(token["content"])
        if name != token["content"]:
            token.update(content=name, normalized=False)
    return type(backend).from_str(json.dumps(layout))
