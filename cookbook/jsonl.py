"""Append-only JSON lines that survive a kill between any two bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook.errors import DataError
from cookbook.lines import limited_lines, max_line_bytes, why_too_long


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file this program wrote; none where there is no file.

    Rows are appended whole, so only the last line can be torn; it is left out.
    """
    if not path.exists():
        return []
    rows = []
    most_bytes = max_line_bytes()
    with path.open("rb") as file:
        lines = list(limited_lines(file, most_bytes))
    if lines and lines[-1] is not None and not lines[-1].endswith(b"\n"):
        del lines[-1]
    for number, line in enumerate(lines, 1):
        if line is None:
            raise DataError(f"line {number} of {path} {why_too_long(most_bytes)}")
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is damaged: {error}. "
                f"Remove that line and those after it; a resumed run measures them again."
            ) from error
    return rows


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
