"""What a run left in its folder, read for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cookbook import files, jsonl
from cookbook.checkpoints import CheckpointLog, read_records
from cookbook.config_files import TYPE_KEY
from cookbook.errors import ConfigError, DataError
from cookbook.loggers import OF_EVERY_STEP
from cookbook.run_metrics import METRICS_FILE, MetricsReader, Series

WIDE = 8
"""Where the greatest value is so many times the least, a logarithmic axis shows more of a curve."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Series]
    num_steps: int
    """Optimizer steps that were taken and logged."""
    is_finished: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @property
    def evals(self) -> dict[str, Series]:
        """The metrics that evaluators measured."""
        return {name: series for name, series in self.metrics.items() if is_eval(name)}

    def total(self, metric: str) -> float:
        """The sum of a metric over all steps."""
        series = self.metrics.get(metric)
        return 0.0 if series is None else float(series.values.sum())


def is_wide(least: float, greatest: float) -> bool:
    """Whether a curve between these values is a line along the floor, unless its axis is logarithmic."""
    return least > 0 and greatest / least > WIDE


def is_eval(metric: str) -> bool:
    return metric.split("/")[0] not in OF_EVERY_STEP


def read_run(folder: str | Path, metrics: MetricsReader | None = None, with_tables: bool = True) -> RunRecord:
    """Everything there is to show of a run, in progress or over. Raises ConfigError where there is none.

    `metrics` is a reader of that run's, which has read some of them before. Tables may be left unread.
    """
    path = Path(folder).expanduser()
    config = _read_config(path)
    metrics = metrics or MetricsReader(path)
    metrics.update()
    steps = metrics.columns.get("optim/learning_rate")
    return RunRecord(
        folder=path,
        name=path.resolve().name,
        config=config,
        metrics=metrics.series(),
        num_steps=0 if steps is None else len(steps.steps),
        is_finished=CheckpointLog(path).is_finished if (path / "checkpoints.jsonl").exists() else False,
        data=_read_object(path / "data.json"),
        environment=_read_object(path / "environment.json"),
        tables=jsonl.read(path / "tables.jsonl") if with_tables else [],
        checkpoints=[asdict(record) for record in read_records(path / "checkpoints.jsonl")],
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Give the folder of a run, its log_path.")
    path = folder / "config.json"
    config = _read_object(path) if path.is_file() else {}
    if TYPE_KEY not in config:
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{METRICS_FILE}"))
        hint = f" Runs in it: {', '.join(inside)}." if inside else ""
        raise ConfigError(f"{folder} is no run's folder: it has no config.json of a run.{hint}")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file of the run's folder; {} where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(files.read(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Restore or remove it.") from error
    return value if isinstance(value, dict) else {}
