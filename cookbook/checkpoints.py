"""checkpoints.jsonl: which checkpoints a run has, and where each one continues."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from cookbook import jsonl
from cookbook.errors import CheckpointError

FINAL = "final"
"""The name of the checkpoint of a finished run."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved state after `step` optimizer steps, so `step` is also the next step to take.

    `batch` of `epoch` is what that next step trains on. `path` is relative to the run's folder,
    which may be moved.
    """

    name: str
    path: str
    step: int
    epoch: int
    batch: int


class CheckpointLog:
    """The checkpoints of one run, oldest first. Only complete ones are recorded."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """`keep` newest checkpoints stay on disk (None: all)."""
        self._folder = folder
        self._file = folder / "checkpoints.jsonl"
        self._keep = keep
        self._records = [Checkpoint(**row) for row in jsonl.read(self._file)]

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken, saved, evaluated and logged."""
        last = self.last()
        if last is None or last.name != FINAL:
            return False
        return any(row["step"] == last.step for row in jsonl.read(self._folder / "metrics.jsonl"))

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that is still there; None before the first.

        Raises CheckpointError where there were some and all are gone: starting afresh would
        throw away the metrics of those steps.
        """
        if not self._records:
            return None
        for record in reversed(self._records):
            if self.path_of(record).is_dir():
                return record
        raise CheckpointError(
            f"{self._file} lists {len(self._records)} checkpoints, but not one is there. Put one back, or "
            f"start over with if_log_path_exists=delete."
        )

    def path_of(self, checkpoint: Checkpoint) -> Path:
        return self._folder / checkpoint.path

    def add(self, name: str, path: str, step: int, epoch: int, batch: int) -> Checkpoint:
        """Records a checkpoint that lies at `path`, then removes those past `keep`.

        The record goes before the folder: a kill in between leaves an unlisted folder, never
        a listed one that is gone.
        """
        added = Checkpoint(name, str(Path(path).relative_to(self._folder)), step, epoch, batch)
        records = [*(record for record in self._records if record.name != name), added]
        dropped = [] if self._keep is None else records[: -self._keep]
        self._records = records[len(dropped) :]
        jsonl.rewrite(self._file, [asdict(record) for record in self._records])
        for record in dropped:
            shutil.rmtree(self.path_of(record), ignore_errors=True)
        return added
