"""Files that are larger than they look: very long lines, and files that decompress to much more."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slow import slow_after

from cookbook.data.sources import BadRow, Row, base, open_source
from cookbook.errors import ConfigError, DataError
from cookbook.utils import jsonl, lines

MIB = 2**20
SMALL = {"text": "small"}


@pytest.fixture(autouse=True)
def _one_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOKBOOK_MAX_LINE_MIB", "1")


def rows_of(path: Path) -> list[Row | BadRow]:
    return list(open_source(str(path)).rows())


def line(num_bytes: int) -> str:
    """Returns a row of JSON of this many bytes."""
    return json.dumps({"text": "x" * (num_bytes - len(json.dumps({"text": ""})))})


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_a_line_above_the_limit_is_a_bad_row_with_advice(name: str, tmp_path: Path) -> None:
    text = "\n".join([json.dumps(SMALL), line(MIB), line(MIB + 1), json.dumps(SMALL)])
    first, longest, bad, last = rows_of(write(tmp_path / name, text))
    assert [first, last] == [SMALL, SMALL]
    assert isinstance(longest, Row)
    assert bad == BadRow(
        f"line 3 of {name}",
        "is longer than 1 MiB. Split it, or raise the limit: COOKBOOK_MAX_LINE_MIB=4",
    )


def test_the_limit_of_a_line_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", line(3 * MIB))
    assert isinstance(rows_of(path)[0], BadRow)
    monkeypatch.setenv("COOKBOOK_MAX_LINE_MIB", "4")
    assert len(rows_of(path)[0]["text"]) > 2 * MIB  # type: ignore[call-overload]
    for wrong in ("0", "none", "-1", "1.5", "9" * 30):
        monkeypatch.setenv("COOKBOOK_MAX_LINE_MIB", wrong)
        with pytest.raises(ConfigError, match=r"give a whole number of MiB, such as 64\."):
            rows_of(path)


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "a.csv": "text\nsmall\n" + "x" * (MIB + 1),
        "a.tsv": "text\tother\nsmall\t\n" + "x\t" * MIB,
        "b.csv": 'text\nsmall\n"' + "a line\n" * (MIB // 4),
        "c.csv.gz": 'text\nsmall\n"' + "a line\n" * (MIB // 4),
    }.items(),
)
def test_a_csv_record_above_the_limit_is_refused_with_its_line(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"row from line 3 of .*{name} on is longer than 1 MiB"):
        rows_of(write(tmp_path / name, text))


def test_a_cell_within_the_limit_is_read(tmp_path: Path) -> None:
    quoted = '"' + "a line\n" * 100_000 + '"'
    (row,) = rows_of(write(tmp_path / "a.csv", f"text\n{quoted}\n"))
    assert row == {"text": "a line\n" * 100_000}


def test_a_compressed_list_that_is_larger_than_many_lines_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json.gz", "[" + ",\n".join([line(MIB)] * 17) + "]")
    with pytest.raises(DataError, match=r"a\.json\.gz has more than 16 MiB of text.*jq -c '\.\[\]'"):
        rows_of(path)


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000, '{"a":' * 100_000])
def test_endless_nesting_and_endless_numbers_are_bad_rows(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ' + value + '}\n{"text": "small"}\n')
    bad, good = rows_of(path)
    assert good == SMALL
    assert isinstance(bad, BadRow)
    assert bad.place == "line 1 of a.jsonl"
    assert "JSON" in bad.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "folder"]))
def test_chunks_of_large_rows_have_fewer_rows(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "x" * (900_000 if number % 5 else 1)} for number in range(60)]
    source = open_source(str(_written(tmp_path / name, rows)))
    for start in (0, 1, 17, 59):
        chunks = list(source.chunks(start, 60))
        assert [row for chunk in chunks for row in chunk.rows()] == rows[start:]
        sizes = [sum(len(row["text"]) for row in chunk.rows()) for chunk in chunks]  # type: ignore[misc]
        assert max(sizes) < 2 * base.MAX_CHUNK_BYTES + MIB
    assert len(list(source.chunks(0, 60))) > 1


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".arrow":
        table.save_to_disk(path.parent / "saved")
        return next((path.parent / "saved").glob("*.arrow"))
    else:
        path.mkdir()
        for number, first in enumerate(range(0, len(rows), 30)):
            _written(path / f"{number}.jsonl", rows[first : first + 30])
    return path


def test_a_row_group_whose_rows_are_above_the_limit_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet", [{"text": "x" * 3 * MIB}])
    assert path.stat().st_size < MIB
    with pytest.raises(DataError, match=r"Row group 0 of .*a\.parquet has 3,\d+,\d+ bytes in 1 rows"):
        rows_of(path)


def test_a_run_names_the_line_of_its_records_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + b"x" * 2 * MIB + b'\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl is longer than 1 MiB"):
        jsonl.read(path)
    path.write_bytes(b'{"step": 0}\n' + b"[" * 500_000 + b"\n")
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        jsonl.read(path)


MEASURE = """
import resource, sys
from cookbook.data.sources import open_source
source = open_source(sys.argv[1])
next(iter(source.chunks()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bad = [row for row in source.rows() if hasattr(row, "reason")]
print(len(bad), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _bad_and_mib(path: Path) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    bad, mib = map(int, done.stdout.split())
    return bad, mib


def _write_bomb(path: Path, num_mib: int) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(json.dumps(SMALL).encode() + b'\n{"text": "')
        for _ in range(num_mib):
            file.write(b"x" * MIB)
        file.write(b'"}\n' + json.dumps(SMALL).encode() + b"\n")
    return path


@pytest.mark.slow
def test_a_compressed_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = _write_bomb(tmp_path / "a.jsonl.gz", 200)
    assert path.stat().st_size < 2 * MIB
    bad, mib = _bad_and_mib(path)
    assert bad == 1
    assert mib < 50


@pytest.mark.slow
def test_four_gigabytes_in_a_few_megabytes_are_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COOKBOOK_MAX_LINE_MIB", str(lines.MAX_LINE_MIB))
    bad, mib = _bad_and_mib(_write_bomb(tmp_path / "a.jsonl.gz", 4096))
    assert bad == 1
    assert mib < 300
