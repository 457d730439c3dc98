"""Append-only JSON lines that survive a kill between any two bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook import files
from cookbook.errors import DataError


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file this program wrote; none where there is no file.

    Rows are appended whole, so only the last line can be torn; it is left out.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(files.read(path).split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"line {number} of {path} is damaged: {error}. "
                f"Remove that line and those after it; a resumed run measures them again."
            ) from error
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    with files.appending(path) as file:
        file.write(_line(row))


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file by these rows, at once."""
    files.write(path, b"".join(_line(row) for row in rows))


def _line(row: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8. Halves of characters, as in a file name that is no UTF-8, are written as `\\udc80`."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
