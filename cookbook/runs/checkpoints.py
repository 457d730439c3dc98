"""checkpoints.jsonl, which records the checkpoints of a run and where each of them resumes.

A row also has the keys that tinker-cookbook reads: `state_path`, `sampler_path` and `final`. The paths
name the folder as it was when the row was written, and are not read back: a run folder may be moved.
Rows that tinker-cookbook wrote have only those keys, and are read too.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cookbook.errors import CheckpointError, RequestError
from cookbook.runs.rows import METRICS_SHAPE, METRICS_VALUE
from cookbook.utils import files, json_files, jsonl
from cookbook.utils.json_files import Count, JsonOrigin, Measured

logger = logging.getLogger(__name__)

Which: TypeAlias = Literal["best", "last"]
"""Which checkpoint of a run is meant."""
FOLDER = "checkpoints"
"""The subfolder of a run that holds its checkpoints, each under its name."""
MARK = "state.json"
"""A file that every checkpoint holds. A folder without it is the user's own and is never removed."""
FINAL = "final"
"""The name of the last checkpoint of a finished run."""


def checkpoint_name(step: int) -> str:
    """Returns the name of a checkpoint that is saved during a run."""
    return f"{step:06d}"


@dataclass(frozen=True)
class Checkpoint:
    """A saved state after `step` optimizer steps, so `step` is also the next step to take.

    That next step trains on the batch after `batch` others of `epoch`. `path` is relative to the run's
    folder, which may be moved.
    """

    name: str
    path: str
    step: Count
    epoch: Count
    batch: Count
    metric: str | None = None
    """The metric of the best checkpoint, or None for any other checkpoint."""
    value: Measured | None = None
    """The value of `metric`, measured on these weights."""
    is_extra: bool = False
    """True for a checkpoint that was saved only for being the best, and is removed with a better one."""
    row: Count | None = None
    """The number of rows of `epoch` that were trained on. It is None if the dataset does not count rows,
    and in folders of an earlier version."""
    location: str | None = None
    """The folder or `tinker://` path of a checkpoint that tinker-cookbook recorded. `path` is empty then."""


_FOR_TINKER_COOKBOOK = ("state_path", "sampler_path", "final")


def read_records(file: Path) -> list[Checkpoint]:
    """Returns the records of a checkpoints.jsonl, oldest first; [] if there is no file.

    Raises CheckpointError for an invalid record, and for one that leads out of the run's folder: the file may
    be untrusted, and the folders it names are loaded and removed.
    """
    return [
        _checked(
            row, JsonOrigin(f"line {number} of {file}", CheckpointError, "Correct the line, or remove it.")
        )
        for number, row in enumerate(jsonl.read(file), 1)
    ]


def _checked(row: Mapping[str, Any], origin: JsonOrigin) -> Checkpoint:
    if "path" not in row and ("state_path" in row or "sampler_path" in row):
        return _of_tinker_cookbook(row, origin)
    own = {key: value for key, value in row.items() if key not in _FOR_TINKER_COOKBOOK}
    record = json_files.record_of(Checkpoint, own, origin)
    if (record.metric is None) != (record.value is None):
        origin.refuse("`metric` and `value` go together, and one of them is missing")
    if not files.PLAIN_NAME.fullmatch(record.name):
        origin.refuse(
            f"`name` is {json_files.shown(record.name)}, expected up to 128 letters, digits, '.', '_' and "
            "'-', of which the first is a letter or digit"
        )
    if record.path != f"{FOLDER}/{record.name}":
        origin.refuse(f"`path` is {json_files.shown(record.path)}, expected {FOLDER}/{record.name}")
    return record


def _of_tinker_cookbook(row: Mapping[str, Any], origin: JsonOrigin) -> Checkpoint:
    """Returns a checkpoint that tinker-cookbook recorded. Programs may add keys of their own to its rows."""
    location = row.get("state_path") or row.get("sampler_path")
    position = {"batch": row.get("batch") or 0, "epoch": row.get("epoch") or 0}
    step = row.get("step")
    values = {"name": row.get("name"), "location": location, "path": "", **position}
    values["step"] = step if isinstance(step, int) and step >= 0 else position["batch"]
    return json_files.record_of(Checkpoint, values, origin)


def _call(work: Callable[[], Any]) -> Any:
    return work()


class CheckpointLog:
    """The checkpoints of one run, oldest first. Only complete checkpoints are recorded."""

    def __init__(
        self, folder: Path, keep: int | None = None, on_rank0: Callable[[Callable[[], Any]], Any] = _call
    ) -> None:
        """The `keep` newest checkpoints stay on disk (None: all), and also the best one.

        `on_rank0` runs a function on one of several processes and returns its result on all. So all have the
        same view of the folder, and only one writes to it.
        """
        self._folder = folder
        self._on_rank0 = on_rank0
        self._file = folder / "checkpoints.jsonl"
        self._keep = keep
        self._records: list[Checkpoint] = on_rank0(lambda: read_records(self._file))

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken, saved, evaluated and logged."""
        last = self.last()
        if last is None or last.name != FINAL:
            return False
        is_logged: bool = self._on_rank0(lambda: self._is_logged(last.step))
        return is_logged

    def _is_logged(self, step: int) -> bool:
        """Returns whether metrics.jsonl, which is in order of steps, has a row of the state after `step`."""
        rows = jsonl.read_backwards(self._folder / "metrics.jsonl", METRICS_SHAPE, METRICS_VALUE)
        return any(row["step"] == step for row in takewhile(lambda row: row["step"] >= step, rows))

    def last(self) -> Checkpoint | None:
        """Returns the newest checkpoint that still exists, or None before the first.

        Raises CheckpointError if there were checkpoints and all are gone, because a new start would discard
        the metrics of their steps.
        """
        if not self._records:
            return None
        for record in reversed(self._records):
            if self._exists(record):
                return record
        raise CheckpointError(
            f"{self._file} lists {len(self._records)} checkpoints, but none of them exists. Restore one, "
            "or start over with if_log_path_exists=delete."
        )

    def before(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Returns the newest existing checkpoint that was recorded before another one, or None."""
        place = self._records.index(checkpoint)
        return next((record for record in reversed(self._records[:place]) if self._exists(record)), None)

    def last_path(self) -> Path | None:
        """Returns the path of the newest checkpoint, or None if there is none."""
        there = (self.path_of(record) for record in reversed(self._records) if self._exists(record))
        return next(there, None)

    def path_of(self, checkpoint: Checkpoint) -> Path:
        """Returns the folder. Raises CheckpointError for one of tinker-cookbook's that does not exist."""
        if checkpoint.location is not None:
            from cookbook.engine.checkpoint_root import CheckpointRoot  # imports torch

            return Path(CheckpointRoot().folder(checkpoint.location)).expanduser()
        return self._folder / checkpoint.path

    def best(self) -> Checkpoint | None:
        """Returns the checkpoint of the best evaluation so far, or None if it does not exist."""
        best = next((record for record in self._records if record.metric is not None), None)
        return best if best is not None and self._exists(best) else None

    def has_step(self, step: int) -> bool:
        """Returns whether the state after `step` steps is saved."""
        return any(record.step == step and self._exists(record) for record in self._records)

    def _exists(self, record: Checkpoint) -> bool:
        exists: bool = self._on_rank0(lambda: self._is_there(record))
        return exists

    def _is_there(self, record: Checkpoint) -> bool:
        try:
            return self.path_of(record).is_dir()
        except (CheckpointError, RequestError):
            return False

    def add(
        self, name: str, path: str, step: int, epoch: int, batch: int, row: int | None = None
    ) -> Checkpoint:
        """Records a checkpoint at `path`, then removes older ones beyond `keep`."""
        added = Checkpoint(name, self._relative(path), step, epoch, batch, row=row)
        self._replace([*self._all_but(name), added])
        return added

    def add_best(
        self,
        name: str,
        path: str,
        step: int,
        epoch: int,
        batch: int,
        metric: str,
        value: float,
        row: int | None = None,
    ) -> None:
        """Records a checkpoint that was saved for being the best."""
        added = Checkpoint(
            name, self._relative(path), step, epoch, batch, metric, value, is_extra=True, row=row
        )
        self._replace([*map(_no_longer_best, self._all_but(name)), added])

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Marks the recorded checkpoint of `step` as the best one."""
        records = [_no_longer_best(record) for record in self._records]
        newest = max(index for index, record in enumerate(records) if record.step == step)
        records[newest] = replace(records[newest], metric=metric, value=value)
        self._replace(records)

    def continue_from_final(self) -> None:
        """Names the final checkpoint by its step, so that the run can continue to another final one.

        Its files are linked under the new name before the record changes, and removed under the old name
        afterwards. A kill in between leaves a folder that is not listed.
        """
        final = next((record for record in self._records if record.name == FINAL), None)
        if final is None:
            return
        if not self._exists(final):  # the run continues from an earlier checkpoint
            self._replace(self._all_but(FINAL))
            return
        name, must_hold = checkpoint_name(final.step), [MARK]
        same = next((record for record in self._records if record.name == name), None)
        if same is None or not self._exists(same):
            renamed = replace(final, name=name, path=f"{FOLDER}/{name}")
            self._on_rank0(lambda: _link_folder(self.path_of(final), self.path_of(renamed)))
            must_hold = []  # all of its content has a second name now
        else:  # the best checkpoint, or the state that was saved when patience ran out
            renamed = replace(same, metric=same.metric or final.metric, is_extra=False)
            renamed = replace(renamed, value=same.value if same.metric is not None else final.value)
        self._records = [*(r for r in self._records if r.name not in (FINAL, name)), renamed]
        self._on_rank0(lambda: self._write([final], must_hold))

    def count_rows(self, per_batch: int) -> None:
        """Records the number of rows of checkpoints of an earlier version, which counted only batches."""
        self._replace(
            [
                record if record.row is not None else replace(record, row=record.batch * per_batch)
                for record in self._records
            ]
        )

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self._folder))

    def _all_but(self, name: str) -> list[Checkpoint]:
        return [record for record in self._records if record.name != name]

    def _replace(self, records: list[Checkpoint]) -> None:
        """Writes the records that stay, then removes the folders of the others.

        The record is removed before the folder, so a kill in between leaves an unlisted folder, never a
        listed one that is gone.
        """
        in_turn = [record for record in records if not record.is_extra]
        past_keep = [] if self._keep is None else in_turn[: -self._keep]
        dropped = [
            record for record in records if record.metric is None and (record.is_extra or record in past_keep)
        ]
        self._records = [record for record in records if record not in dropped]
        self._on_rank0(lambda: self._write(dropped))

    def _write(self, dropped: Sequence[Checkpoint], must_hold: Sequence[str] = (MARK,)) -> None:
        jsonl.rewrite(self._file, [self._row(record) for record in self._records])
        listed = {record.path for record in self._records}
        own = [record for record in dropped if record.location is None]  # others are not this run's to remove
        for path in [self.path_of(record) for record in own if record.path not in listed]:
            try:
                files.remove(path, must_hold)
            # the folder is no longer listed, and the run matters more than the disk space
            except OSError as error:
                logger.warning("The checkpoint %s was not removed: %s", path, error)

    def _row(self, record: Checkpoint) -> dict[str, Any]:
        """Returns the record as JSON, without the values that most checkpoints share."""
        row = asdict(record)
        if (location := row.pop("location")) is not None:
            del row["path"]
            row["state_path"] = location
        else:
            row["state_path"] = row["sampler_path"] = str(self.path_of(record).resolve())
            row["final"] = record.name == FINAL
        return {key: value for key, value in row.items() if value is not None and value is not False}


def _no_longer_best(record: Checkpoint) -> Checkpoint:
    return replace(record, metric=None, value=None)


def _link_folder(folder: Path, other: Path) -> None:
    """Creates a folder of hard links to another's files, or of copies if hard links are not supported."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    def others(parent: str, names: list[str]) -> list[str]:
        """Returns the names of special files such as pipes. Raises FileError for a link."""
        paths = [Path(parent, name) for name in names]
        for path in paths:
            files.refuse_link(path)
        return [path.name for path in paths if not (path.is_file() or path.is_dir())]

    # If the folder exists already, it is from a discarded step and is not listed.
    with files.writing_folder(other, replace=True, must_hold=[MARK]) as unfinished:
        shutil.copytree(folder, unfinished, ignore=others, copy_function=link, dirs_exist_ok=True)
