"""Append-only JSON lines that survive a kill between any two bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook import json_files
from cookbook.errors import DataError
from cookbook.json_files import Origin

REPAIR = "Remove that line and those after it; a resumed run measures them again."


def read(path: Path, shape: Mapping[str, Any] | None = None, rest: Any = Any) -> list[dict[str, Any]]:
    """The rows of a file this program wrote; none where there is no file.

    Rows are appended whole, so only the last line can be torn; it is left out. Each is an object with the
    keys and types of `shape`, and `rest` under every other key (see `json_files`).
    """
    if not path.exists():
        return []
    content = json_files.read_bytes(path, Origin(str(path), DataError, "Restore or remove it."))
    return [
        row_of(line, origin_of(path, number), shape, rest)
        for number, line in enumerate(content.split(b"\n")[:-1], 1)
    ]


def origin_of(path: Path, line_number: int) -> Origin:
    return Origin(f"line {line_number} of {path}", DataError, REPAIR)


def row_of(
    line: bytes, origin: Origin, shape: Mapping[str, Any] | None = None, rest: Any = Any
) -> dict[str, Any]:
    row = json_files.object_of(line, origin)
    json_files.check(row, shape or {}, origin, rest)
    return row


def append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(_line(row))


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file by these rows, at once."""
    write_atomically(path, b"".join(_line(row) for row in rows))


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def encoded(text: str) -> bytes:
    """JSON in UTF-8. Halves of characters, as in a file name that is no UTF-8, are written as `\\udc80`."""
    return text.encode(errors="backslashreplace")


def _line(row: Mapping[str, Any]) -> bytes:
    return encoded(json.dumps(row, ensure_ascii=False) + "\n")
