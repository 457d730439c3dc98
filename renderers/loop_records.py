"""What the iterations of a template's loops printed, and for which other lists of messages that holds.

The body of a loop can read its own item, other items and the length of lists, variables from outside, and
what earlier iterations left in a namespace; nothing else lasts from one iteration to the next. All of these
are followed while the loop runs (`loop_rewriting` makes the template tell), and kept with the text. When
the same loop is met again for more or fewer messages, the iterations that read what they would read again
are not run: their text is printed, and the namespaces are set to what they left there.

A loop over a list from its end sees other items at every number of messages, but mostly looks for the last
message of some kind. There it is kept what the remaining iterations do from one item on: what of the
namespaces they read before they set it, and what they leave in them.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace

from renderers.loop_counts import END, Count, NotFollowed
from renderers.loop_rewriting import Loop

if TYPE_CHECKING:
    from renderers.incremental import Run

_SCALARS = (str, int, float, bool, type(None))
_MOST_RECORDS = 4
_MOST_SUFFIXES = 8
_WORTH_A_RECORD = 8
"""Iterations that have to run again for other values before those are recorded apart."""

ABSENT = object()


# -- values -------------------------------------------------------------------------------------


class Attributes(dict[str, Any]):
    """The attributes of a namespace. A visit may ask to be told of what is read and set."""

    visit: BackwardVisit | None = None

    def __getitem__(self, name: str) -> Any:
        value = super().get(name, ABSENT)
        if self.visit is not None:
            self.visit.read(self, name, value)
        if value is ABSENT:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if self.visit is not None:
            self.visit.set(self, name, value)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        if self.visit is not None:
            raise NotFollowed  # it spells them all
        return super().__repr__()

    def become(self, values: Mapping[str, Any]) -> None:
        self.clear()
        self.update(values)


def followed(kind: type[Namespace]) -> type[Namespace]:
    """This kind of namespace, with attributes that can be followed."""

    class FollowedNamespace(kind):  # type: ignore[misc, valid-type]
        def __init__(*given: Any, **attributes: Any) -> None:
            kind.__init__(*given, **attributes)
            given[0]._Namespace__attrs = Attributes(given[0]._Namespace__attrs)

    return FollowedNamespace


def attributes_of(namespace: Namespace) -> Attributes:
    found: Attributes = namespace._Namespace__attrs
    return found


def same(one: Any, other: Any) -> bool:
    """Whether a template cannot tell the two apart. Namespaces and other objects are only like themselves."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is float:
        return repr(one) == repr(other)  # 0.0 == -0.0
    if kind in _SCALARS:
        return bool(one == other)
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if kind is dict:
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return (kind is range and one == other) or isinstance(one, Undefined)


def is_frozen(value: Any) -> bool:
    """Whether nothing can change this value: the sandbox lets no template change a list or a dict."""
    kind = type(value)
    if kind in (list, tuple):
        return all(map(is_frozen, value))
    if kind is dict:
        return all(map(is_frozen, value.values()))
    return kind in _SCALARS or kind is range or isinstance(value, Undefined)


def _are_frozen(states: Sequence[Mapping[str, Any]]) -> bool:
    return all(is_frozen(value) for state in states for value in state.values())


def _length_of_common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of first items that are the same objects."""
    if one is other:
        return len(one)
    least = min(len(one), len(other))
    if type(one) is type(other) is range:
        return least if not least or (one[0], one.step) == (other[0], other.step) else 0
    if all(map(is_, one, other)):
        return least
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a is not b)


# -- loops from the first item on ---------------------------------------------------------------


@dataclass
class Iteration:
    """What was seen of one run of a loop's body."""

    states: list[dict[str, Any]]
    """The attributes of the namespaces before it."""
    need: float
    """The number of messages from which on it is the same."""
    bounds: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of what it compares for which the comparisons turn out the same."""
    read: set[int] = field(default_factory=set)
    """The messages that it read by their number."""
    text: str = ""


class Record:
    """The iterations of one loop, for one conversation."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.iterations: list[Iteration] = []
        self._needs: list[float] = []
        """For each iteration, the number of messages from which on all iterations up to it are the same."""
        self._lows: dict[tuple[str, str], list[float]] = {key: [] for key in loop.compared}
        self._negative_highs: dict[tuple[str, str], list[float]] = {key: [] for key in loop.compared}
        self._last_readers: dict[int, int] = {}
        self._text = ""
        self._ends = [0]
        """Where the text of the iterations before each one ends."""
        self.entry: Entry
        self.final: list[dict[str, Any]] | None = None
        """The attributes of the namespaces after the loop, where nothing can change them."""

    def replace_from(self, start: int, iterations: Sequence[Iteration], entry: Entry) -> None:
        del self.iterations[start:]
        del self._ends[start + 1 :]
        self._text = "".join((self._text[: self._ends[-1]], *(iteration.text for iteration in iterations)))
        for numbers in (self._needs, *self._lows.values(), *self._negative_highs.values()):
            del numbers[start:]
        for number, iteration in enumerate(iterations, start):
            self.iterations.append(iteration)
            self._ends.append(self._ends[-1] + len(iteration.text))
            self._needs.append(max(iteration.need, self._needs[-1] if self._needs else 0))
            for key in self._loop.compared:
                low, high = iteration.bounds.get(key, (-END, END))
                for listed, value in ((self._lows[key], low), (self._negative_highs[key], -high)):
                    listed.append(max(value, listed[-1] if listed else -END))
            for index in iteration.read:
                self._last_readers[index] = number
        self.entry = entry

    def text(self, start: int, stop: int | None = None) -> str:
        """What the iterations printed."""
        return self._text[self._ends[start] : None if stop is None else self._ends[stop]]

    def beginning(self, num_iterations: int) -> Record:
        copied = Record(self._loop)
        copied.replace_from(0, self.iterations[:num_iterations], self.entry)
        return copied

    def reuse(self, entry: Entry) -> Reuse | None:
        """What of this record holds where the loop is entered so; None if nothing."""
        if not self.iterations or entry.num_before != self.entry.num_before:
            return None
        found = self.entry.compared_with(entry)
        if found is None:
            return None
        first, last = found
        as_long = bisect_right(self._needs, entry.num_messages if first is None else first)
        in_bounds = len(self.iterations)
        for name, attribute in self._loop.compared:
            value = entry.attribute(name, attribute)
            if type(value) is int:
                key = (name, attribute)
                in_bounds = min(
                    in_bounds,
                    bisect_right(self._lows[key], value),
                    bisect_right(self._negative_highs[key], -value),
                )
        last_iteration = len(self.iterations) - 1
        start = min(as_long, in_bounds, last_iteration)
        rest = None
        is_whole = in_bounds == len(self.iterations) == entry.num_items and self.final is not None
        is_as_long = (entry.num_items, entry.num_messages) == (self.entry.num_items, self.entry.num_messages)
        if first is not None and is_whole and is_as_long:
            readers = [self._last_readers.get(index, -1) for index in range(first, last + 1)]
            rest = max(last - entry.num_before, *readers) + 1
        return Reuse(self, start, min(as_long, last_iteration) - start, rest)


@dataclass(frozen=True)
class Reuse:
    """The part of a record that holds again."""

    record: Record
    start: int
    """The number of iterations that need not run."""
    num_out_of_bounds: int
    """How many more there would be if what they compare were the same."""
    rest_from: int | None
    """The iteration from which on all are the same again if the namespaces are, for a list of this length."""


def _may_grow(value: Any, messages: Sequence[Any]) -> bool:
    """Whether the value may be the list of the messages, or their numbers, maybe without the first ones."""
    if type(value) is range:
        return True
    num_before = len(messages) - len(value) if type(value) is list else -1
    return bool(value) and num_before >= 0 and value[0] is messages[num_before]


class Entry:
    """The state in which a loop is entered."""

    def __init__(
        self, loop: Loop, messages: Sequence[Any], items: Sequence[Any], values: Sequence[Any]
    ) -> None:
        self._loop = loop
        self.num_messages = len(messages)
        self.items = items
        self.num_items = len(items)
        self.grows = _may_grow(items, messages)
        """Whether the list may be that of the messages, or of all but the first ones."""
        self.num_before = len(messages) - len(items) if self.grows else 0
        """The messages before those in the list."""
        self.values: dict[str, Any] = {}
        """Those of the variables from outside that hold no namespace."""
        self.lists: dict[str, Sequence[Any]] = {}
        """Those of which items and length alone are read, by the name that they are read by."""
        self.namespaces: dict[str, Attributes] = {}
        for name, value in zip(loop.names, values, strict=True):
            if isinstance(value, Namespace):
                self.namespaces[name] = attributes_of(value)
                continue
            self.values[name] = value
            if name in loop.indexed and _may_grow(value, messages):
                self.lists[name] = value
        self.initial = {name: dict(attributes) for name, attributes in self.namespaces.items()}

    def attribute(self, name: str, attribute: str) -> Any:
        return self.initial.get(name, {}).get(attribute)

    def compared_with(self, other: Entry, with_namespaces: bool = True) -> tuple[int | None, int] | None:
        """The first and the last message that differ: `(None, -1)` if none of those that both have do.

        None if anything else differs, but for what the body only compares, and for what is in the namespaces
        if they are left out.
        """
        if list(self.values) != list(other.values) or list(self.initial) != list(other.initial):
            return None
        if self.grows != other.grows or not (self.grows or same(self.items, other.items)):
            return None
        pairs = [(self.items, other.items)] if self.grows else []
        for name, value in self.values.items():
            there = other.values[name]
            if name in self.lists:
                if value is not self.items or there is not other.items:
                    pairs.append((value, there))
            elif not same(value, there):
                return None
        for name, attributes in self.initial.items() if with_namespaces else ():
            theirs = other.initial[name]
            if list(attributes) != list(theirs):
                return None
            for attribute, value in attributes.items():
                there = theirs[attribute]
                is_compared = (name, attribute) in self._loop.compared and type(value) is type(there) is int
                if not is_compared and not same(value, there):
                    return None
        return self._different_messages(pairs, other)

    def _different_messages(
        self, pairs: Sequence[tuple[Any, Any]], other: Entry
    ) -> tuple[int | None, int] | None:
        first, last = None, -1
        for here, there in pairs:
            if type(here) is not type(there):
                return None
            num_before = self.num_messages - len(here)
            if num_before != other.num_messages - len(there):
                return None
            start = _length_of_common_start(here, there)
            if start < min(len(here), len(there)):
                first = start + num_before if first is None else min(first, start + num_before)
                end = min(len(here), len(there))
                while here[end - 1] is there[end - 1]:
                    end -= 1
                last = max(last, end - 1 + num_before)
        return first, last


class Visit:
    """One run through a loop."""

    def __init__(self, run: Run, items: Sequence[Any], entry: Entry) -> None:
        self.run = run
        self.items = items
        self.entry = entry
        self.index = -1
        """The place of the present item in the list."""

    def _need_of_item(self, place: int) -> int:
        """The number of messages that the list needs to have an item at this place."""
        return self.entry.num_before + place + 1 if self.entry.grows else 0

    def is_followed(self, listed: Any) -> bool:
        return any(listed is one for one in self.entry.lists.values())

    def need(self, num_messages: float) -> None:
        """The present iteration is the same for any more messages than these, and maybe for no others."""
        raise NotImplementedError

    def note_item(self, listed: Sequence[Any], position: int) -> None:
        """The item of one of the lists was read, or looked for where there is none."""
        if not 0 <= position < len(listed):
            self.need(END)
            return
        index = len(self.run.messages) - len(listed) + position
        self.need(index + 1)
        self.note_read(index)

    def numbers(self, start: int, listed: Sequence[Any]) -> Iterator[int]:
        """The numbers of the items of one of the lists."""
        for number in range(start, len(listed)):
            self.need(len(self.run.messages) - len(listed) + number + 1)
            yield number
        self.need(END)

    def note_read(self, index: int) -> None:
        """The message of this number was read."""

    def note_comparison(self, key: tuple[str, str], left: Any, comparison: str, right: Any) -> None:
        """It was compared with what has been on the left side."""

    def leave(self) -> None:
        """The loop has ended."""

    def end(self) -> None:
        """The run has ended, maybe in the loop and by an error."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    # What a template can ask of the loop, for the present iteration.

    def index0(self) -> Any:
        return self.index

    def revindex0(self) -> Any:
        return self.length() - (self.index + 1)

    def length(self) -> Any:
        if not self.entry.grows:
            return len(self.items)
        return Count(self, len(self.items), -self.entry.num_before)

    def is_first(self) -> bool:
        return self.index == 0

    def is_last(self) -> bool:
        is_last = self.index + 1 == len(self.items)
        if self.entry.grows:
            self.need(END if is_last else self._need_of_item(self.index + 1))
        return is_last

    def previous(self) -> Any:
        if self.index == 0:
            return self.run.undefined("there is no previous item")
        self._note_neighbour(self.index - 1)
        return self.items[self.index - 1]

    def _note_neighbour(self, place: int) -> None:
        if self.entry.grows:
            self.note_read(self.entry.num_before + place)

    def following(self) -> Any:
        if self.is_last():
            return self.run.undefined("there is no next item")
        self._note_neighbour(self.index + 1)
        return self.items[self.index + 1]


class ForwardVisit(Visit):
    """A run through a loop from its first item on, or from the first that has to be run again."""

    def __init__(
        self, run: Run, loop: Loop, items: Sequence[Any], values: Sequence[Any], records: list[Record]
    ) -> None:
        super().__init__(run, items, Entry(loop, run.messages, items, values))
        self._loop = loop
        self._records = records
        reuses = [reuse for record in records if (reuse := record.reuse(self.entry)) is not None]
        self._reuse = max(reuses, key=lambda reuse: reuse.start, default=None)
        self._start = self._reuse.start if self._reuse else 0
        self._iterations: list[Iteration] = []
        self._is_open = False
        self._is_shortened = False
        self._num_pieces = 0

    def __iter__(self) -> Iterator[Any]:
        if self._reuse is not None and self._start:
            record = self._reuse.record
            self.run.pieces.append(record.text(0, self._start))
            self._set_namespaces(record.iterations[self._start].states)
            self.run.num_reused += self._start
        rest_from = END if self._reuse is None or self._reuse.rest_from is None else self._reuse.rest_from
        for index in range(self._start, len(self.items)):
            if index >= rest_from and self._print_rest(index):
                return
            self._begin(index)
            yield self.items[index]

    def _set_namespaces(self, states: Sequence[Mapping[str, Any]]) -> None:
        for (name, attributes), state in zip(self.entry.namespaces.items(), states, strict=True):
            initial = self.entry.initial[name]
            compared = {key: initial[key] for key in initial if (name, key) in self._loop.compared}
            attributes.become({**state, **compared})

    def _print_rest(self, index: int) -> bool:
        """Print all that is left as it was recorded, if the namespaces hold what they held there."""
        assert self._reuse is not None
        record = self._reuse.record
        states = record.iterations[index].states
        here = [dict(attributes) for attributes in self.entry.namespaces.values()]
        if record.final is None or not same(here, states):
            return False
        self._close()
        self._is_shortened = True
        self.run.pieces.append(record.text(index))
        self._set_namespaces(record.final)
        return True

    def _begin(self, index: int) -> None:
        self._close()
        self.index = index
        states = [dict(attributes) for attributes in self.entry.namespaces.values()]
        if self._iterations and not _are_frozen(states):
            self.need(END)  # of the iteration before: this one cannot be begun with what may change since
        self._iterations.append(Iteration(states, self._need_of_item(index)))
        self._num_pieces = len(self.run.pieces)
        self._is_open = True
        self.run.num_iterations += 1

    def _close(self) -> None:
        if self._is_open:
            self._iterations[-1].text = "".join(self.run.pieces[self._num_pieces :])
            self._is_open = False

    def need(self, num_messages: float) -> None:
        iteration = self._iterations[-1]
        iteration.need = max(iteration.need, num_messages)

    def note_read(self, index: int) -> None:
        self._iterations[-1].read.add(index)

    def note_comparison(self, key: tuple[str, str], left: Any, comparison: str, right: Any) -> None:
        bounds = self._iterations[-1].bounds
        low, high = bounds.get(key, (-END, END))
        least, greatest = _bounds_of(left, comparison, right)
        bounds[key] = max(low, least), min(high, greatest)

    def leave(self) -> None:
        self._close()
        final = [dict(attributes) for attributes in self.entry.namespaces.values()]
        self._keep(final if _are_frozen(final) else None)

    def end(self) -> None:
        if self._is_open:
            self._iterations.pop()
        self._keep(None)

    def _keep(self, final: list[dict[str, Any]] | None) -> None:
        if self._is_shortened or not self._iterations:
            return
        record = self._reuse.record if self._reuse else Record(self._loop)
        if self._reuse and self._start + len(self._iterations) <= len(record.iterations):
            if self._reuse.num_out_of_bounds < _WORTH_A_RECORD:
                return
            record = record.beginning(self._start)
        if not any(record is kept for kept in self._records):
            if len(self._records) == _MOST_RECORDS:
                del self._records[1]  # the first one is that of all messages, mostly
            self._records.append(record)
        record.replace_from(self._start, self._iterations, self.entry)
        record.final = final


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
}


def _bounds_of(left: Any, comparison: str, right: Any) -> tuple[float, float]:
    """The values on the right side, from the least to the greatest, for which the outcome is the same.

    Where the two are no whole numbers there is none.
    """
    if type(left) is not int or type(right) is not int:
        return END, -END
    if comparison in ("eq", "ne"):
        return (left, left) if left == right else (left + 1, END) if right > left else (-END, left - 1)
    if comparison in ("lt", "gteq"):
        return (left + 1, END) if right > left else (-END, left)
    return (left, END) if right >= left else (-END, left - 1)


# -- loops from the last item on ----------------------------------------------------------------


@dataclass
class Suffix:
    """What the iterations from one item on to the first one do to the namespaces."""

    read: dict[tuple[str, str], Any]
    """Attributes and their values that they depend on."""
    set: dict[tuple[str, str], Any]


@dataclass
class Step(Suffix):
    """What one iteration does to the namespaces."""

    index: int
    """The place of its item, counted from the first one."""
    need: float
    """The number of messages from which on it is the same."""


class BackwardRecord:
    """What the last iterations of a loop from the last item on were seen to do."""

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.suffixes: dict[int, list[Suffix]] = {}
        """By the place of the item that they begin with."""


class BackwardVisit(Visit):
    """A run through a loop from its last item on, until it is known what the rest of it does."""

    def __init__(
        self, run: Run, loop: Loop, items: Sequence[Any], values: Sequence[Any], record: BackwardRecord
    ):
        super().__init__(run, items, Entry(loop, run.messages, items[::-1], values))
        self._record = record
        self._num_usable = self._fit_record()
        self._names = {id(attributes): name for name, attributes in self.entry.namespaces.items()}
        self._steps: list[Step] = []
        self._num_pieces = 0
        self._rest = Suffix({}, {})
        self._follow(self)

    def _fit_record(self) -> int:
        """The number of first items for which the record holds, or may be added to."""
        record, entry = self._record, self.entry
        found = None if record.entry is None else record.entry.compared_with(entry, with_namespaces=False)
        if record.entry is None or found is None:
            record.suffixes.clear()
            record.entry = entry
        elif found[0] is not None:
            return found[0] - entry.num_before
        elif entry.num_items > record.entry.num_items:
            record.entry = entry
        return entry.num_items

    def _follow(self, visit: BackwardVisit | None) -> None:
        for attributes in self.entry.namespaces.values():
            attributes.visit = visit

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self.items):
            self._close()
            place = len(self.items) - 1 - index
            known = self._known_suffix(place) if place < self._num_usable else None
            if known is not None:
                self._rest = known
                self._follow(None)
                for (name, attribute), value in known.set.items():
                    self.entry.namespaces[name][attribute] = value
                self.run.num_reused += place
                return
            self.index = index
            self._num_pieces = len(self.run.pieces)
            self.run.num_iterations += 1
            self._steps.append(Step({}, {}, place, self._need_of_item(place)))
            yield item
        self._close()

    def _known_suffix(self, place: int) -> Suffix | None:
        for suffix in self._record.suffixes.get(place, ()):
            if all(
                same(self.entry.namespaces[name].get(attribute, ABSENT), value)
                for (name, attribute), value in suffix.read.items()
            ):
                return suffix
        return None

    def _close(self) -> None:
        if self._steps and any(self.run.pieces[self._num_pieces :]):
            self.need(END)  # what it prints is not kept

    def need(self, num_messages: float) -> None:
        self._steps[-1].need = max(self._steps[-1].need, num_messages)

    def read(self, attributes: Attributes, name: str, value: Any) -> None:
        """An attribute was read."""
        key = (self._names[id(attributes)], name)
        step = self._steps[-1]
        if key not in step.set:
            step.read.setdefault(key, value)

    def set(self, attributes: Attributes, name: str, value: Any) -> None:
        """An attribute was set."""
        self._steps[-1].set[self._names[id(attributes)], name] = value
        if not is_frozen(value):
            self.need(END)

    def leave(self) -> None:
        self._close()
        self._follow(None)
        suffix = self._rest
        for step in reversed(self._steps):
            if step.need > self._need_of_item(step.index):
                return
            read = {key: value for key, value in suffix.read.items() if key not in step.set}
            suffix = Suffix({**read, **step.read}, {**step.set, **suffix.set})
            kept = self._record.suffixes.setdefault(step.index, [])
            if step.index < self._num_usable and len(kept) < _MOST_SUFFIXES:
                kept.append(suffix)

    def end(self) -> None:
        self._follow(None)

    # -- what a template can ask of the loop

    def index0(self) -> Any:
        if not self.entry.grows:
            return self.index
        return Count(self, self.index, self.index - len(self.run.messages))

    def revindex0(self) -> int:
        return len(self.items) - 1 - self.index

    def _need_all(self) -> None:
        if self.entry.grows:
            self.need(END)

    def is_first(self) -> bool:
        self._need_all()
        return self.index == 0

    def is_last(self) -> bool:
        return self.index + 1 == len(self.items)

    def previous(self) -> Any:
        self._need_all()
        return self.items[self.index - 1] if self.index else self.run.undefined("there is no previous item")

    def following(self) -> Any:
        if self.is_last():
            return self.run.undefined("there is no next item")
        return self.items[self.index + 1]


class FollowedLoop:
    """The `loop` of a template in a loop that is followed."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def with_items(self) -> Iterator[tuple[Any, FollowedLoop]]:
        for item in self._visit:
            yield item, self

    @property
    def index0(self) -> Any:
        return self._visit.index0()

    @property
    def index(self) -> Any:
        return self._visit.index0() + 1

    @property
    def revindex0(self) -> Any:
        return self._visit.revindex0()

    @property
    def revindex(self) -> Any:
        return self._visit.revindex0() + 1

    @property
    def length(self) -> Any:
        return self._visit.length()

    @property
    def first(self) -> bool:
        return self._visit.is_first()

    @property
    def last(self) -> bool:
        return self._visit.is_last()

    @property
    def previtem(self) -> Any:
        return self._visit.previous()

    @property
    def nextitem(self) -> Any:
        return self._visit.following()

    @property
    def depth0(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 1

    def __iter__(self) -> NoReturn:
        raise NotFollowed

    def __len__(self) -> NoReturn:
        raise NotFollowed

    def __call__(self, *_: Any) -> NoReturn:
        raise NotFollowed

    def __str__(self) -> NoReturn:
        raise NotFollowed


NAMES_IN_LOOPS = frozenset(
    name for name in vars(FollowedLoop) if isinstance(vars(FollowedLoop)[name], property)
)
"""What of a loop can be followed."""


def loop_context(iterable: Any, undefined: Any, *recursion: Any) -> Any:
    """The `loop` of any loop of a rewritten template."""
    return (
        FollowedLoop(iterable).with_items()
        if isinstance(iterable, Visit)
        else LoopContext(iterable, undefined, *recursion)
    )
