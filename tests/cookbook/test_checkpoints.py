"""The record of a run's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cookbook.checkpoints import CheckpointLog
from cookbook.errors import CheckpointError


def add(log: CheckpointLog, folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"{step:06d}"
    path.mkdir(parents=True, exist_ok=True)
    log.add(path.name, str(path), step, *divmod(step, 4))


def names_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_checkpoint_is_found_again_and_knows_the_next_batch(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    assert log.last() is None
    for step in (3, 6):
        add(log, tmp_path, step)
    last = CheckpointLog(tmp_path).last()
    assert last is not None
    assert (last.step, last.epoch, last.batch) == (6, 1, 2)


def test_a_folder_that_was_moved_still_has_its_checkpoints(tmp_path: Path) -> None:
    add(CheckpointLog(tmp_path / "old"), tmp_path / "old", 3)
    (tmp_path / "old").rename(tmp_path / "new")
    log = CheckpointLog(tmp_path / "new")
    last = log.last()
    assert last is not None
    assert log.path_of(last) == tmp_path / "new" / "checkpoints" / "000003"


def test_a_recorded_checkpoint_that_was_deleted_by_hand_is_passed_over(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    for step in (3, 6):
        add(log, tmp_path, step)
    shutil.rmtree(tmp_path / "checkpoints" / "000006")
    last = log.last()
    assert last is not None
    assert last.step == 3


def test_when_every_checkpoint_is_gone_nothing_starts_afresh_in_silence(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    add(log, tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="lists 1 checkpoints, but not one is there"):
        log.last()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path, keep=2)
    for step in (3, 6, 9):
        add(log, tmp_path, step)
    assert names_on_disk(tmp_path) == ["000006", "000009"]
    assert (tmp_path / "checkpoints.jsonl").read_text().count("\n") == 2


def test_a_name_recorded_twice_stands_once(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path, keep=2)
    for step in (3, 6, 3):
        add(log, tmp_path, step)
    assert names_on_disk(tmp_path) == ["000003", "000006"]
    assert (tmp_path / "checkpoints.jsonl").read_text().count("\n") == 2
