"""JSON lines that survive a kill between any two bytes."""

from __future__ import annotations

from pathlib import Path

from cookbook import jsonl


def test_a_file_torn_at_any_byte_reads_as_the_rows_that_are_whole(tmp_path: Path) -> None:
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


def test_rewriting_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, {"step": 0})
    jsonl.rewrite(path, [{"step": 1}, {"step": 2}])
    assert jsonl.read(path) == [{"step": 1}, {"step": 2}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
