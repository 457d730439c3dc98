"""Examples are read from disk as they were written."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cookbook.data.rendered import TrainableRows
from cookbook.data.store import BadRowNote, Example, ExampleStore, StoreWriter, make_block, open_store
from cookbook.utils.notes import Note

Rows = list[list[Example]]

weights = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 2.0])
examples = st.lists(weights, min_size=1, max_size=9).map(
    lambda values: Example.of(np.arange(len(values), dtype=np.int32) * 7 + 3, np.asarray(values, np.float32))
)
rows_of_examples = st.lists(st.lists(examples, max_size=3), max_size=6)


def write(path: Path, rows: Rows, rows_per_block: int) -> ExampleStore:
    with StoreWriter(path) as writer:
        for first in range(0, len(rows), rows_per_block):
            block = rows[first : first + rows_per_block]
            writer.append(make_block([(f"row {first + i}", row) for i, row in enumerate(block)], [], 0))
    return ExampleStore(path, "some")


@pytest.mark.slow
@settings(deadline=None)
@given(rows=rows_of_examples, rows_per_block=st.integers(1, 4))
def test_every_example_of_every_row_is_read_back(rows: Rows, rows_per_block: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder) / "store", rows, rows_per_block)
        assert store.num_rows == len(rows)
        assert store.num_examples == sum(map(len, rows))
        for number, row in enumerate(rows):
            found = store.examples_of_row(number)
            assert [store.tokens[e].tolist() for e in found] == [e.tokens_T.tolist() for e in row]
            assert [store.weights_T(e).tolist() for e in found] == [e.weights_T.tolist() for e in row]
            assert not row or store.place_of_row(number) == f"row {number}"
        whole = write(Path(folder) / "whole", rows, 100)
        assert store.meta.digest == whole.meta.digest


@pytest.mark.slow
@settings(deadline=None)
@given(rows=rows_of_examples, max_length=st.none() | st.integers(1, 10))
def test_trained_tokens_are_counted_without_the_first_token_and_truncated_ones(
    rows: Rows, max_length: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder) / "store", rows, 2)
        counted = [int(np.count_nonzero(e.weights_T[1:max_length])) for row in rows for e in row]
        assert store.trained_tokens_E(max_length).tolist() == counted


def branches(row: Rows) -> Rows:
    """Returns rows of the same examples, in which each shares what it can with a random earlier one."""
    shared = []
    for examples_of_row in row:
        made: list[Example] = []
        for number, example in enumerate(examples_of_row):
            base = made[(number * 7) % number] if number else None
            alike = example.tokens_T[: base.num_tokens] == base.tokens_T[: example.num_tokens] if base else []
            num = int(np.argmin([*alike, False]))
            own_T = example.tokens_T[num:]
            made.append(Example(own_T, example.runs, base, num) if base else example)
        shared.append(made)
    return shared


@settings(deadline=None)
@given(rows=rows_of_examples, rows_per_block=st.integers(1, 4))
def test_shared_tokens_are_stored_once_and_change_neither_examples_nor_digest(
    rows: Rows, rows_per_block: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "whole", rows, rows_per_block)
        store = write(Path(folder) / "shared", branches(rows), rows_per_block)
        for number in [*range(store.num_examples), *reversed(range(store.num_examples))]:
            assert store.tokens[number].tolist() == whole.tokens[number].tolist()
            assert store.weights_T(number).tolist() == whole.weights_T(number).tolist()
        assert store.meta.digest == whole.meta.digest
        assert store.lengths_E.tolist() == whole.lengths_E.tolist()
        sizes = [(Path(folder) / name / "tokens.bin").stat().st_size for name in ("shared", "whole")]
        # Every example begins with the same tokens, so a row has those of its longest one.
        assert (sizes[0] < sizes[1]) == any(len(row) > 1 for row in rows)


@pytest.mark.parametrize(
    ("example", "base", "number"), [(1, 2, 0), (1, 0, 9), (1, -2, 0), (2, 1, 0), (1, 0, -1), (0, -1, 1)]
)
def test_a_store_whose_examples_share_what_does_not_exist_is_damaged(
    tmp_path: Path, example: int, base: int, number: int
) -> None:
    one = Example.of(np.arange(3, dtype=np.int32), np.ones(3, np.float32))
    write(tmp_path / "store", [[one, Example(one.tokens_T[:1], [(0, 4, 1.0)], one, 3)], [one]], 2)
    shared = np.load(tmp_path / "store" / "shared.npy")
    assert shared.tolist() == [[-1, 0], [0, 3], [-1, 0]]
    assert open_store(tmp_path / "store", "some") is not None
    shared[example] = base, number
    np.save(tmp_path / "store" / "shared.npy", shared)
    assert open_store(tmp_path / "store", "some") is None


def test_examples_stay_readable_after_the_cache_is_deleted(tmp_path: Path) -> None:
    rows = [[Example.of(np.arange(3, dtype=np.int32), np.ones(3, np.float32))], [], []]
    store = write(tmp_path / "store", rows, 2)
    shutil.rmtree(tmp_path / "store")
    assert store.tokens[0].tolist() == [0, 1, 2]


def test_a_store_that_is_truncated_within_a_token_is_damaged(tmp_path: Path) -> None:
    write(tmp_path / "store", [[Example.of(np.arange(3, dtype=np.int32), np.ones(3, np.float32))]], 1)
    with (tmp_path / "store" / "tokens.bin").open("ab") as file:
        file.write(b"\0")
    assert open_store(tmp_path / "store", "some") is None


def test_bad_rows_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        for number in range(9):
            writer.append(make_block([], [BadRowNote(f"row {number}", "is bad")], 1))
    meta = ExampleStore(tmp_path / "store", "some").meta
    assert (meta.num_rows_read, meta.num_bad_rows, meta.num_filtered) == (18, 9, 9)
    assert [note.place for note in meta.bad_rows] == [f"row {number}" for number in range(5)]


def test_notes_of_all_blocks_are_summed_and_read_back(tmp_path: Path) -> None:
    colours = Note("row", "Colours", "red"), Note("message", "held an image")
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(make_block([], [], 0, Counter({colours[0]: 2})))
        writer.append(make_block([], [], 0, Counter({colours[0]: 3, colours[1]: 1})))
    assert ExampleStore(tmp_path / "store", "some").meta.notes == {colours[0]: 5, colours[1]: 1}


def test_an_unfinished_store_leaves_no_files(tmp_path: Path) -> None:
    def stop_halfway() -> None:
        with StoreWriter(tmp_path / "store") as writer:
            writer.append(make_block([], [], 0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_store_leave_one(tmp_path: Path) -> None:
    rows = [[Example.of(np.asarray([1, 2], np.int32), np.asarray([0, 1], np.float32))]]
    with StoreWriter(tmp_path / "store") as slow:
        slow.append(make_block([("row 0", rows[0])], [], 0))
        write(tmp_path / "store", rows, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert ExampleStore(tmp_path / "store", "some").tokens[0].tolist() == [1, 2]


def test_files_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    abandoned = tmp_path / ".store.abandoned"
    abandoned.mkdir()
    (abandoned / "lock").write_text("", encoding="utf-8")
    with StoreWriter(tmp_path / "store") as running:
        running.append(make_block([], [], 0))
        assert not abandoned.exists()
        assert len(list(tmp_path.iterdir())) == 1
        write(tmp_path / "other", [], 1)
        with StoreWriter(tmp_path / "store") as another:
            assert len(list(tmp_path.glob(".store.*"))) == 2, "the running one is left alone"
            another.append(make_block([], [], 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "store"]


def test_places_may_contain_any_characters(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        example = Example.of(np.asarray([1, 2], np.int32), np.asarray([0, 1], np.float32))
        writer.append(make_block([("row 0 of a\nb\udcff", [example]), ("row 1", [example])], [], 0))
    assert ExampleStore(tmp_path / "store", "some").place_of_row(1) == "row 1"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_can_read_a_store(tmp_path: Path, umask: int) -> None:
    earlier = os.umask(umask)
    try:
        write(
            tmp_path / "cache" / "store", [[Example.of(np.asarray([1], np.int32), np.ones(1, np.float32))]], 1
        )
    finally:
        os.umask(earlier)
    for path in (tmp_path / "cache").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["examples.npy", "runs.npy", "rows.npy", "tokens.bin", "meta.json"])
def test_a_pipe_in_place_of_a_file_of_the_store_does_not_block(tmp_path: Path, name: str) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(
            make_block(
                [("row 1", [Example.of(np.array([1, 2, 3], np.int32), np.ones(3, np.float32))])], [], 0
            )
        )
    (tmp_path / "store" / name).unlink()
    os.mkfifo(tmp_path / "store" / name)
    assert open_store(tmp_path / "store", "rows") is None


def test_the_report_counts_what_examples_share_once(tmp_path: Path) -> None:
    first = Example.of(np.arange(6, dtype=np.int32), np.ones(6, np.float32))
    second = Example(np.asarray([7, 8], np.int32), [], first, 5)  # it has no trained token
    third = Example(np.asarray([9, 9, 9], np.int32), [(6, 8, 1.0)], second, 6)
    other = Example.of(np.arange(4, dtype=np.int32), np.ones(4, np.float32))
    store = write(tmp_path / "store", [[other], [first, second, third]], 2)
    report = TrainableRows(store, None).report
    assert (report.examples, report.tokens, report.computed_tokens) == (3, 4 + 6 + 9, 4 + 6 + 4)
    assert "  14 tokens when what examples share is counted once." in report.lines()
    report = TrainableRows(store, 7).report
    assert (report.tokens, report.computed_tokens) == (4 + 6 + 7, 4 + 6 + 2)
