"""compare.html: several runs laid over each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cookbook import files
from cookbook.errors import ConfigError
from cookbook.report import panels
from cookbook.report.record import RunRecord, read_run
from cookbook.report.rendering import render
from cookbook.report.run_page import REPORT_FILE
from cookbook.report.settings import texts_of
from cookbook.report.summary import Outcome, better_of, headline_metric, outcome_of, status_of

MAX_METRICS = 6
"""Columns of metrics in the table of runs; the charts have all of them."""
NAMES = {"log_path", "wandb_name", "if_log_path_exists"}
"""Settings that every run has its own of, and that change nothing."""


@dataclass(frozen=True)
class Row:
    """A run in the table of runs."""

    name: str
    colour: str
    dash: str
    status: str
    num_steps: int
    outcomes: Sequence[Outcome | None]
    seconds: float
    tokens_per_second: float
    link: str | None


def compare(
    folders: Sequence[str | Path], to: str | Path, title: str = "Comparison of runs", notes: str | None = None
) -> Path:
    """Lays the runs in `folders` over each other on a page at `to`, the best first. Returns its path.

    `notes` is plain text that stands above everything else. Raises ConfigError for what is no run's
    folder, a folder that is given twice, and where no run has taken a step.
    """
    path = Path(to).expanduser()
    if not path.parent.is_dir():
        raise ConfigError(f"to={to}: there is no folder {path.parent}. Make it, or write elsewhere.")
    runs = _named([read_run(folder) for folder in folders])
    if not any(run.metrics for run in runs.values()):
        raise ConfigError(f"Nothing to compare: no step was logged yet in {', '.join(map(str, folders))}.")
    metrics = _metrics(runs)
    runs = _best_first(runs, metrics[0])
    charts = panels.charts_of_several(runs)
    page = render(
        "compare.html",
        charts,
        title=title,
        notes=notes,
        metrics=[(metric, better_of(metric)) for metric in metrics],
        rows=[_row(index, name, run, metrics, path) for index, (name, run) in enumerate(runs.items())],
        differences=_differences(runs),
        num_charts=len(charts),
    )
    files.write(path, page)
    return path


def _named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by their folders' names, with as much of the path as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    twice = next((path for path, number in Counter(parts).items() if number > 1), None)
    if twice is not None:
        raise ConfigError(f"{Path(*twice)} is given twice. Give every run once.")
    length = 1
    while len({path[-length:] for path in parts}) < len(runs):
        length += 1
    return {str(Path(*path[-length:])): run for path, run in zip(parts, runs, strict=True)}


def _metrics(runs: Mapping[str, RunRecord]) -> list[str]:
    """What the table shows, the metric that most runs are judged by first."""
    headlines = Counter(metric for run in runs.values() if (metric := headline_metric(run)) is not None)
    counts = Counter(metric for run in runs.values() for metric in run.evals if metric.count("/") == 1)
    first = headlines.most_common(1)[0][0]
    others = [metric for metric, _ in counts.most_common() if metric != first]
    return [first, *others][:MAX_METRICS]


def _best_first(runs: Mapping[str, RunRecord], metric: str) -> dict[str, RunRecord]:
    def rank(item: tuple[str, RunRecord]) -> tuple[bool, float]:
        series = item[1].metrics.get(metric)
        if series is None:
            return True, 0
        outcome = outcome_of(metric, series)
        value = outcome.last if outcome.best is None else outcome.best
        return False, -value if better_of(metric) == "max" else value

    return dict(sorted(runs.items(), key=rank))


def _row(index: int, name: str, run: RunRecord, metrics: Sequence[str], page: Path) -> Row:
    seconds = run.total("perf/seconds")
    report = run.folder / REPORT_FILE
    return Row(
        name=name,
        colour=f"c{index % panels.NUM_COLOURS}",
        dash=panels.dash(index),
        status=status_of(run) if run.metrics else "no step logged yet",
        num_steps=run.num_steps,
        outcomes=[
            outcome_of(metric, run.metrics[metric]) if metric in run.metrics else None for metric in metrics
        ],
        seconds=seconds,
        tokens_per_second=run.total("data/tokens") / seconds if seconds else 0,
        link=os.path.relpath(report, page.parent) if report.exists() else None,
    )


def _differences(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, each with its value in every run."""
    texts = {name: texts_of(run.config) for name, run in runs.items()}
    keys = dict.fromkeys(key for settings in texts.values() for key in settings)
    rows = [(key, [settings.get(key, "") for settings in texts.values()]) for key in keys]
    return [(key, values) for key, values in rows if key not in NAMES and len(set(values)) > 1]
