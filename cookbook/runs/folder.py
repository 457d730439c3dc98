"""The folder of a run: its config, its lock, and whether a run may continue in it.

config.json         the resolved config; `config=<this file>` runs it again
config_changes.jsonl  earlier values of its keys, if a run continued with others, and from which step
data.json           the data that were read, the rows that were skipped, and a fingerprint
metrics.jsonl       one row per step; perf/seconds_... are the parts of its time (see step_times.py)
tables.jsonl        tables of evaluators, such as samples: one row of a table per line
checkpoints.jsonl   the checkpoints, the batch at which each one resumes, and which is the best
checkpoints/<name>/ weights and optimizer; loads with plain PEFT
environment.json    the machine and the versions of the last start
reference_logprobs.json  of recipes.dpo: the log-probabilities of the replies before the first step
estimate.json       memory, time and disk as estimated before the model was loaded
report.html         all of it on one page, with the picture curves.png
train.log           what was printed, with times
ranks/<n>.log       the same for each other process, if several train together
jobs/<id>.json      configs of the Ray jobs that ran here
inspect/            logs of Inspect AI, if its tasks were run
trace.json          with trace=True: what ran when; open it at https://ui.perfetto.dev
tensorboard/        with tensorboard=True: event files
wandb/              with wandb_project: files of its client
wandb_run_id.txt    with wandb_project: the id under which a resumed run continues there
trackio_run_name.txt  with trackio_project: the name under which a resumed run continues there
mlflow_run_id.txt   with mlflow_experiment: the id under which a resumed run continues there
swanlab/            with swanlab_project: files of its client
swanlab_run_id.txt  with swanlab_project: the id under which a resumed run continues there
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeAlias

from cookbook.config.config_files import TYPE_KEY, differences, with_defaults
from cookbook.engine.processes import ALONE, World
from cookbook.errors import ConfigError, CookbookError, DataError
from cookbook.runs.checkpoints import FOLDER, CheckpointLog
from cookbook.runs.rows import read_changes, read_metrics, read_tables
from cookbook.utils import files, json_files, jsonl
from cookbook.utils.control_characters import visible_line
from cookbook.utils.json_files import JsonOrigin, Positive

logger = logging.getLogger(__name__)

CHANGES_FILE = "config_changes.jsonl"
LOCK_FILE = ".lock"

IfLogPathExists: TypeAlias = Literal["resume", "raise", "delete", "ask"]

RUN_FILES = (
    "config.json", "config_changes.jsonl", "data.json", "metrics.jsonl", "tables.jsonl", "checkpoints.jsonl",
    "checkpoints", "environment.json", "estimate.json", "report.html", "curves.png", "train.log", "ranks",
    "jobs", "inspect", "trace.json", "tensorboard", "wandb", "wandb_run_id.txt", "trackio_run_name.txt",
    "mlflow_run_id.txt", "swanlab", "swanlab_run_id.txt",
    "reference_logprobs.json",
)  # fmt: skip
"""The files that a run writes, and that `if_log_path_exists=delete` removes."""

HARMLESS_KEYS = {
    "log_path", "if_log_path_exists", "submit_ahead", "on_evaluator_error", "wandb_project", "wandb_name",
    "tensorboard", "trackio_project", "trackio_name", "trace", "save_every", "keep_checkpoints", "eval_every",
    "infrequent_eval_every", "evaluator_builders", "infrequent_evaluator_builders", "num_proc", "use_cache",
    "on_bad_row", "mlflow_experiment", "mlflow_name", "swanlab_project", "swanlab_name", "push_to_hub",
    "notify",
}  # fmt: skip
"""Keys that may change between the first run in a folder and a resumed one, because they change no weight."""

ROUNDING_KEYS = {
    "device", "max_tokens_per_microbatch", "gradient_checkpointing", "compile", "shard",
    "deterministic",
}  # fmt: skip
"""Keys that change results only by rounding. A run continues if they change, and logs it."""

PATIENCE_KEYS = {"early_stopping_patience", "early_stopping_min_delta"}

SHAPE_KEYS = {
    "model_name", "lora_rank", "lora_alpha", "train_attn", "train_mlp", "train_unembed", "lora_targets",
    "use_rslora", "add_tokens",
}  # fmt: skip
"""Keys whose values must be equal for a checkpoint to fit."""


class RunFolder:
    """Locks the folder for one run at a time. Of several processes only rank 0 writes to it."""

    def __init__(
        self, path: str, config: dict[str, Any], if_exists: IfLogPathExists, world: World = ALONE
    ) -> None:
        """Raises ConfigError if the folder holds a run that this config cannot continue."""
        self.path = Path(path)
        self.config = config
        self.world = world
        self._lock: IO[bytes] | None = None
        self.earlier_config: dict[str, Any] | None = world.on_rank0(lambda: self._open(if_exists))
        """The config of the run that continues here, or None if a new one begins."""
        self._check_shared_by_all(world)

    def _open(self, if_exists: IfLogPathExists) -> dict[str, Any] | None:
        """Returns the config of the run that continues. Its file is kept until `record_config`."""
        path = self.path
        for folder in (path, self.checkpoint_dir):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(
                    f"log_path={path}: {folder} is a file. Give a folder, which need not exist."
                )
        try:
            earlier = None
            if (path / "config.json").exists() and not _is_untouched(path):
                earlier = self._resolve_earlier_run(if_exists)
            _refuse_links(path)
            files.make_folder(path, may_be_link=True)
            self._take_lock()
            files.remove_abandoned(path)
            if earlier is None:
                self._write_config()
            else:
                files.check_writable(path)
        except OSError as error:
            if isinstance(error, CookbookError):
                raise
            raise ConfigError(
                f"log_path={path} cannot be written: {error}. Choose another folder."
            ) from error
        return earlier

    def _write_config(self) -> None:
        files.write(self.path / "config.json", _text(self.config))

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The dotted keys that differ from the earlier run, each with the earlier and the new value."""
        return {} if self.earlier_config is None else _changes(self.earlier_config, self.config)

    @property
    def length_changes(self) -> dict[str, tuple[Any, Any]]:
        """The changes of the run's length, and so of the learning rates of later steps."""
        return {key: values for key, values in self.changes.items() if _is_length(key)}

    @property
    def patience_changes(self) -> dict[str, tuple[Any, Any]]:
        return {key: values for key, values in self.changes.items() if key in PATIENCE_KEYS}

    def record_config(self, step: int, ended_by_patience: bool) -> None:
        """Writes this config to the folder, after recording the changes made at `step`."""
        if not self.world.is_main:
            return
        if self.changes:
            path = self.path / CHANGES_FILE
            row = {
                "step": step,
                "ended_by_patience": ended_by_patience,
                "changes": {
                    key: {"was": was, "now": now} for key, (was, now) in sorted(self.changes.items())
                },
            }
            rows = read_changes(path)
            if row not in rows[-1:]:
                jsonl.rewrite(path, [*rows, row])
        self._write_config()

    def patience_restarts(self) -> set[int]:
        """Returns the steps at which a run that had ended by patience was continued."""
        rows: list[dict[str, Any]] = self.world.on_rank0(lambda: read_changes(self.path / CHANGES_FILE))
        return {row["step"] for row in rows if row["ended_by_patience"]}

    def _check_shared_by_all(self, world: World) -> None:
        """Raises ConfigError if this path is not the same folder for all processes, which all read it."""
        if world.is_alone:
            return
        mark = self.path / world.broadcast(f".seen-by-all-{secrets.token_hex(8)}")
        world.on_rank0(lambda: files.write(mark, ""))
        hosts = world.all_gather_object(None if mark.exists() else socket.gethostname())
        world.on_rank0(lambda: files.remove(mark))
        for rank, host in enumerate(hosts):
            if host is not None:
                raise ConfigError(
                    f"log_path={self.path} is not shared by all processes: process {rank}, on {host}, does "
                    f"not see what process 0 writes there. Choose a folder on a file system they share."
                )

    @property
    def log_file(self) -> Path:
        """The log file of this process."""
        if self.world.is_main:
            return self.path / "train.log"
        folder = files.make_folder(self.path / "ranks")
        return folder / f"{os.environ['RANK']}.log"

    @property
    def checkpoint_dir(self) -> Path:
        return self.path / FOLDER

    def write_data_report(
        self,
        fingerprint: str | None,
        num_rows: int | None,
        reports: list[dict[str, Any]],
        evaluation_reports: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`num_rows` is the number of rows of an epoch, if known."""
        if self.world.is_main:
            values = {"fingerprint": fingerprint, "rows": num_rows, "sources": reports}
            values |= {"evaluation_sources": list(evaluation_reports)}
            files.write(self.path / "data.json", _text(values))

    def read_data_report(self) -> dict[str, Any]:
        """Returns what was recorded about the data that the run began with; {} if nothing was."""
        path = self.path / "data.json"
        if not path.exists():
            return {}
        repair = f"Restore it. {how_to_train_on(self.path)}"
        shape = {"fingerprint": str | None, "rows": int | None}
        return json_files.read_object(path, DataError, repair, shape)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl so far, as rank 0 sees them."""
        rows: list[dict[str, Any]] = self.world.on_rank0(lambda: read_metrics(self.path / "metrics.jsonl"))
        return rows

    def read_tables(self) -> list[dict[str, Any]]:
        """Returns the rows of tables.jsonl so far, as rank 0 sees them."""
        rows: list[dict[str, Any]] = self.world.on_rank0(lambda: read_tables(self.path / "tables.jsonl"))
        return rows

    def _resolve_earlier_run(self, if_exists: IfLogPathExists) -> dict[str, Any] | None:
        """Returns the config of the earlier run if this one continues it, or None if it was deleted.

        Raises ConfigError if the run cannot be continued.
        """
        earlier = _read_run_config(self.path / "config.json")
        if if_exists == "ask":
            if_exists = _ask(self.path)
        if if_exists == "delete":
            self._take_lock()
            _remove_run(self.path)
            return None
        if if_exists == "raise":
            raise ConfigError(
                f"log_path={self.path} holds a run already. Choose another folder, or set "
                "if_log_path_exists=resume or if_log_path_exists=delete."
            )
        changed = {
            key: values for key, values in _changes(earlier, self.config).items() if not _is_harmless(key)
        }
        refused = [key for key in changed if not _may_change(key)]
        if refused:
            lines = [f"  {key}: was {old!r}, now {new!r}" for key, (old, new) in sorted(changed.items())]
            others = sorted(key.split(".")[-1] for key in changed.keys() - set(refused))
            alone = f"It would continue with another {', '.join(others)} alone. " if others else ""
            raise ConfigError(
                f"log_path={self.path} holds a run with another config:\n"
                + "\n".join(lines)
                + f"\n{alone}{how_to_train_on(self.path, refused)}"
            )
        return earlier

    def _take_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
        try:
            self._lock = files.locked(self.path / LOCK_FILE)
        except BlockingIOError as error:
            raise ConfigError(
                f"log_path={self.path} is in use by another process. Wait for it, or choose another folder."
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()


def _changes(earlier: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    found = differences(with_defaults(earlier, config), config)
    return {key: values for key, values in found.items() if key not in ("log_path", "if_log_path_exists")}


def _is_harmless(key: str) -> bool:
    return bool(HARMLESS_KEYS & {key.split(".")[0], key.split(".")[-1]})


def _may_change(key: str) -> bool:
    return _is_harmless(key) or key in ROUNDING_KEYS | PATIENCE_KEYS or _is_length(key)


def _is_length(key: str) -> bool:
    is_batch_size = key.startswith("dataset_builder.") and key.endswith(".batch_size")
    return is_batch_size or key in ("max_steps", "num_epochs")


def how_to_train_on(folder: Path, refused: Collection[str] = ()) -> str:
    """Returns the advice for a run in `folder` that cannot continue with changes of the keys `refused`."""
    last = CheckpointLog(folder).last_path()
    if last is None:
        return "Choose another log_path, or start over with if_log_path_exists=delete."
    shapes = sorted(SHAPE_KEYS & set(refused))
    fits = f", which fit no other {', '.join(shapes)}," if shapes else ""
    return (
        f"To start from its weights{fits} give another log_path and load_checkpoint_path={last}; "
        f"to start over set if_log_path_exists=delete."
    )


def holds_run(path: str) -> bool:
    """Returns whether a run in this folder has recorded a checkpoint, from which it can be resumed."""
    checkpoints = Path(path) / "checkpoints.jsonl"
    return checkpoints.is_file() and checkpoints.stat().st_size > 0


def recorded_config(path: str) -> dict[str, Any] | None:
    """Returns the config of the run in this folder; None if there is none, or it has taken no step.

    Raises ConfigError if its file is damaged.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or _is_untouched(folder):
        return None
    return _read_run_config(folder / "config.json")


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _is_untouched(folder: Path) -> bool:
    """Returns whether a run started here but took no step, so that there is nothing to resume or to lose."""
    _read_run_config(folder / "config.json")
    progress = [folder / name for name in ("metrics.jsonl", "checkpoints.jsonl")]
    return not any(path.exists() and path.stat().st_size for path in progress)


def _read_run_config(path: Path) -> dict[str, Any]:
    repair = f"Restore it, or choose another folder than log_path={path.parent}."
    origin = JsonOrigin(str(path), ConfigError, repair)
    config = json_files.read_object(path, ConfigError, repair)
    if TYPE_KEY not in config:
        raise ConfigError(
            f"log_path={path.parent} holds a config.json that no run wrote. Choose another folder."
        )
    json_files.check(
        config, {TYPE_KEY: str, "num_epochs": Positive | None, "max_steps": Positive | None}, origin
    )
    return config


def _remove_run(folder: Path) -> None:
    for name in RUN_FILES:
        files.remove(folder / name)


def _refuse_links(folder: Path) -> None:
    """Raises FileError for a link inside a run's folder, which may be untrusted."""
    for name in (*RUN_FILES, LOCK_FILE):
        files.refuse_link(folder / name)
    checkpoints = folder / FOLDER
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        files.refuse_link(path)


def _ask(path: Path) -> IfLogPathExists:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"log_path={path} holds a run already, and standard input is not a terminal on which to ask "
            f"what to do. Give if_log_path_exists=resume, delete or raise."
        )
    question = f"{path} holds a run already. [r]esume it, [d]elete it, or stop? "
    answer = input(visible_line(question)).strip().lower()
    return {"r": "resume", "resume": "resume", "d": "delete", "delete": "delete"}.get(answer, "raise")  # type: ignore[return-value]
