"""checkpoints.jsonl: which checkpoints a run has, and where each one continues."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from cookbook import jsonl


@dataclass(frozen=True)
class Checkpoint:
    """A saved state after `step` optimizer steps, so `step` is also the next step to take.

    Step s trains batch s % num_batches of epoch s // num_batches.
    """

    name: str
    path: str
    step: int
    epoch: int
    batch: int


class CheckpointLog:
    """The checkpoints of one run, oldest first. Only complete ones are recorded."""

    def __init__(self, path: Path, keep: int | None = None) -> None:
        """`keep` newest checkpoints stay on disk (None: all)."""
        self._path = path
        self._keep = keep
        self._records = [Checkpoint(**row) for row in jsonl.read(path)]

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that is still there."""
        return next((record for record in reversed(self._records) if Path(record.path).is_dir()), None)

    def add(self, checkpoint: Checkpoint) -> None:
        """Records a checkpoint that lies on disk, then removes those past `keep`.

        The record goes before the folder: a kill in between leaves an unlisted folder, never
        a listed one that is gone.
        """
        records = [record for record in self._records if record.name != checkpoint.name]
        records.append(checkpoint)
        dropped = [] if self._keep is None else records[: -self._keep]
        self._records = records[len(dropped) :]
        jsonl.rewrite(self._path, [asdict(record) for record in self._records])
        for record in dropped:
            shutil.rmtree(record.path, ignore_errors=True)
