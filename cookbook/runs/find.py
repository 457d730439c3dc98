"""Finds a checkpoint by its folder or its run's folder, together with its base model and the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook import embedded
from cookbook.engine import checkpoint
from cookbook.errors import CheckpointError
from cookbook.runs.checkpoints import Checkpoint, CheckpointLog, Which, read_records
from cookbook.runs.record import RunRecord, read_run
from cookbook.utils import json_files
from cookbook.utils.json_files import JsonOrigin

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_EMBEDDED = embedded.MODEL_PATH.parts[-3:]


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint to export or to chat with: one of a run, a checkpoint's folder, or an adapter's folder.

    `base_model` is the model of the adapter, as this machine names it; for a full fine-tune, it is the
    checkpoint itself. `step` counts the optimizer steps, if the run's folder records them.
    """

    folder: Path
    info: checkpoint.StateInfo
    base_model: str
    run: RunRecord | None = None
    step: int | None = None

    @property
    def is_full(self) -> bool:
        return self.info.lora.rank == 0

    @property
    def name(self) -> str:
        """The default name of an export."""
        return self.run.name if self.run else self.folder.resolve().name

    @property
    def origin(self) -> str:
        """The name of the model that was fine-tuned, on the machine that trained it."""
        return _with_embedded_name(self.info.base_model) if self.is_full else self.base_model

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables of the chat template with which it was trained."""
        return recorded_template_kwargs(self.info.user_metadata)

    @property
    def base_bits(self) -> int | None:
        """The bits of a weight of the base that it was trained on; None if that was not quantised."""
        quantization = None if self.run is None else self.run.config.get("quantization")
        return {None: None, "fp8": 8}.get(quantization, 4)


def recorded_template_kwargs(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the variables of the chat template in a checkpoint's metadata. Raises CheckpointError."""
    origin = JsonOrigin("`template_kwargs` in the checkpoint's metadata", CheckpointError, "")
    return json_files.object_of(metadata.get("template_kwargs") or "{}", origin)


def find_trained_model(path: str, which: Which | None = None, base_model: str | None = None) -> TrainedModel:
    """Returns the checkpoint in a run's folder, a checkpoint's folder or a plain PEFT adapter.

    `which` selects the best or the last of a run's checkpoints. Raises CheckpointError if there is none.
    """
    folder = Path(path).expanduser()
    if (folder / "checkpoints.jsonl").is_file():
        run_folder: Path | None = folder
        log = CheckpointLog(folder)
        chosen = _choose(folder, log, which)
        record: Checkpoint | None = chosen
        folder = log.path_of(chosen)
    else:
        run_folder = folder.absolute().parent.parent
        if not (run_folder / "checkpoints.jsonl").is_file():
            run_folder = None
        if not folder.is_dir():
            raise _missing(folder, run_folder)
        record = _record_of(folder, run_folder)
    info = checkpoint.read_info(folder)
    base = str(folder) if info.lora.rank == 0 else _with_embedded_name(base_model or info.base_model)
    if base == "None":
        raise CheckpointError(f"{folder} does not name the base model of its adapter. Give base_model=.")
    return TrainedModel(
        folder,
        info,
        base,
        read_run(run_folder) if run_folder and (run_folder / "config.json").is_file() else None,
        record.step if record else None,
    )


def _choose(folder: Path, log: CheckpointLog, which: Which | None) -> Checkpoint:
    """Returns the requested checkpoint. The default is the best if the run tracks it, otherwise the last."""
    best, last = log.best(), log.last()
    if last is None:
        raise CheckpointError(
            f"The run in {folder} has no checkpoint yet. Wait for its first (save_every=), or stop it: "
            f"a run that is stopped saves."
        )
    if which == "best" and best is None:
        raise CheckpointError(
            f"The run in {folder} has no best checkpoint: none was tracked (best_metric=), or its folder "
            "is gone. Give which=last."
        )
    return last if which == "last" or best is None else best


def _missing(folder: Path, run_folder: Path | None) -> CheckpointError:
    if run_folder is not None:
        names = [record.name for record in read_records(run_folder / "checkpoints.jsonl")]
        return CheckpointError(
            f"There is no checkpoint {folder}. The run {run_folder} has: {', '.join(names) or 'none yet'}."
        )
    return CheckpointError(
        f"There is no checkpoint {folder}. Give the folder of a run (its log_path) or of one of its "
        f"checkpoints, as a run prints it: checkpoint=runs/sft/checkpoints/final"
    )


def _record_of(folder: Path, run_folder: Path | None) -> Checkpoint | None:
    if run_folder is None:
        return None
    for record in read_records(run_folder / "checkpoints.jsonl"):
        if record.location is None and (run_folder / record.path).resolve() == folder.resolve():
            return record
    return None


def _with_embedded_name(base_model: str) -> str:
    """Replaces the path by which PEFT's files name the embedded model with its name."""
    return embedded.MODEL_NAME if Path(base_model).parts[-3:] == _EMBEDDED else base_model


def is_on_hub(base_model: str) -> bool:
    """Returns whether a model's name is a hub id."""
    looks_so = _HUB_ID.fullmatch(base_model) is not None
    return looks_so and base_model != embedded.MODEL_NAME and not Path(base_model).is_dir()


def public_name(base_model: str) -> str:
    """Returns a model's name for use elsewhere: its hub id, or a word for a model that is only here.

    The word for a folder is deliberately not a valid hub id, so that no repository can have that name.
    """
    if base_model == embedded.MODEL_NAME or is_on_hub(base_model):
        return base_model
    return f"{Path(base_model).expanduser().resolve().name} (a folder of the machine it was trained on)"


def path_elsewhere(base_model: str) -> str:
    """Returns the name by which another machine loads a model: its hub id, or a path to fill in."""
    return base_model if is_on_hub(base_model) else f"/path/to/{Path(base_model).expanduser().resolve().name}"
