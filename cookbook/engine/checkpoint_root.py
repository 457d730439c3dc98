"""Where checkpoints are: folders on disk, and the paths `tinker://<run>/<kind>/<name>` that name them.

A run is the folder of one training client:

    <run>/<name>                    `save_state`                  tinker://<run>/weights/<name>
    <run>/sampler_weights/<name>    `save_weights_for_sampler`    tinker://<run>/sampler_weights/<name>
    <run>/external_weights/<name>   `save_weights_external`       tinker://<run>/external_weights/<name>
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cookbook.engine import checkpoint
from cookbook.errors import CheckpointError
from cookbook.types import FOLDER_OF_TYPE, TINKER_SCHEME, CheckpointType, ParsedCheckpointTinkerPath
from cookbook.utils import files, json_files

logger = logging.getLogger(__name__)

DEFAULT_CHECKPOINT_ROOT = Path("~/.cookbook/checkpoints")
SAMPLER_FOLDER = FOLDER_OF_TYPE["sampler"]
EXTERNAL_FOLDER = FOLDER_OF_TYPE["external"]


@dataclass(frozen=True)
class CheckpointRoot:
    """The runs of this machine, and `own`, the only folder that a service saves in if it was given one."""

    own: Path | None = None
    says_tinker_paths: bool = False
    """Whether saved checkpoints are named by `tinker://` paths. Both kinds of paths are understood."""

    @property
    def root(self) -> Path:
        return DEFAULT_CHECKPOINT_ROOT.expanduser()

    def new_run(self, run_id: str) -> Path:
        """Returns the folder that a new training client saves in."""
        return self.root / run_id if self.own is None else self.own

    def new_run_id(self) -> str:
        return uuid.uuid4().hex[:12]

    def runs(self) -> dict[str, Path]:
        """Returns the folders of all runs by their names."""
        if self.own is not None:
            return {self.own.resolve().name: self.own} if self.own.is_dir() else {}
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return {folder.name: folder for folder in folders if _is_own_folder(folder)}

    def run(self, run_id: str) -> Path:
        """Raises CheckpointError for a run that does not exist."""
        runs = self.runs()
        if run_id not in runs:
            raise CheckpointError(f"There is no training run {run_id!r} in {self.own or self.root}.")
        return runs[run_id]

    def folder(self, path: str | os.PathLike[str]) -> str:
        """Returns the folder of a `tinker://` path, and any other path as it is.

        Raises RequestError for a path of another form, and CheckpointError for one that does not exist.
        """
        if not os.fspath(path).startswith(TINKER_SCHEME):
            return os.fspath(path)
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(os.fspath(path))
        run = self.run(parsed.training_run_id)
        remove_expired(run)
        folder = place(run, parsed.checkpoint_type, parsed.checkpoint_id.partition("/")[2])
        if not folder.is_dir():
            raise CheckpointError(f"Checkpoint {path} does not exist: there is no folder {folder}.")
        return str(folder)

    def shown(self, folder: Path) -> str:
        """Returns the path that a saved checkpoint is named by."""
        if not self.says_tinker_paths:
            return str(folder)
        kind = folder.parent.name if folder.parent.name in (SAMPLER_FOLDER, EXTERNAL_FOLDER) else "weights"
        run = folder.parent if kind == "weights" else folder.parent.parent
        return f"{TINKER_SCHEME}{run.resolve().name}/{kind}/{folder.name}"


def place(run: Path, kind: CheckpointType, name: str) -> Path:
    """Returns the folder of a checkpoint. Raises CheckpointError if the name could lead out of the run."""
    parent = run if kind == "training" else run / FOLDER_OF_TYPE[kind]
    if kind == "training" and name in (SAMPLER_FOLDER, EXTERNAL_FOLDER):
        raise CheckpointError(f"{name!r} is the folder of other weights. Choose another name.")
    if kind != "training":
        files.refuse_link(parent)
    return checkpoint.checkpoint_path(parent, name)


def checkpoints_of(run: Path) -> Iterator[tuple[CheckpointType, Path]]:
    """Yields the kind and the folder of each checkpoint of a run, by name."""
    kinds: tuple[CheckpointType, ...] = ("training", "sampler", "external")
    for kind in kinds:
        parent = run if kind == "training" else run / FOLDER_OF_TYPE[kind]
        # the run itself may be a link, if it is the folder that a service was given
        is_safe = run.is_dir() if kind == "training" else _is_own_folder(parent)
        for folder in sorted(parent.iterdir()) if is_safe else ():
            if _is_own_folder(folder) and (folder / checkpoint.STATE_FILE).is_file():
                yield kind, folder


def expires_at(folder: Path) -> datetime | None:
    """Returns the time until which a checkpoint is wanted, or None. An unreadable one does not expire."""
    try:
        said = json_files.read_object(folder / checkpoint.STATE_FILE, CheckpointError, "").get("expires_at")
        time = None if said is None else datetime.fromisoformat(said)
    except (OSError, ValueError, TypeError, CheckpointError):
        return None
    return time if time is None or time.tzinfo else time.replace(tzinfo=UTC)


def remove_expired(run: Path) -> None:
    """Removes the checkpoints of a run whose time to live has ended."""
    now = datetime.now(UTC)
    for _, folder in [*checkpoints_of(run)]:
        time = expires_at(folder)
        if time is None or time > now:
            continue
        try:
            files.remove(folder, must_hold=[checkpoint.STATE_FILE])
            logger.info("The checkpoint %s expired at %s and was removed.", folder, time)
        except OSError as error:  # another process may have removed it
            logger.warning("The expired checkpoint %s was not removed: %s", folder, error)


def _is_own_folder(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()
