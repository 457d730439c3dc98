"""Logs to MLflow, with its own client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook.errors import ConfigError
from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.utils import files
from cookbook.utils.tables import Table

RUN_FILE = "mlflow_run_id.txt"
MAX_PARAM = 500
"""The number of characters of a parameter that every store of MLflow accepts."""


class MLflowLogger(MetricLogger):
    """Logs to a run of an MLflow experiment, at MLFLOW_TRACKING_URI. A resumed run continues under its id.

    Metrics of steps that a killed run had logged already are logged again, and MLflow shows the later ones.
    """

    def __init__(self, folder: Path, experiment: str, name: str | None, config: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        id_file = folder / RUN_FILE
        try:
            self._client = MlflowClient()
            if id_file.exists():
                self._run_id = files.read(id_file).decode().strip()
                self._client.update_run(self._run_id, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if found is None else found.experiment_id
            self._run_id = self._client.create_run(number, run_name=name or folder.name).info.run_id
            files.write(id_file, self._run_id)
            for key, value in _flat(config):
                self._client.log_param(self._run_id, key, str(value)[:MAX_PARAM])
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"mlflow_experiment={experiment!r}, but MLflow cannot start: {error} MLFLOW_TRACKING_URI "
                f"sets the place of its store."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(
            self._run_id, [Metric(name, float(value), now, step) for name, value in metrics.items()]
        )

    def log_table(self, step: int, name: str, table: Table) -> None:
        text = json.dumps(
            {"columns": list(table.columns), "data": [list(row) for row in table.rows]}, ensure_ascii=False
        )
        self._client.log_text(self._run_id, text, f"{name}/{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the plain values by dotted keys, without the names of classes."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            found.append((f"{prefix}{key}", value))
    return found
