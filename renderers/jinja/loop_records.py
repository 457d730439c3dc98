"""Records what the iterations of a template's loops printed, and for which other lists of messages it holds.

The body of a loop can read its own item, other items and the length of lists, outer variables, and namespaces
that earlier iterations set. No other state lasts from one iteration to the next. All of these reads are
traced while the loop runs (`loop_visits`), and kept with the text. When the same loop is entered again for
more or fewer messages, an iteration that would read the same values is not run: its recorded text is printed,
and the namespaces are set to their recorded values.

A loop that runs from the end of a list sees different items at every number of messages. For such a loop the
effect of the remaining iterations is recorded for each item: which attributes of namespaces they read before
setting them, and which values they set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from renderers.jinja.loop_counts import END
from renderers.jinja.loop_rewriting import Loop
from renderers.jinja.loop_values import Attributes, length_of_common_start, same
from renderers.jinja.private import Namespace, attributes_of

_ENOUGH_ENTRIES = 16
"""How often a loop is entered before it is decided whether to trace it further."""


Key: TypeAlias = tuple[str, str]
"""A namespace and its attribute, or a variable and an empty string."""


@dataclass
class Iteration:
    """What was observed during one run of a loop's body."""

    states: list[dict[str, Any]]
    """The attributes of the namespaces before the iteration."""
    need: float
    """The least number of messages for which the iteration is the same."""
    bounds: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of each compared attribute for which all comparisons are the same."""
    read: set[int] = field(default_factory=set)
    """The indices of the messages that it read."""
    outer: set[Key] = field(default_factory=set)
    """The lazy variables, and the attributes that it had not set before, that it read."""
    changed: set[Key] = field(default_factory=set)
    """The attributes that it set."""
    text: str = ""


class Record:
    """The iterations of one loop, for one conversation."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.iterations: list[Iteration] = []
        self._needs: list[float] = []
        """For each iteration, the least number of messages for which all iterations up to it are the same."""
        self._lows: dict[tuple[str, str], list[float]] = {key: [] for key in loop.compared}
        self._negative_highs: dict[tuple[str, str], list[float]] = {key: [] for key in loop.compared}
        self._last_readers: dict[int, int] = {}
        self._first_reads: dict[Key, int] = {}
        """The first iteration that reads a variable, or an attribute as it was before the loop."""
        self._first_sets: dict[Key, int] = {}
        """The first iteration that sets an attribute."""
        self._text = ""
        self._ends = [0]
        """For each iteration, the position where the text of the iterations before it ends."""
        self.entry: LoopEntry
        self.final: list[dict[str, Any]] | None = None
        """The attributes of the namespaces after the loop; None if they may be changed later."""

    def replace_from(self, start: int, iterations: Sequence[Iteration], entry: LoopEntry) -> None:
        del self.iterations[start:]
        del self._ends[start + 1 :]
        self._text = "".join((self._text[: self._ends[-1]], *(iteration.text for iteration in iterations)))
        for numbers in (self._needs, *self._lows.values(), *self._negative_highs.values()):
            del numbers[start:]
        for firsts in (self._first_reads, self._first_sets):
            for key in [key for key, number in firsts.items() if number >= start]:
                del firsts[key]
        for number, iteration in enumerate(iterations, start):
            self.iterations.append(iteration)
            for key in iteration.outer - self._first_sets.keys():
                self._first_reads.setdefault(key, number)
            for key in iteration.changed:
                self._first_sets.setdefault(key, number)
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
        """Returns what the iterations from `start` to `stop` printed."""
        return self._text[self._ends[start] : None if stop is None else self._ends[stop]]

    def beginning(self, num_iterations: int) -> Record:
        copied = Record(self._loop)
        copied.replace_from(0, self.iterations[:num_iterations], self.entry)
        return copied

    def state_before(self, number: int, entry: LoopEntry) -> list[dict[str, Any]]:
        """Returns the attributes of the namespaces before an iteration, or behind the last one.

        They are those of another entry into the loop, as far as no iteration before has set them.
        """
        states = []
        recorded = self.final if number == len(self.iterations) else self.iterations[number].states
        assert recorded is not None
        for name, state in zip(entry.initial, recorded, strict=True):
            initial = entry.initial[name]
            unset = {
                key: initial[key] for key in initial if self._first_sets.get((name, key), number) >= number
            }
            states.append({**state, **unset})
        return states

    def reuse(self, entry: LoopEntry) -> Reuse | None:
        """Returns the part of this record that holds for a new entry into the loop; None if nothing does."""
        if not self.iterations or entry.num_before != self.entry.num_before:
            return None
        found = self.entry.compared_with(entry)
        if found is None:
            return None
        first, last, others = found
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
        unread = min((self._first_reads.get(key, last_iteration) for key in others), default=last_iteration)
        start = min(as_long, in_bounds, last_iteration, unread)
        rest = None
        is_whole = in_bounds == len(self.iterations) == entry.num_items and self.final is not None
        is_as_long = (entry.num_items, entry.num_messages) == (self.entry.num_items, self.entry.num_messages)
        if first is not None and is_whole and is_as_long and not others:
            readers = [self._last_readers.get(index, -1) for index in range(first, last + 1)]
            rest = max(last - entry.num_before, *readers) + 1
        return Reuse(self, start, min(as_long, last_iteration) - start, rest)


@dataclass(frozen=True)
class Reuse:
    """The part of a record that can be reused."""

    record: Record
    start: int
    """The number of first iterations that are reused."""
    num_out_of_bounds: int
    """The number of further iterations that cannot be reused because of compared attributes alone."""
    rest_from: int | None
    """The iteration from which on all are the same if the namespaces are, for a list of the same length."""


def _may_grow(value: Any, messages: Sequence[Any]) -> bool:
    """Returns whether the value may be a range, or the list of messages or a tail of it."""
    if type(value) is range:
        return True
    num_before = len(messages) - len(value) if type(value) is list else -1
    return bool(value) and num_before >= 0 and value[0] is messages[num_before]


class Difference(NamedTuple):
    """What differs between two entries into a loop."""

    first: int | None
    last: int
    """The first and the last message that differ; None and -1 if no common one does."""
    others: set[Key]
    """The lazy variables and the attributes of namespaces that differ."""


class LoopEntry:
    """The state in which a loop is entered."""

    def __init__(
        self, loop: Loop, messages: Sequence[Any], items: Sequence[Any], values: Sequence[Any]
    ) -> None:
        self._loop = loop
        self.messages = messages
        self.num_messages = len(messages)
        self.items = items
        self.num_items = len(items)
        self.grows = _may_grow(items, messages)
        """Whether the list may be the list of messages or a tail of it."""
        self.num_before = len(messages) - len(items) if self.grows else 0
        """The number of messages before those in the list."""
        self.values: dict[str, Any] = {}
        """The outer variables that are not namespaces."""
        self.lists: dict[str, Sequence[Any]] = {}
        """The outer variables of which only items and the length are read."""
        self.lazy: dict[str, Any] = {}
        """The outer variables each read of which is noted."""
        self.namespaces: dict[str, Attributes] = {}
        for name, value in zip(loop.names, values, strict=True):
            if isinstance(value, Namespace):
                self.namespaces[name] = attributes_of(value)
                continue
            if name in loop.lazy:
                self.lazy[name] = value
                continue
            self.values[name] = value
            if name in loop.indexed and _may_grow(value, messages):
                self.lists[name] = value
        self.initial = {name: dict(attributes) for name, attributes in self.namespaces.items()}

    def _outer(self) -> tuple[dict[str, Any], ...]:
        return self.values, self.lazy, self.initial

    def attribute(self, name: str, attribute: str) -> Any:
        return self.initial.get(name, {}).get(attribute)

    def compared_with(self, other: LoopEntry, with_namespaces: bool = True) -> Difference | None:
        """Returns what differs, except attributes that the body only compares.

        Returns None if a variable differs that is not lazy, or what a loop iterates over. Without
        `with_namespaces` their content is not compared.
        """
        if any(list(here) != list(there) for here, there in zip(self._outer(), other._outer(), strict=True)):
            return None
        if self.grows != other.grows or not (self.grows or same(self.items, other.items)):
            return None
        others = {(name, "") for name, value in self.lazy.items() if not same(value, other.lazy[name])}
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
                    others.add((name, attribute))
        found = self._different_messages(pairs, other)
        return None if found is None else Difference(*found, others)

    def _different_messages(
        self, pairs: Sequence[tuple[Any, Any]], other: LoopEntry
    ) -> tuple[int | None, int] | None:
        first, last = None, -1
        for here, there in pairs:
            if type(here) is not type(there):
                return None
            num_before = self.num_messages - len(here)
            if num_before != other.num_messages - len(there):
                return None
            start = length_of_common_start(here, there)
            if start < min(len(here), len(there)):
                first = start + num_before if first is None else min(first, start + num_before)
                end = min(len(here), len(there))
                while here[end - 1] is there[end - 1]:
                    end -= 1
                last = max(last, end - 1 + num_before)
        return first, last


# -- loops from the last item to the first ------------------------------------------------------


@dataclass
class Suffix:
    """The effect on the namespaces of the iterations from one item back to the first."""

    read: dict[tuple[str, str], Any]
    """The values of the attributes that the iterations depend on."""
    set: dict[tuple[str, str], Any]
    """The values of the attributes that the iterations set."""


@dataclass
class IterationEffect(Suffix):
    """The effect of one iteration on the namespaces."""

    index: int
    """The index of its item, counted from the start of the list."""
    need: float
    """The least number of messages for which the iteration is the same."""


class BackwardRecord:
    """The effects of the last iterations of a loop that runs from the last item to the first."""

    def __init__(self) -> None:
        self.entry: LoopEntry | None = None
        self.suffixes: dict[int, list[Suffix]] = {}
        """The effects, by the index of the item with which they begin."""


# -- one conversation ---------------------------------------------------------------------------


@dataclass
class LoopCounts:
    """How often the iterations of one loop were run and reused."""

    num_entries: int = 0
    num_run: int = 0
    num_reused: int = 0
    is_of_use: bool = True
    """False once a loop is no longer traced, because most of its iterations were run again."""
    _before: tuple[int, int] = (0, 0)

    def enter(self) -> None:
        """Counts an entry, of which the first one can reuse nothing."""
        self.num_entries += 1
        if self.num_entries % _ENOUGH_ENTRIES == 2:
            num_run, num_reused = self._before
            self._before = self.num_run, self.num_reused
            if self.num_entries > 2:
                self.is_of_use = self.num_reused - num_reused > self.num_run - num_run


class Memory:
    """The records of one conversation under one template."""

    def __init__(self) -> None:
        self.records: dict[int, list[Record]] = {}
        self.backward_records: dict[int, BackwardRecord] = {}
        self.loops: dict[int, LoopCounts] = {}
        self.num_runs = 0

    @property
    def num_iterations(self) -> int:
        """The number of iterations that were run."""
        return sum(loop.num_run for loop in self.loops.values())

    @property
    def num_reused(self) -> int:
        """The number of iterations that were reused instead."""
        return sum(loop.num_reused for loop in self.loops.values())

    @property
    def is_of_use(self) -> bool:
        return not self.loops or any(loop.is_of_use for loop in self.loops.values())
