"""Logs to SwanLab, with its own client."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook.errors import ConfigError
from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.loggers.tensorboard import in_markdown
from cookbook.utils import files
from cookbook.utils.tables import Table

ID_FILE = "swanlab_run_id.txt"
LOG_FOLDER = "swanlab"


class SwanLabLogger(MetricLogger):
    """Logs to a SwanLab project; SWANLAB_MODE=offline or local needs no login. A resumed run keeps its id."""

    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        import swanlab

        id_file = folder / ID_FILE
        if not id_file.exists():
            files.write(id_file, secrets.token_hex(10) + "0")
        files.make_folder(folder / LOG_FOLDER)
        try:
            self._run = swanlab.init(
                project=project,
                experiment_name=name or folder.name,
                config=dict(config),
                logdir=str(folder / LOG_FOLDER),
                id=files.read(id_file).decode().strip(),
                resume="allow",
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"swanlab_project={project!r}, but SwanLab cannot start: {error} Log in with `swanlab "
                f"login`, or set SWANLAB_MODE=offline."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        import swanlab

        swanlab.log({name: float(value) for name, value in metrics.items()}, step=step)

    def log_table(self, step: int, name: str, table: Table) -> None:
        import swanlab

        swanlab.log({name: swanlab.Text(in_markdown(table))}, step=step)

    def close(self) -> None:
        import swanlab

        swanlab.finish()
