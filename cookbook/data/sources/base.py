"""The interface of sources of rows."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "steps", "trajectory", "history")
"""Columns of lists, which a table of text holds as JSON."""

_PYTHON_REPR = re.compile(r"\s*+(array\()?[\s\[(]*+\{\s*+'")


class Row(dict[str, Any]):
    """A row of a dataset. `place` is its position, for error messages: line 7 of chats.jsonl."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.place)


class BadRow(NamedTuple):
    """A row that cannot be read. `reason` ends the sentence that `place` and a colon begin."""

    place: str
    reason: str


AnyRow: TypeAlias = Row | BadRow


class Chunk(ABC):
    """Successive rows as they were stored. Pickled, it takes little more room than they do."""

    @abstractmethod
    def rows(self) -> list[AnyRow]:
        """Decodes the rows."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, known without decoding them."""


class Source(ABC):
    """Rows in one place, in an order that does not change."""

    name: str
    """For messages, short."""
    files: Sequence[str] = ()
    """The files of a folder that the rows are in; none where `name` is enough."""
    unread: Sequence[str] = ()
    """The files of that folder that are in no split or hold no data."""
    evaluation: Source | None = None
    """The splits of the same folder to evaluate on."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever a row does."""

    @abstractmethod
    def num_rows(self) -> int | None:
        """The number of rows; None where counting means reading all of them."""

    @abstractmethod
    def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
        """The rows from number `start` on, `size` in each chunk but the last, or fewer where they are large.

        Rows before `start` are not decoded. Raises DataError where there are none at all.
        """

    def rows(self, start: int = 0) -> Iterator[AnyRow]:
        for chunk in self.chunks(start):
            yield from chunk.rows()


@dataclass(frozen=True)
class ListChunk(Chunk):
    """Rows that are decoded already."""

    decoded: list[AnyRow]

    def __len__(self) -> int:
        return len(self.decoded)

    def rows(self) -> list[AnyRow]:
        return self.decoded


def row_of(value: Any, place: str) -> AnyRow:
    """An object as a row. A bad one is anything else, and one whose list is Python's repr of a list."""
    if not isinstance(value, dict):
        return BadRow(place, f"is a JSON {type(value).__name__}, not an object.{_how_to_write_a_list(value)}")
    for column in JSON_COLUMNS:
        if isinstance(text := value.get(column), str) and _PYTHON_REPR.match(text):
            return BadRow(
                place,
                f"`{column}` is Python's repr of its value (single quotes), not JSON. Write it with "
                f"json.dumps(value), or save the table as Parquet.",
            )
    return Row(value, place)


def _how_to_write_a_list(value: Any) -> str:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return ""
    if "role" in value[0] or "from" in value[0]:
        return ' Write {"messages": [...]}.'
    return " Write one object a line; a file that is one list is named .json."


def without_nulls(value: Any) -> Any:
    """The value without the keys, at any depth, that hold None: Arrow fills in those a row lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


MAX_CHUNK_BYTES = 2**24
"""A chunk that has got so large takes no more rows."""


def batched(values: Iterable[T], size: int, bytes_of: Callable[[T], int] | None = None) -> Iterator[list[T]]:
    """Lists of `size` values; where their bytes are counted, of fewer once they are `MAX_CHUNK_BYTES`."""
    iterator = iter(values)
    if bytes_of is None:
        while batch := list(islice(iterator, size)):
            yield batch
        return
    batch, num_bytes = [], 0
    for value in iterator:
        batch.append(value)
        num_bytes += bytes_of(value)
        if len(batch) == size or num_bytes >= MAX_CHUNK_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def digest_of(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
