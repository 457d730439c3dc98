"""Reads everything that a run wrote into its folder, for a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cookbook.config.config_files import TYPE_KEY
from cookbook.errors import ConfigError, DataError
from cookbook.runs.checkpoints import CheckpointLog, read_records
from cookbook.runs.metrics import METRICS_FILE, MetricsReader, Series
from cookbook.runs.rows import STEP_METRIC_PREFIXES, read_tables
from cookbook.utils import json_files
from cookbook.utils.json_files import Count, JsonOrigin

LOG_AXIS_RATIO = 8
"""The ratio of maximum to minimum from which a logarithmic axis shows more of a curve."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Series]
    num_steps: int
    """The number of optimizer steps that were taken and logged."""
    is_finished: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    estimate: Mapping[str, Any] = field(default_factory=dict)
    """What the run was expected to take, in bytes and seconds; empty for a run without an estimate."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @property
    def evals(self) -> dict[str, Series]:
        """The metrics that evaluators measured."""
        return {name: series for name, series in self.metrics.items() if is_eval(name)}

    @property
    def planned_steps(self) -> int | None:
        """The number of steps that the run was to take, or None if that is unknown."""
        planned = self.estimate.get("num_steps") or self.config.get("max_steps")
        return planned if isinstance(planned, int) and not isinstance(planned, bool) else None

    def total(self, metric: str) -> float:
        """Returns the sum of a metric over all steps."""
        series = self.metrics.get(metric)
        return 0.0 if series is None else float(series.values.sum())


def needs_log_axis(lowest: float, highest: float) -> bool:
    """Returns whether a curve between these values would look flat without a logarithmic axis."""
    return lowest > 0 and highest / lowest > LOG_AXIS_RATIO


def is_eval(metric: str) -> bool:
    return metric.split("/")[0] not in STEP_METRIC_PREFIXES


def read_run(folder: str | Path, metrics: MetricsReader | None = None, with_tables: bool = True) -> RunRecord:
    """Reads a run, in progress or finished. Raises ConfigError if the folder is not that of a run.

    `metrics` is a reader of this run, which may have read some rows before. Without `with_tables`, tables are
    not read.
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
        data=_read_data(path / "data.json"),
        environment=_read_object(path / "environment.json"),
        estimate=_read_object(path / "estimate.json"),
        tables=read_tables(path / "tables.jsonl") if with_tables else [],
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
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.json of one.{hint}")
    shape = {TYPE_KEY: str, "best_metric": str | None}
    json_files.check(config, shape, JsonOrigin(str(path), DataError, _REPAIR))
    return config


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of the run's folder; {} if there is no file."""
    if not path.exists():
        return {}
    return json_files.read_object(path, DataError, _REPAIR)


_REPAIR = "Restore or remove it."
_NOTE_SHAPE = {"noun": str, "what": str, "item": str, "count": Count}
_COUNTS = (
    "rows", "examples", "tokens", "trained_tokens", "longest", "truncated", "too_long", "untrained",
    "filtered", "bad",
)  # fmt: skip
_SOURCE_SHAPE: Mapping[str, Any] = {
    "name": str,
    "role": str | None,
    "files": list[str] | None,
    "unread": list[str] | None,
    "notes": list[Mapping[str, Any]] | None,
    "bad_rows": list[Mapping[str, str]] | None,
    "length_histogram": Mapping[str, list[Count]] | None,
    **dict.fromkeys(_COUNTS, Count | None),
}
"""The parts of a source's report that a page shows."""


def _read_data(path: Path) -> dict[str, Any]:
    values = _read_object(path)
    origin = JsonOrigin(str(path), DataError, _REPAIR)
    lists = {"sources": list[Mapping[str, Any]] | None, "evaluation_sources": list[Mapping[str, Any]] | None}
    json_files.check(values, lists, origin)
    for name in lists:
        for index, source in enumerate(values.get(name) or ()):
            below = JsonOrigin(f"`{name}[{index}]` of {path}", DataError, _REPAIR)
            json_files.check(source, _SOURCE_SHAPE, below)
            for key in [key for key, value in source.items() if value is None]:
                del source[key]
            for note in source.get("notes") or ():
                json_files.check(note, _NOTE_SHAPE, below)
            histogram = source.get("length_histogram") or {}
            edges, counts = histogram.get("edges", []), histogram.get("counts", [])
            if len(edges) != len(counts) + bool(counts):
                below.refuse("`length_histogram` must have one edge more than counts")
    return {key: value for key, value in values.items() if value is not None}
