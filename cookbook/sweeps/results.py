"""Results of a sweep: a record of ended runs, a table, a CSV file, and the best settings as a config file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from chz.blueprint import Castable
from rich.console import Console
from rich.table import Table

from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.metrics import METRICS_FILE
from cookbook.runs.rows import METRICS_SHAPE, METRICS_VALUE
from cookbook.sweeps.plan import Plan, PlannedRun
from cookbook.sweeps.run_process import Progress
from cookbook.sweeps.space import SEED
from cookbook.utils import files, json_files, jsonl
from cookbook.utils.control_characters import visible_line
from cookbook.utils.rich_console import plain_line

RECORD = "sweep.jsonl"
CSV = "results.csv"
BEST = "best.yaml"
REPORT = "report.html"
ORDER = ("finished", "stopped", "running", "failed")
"""The order of ranking. Stopped and running runs have taken fewer steps than finished ones."""


@dataclass(frozen=True)
class PointResult:
    """The runs of one point of the search space, which differ only in their seeds."""

    runs: Sequence[PlannedRun]
    progress: Sequence[Progress]

    @property
    def state(self) -> str:
        """The least finished state of its runs."""
        return max((one.state for one in self.progress), key=ORDER.index)

    @property
    def values(self) -> list[float]:
        return [one.value for one in self.progress if not math.isnan(one.value)]

    @property
    def value(self) -> float:
        return mean(self.values) if self.values else math.nan


def record(plan: Plan, run: PlannedRun, progress: Progress) -> None:
    jsonl.append(plan.folder / RECORD, {"name": run.name, **progress.to_json()})


def progress_of(plan: Plan) -> dict[str, Progress]:
    """Returns the progress of every run, from its folder and the sweep's record of ended runs."""
    recorded = _recorded(plan.folder / RECORD)
    return {run.name: _progress_of(run, plan.config.metric, recorded.get(run.name)) for run in plan.runs}


def _recorded(file: Path) -> dict[str, Progress]:
    """Returns the sweep's record of ended runs, by name."""
    rows = jsonl.read(file, {"name": str})
    return {
        row.pop("name"): json_files.record_of(Progress, row, jsonl.origin_of(file, number))
        for number, row in enumerate(rows, 1)
    }


def _progress_of(run: PlannedRun, metric: str, recorded: Progress | None) -> Progress:
    rows = jsonl.read_backwards(run.folder / METRICS_FILE, METRICS_SHAPE, METRICS_VALUE)
    last = next((row for row in rows if metric in row), None)
    step, value = (0, math.nan) if last is None else (last["step"], last[metric])
    if CheckpointLog(run.folder).is_finished:
        return (recorded or Progress("finished")) if last is None else Progress("finished", step, value)
    if recorded is not None and recorded.state in ("stopped", "failed"):
        return Progress(recorded.state, step, value, recorded.error)
    return Progress("running", step, value)


def ranked(plan: Plan, progress: Mapping[str, Progress]) -> list[PointResult]:
    """Returns the results of all points, the best first, by the mean over their seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[PlannedRun]] = {}
    for run in plan.runs:
        point = tuple((key, value) for key, value in run.point.items() if key != SEED)
        groups.setdefault(point, []).append(run)
    results = [PointResult(runs, [progress[run.name] for run in runs]) for runs in groups.values()]
    sign = 1 if plan.config.mode == "min" else -1

    def rank(result: PointResult) -> tuple[int, bool, float]:
        is_unknown = math.isnan(result.value)
        return ORDER.index(result.state), is_unknown, 0.0 if is_unknown else sign * result.value

    return sorted(results, key=rank)


def print_table(plan: Plan, results: Sequence[PointResult], console: Console) -> None:
    keys = [key for key in plan.varied_keys if key != SEED]
    has_seeds = any(len(result.runs) > 1 for result in results)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in keys:
        table.add_column(plain_line(key.rsplit(".", 1)[-1]), overflow="fold")
    table.add_column(plain_line(plan.config.metric), justify="right", no_wrap=True)
    if has_seeds:
        table.add_column("seeds", justify="right")
    table.add_column("steps", justify="right")
    table.add_column("state")
    for result in results:
        point = result.runs[0].point
        seeds = [f"{len(result.values)}/{len(result.runs)}"] if has_seeds else []
        steps = max(one.step for one in result.progress)
        cells = [*(point[key] for key in keys), _value_text(result), *seeds, steps, result.state]
        table.add_row(*map(plain_line, cells))
    console.print(table)


def _value_text(result: PointResult) -> str:
    if not result.values:
        return "-"
    spread = f" ± {stdev(result.values):.4f}" if len(result.values) > 1 else ""
    return f"{result.value:.4f}{spread}"


def write_csv(plan: Plan, results: Sequence[PointResult]) -> Path:
    """Writes one row per run, the best point first."""
    path = plan.folder / CSV
    table = io.StringIO()
    writer = csv.writer(table)
    head = ["run", *plan.varied_keys, plan.config.metric, "steps", "state", "error", "log_path"]
    writer.writerow(map(_cell, head))
    for result in results:
        for run, progress in zip(result.runs, result.progress, strict=True):
            value = "" if math.isnan(progress.value) else progress.value
            settings = [run.point[key] for key in plan.varied_keys]
            cells = [run.name, *settings, value, progress.step, progress.state, progress.error, run.folder]
            writer.writerow(map(_cell, cells))
    files.write(path, table.getvalue())
    return path


def _cell(value: Any) -> str:
    """Returns a cell that spreadsheets treat as text: an apostrophe goes before what looks like a formula."""
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_best(plan: Plan, best: PointResult) -> Path:
    """Writes the settings of the best point as a config file, with a new folder as log_path."""
    path = plan.folder / BEST
    values = {key: setting.value for key, setting in plan.recipe.settings(best.runs[0].argv).items()}
    values["log_path"] = str(plan.folder / "best")
    files.write(
        path,
        f"# The best of {len(plan.runs)} runs: {visible_line(plan.config.metric)} {_value_text(best)}\n"
        f"#   python -m {plan.recipe.module} config={visible_line(path)}\n"
        + yaml.safe_dump({key: _plain(value) for key, value in values.items()}, sort_keys=False),
    )
    return path


def _plain(value: Any) -> Any:
    """Returns a setting as a YAML value, with integers as int."""
    value = value.value if isinstance(value, Castable) else value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value
