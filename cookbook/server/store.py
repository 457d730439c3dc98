"""The folder of a server: a folder for each training run, named by its id, with its checkpoints.

Below a run's folder things lie as the clients in process write them (`checkpoint_root.py`).
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cookbook.clients.rest import RestClient
from cookbook.engine import checkpoint_root
from cookbook.engine.checkpoint_root import CheckpointRoot
from cookbook.errors import CheckpointError, ConfigError
from cookbook.types import FOLDER_OF_TYPE, TINKER_SCHEME, CheckpointType
from cookbook.utils import files

_RUN_ID = re.compile(r"[0-9a-f]{16}:train:\d{1,9}")


@dataclass(frozen=True)
class ServerRoot(CheckpointRoot):
    """The runs in the folder of a server."""

    place: Path = Path()
    says_tinker_paths: bool = True

    @property
    def root(self) -> Path:
        return self.place

    def new_run_id(self) -> str:
        """Returns an id of the form that the SDK expects."""
        return f"{secrets.token_hex(8)}:train:0"


class CheckpointStore:
    """Finds checkpoints by their `tinker://` paths. No path leads out of the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if another server uses the folder."""
        self.folder = files.make_folder(folder.expanduser(), may_be_link=True)
        try:
            self._lock: IO[bytes] = files.locked(self.folder / ".lock")
        except BlockingIOError as error:
            raise ConfigError(
                f"Another server uses {self.folder}. Stop it, or give another folder with folder=."
            ) from error
        self.root = ServerRoot(place=self.folder)
        self.rest = RestClient(root=self.root)

    def close(self) -> None:
        self._lock.close()

    def folder_of(self, run_id: str) -> Path:
        """Returns the folder of a run, which may not exist. Raises CheckpointError for an invalid name."""
        if _RUN_ID.fullmatch(run_id) is None:
            raise CheckpointError(f"{run_id!r} is not the id of a training run of this server.")
        return self.folder / run_id

    def path_of(self, tinker_path: str) -> Path:
        """Returns the folder of a checkpoint.

        Raises RequestError for another form, and CheckpointError unless it exists.
        """
        if not tinker_path.startswith(TINKER_SCHEME):
            raise CheckpointError(
                f"{tinker_path!r} is not the path of a checkpoint. Use tinker://<run>/weights/<name> or "
                f"tinker://<run>/sampler_weights/<name>, as save_state and save_weights_for_sampler return."
            )
        return Path(self.root.folder(tinker_path))

    def place_of(self, run_id: str, kind: CheckpointType, name: str) -> Path:
        """Returns where a checkpoint is or would be. Raises CheckpointError for an invalid name."""
        return checkpoint_root.place(self.folder_of(run_id), kind, name)

    def tinker_path(self, run_id: str, kind: CheckpointType, name: str) -> str:
        return f"{TINKER_SCHEME}{run_id}/{FOLDER_OF_TYPE[kind]}/{name}"

    def sampler_paths(self) -> list[str]:
        """Returns the paths of the weights that were saved for samplers."""
        return [
            self.tinker_path(run_id, kind, folder.name)
            for run_id, run in self.root.runs().items()
            for kind, folder in checkpoint_root.checkpoints_of(run)
            if kind == "sampler"
        ]

    def remove_expired(self) -> None:
        """Removes the checkpoints whose time to live has ended."""
        for run in self.root.runs().values():
            checkpoint_root.remove_expired(run)
