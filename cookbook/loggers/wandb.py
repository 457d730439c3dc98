"""Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook.errors import ConfigError
from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.tables import Table


class WandbLogger(MetricLogger):
    """Weights & Biases, with its own client. A resumed run goes on under the same run id."""

    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                config=dict(config),
                dir=str(folder),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}, but Weights & Biases cannot start: {error}\n"
                f"Log in with `wandb login`, work without a network with WANDB_MODE=offline, or leave "
                f"wandb_project out."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, table: Table) -> None:
        import wandb

        rows = [list(row) for row in table.rows]
        # A cell may be empty, which wandb takes for another type.
        shown = wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()
