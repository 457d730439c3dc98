"""The folder of a run: its config, its lock, and whether a run may go on in it.

config.json         the resolved config; `config=<this file>` runs it again
metrics.jsonl       one row a step; perf/seconds_... say what its time went to (see step_times.py)
tables.jsonl        what evaluators showed beside numbers, such as samples: one row of a table a line
data.json           what was read and left out, and a fingerprint of it
checkpoints.jsonl   the checkpoints there are, where each one continues, and which is the best
checkpoints/<name>/ weights and optimizer; loads with plain PEFT
environment.json    the machine and the versions it was last started with
inspect/            logs of Inspect AI, where its tasks were run
report.html         all of it to look at, and curves.png
trace.json          with trace=True: what ran when; open it at https://ui.perfetto.dev
tensorboard/        with tensorboard=True: event files
train.log           what was printed, with times
ranks/<n>.log       the same of the other processes, where several train together
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeAlias

from cookbook import jsonl
from cookbook.config_files import TYPE_KEY, differences
from cookbook.engine.mesh import ALONE, Mesh
from cookbook.errors import ConfigError

logger = logging.getLogger(__name__)

IfLogPathExists: TypeAlias = Literal["resume", "raise", "delete", "ask"]

RUN_FILES = (
    "config.json", "data.json", "metrics.jsonl", "tables.jsonl", "checkpoints.jsonl", "checkpoints",
    "train.log", "ranks", "wandb", "wandb_run_id.txt", "environment.json", "report.html", "curves.png",
    "inspect", "tensorboard", "trackio_run_name.txt", "trace.json",
)  # fmt: skip
"""What a run writes, and so all that `if_log_path_exists=delete` removes."""

HARMLESS_KEYS = {
    "log_path", "if_log_path_exists", "submit_ahead", "on_evaluator_error", "wandb_project", "wandb_name",
    "tensorboard", "trackio_project", "trackio_name", "trace",
}  # fmt: skip
"""What may change between the first run in a folder and a resumed one: it moves no weight and no metric."""


class RunFolder:
    """Holds the folder for one run at a time. Of several processes the main one alone writes to it."""

    def __init__(
        self, path: str, config: dict[str, Any], if_exists: IfLogPathExists, world: Mesh = ALONE
    ) -> None:
        """Raises ConfigError where the folder holds a run that this config does not continue."""
        self.path = Path(path)
        self.config = config
        self.world = world
        self._lock: IO[str] | None = None
        world.by_main(lambda: self._open(if_exists))
        self._check_that_all_see_it(world)

    def _open(self, if_exists: IfLogPathExists) -> None:
        path, config = self.path, self.config
        if (self.path / "config.json").exists() and not _is_untouched(self.path):
            self._settle_with_earlier_run(config, if_exists)
        elif self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"log_path={path} is a file. Give a folder, which need not exist.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            jsonl.write_atomically(self.path / "config.json", jsonl.encoded(_text(config)))
        except OSError as error:
            raise ConfigError(
                f"log_path={path} cannot be written: {error}. Choose another folder."
            ) from error

    def _check_that_all_see_it(self, world: Mesh) -> None:
        """Raises ConfigError where a process has another folder under this name, or none: each reads it."""
        if world.is_alone:
            return
        mark = self.path / world.of_main(f".seen-by-all-{secrets.token_hex(8)}")
        world.by_main(mark.touch)
        hosts = world.gather(None if mark.exists() else socket.gethostname())
        world.by_main(mark.unlink)
        for rank, host in enumerate(hosts):
            if host is not None:
                raise ConfigError(
                    f"log_path={self.path} is not one folder for all processes: what process 0 writes there "
                    f"process {rank}, on {host}, does not see. Choose a folder on a file system they share."
                )

    @property
    def log_file(self) -> Path:
        """Where this process writes down what it has to say."""
        if self.world.is_main:
            return self.path / "train.log"
        folder = self.path / "ranks"
        folder.mkdir(exist_ok=True)
        return folder / f"{os.environ['RANK']}.log"

    @property
    def checkpoint_dir(self) -> Path:
        return self.path / "checkpoints"

    def write_data_report(
        self,
        fingerprint: str | None,
        reports: list[dict[str, Any]],
        evaluation_reports: Sequence[dict[str, Any]] = (),
    ) -> None:
        if self.world.is_main:
            values = {"fingerprint": fingerprint, "sources": reports}
            values |= {"evaluation_sources": list(evaluation_reports)}
            jsonl.write_atomically(self.path / "data.json", jsonl.encoded(_text(values)))

    def read_data_fingerprint(self) -> str | None:
        """Of the data that the run began with."""
        path = self.path / "data.json"
        return json.loads(path.read_text(encoding="utf-8"))["fingerprint"] if path.exists() else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far, as the main process sees them."""
        rows: list[dict[str, Any]] = self.world.by_main(lambda: jsonl.read(self.path / "metrics.jsonl"))
        return rows

    def _settle_with_earlier_run(self, config: dict[str, Any], if_exists: IfLogPathExists) -> None:
        earlier = _read_run_config(self.path / "config.json")
        if if_exists == "ask":
            if_exists = _ask(self.path)
        if if_exists == "delete":
            self._take_lock()
            _remove_run(self.path)
            return
        if if_exists == "raise":
            raise ConfigError(
                f"log_path={self.path} holds a run already. Choose another folder, or say "
                f"if_log_path_exists=resume or if_log_path_exists=delete."
            )
        changed = {
            key: values
            for key, values in differences(earlier, config).items()
            if not HARMLESS_KEYS & {key.split(".")[0], key.split(".")[-1]}
        }
        if changed:
            lines = [f"  {key}: was {old!r}, now {new!r}" for key, (old, new) in sorted(changed.items())]
            raise ConfigError(
                f"log_path={self.path} holds a run with another config:\n" + "\n".join(lines) + "\n"
                "Choose another log_path, or start over with if_log_path_exists=delete."
            )

    def _take_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _is_untouched(folder: Path) -> bool:
    """Whether a run was begun here but took no step: there is nothing to resume or to lose."""
    _read_run_config(folder / "config.json")
    progress = [folder / name for name in ("metrics.jsonl", "checkpoints.jsonl")]
    return not any(path.exists() and path.stat().st_size for path in progress)


def _read_run_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or TYPE_KEY not in config:
        raise ConfigError(
            f"log_path={path.parent} holds a config.json that is no run's. Choose another folder."
        )
    return config


def _remove_run(folder: Path) -> None:
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _ask(path: Path) -> IfLogPathExists:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"log_path={path} holds a run already, and nobody can be asked what to do: standard input is no "
            f"terminal. Say if_log_path_exists=resume, delete or raise."
        )
    answer = input(f"{path} holds a run already. [r]esume it, [d]elete it, or stop? ").strip().lower()
    return {"r": "resume", "resume": "resume", "d": "delete", "delete": "delete"}.get(answer, "raise")  # type: ignore[return-value]
