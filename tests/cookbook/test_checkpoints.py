"""The record of a run's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from cookbook.checkpoints import Checkpoint, CheckpointLog


def make_checkpoint(folder: Path, step: int) -> Checkpoint:
    path = folder / f"{step:06d}"
    path.mkdir()
    return Checkpoint(name=path.name, path=str(path), step=step, epoch=0, batch=step)


def test_the_last_checkpoint_is_found_again(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "checkpoints.jsonl")
    assert log.last() is None
    for step in (3, 6):
        log.add(make_checkpoint(tmp_path, step))
    last = CheckpointLog(tmp_path / "checkpoints.jsonl").last()
    assert last is not None
    assert last.step == 6


def test_a_recorded_checkpoint_that_was_deleted_by_hand_is_passed_over(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "checkpoints.jsonl")
    for step in (3, 6):
        log.add(make_checkpoint(tmp_path, step))
    shutil.rmtree(tmp_path / "000006")
    last = log.last()
    assert last is not None
    assert last.step == 3


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "checkpoints.jsonl", keep=2)
    for step in (3, 6, 9):
        log.add(make_checkpoint(tmp_path, step))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["000006", "000009"]
    assert (tmp_path / "checkpoints.jsonl").read_text().count("\n") == 2


def test_a_name_recorded_twice_stands_once(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "checkpoints.jsonl", keep=2)
    first = make_checkpoint(tmp_path, 3)
    log.add(first)
    log.add(make_checkpoint(tmp_path, 6))
    log.add(first)
    assert (tmp_path / "checkpoints.jsonl").read_text().count("000003") == 2  # name and path of one row
    assert (tmp_path / "000006").is_dir()
