"""Tests that JSON lines stay readable when a process is killed between any two bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cookbook.errors import DataError
from cookbook.runs.rows import METRICS_SHAPE, METRICS_VALUE
from cookbook.utils import jsonl


def test_a_file_truncated_at_any_byte_reads_as_its_complete_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": 0, "text": "é\n"}, {"step": 1}, {"step": 2, "text": "🏴"}]
    for row in rows:
        jsonl.append(path, row)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        assert jsonl.read(path) == rows[: content[:length].count(b"\n")]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert jsonl.read(tmp_path / "none.jsonl") == []


def test_rewriting_replaces_the_file_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, {"step": 0})
    jsonl.rewrite(path, [{"step": 1}, {"step": 2}])
    assert jsonl.read(path) == [{"step": 1}, {"step": 2}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_reading_backwards_reverses_the_rows_for_any_block_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "text": "é\n" * step} for step in range(9)]
    jsonl.rewrite(path, rows)
    content = path.read_bytes()
    for block_size in (1, 2, 7, 60, 1 << 16):
        for length in {*range(0, len(content) + 1, 11), len(content)}:
            path.write_bytes(content[:length])
            assert list(jsonl.read_backwards(path, block_size=block_size)) == jsonl.read(path)[::-1]
    assert list(jsonl.read_backwards(tmp_path / "none.jsonl")) == []


def test_only_the_last_rows_of_a_long_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("damaged\n" * 100_000 + '{"step": 7}\n', encoding="utf-8")
    rows = jsonl.read_backwards(path)
    assert next(rows) == {"step": 7}
    with pytest.raises(DataError, match="The line b'damaged' of .*rows.jsonl is damaged"):
        next(rows)


def test_nothing_is_read_after_a_line_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n', encoding="utf-8")
    os.truncate(path, 1 << 40)  # reading this would take hours
    with pytest.raises(DataError, match=r"line 2 of .*rows.jsonl is longer than 64 MiB"):
        jsonl.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long_is_not_read_backwards_to_its_start(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse file
        file.seek(0, os.SEEK_END)
        file.write(end)
    started = time.process_time()
    with pytest.raises(DataError, match="line of .* is longer than 64 MiB"):
        list(jsonl.read_backwards(path))
    assert time.process_time() - started < 60


def test_rows_are_checked_backwards_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "test/nll": "low"}\n', encoding="utf-8")
    with pytest.raises(DataError, match='`test/nll` is "low", expected a number'):
        list(jsonl.read_backwards(path, METRICS_SHAPE, METRICS_VALUE))
