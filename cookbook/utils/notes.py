"""Counts of what was found while rows were read and rendered, for the report of their source.

Whoever meets something that the user should know of calls `count`; whoever reads rows collects:

    with notes.collected() as found:
        examples = row_renderer(row)        # somewhere below: notes.count("message", "held an <image>")

Readers of rows and renderers have signatures that users implement, so the counter does not travel
through them: it belongs to the context (a thread, a process) that collects. Where nothing collects, as
when a prompt is sampled, a count is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Note(NamedTuple):
    """What is counted.

    Without an item it is printed as a sentence, `3 messages held an <image>`: `what` is in the past
    tense, which suits one and many. Notes that differ by their `item` are printed as one list,
    `Columns not read: id (9 rows), lang (2 rows)`, of which `what` is the heading.
    """

    noun: str
    """The unit, in the singular."""
    what: str
    item: str = ""


_collecting: ContextVar[Counter[Note] | None] = ContextVar("notes", default=None)


def count(noun: str, what: str, item: str = "", number: int = 1) -> None:
    """Adds to what is being collected. An item may be a key of the user's of any length: it is cut."""
    item = item if len(item) <= MAX_ITEM_LENGTH else f"{item[: MAX_ITEM_LENGTH - 3]}..."
    add({Note(noun, what, item): number})


def add(found: Mapping[Note, int]) -> None:
    """Adds notes that were collected apart."""
    counter = _collecting.get()
    if counter is not None:
        counter.update(found)


@contextmanager
def collected() -> Iterator[Counter[Note]]:
    """Collects what is counted inside. It is not added to what is being collected outside."""
    counter: Counter[Note] = Counter()
    token = _collecting.set(counter)
    try:
        yield counter
    finally:
        _collecting.reset(token)


def lines(found: Mapping[Note, int]) -> list[str]:
    """Sentences and lists, in the order in which they were first met, the most frequent items first."""
    lists: dict[str, list[tuple[Note, int]]] = {}
    for note, number in found.items():
        lists.setdefault(note.what, []).append((note, number))
    return [_line(what, counted) for what, counted in lists.items()]


MAX_ITEM_LENGTH = 200
"""Characters of an item that are kept."""

MAX_ITEMS = 12
"""Items of a list that are printed."""


def _line(what: str, counted: list[tuple[Note, int]]) -> str:
    if not counted[0][0].item:
        return "; ".join(f"{counted_noun(number, note.noun)} {what}" for note, number in counted)
    counted = sorted(counted, key=lambda pair: -pair[1])
    items = [f"{note.item} ({counted_noun(number, note.noun)})" for note, number in counted[:MAX_ITEMS]]
    more = [f"and {len(counted) - MAX_ITEMS:,} more"] if len(counted) > MAX_ITEMS else []
    return f"{what}: {', '.join([*items, *more])}"


def counted_noun(number: int, noun: str) -> str:
    """`1 row`, `1,600 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
