"""Tests of the metrics of a run, each row of which is read once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cookbook.errors import DataError
from cookbook.runs import metrics
from cookbook.runs.metrics import MetricsReader
from cookbook.utils import jsonl


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "train/nll": 2.0 / (1 + step), "perf/seconds": 0.1 + step * 1e-7, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def values_read_by(reader: MetricsReader) -> dict[str, list[tuple[int, float]]]:
    reader.update()
    return {
        name: list(zip(column.steps, column.values, strict=True)) for name, column in reader.columns.items()
    }


def truth(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The slow reference: reads all rows each time."""
    found: dict[str, list[tuple[int, float]]] = {}
    for one in jsonl.read(path):
        for name, value in one.items():
            if name != "step":
                found.setdefault(name, []).append((one["step"], value))
    return found


@pytest.mark.slow
def test_an_update_reads_only_new_rows(tmp_path: Path, bytes_read: Callable[[], int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step) for step in range(50_000)])
    reader = MetricsReader(tmp_path)
    reader.update()
    whole = path.stat().st_size
    before = bytes_read()
    for step in range(50_000, 50_100):
        jsonl.append(path, row(step))
        reader.update()
        reader.update()
    read = bytes_read() - before
    assert read < 100 * 3_000, "each update reads a row and the bytes before it"
    assert read < whole / 10
    assert values_read_by(reader) == truth(path)


def test_an_incomplete_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = "".join(json.dumps(row(step)) + "\n" for step in range(4)).encode()
    reader = MetricsReader(tmp_path)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length]) if length == 0 else path.open("ab").write(
            content[length - 1 : length]
        )
        assert values_read_by(reader) == truth(path)


CHANGES = {
    "resumed: the last rows are measured again": lambda path: jsonl.rewrite(
        path, [row(step) for step in range(5)] + [row(step, again=1) for step in range(5, 12)]
    ),
    "resumed twice between two looks": lambda path: [
        jsonl.rewrite(path, [row(step, life=life) for step in range(12)]) for life in (1, 2)
    ],
    "cut": lambda path: os.truncate(path, path.read_bytes().index(b'{"step": 5')),
    "cut and written on beyond where it was": lambda path: (
        os.truncate(path, path.stat().st_size // 2 + 1),
        write_over(path, [row(step, other=step) for step in range(30)]),
    ),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "another run in its place": lambda path: (path.unlink(), write(path, [row(step) for step in range(3)])),
    "written anew and as it was": lambda path: jsonl.rewrite(path, jsonl.read(path)),
}


def write_over(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rewrites the file in place, so that it keeps its inode."""
    with path.open("r+b") as file:
        file.write("".join(json.dumps(one) + "\n" for one in rows).encode())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_was_replaced_is_read_again(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step) for step in range(10)])
    reader = MetricsReader(tmp_path)
    assert values_read_by(reader) == truth(path)
    change(path)
    assert values_read_by(reader) == truth(path)
    jsonl.append(path, row(12, late=1.5))
    assert values_read_by(reader) == truth(path)


def test_updates_after_any_changes_equal_reading_the_whole_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "metrics.jsonl"
    write(path, [])
    readers = [MetricsReader(tmp_path) for _ in range(2)]
    for turn in range(300):
        kind = rng.integers(6)
        rows = jsonl.read(path)
        if kind == 0:
            jsonl.rewrite(path, rows[: rng.integers(len(rows) + 1)])
        elif kind == 1:
            os.truncate(path, rng.integers(path.stat().st_size + 1))
            rows = jsonl.read(path)
            jsonl.rewrite(path, rows) if rng.random() < 0.5 else os.truncate(
                path, sum(len(json.dumps(one)) + 1 for one in rows)
            )
        else:
            jsonl.append(path, row(len(jsonl.read(path)), turn=turn))
        for reader in readers[: rng.integers(3)]:
            assert values_read_by(reader) == truth(path)


@pytest.mark.slow
def test_large_files_are_read_like_small_ones(tmp_path: Path) -> None:
    """Bit for bit and in the same order of metrics, by both parsers, for any block size."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(3_000):
        one: dict[str, Any] = {"step": step, "epoch": 0, "train/nll": float(rng.normal())}
        one |= {"data/tokens": int(rng.integers(2**40)), "mixed": step if step % 3 else step / 7}
        one |= {"test/nll": float(rng.random()), "late": 2**63 + step} if step % 500 == 0 else {}
        one |= {"tiny": 5e-324, "huge": 1e308, "below": -0.0} if step > 2_000 else {}
        rows.append(one)
    write(tmp_path / "metrics.jsonl", rows)
    expected = values_read_by(MetricsReader(tmp_path, arrow_from_bytes=1 << 60))
    for block_size in (1 << 10, 1 << 16, 1 << 24):
        fast = values_read_by(MetricsReader(tmp_path, arrow_from_bytes=1, block_size=block_size))
        assert list(fast) == list(expected)
        assert repr(fast) == repr(expected)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert metrics._columns_by_arrow(content) is not None, "the intended parser was used"


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 7, "a": NaN}', '{"step": 7, "a": -Infinity}', '{"step": 7, "a": true}',
        '{"step": 7, "a": 1e400}', '{"step": 7, "\\u00e9": 1}',
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_skipped_by_both_parsers(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row(6))}\n{line}\n{json.dumps(row(8))}\n", encoding="utf-8")
    found = {}
    for limit in (1 << 60, 1):
        reader = MetricsReader(tmp_path, arrow_from_bytes=limit)
        found[limit] = repr(values_read_by(reader))
        (value,) = [value for key, value in json.loads(line).items() if key != "step"]
        assert ("a" in reader.series() or "é" in reader.series()) == math.isfinite(value)
    assert found[1] == found[1 << 60]


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "7", "[]", '{"train/nll": 1}', '{"step": "a"}', '{"step": 1.5}', '{"step": -1}',
        '{"step": 7, "a": null}', '{"step": 7, "a": "x"}', '{"step": 7, "a": [1]}',
        '{"step": 7, "a": {"b": 1}}', '{"step": 7, "a": 1, "a": 2}', f'{{"step": 7, "a": {10**400}}}',
        f'{{"step": {2**70}}}', '{"step": null}', '{"step": 1}{"step": 2}', "\ufeff", "[" * 100_000,
    ],
)  # fmt: skip
def test_an_invalid_row_raises_an_error_with_its_line_at_every_update(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row(6))}\n{line}\n{json.dumps(row(8))}\n", encoding="utf-8")
    for limit in (1 << 60, 1):
        reader = MetricsReader(tmp_path, arrow_from_bytes=limit)
        for _ in range(2):
            with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
                reader.update()
        write(path, [row(6)])
        assert values_read_by(reader) == truth(path)
        path.write_text(f"{json.dumps(row(6))}\n{line}\n{json.dumps(row(8))}\n", encoding="utf-8")


def test_only_the_requested_metrics_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [row(step) for step in range(10)])
    reader = MetricsReader(tmp_path, keep={"train/nll"})
    reader.update()
    assert {name: len(column.steps) for name, column in reader.columns.items()} == {
        "train/nll": 10,
        "perf/seconds": 0,
    }
