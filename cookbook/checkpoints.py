"""checkpoints.jsonl: which checkpoints a run has, and where each one continues."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from cookbook import files, jsonl
from cookbook.errors import CheckpointError

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Of a run's folder: all its checkpoints lie there, each under its name."""
MARK = "state.json"
"""The file that tells a checkpoint from a folder of the user's, which is never removed."""
FINAL = "final"
"""The name of the checkpoint of a finished run."""


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a run that continues."""
    return f"{step:06d}"


@dataclass(frozen=True)
class Checkpoint:
    """A saved state after `step` optimizer steps, so `step` is also the next step to take.

    That next step trains on the batch behind `batch` others of `epoch`. `path` is relative to the
    run's folder, which may be moved.
    """

    name: str
    path: str
    step: int
    epoch: int
    batch: int
    metric: str | None = None
    """Of the best checkpoint and of no other: what it is best by."""
    value: float | None = None
    """What `metric` came to, measured on these weights."""
    is_extra: bool = False
    """Saved out of turn, for being the best: it goes when a better one comes."""
    row: int | None = None
    """The rows of `epoch` that were trained on, whatever the sizes of their batches; None where the dataset
    does not count them, and in folders of an earlier version."""


def read_records(file: Path) -> list[Checkpoint]:
    """The records of a checkpoints.jsonl, oldest first; none where there is no file.

    Raises CheckpointError for a record that is none, or that leads out of the run's folder: the file may be
    somebody else's, and what it names is loaded and removed.
    """
    return [_checked(row, f"{file}, line {number}") for number, row in enumerate(jsonl.read(file), 1)]


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "a text"),
    "path": ((str,), "a text"),
    "step": ((int,), "a whole number"),
    "epoch": ((int,), "a whole number"),
    "batch": ((int,), "a whole number"),
    "metric": ((str, type(None)), "a text"),
    "value": ((int, float, type(None)), "a number"),
    "is_extra": ((bool,), "true or false"),
    "row": ((int, type(None)), "a whole number"),
}
_TOO_LARGE = 2**63
_REQUIRED = ("name", "path", "step", "epoch", "batch")


def _checked(row: Any, place: str) -> Checkpoint:
    repair = "Correct the line, or remove it."
    if not isinstance(row, dict):
        raise CheckpointError(f"{place}: {_shown(row)} is no record of a checkpoint. {repair}")
    for key, value in row.items():
        if key not in _TYPES:
            raise CheckpointError(f"{place}: {_shown(key)} is no key of a checkpoint's record. {repair}")
        types, what = _TYPES[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(f"{place}: {key} is {_shown(value)}, not {what}. {repair}")
        if isinstance(value, int) and not (0 if key != "value" else -_TOO_LARGE) <= value < _TOO_LARGE:
            raise CheckpointError(f"{place}: {key} is {_shown(value)}, which cannot be. {repair}")
    if missing := [key for key in _REQUIRED if key not in row]:
        raise CheckpointError(f"{place}: the record has no {missing[0]}. {repair}")
    if (row.get("metric") is None) != (row.get("value") is None):
        raise CheckpointError(f"{place}: metric and value belong together, and one is missing. {repair}")
    name, path = row["name"], row["path"]
    if not files.PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{place}: name is {_shown(name)}, which is no name of a checkpoint: up to 128 letters, digits, "
            f"'.', '_' and '-', beginning with a letter or digit. {repair}"
        )
    if path != f"{FOLDER}/{name}":
        raise CheckpointError(
            f"{place}: path is {_shown(path)}, and the checkpoint {name} of a run lies in {FOLDER}/{name}. "
            f"{repair}"
        )
    return Checkpoint(**row)


def _shown(value: Any) -> str:
    """As JSON has it, on one line, and not at any length."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _itself(work: Callable[[], Any]) -> Any:
    return work()


class CheckpointLog:
    """The checkpoints of one run, oldest first. Only complete ones are recorded."""

    def __init__(
        self, folder: Path, keep: int | None = None, by_main: Callable[[Callable[[], Any]], Any] = _itself
    ) -> None:
        """`keep` newest checkpoints stay on disk (None: all), and the best one beside them.

        `by_main` does something on one of several processes, and gives its result to all: they have
        one view of the folder, and one of them writes to it.
        """
        self._folder = folder
        self._by_main = by_main
        self._file = folder / "checkpoints.jsonl"
        self._keep = keep
        self._records: list[Checkpoint] = by_main(lambda: read_records(self._file))

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken, saved, evaluated and logged."""
        last = self.last()
        if last is None or last.name != FINAL:
            return False
        is_logged: bool = self._by_main(lambda: self._is_logged(last.step))
        return is_logged

    def _is_logged(self, step: int) -> bool:
        """Whether there is a row of metrics of the state after `step` steps. Rows are in order of steps."""
        rows = jsonl.read_backwards(self._folder / "metrics.jsonl")
        return any(row["step"] == step for row in takewhile(lambda row: row["step"] >= step, rows))

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that is still there; None before the first.

        Raises CheckpointError where there were some and all are gone: starting afresh would
        throw away the metrics of those steps.
        """
        if not self._records:
            return None
        for record in reversed(self._records):
            if self._is_there(record):
                return record
        raise CheckpointError(
            f"{self._file} lists {len(self._records)} checkpoints, but not one is there. Put one back, or "
            f"start over with if_log_path_exists=delete."
        )

    def last_path(self) -> Path | None:
        """Where the newest checkpoint lies; None where none is there."""
        there = (self.path_of(record) for record in reversed(self._records) if self._is_there(record))
        return next(there, None)

    def path_of(self, checkpoint: Checkpoint) -> Path:
        return self._folder / checkpoint.path

    def best(self) -> Checkpoint | None:
        """The checkpoint of the best evaluation so far; None where there is none, or its folder is gone."""
        best = next((record for record in self._records if record.metric is not None), None)
        return best if best is not None and self._is_there(best) else None

    def has_step(self, step: int) -> bool:
        """Whether the state after `step` steps is there."""
        return any(record.step == step and self._is_there(record) for record in self._records)

    def _is_there(self, record: Checkpoint) -> bool:
        is_there: bool = self._by_main(self.path_of(record).is_dir)
        return is_there

    def add(
        self, name: str, path: str, step: int, epoch: int, batch: int, row: int | None = None
    ) -> Checkpoint:
        """Records a checkpoint that lies at `path`, then removes those past `keep`."""
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
        """Makes the checkpoint of `step`, which is recorded, the best one."""
        records = [_no_longer_best(record) for record in self._records]
        newest = max(index for index, record in enumerate(records) if record.step == step)
        records[newest] = replace(records[newest], metric=metric, value=value)
        self._replace(records)

    def continue_from_final(self) -> None:
        """Makes the final checkpoint one of a run that continues, so that another can become final.

        Its files are linked under the name of its step before the record changes, and removed under the
        old name after: a kill in between leaves a folder that is not listed.
        """
        final = next((record for record in self._records if record.name == FINAL), None)
        if final is None:
            return
        name, must_hold = checkpoint_name(final.step), [MARK]
        same = next((record for record in self._records if record.name == name), None)
        if same is None or not self._is_there(same):
            renamed = replace(final, name=name, path=f"{FOLDER}/{name}")
            self._by_main(lambda: _link_folder(self.path_of(final), self.path_of(renamed)))
            must_hold = []  # whatever it holds has a second name now
        else:  # the best of all, or the state that a run out of patience had saved
            renamed = replace(same, metric=same.metric or final.metric, is_extra=False)
            renamed = replace(renamed, value=same.value if same.metric is not None else final.value)
        self._records = [*(r for r in self._records if r.name not in (FINAL, name)), renamed]
        self._by_main(lambda: self._write([final], must_hold))

    def count_rows(self, per_batch: int) -> None:
        """Records the rows before each checkpoint of an earlier version, which counted batches alone."""
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

        The record goes before the folder: a kill in between leaves an unlisted folder, never
        a listed one that is gone.
        """
        in_turn = [record for record in records if not record.is_extra]
        past_keep = [] if self._keep is None else in_turn[: -self._keep]
        dropped = [
            record for record in records if record.metric is None and (record.is_extra or record in past_keep)
        ]
        self._records = [record for record in records if record not in dropped]
        self._by_main(lambda: self._write(dropped))

    def _write(self, dropped: Sequence[Checkpoint], must_hold: Sequence[str] = (MARK,)) -> None:
        jsonl.rewrite(self._file, [_row(record) for record in self._records])
        listed = {record.path for record in self._records}
        for path in [self.path_of(record) for record in dropped if record.path not in listed]:
            try:
                files.remove(path, must_hold)
            except OSError as error:  # it is not listed any more, and the run is worth more than the room
                logger.warning("The checkpoint %s is not removed: %s", path, error)


def _no_longer_best(record: Checkpoint) -> Checkpoint:
    return replace(record, metric=None, value=None)


def _link_folder(folder: Path, other: Path) -> None:
    """A second name for the files of a folder, or a copy where the file system has no such links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    # What is there is of a step that was taken in vain: it is not listed.
    with files.writing_folder(other, replace=True, must_hold=[MARK]) as unfinished:
        shutil.copytree(folder, unfinished, copy_function=link, dirs_exist_ok=True)


def _row(record: Checkpoint) -> dict[str, Any]:
    """Without what is as it is for most checkpoints."""
    row = asdict(record)
    return {key: value for key, value in row.items() if value is not None and value is not False}
