"""Counts of findings while rows are read and rendered, for the report of their source.

Code that finds something the user should know calls `count`. Code that reads rows collects the counts:

    with notes.collected() as found:
        examples = row_renderer(row)        # code below it calls notes.count("message", "held an <image>")

Users implement the signatures of row readers and renderers, so these do not pass the counter. It belongs to
the context (a thread, a process) that collects. If nothing collects, as when a prompt is sampled, a count is
dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Note(NamedTuple):
    """The thing that is counted.

    Without an item it is printed as a sentence, `3 messages held an <image>`. `what` is in the past tense,
    which fits one and many. Notes that differ by their `item` are printed as one list with `what` as its
    heading: `Columns not read: id (9 rows), lang (2 rows)`. A list of the item `USUAL` alone is not printed.
    """

    noun: str
    """The unit, in the singular."""
    what: str
    item: str = ""


USUAL = "usual"
"""The item of a list for what needs no mention by itself."""

_collecting: ContextVar[Counter[Note] | None] = ContextVar("notes", default=None)


def count(noun: str, what: str, item: str = "", number: int = 1) -> None:
    """Adds to the counts that are being collected. An item, such as a key of the user's, is truncated."""
    item = item if len(item) <= MAX_ITEM_LENGTH else f"{item[: MAX_ITEM_LENGTH - 3]}..."
    add({Note(noun, what, item): number})


def add(found: Mapping[Note, int]) -> None:
    """Adds counts that were collected separately."""
    counter = _collecting.get()
    if counter is not None:
        counter.update(found)


@contextmanager
def collected() -> Iterator[Counter[Note]]:
    """Collects the counts of the body. They are not added to those collected outside."""
    counter: Counter[Note] = Counter()
    token = _collecting.set(counter)
    try:
        yield counter
    finally:
        _collecting.reset(token)


def lines(found: Mapping[Note, int]) -> list[str]:
    """Returns sentences and lists in the order of first occurrence, with the most frequent items first."""
    lists: dict[str, list[tuple[Note, int]]] = {}
    for note, number in found.items():
        lists.setdefault(note.what, []).append((note, number))
    return [
        _line(what, counted)
        for what, counted in lists.items()
        if any(note.item != USUAL for note, _ in counted)
    ]


MAX_ITEM_LENGTH = 200
"""The number of characters of an item that are kept."""

MAX_ITEMS = 12
"""The number of items of a list that are printed."""


def _line(what: str, counted: list[tuple[Note, int]]) -> str:
    if not counted[0][0].item:
        return "; ".join(f"{counted_noun(number, note.noun)} {what}" for note, number in counted)
    counted = sorted(counted, key=lambda pair: -pair[1])
    items = [f"{note.item} ({counted_noun(number, note.noun)})" for note, number in counted[:MAX_ITEMS]]
    more = [f"and {len(counted) - MAX_ITEMS:,} more"] if len(counted) > MAX_ITEMS else []
    return f"{what}: {', '.join([*items, *more])}"


def counted_noun(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 row`, `1,600 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
