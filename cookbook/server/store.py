"""The folder of a server: a folder for each training run, with its checkpoints.

<run>/.run.json                       the base model, the adapter and the metadata of a run
<run>/<name>/                         a checkpoint of save_state:   tinker://<run>/weights/<name>
<run>/sampler_weights/<name>/         weights for samplers:         tinker://<run>/sampler_weights/<name>

A run is named <session>:train:<number>, and its folder <session>-train-<number>.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO

from cookbook.clients.training import SAMPLER_FOLDER
from cookbook.engine import checkpoint
from cookbook.errors import CheckpointError, ConfigError
from cookbook.utils import files

_RUN_ID = re.compile(r"(?P<session>[0-9a-f]{16}):train:(?P<number>\d{1,9})")
_SCHEME = "tinker://"
KINDS = ("weights", "sampler_weights")


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

    def close(self) -> None:
        self._lock.close()

    def folder_of(self, run_id: str) -> Path:
        """Returns the folder of a run, which may not exist. Raises CheckpointError for an invalid name."""
        match = _RUN_ID.fullmatch(run_id)
        if match is None:
            raise CheckpointError(f"{run_id!r} is not the id of a training run of this server.")
        return self.folder / f"{match['session']}-train-{match['number']}"

    def path_of(self, tinker_path: str) -> Path:
        """Returns the folder of a checkpoint. Raises CheckpointError unless it exists."""
        parts = tinker_path.removeprefix(_SCHEME).split("/")
        if not tinker_path.startswith(_SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
            raise CheckpointError(
                f"{tinker_path!r} is not the path of a checkpoint. Use tinker://<run>/weights/<name> or "
                f"tinker://<run>/sampler_weights/<name>, as save_state and save_weights_for_sampler return."
            )
        run_id, kind, name = parts
        path = self.place_of(run_id, kind, name)
        if not path.is_dir() or path.is_symlink():
            raise CheckpointError(f"There is no checkpoint {tinker_path} on this server.")
        return path

    def place_of(self, run_id: str, kind: str, name: str) -> Path:
        """Returns where a checkpoint is or would be. Raises CheckpointError for an invalid name."""
        folder = self.folder_of(run_id)
        if kind == "weights" and name == SAMPLER_FOLDER:
            raise CheckpointError(f"{name!r} is the folder of the sampler's weights. Choose another name.")
        return checkpoint.checkpoint_path(folder if kind == "weights" else folder / SAMPLER_FOLDER, name)

    def sampler_paths(self) -> list[str]:
        """Returns the paths of the weights that were saved for samplers."""
        found = []
        for folder in sorted(self.folder.glob(f"*-train-*/{SAMPLER_FOLDER}/*")):
            run = folder.parent.parent.name.replace("-train-", ":train:")
            if _RUN_ID.fullmatch(run) and files.PLAIN_NAME.fullmatch(folder.name):
                found.append(self.tinker_path(run, SAMPLER_FOLDER, folder.name))
        return found

    def tinker_path(self, run_id: str, kind: str, name: str) -> str:
        return f"{_SCHEME}{run_id}/{kind}/{name}"
