"""Rows in text files: JSON lines, a JSON list, and tables of cells. All are UTF-8."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from cookbook.errors import DataError
from cookbook.supervised.data.cache import file_digest
from cookbook.supervised.data.sources.base import (
    AnyRow,
    BadRow,
    Chunk,
    ListChunk,
    Row,
    Source,
    batched,
    digest_of,
    row_of,
)

_BOM = b"\xef\xbb\xbf"

JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "steps", "trajectory", "history")
"""Cells of these columns are decoded where they hold JSON."""


class FileSource(Source):
    """One file. `kind` is what its bytes mean."""

    kind: str

    def __init__(self, path: Path, name: str | None = None) -> None:
        if not path.is_file():
            raise DataError(f"Dataset file {path} does not exist.")
        self.path = path
        self.name = name or path.name

    def fingerprint(self) -> str:
        with self._readable():
            return digest_of(self.kind, file_digest(self.path))

    def num_rows(self) -> int | None:
        return None

    def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
        with self._readable():
            is_empty = True
            for chunk in self._chunks(start, size):
                is_empty = False
                yield chunk
            if is_empty and (start == 0 or next(self._chunks(0, 1), None) is None):
                raise DataError(f"{self.path} has no rows.")

    def count_rows(self) -> int:
        """Reads the whole file, decoding nothing where that can be avoided."""
        return sum(len(chunk) for chunk in self.chunks())

    @abstractmethod
    def _chunks(self, start: int, size: int) -> Iterator[Chunk]:
        """The chunks of a file that may have no rows."""

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text: {error}.") from error
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error


# -- JSON lines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinesChunk(Chunk):
    name: str
    lines: list[tuple[int, bytes]]
    """With their numbers in the file, from 1."""

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self) -> list[AnyRow]:
        return [_row_of_line(line, f"line {number} of {self.name}") for number, line in self.lines]


def _row_of_line(line: bytes, place: str) -> AnyRow:
    try:
        return row_of(json.loads(line.decode()), place)
    except (ValueError, RecursionError) as error:
        return BadRow(place, _why_not_json(error))


class JsonLinesSource(FileSource):
    """One JSON object in each line that is not blank. The file may be gzipped."""

    kind = "jsonl"

    def _chunks(self, start: int, size: int) -> Iterator[Chunk]:
        with self._open() as file:
            lines = _lines(file)
            for _ in range(start):
                if next(lines, None) is None:
                    return
            for batch in batched(lines, size):
                yield LinesChunk(self.name, batch)

    def _open(self) -> BinaryIO:
        if self.path.suffix == ".gz":
            return gzip.open(self.path)  # type: ignore[return-value]
        return self.path.open("rb")


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        text = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if text:
            yield number, text


def _why_not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text: {error}."
    if not isinstance(error, json.JSONDecodeError):
        return f"is JSON that cannot be read: {error}."
    where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return f"is not JSON: {error.msg} at {where}."


# -- a JSON list ------------------------------------------------------------------------------


class JsonSource(FileSource):
    """A list of objects. JSON lines under this suffix are read as such."""

    kind = "json"

    def _chunks(self, start: int, size: int) -> Iterator[Chunk]:
        content = self.path.read_bytes().removeprefix(_BOM)
        if _is_json_lines(content):
            yield from JsonLinesSource(self.path, self.name)._chunks(start, size)
            return
        try:
            values = json.loads(content.decode()) if content.strip() else []
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} {_why_not_json(error)}") from error
        if not isinstance(values, list):
            raise DataError(f"{self.path} holds a JSON {type(values).__name__}. Give a list of objects.")
        rows = [row_of(value, f"row {number} of {self.name}") for number, value in enumerate(values)]
        for batch in batched(rows[start:], size):
            yield ListChunk(batch)


def _is_json_lines(content: bytes) -> bool:
    """Whether there are several lines, and the first two that are not blank are objects."""
    found = [
        line for _, line in zip(range(2), (line for _, line in _lines(io.BytesIO(content))), strict=False)
    ]
    return len(found) == 2 and all(isinstance(_row_of_line(line, ""), Row) for line in found)


# -- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellsChunk(Chunk):
    name: str
    header: list[str]
    records: list[tuple[int, list[str]]]
    """With the lines they begin in, from 1."""

    def __len__(self) -> int:
        return len(self.records)

    def rows(self) -> list[AnyRow]:
        return [self._row_of(cells, f"line {line} of {self.name}") for line, cells in self.records]

    def _row_of(self, cells: list[str], place: str) -> AnyRow:
        if len(cells) > len(self.header):
            return BadRow(place, f"has {len(cells)} cells, and the header names {len(self.header)}.")
        named = zip(self.header, cells, strict=False)
        return Row({key: _value_of(key, cell) for key, cell in named if cell}, place)


def _value_of(column: str, cell: str) -> Any:
    if column in JSON_COLUMNS and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


class CsvSource(FileSource):
    """Rows of cells under a header. An empty cell is an absent key."""

    kind = "csv"
    _delimiter = ","

    def _chunks(self, start: int, size: int) -> Iterator[Chunk]:
        csv.field_size_limit(2**31 - 1)  # of the whole process; the default refuses a cell of 128 KiB
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            records = self._records(file)
            header = next(records, (1, []))[1]
            if doubled := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{self.path} has two columns `{doubled[0]}`. Rename one.")
            for _ in range(start):
                if next(records, None) is None:
                    return
            for batch in batched(records, size):
                yield CellsChunk(self.name, header, batch)

    def _records(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(file, delimiter=self._delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"line {line} of {self.path} is no row of cells: {error}.") from error
            if cells is None:
                return
            if cells:
                yield line, cells


class TsvSource(CsvSource):
    kind = "tsv"
    _delimiter = "\t"
