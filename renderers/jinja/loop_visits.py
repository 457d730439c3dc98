"""Iterates over the traced loops of a template, and skips iterations that need not run.

The filter `enter` of `incremental` creates a visit of the list that a loop iterates over. The visit yields
the items whose iterations must run, notes what these read, and prints what was recorded for the others.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from renderers.jinja.loop_counts import END, Count, NotTraceable
from renderers.jinja.loop_records import (
    BackwardRecord,
    Iteration,
    IterationEffect,
    LoopCounts,
    LoopEntry,
    Memory,
    Record,
    Suffix,
)
from renderers.jinja.loop_rewriting import Loop
from renderers.jinja.loop_values import ABSENT, Attributes, AttributeTracer, are_frozen, is_frozen, same

_MOST_RECORDS = 4
_MOST_SUFFIXES = 8
_WORTH_A_RECORD = 8
"""The least number of iterations, different by compared attributes alone, that get a record of their own."""


@dataclass
class TemplateRun:
    """One run of a template."""

    messages: Sequence[Any]
    environment: jinja2.Environment
    loops: Sequence[Loop]
    memory: Memory
    pieces: list[str] = field(default_factory=list)
    """The text printed so far."""
    visit: Visit | None = None
    """The traced loop that is running."""


class Visit:
    """One pass through a loop."""

    def __init__(self, run: TemplateRun, items: Sequence[Any], entry: LoopEntry, counts: LoopCounts) -> None:
        self.run = run
        self.messages = entry.messages
        self.counts = counts
        counts.enter()
        self.items = items
        self.entry = entry
        self.index = -1
        """The index of the current item in the list."""
        self._names = {id(attributes): name for name, attributes in entry.namespaces.items()}

    def _need_of_item(self, place: int) -> int:
        """Returns the number of messages for which the list has an item at this index."""
        return self.entry.num_before + place + 1 if self.entry.grows else 0

    def _trace(self, visit: AttributeTracer | None) -> None:
        for attributes in self.entry.namespaces.values():
            attributes.visit = visit

    def is_traced(self, listed: Any) -> bool:
        return any(listed is one for one in self.entry.lists.values())

    def need(self, num_messages: float) -> None:
        """Notes that the current iteration is the same for this number of messages or more."""
        raise NotImplementedError

    def note_item(self, listed: Sequence[Any], position: int) -> None:
        """Notes that an item of one of the lists was read, or read in vain past its end."""
        if not 0 <= position < len(listed):
            self.need(END)
            return
        index = len(self.messages) - len(listed) + position
        self.need(index + 1)
        self.note_read(index)

    def numbers(self, start: int, listed: Sequence[Any]) -> Iterator[int]:
        """Yields the indices of one of the lists from `start` on."""
        for number in range(start, len(listed)):
            self.need(len(self.messages) - len(listed) + number + 1)
            yield number
        self.need(END)

    def note_read(self, index: int) -> None:
        """Notes that the message of this index was read."""

    def note_comparison(self, key: tuple[str, str], left: Any, comparison: str, right: Any) -> None:
        """Notes that `left` was compared with `right`, the value of the attribute `key`."""

    def note_outer(self, name: str) -> None:
        """Notes that a lazy variable was read."""

    def leave(self) -> None:
        """Ends the loop."""

    def end(self) -> None:
        """Ends the run, which may have stopped in the loop with an error."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    # The attributes of `loop`, for the current iteration.

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
            return self.run.environment.undefined("there is no previous item")
        self._note_neighbour(self.index - 1)
        return self.items[self.index - 1]

    def _note_neighbour(self, place: int) -> None:
        if self.entry.grows:
            self.note_read(self.entry.num_before + place)

    def following(self) -> Any:
        if self.is_last():
            return self.run.environment.undefined("there is no next item")
        self._note_neighbour(self.index + 1)
        return self.items[self.index + 1]


def _growing(items: Sequence[Any], messages: Sequence[Any]) -> Sequence[Any]:
    """Returns the messages up to the last one of a list: the list itself, if it is a beginning of them."""
    is_head = type(items) is list and 0 < len(items) < len(messages) and items == messages[: len(items)]
    return items if is_head and items[0] is messages[0] else messages


class ForwardVisit(Visit):
    """A pass through a loop from its first item, or from the first whose iteration must run."""

    def __init__(
        self,
        run: TemplateRun,
        loop: Loop,
        items: Sequence[Any],
        values: Sequence[Any],
        records: list[Record],
        counts: LoopCounts,
    ) -> None:
        super().__init__(run, items, LoopEntry(loop, _growing(items, run.messages), items, values), counts)
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
            self._set_namespaces(record, self._start)
            self.counts.num_reused += self._start
        self._trace(self)
        rest_from = END if self._reuse is None or self._reuse.rest_from is None else self._reuse.rest_from
        for index in range(self._start, len(self.items)):
            if index >= rest_from and self._print_rest(index):
                return
            self._begin(index)
            yield self.items[index]

    def _set_namespaces(self, record: Record, number: int) -> None:
        """Sets the namespaces to what they are before an iteration of a record, or behind its last one."""
        states = record.state_before(number, self.entry)
        for attributes, state in zip(self.entry.namespaces.values(), states, strict=True):
            attributes.become(state)

    def _print_rest(self, index: int) -> bool:
        """Prints the rest of the loop from the record, if the namespaces are as they were recorded there."""
        assert self._reuse is not None
        record = self._reuse.record
        states = record.iterations[index].states
        here = [dict(attributes) for attributes in self.entry.namespaces.values()]
        if record.final is None or not same(here, states):
            return False
        self._close()
        self._trace(None)
        self._is_shortened = True
        self.run.pieces.append(record.text(index))
        self._set_namespaces(record, len(record.iterations))
        return True

    def _begin(self, index: int) -> None:
        self._close()
        self.index = index
        states = [dict(attributes) for attributes in self.entry.namespaces.values()]
        if self._iterations and not are_frozen(states):
            self.need(END)  # for the previous iteration: this one depends on values that may change
        self._iterations.append(Iteration(states, self._need_of_item(index)))
        self._num_pieces = len(self.run.pieces)
        self._is_open = True
        self.counts.num_run += 1

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

    def note_outer(self, name: str) -> None:
        self._iterations[-1].outer.add((name, ""))

    def read(self, attributes: Attributes, name: str, value: Any) -> None:
        """Notes that an attribute was read."""
        key, iteration = (self._names[id(attributes)], name), self._iterations[-1]
        if key not in self._loop.compared and key not in iteration.changed:
            iteration.outer.add(key)

    def read_all(self, attributes: Attributes) -> None:
        for name in attributes:
            self.read(attributes, name, None)

    def set(self, attributes: Attributes, name: str, value: Any) -> None:
        """Notes that an attribute was set."""
        self._iterations[-1].changed.add((self._names[id(attributes)], name))

    def leave(self) -> None:
        self._close()
        self._trace(None)
        final = [dict(attributes) for attributes in self.entry.namespaces.values()]
        self._keep(final if are_frozen(final) else None)

    def end(self) -> None:
        self._trace(None)
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
                del self._records[1]  # the first record is usually that of all messages
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
    """Returns the least and the greatest value on the right side for which the outcome is the same.

    If the two sides are not integers, the range is empty.
    """
    if type(left) is not int or type(right) is not int:
        return END, -END
    if comparison in ("eq", "ne"):
        return (left, left) if left == right else (left + 1, END) if right > left else (-END, left - 1)
    if comparison in ("lt", "gteq"):
        return (left + 1, END) if right > left else (-END, left)
    return (left, END) if right >= left else (-END, left - 1)


class BackwardVisit(Visit):
    """A pass through a loop from its last item, up to an item from which on the effect is recorded."""

    def __init__(
        self,
        run: TemplateRun,
        loop: Loop,
        items: Sequence[Any],
        values: Sequence[Any],
        record: BackwardRecord,
        counts: LoopCounts,
    ):
        super().__init__(run, items, LoopEntry(loop, run.messages, items[::-1], values), counts)
        self._record = record
        self._num_usable = self._fit_record()
        self._steps: list[IterationEffect] = []
        self._num_pieces = 0
        self._rest = Suffix({}, {})
        self._trace(self)

    def _fit_record(self) -> int:
        """Returns the number of first items for which the record holds or can be extended."""
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

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self.items):
            self._close()
            place = len(self.items) - 1 - index
            known = self._known_suffix(place) if place < self._num_usable else None
            if known is not None:
                self._rest = known
                self._trace(None)
                for (name, attribute), value in known.set.items():
                    self.entry.namespaces[name][attribute] = value
                self.counts.num_reused += place
                return
            self.index = index
            self._num_pieces = len(self.run.pieces)
            self.counts.num_run += 1
            self._steps.append(IterationEffect({}, {}, place, self._need_of_item(place)))
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
            self.need(END)  # printed text is not recorded

    def need(self, num_messages: float) -> None:
        self._steps[-1].need = max(self._steps[-1].need, num_messages)

    def read(self, attributes: Attributes, name: str, value: Any) -> None:
        """Notes that an attribute was read."""
        key = (self._names[id(attributes)], name)
        step = self._steps[-1]
        if key not in step.set:
            step.read.setdefault(key, value)

    def read_all(self, attributes: Attributes) -> None:
        raise NotTraceable

    def set(self, attributes: Attributes, name: str, value: Any) -> None:
        """Notes that an attribute was set."""
        self._steps[-1].set[self._names[id(attributes)], name] = value
        if not is_frozen(value):
            self.need(END)

    def leave(self) -> None:
        self._close()
        self._trace(None)
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
        self._trace(None)

    # -- the attributes of `loop`

    def index0(self) -> Any:
        if not self.entry.grows:
            return self.index
        return Count(self, self.index, self.index - len(self.messages))

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
        return (
            self.items[self.index - 1]
            if self.index
            else self.run.environment.undefined("there is no previous item")
        )

    def following(self) -> Any:
        if self.is_last():
            return self.run.environment.undefined("there is no next item")
        return self.items[self.index + 1]
