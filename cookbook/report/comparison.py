"""Writes compare.html, which shows several runs in the same charts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cookbook.errors import ConfigError
from cookbook.report import panels
from cookbook.report.rendering import render
from cookbook.report.run_page import REPORT_FILE
from cookbook.report.table_views import shortened
from cookbook.runs.record import RunRecord, read_run
from cookbook.runs.settings import texts_of
from cookbook.runs.summary import Outcome, better_of, headline_metric, outcome_of, status_of, steps_of
from cookbook.utils import files

MAX_METRICS = 6
"""The largest number of metric columns in the table of runs; the charts show all metrics."""
MAX_READERS = 8
MAX_SETTING = 300
"""The number of characters of a setting that are shown."""
NAMES = {"log_path", "wandb_name", "if_log_path_exists"}
"""Settings that differ between runs without an effect on the results."""


@dataclass(frozen=True)
class RunRow:
    """A row of the table of runs."""

    name: str
    colour: str
    dash: str
    status: str
    num_steps: int
    steps: str
    """The steps in words, such as 25 of 44."""
    outcomes: Sequence[Outcome | None]
    seconds: float
    tokens_per_second: float
    link: str | None


def compare(
    folders: Sequence[str | Path], to: str | Path, title: str = "Comparison of runs", notes: str | None = None
) -> Path:
    """Writes a page to `to` that shows the runs in `folders` in the same charts, the best first.

    Returns the path of the page. `notes` is plain text at its top. Raises ConfigError if a folder is not that
    of a run or is given twice, or if no run has taken a step.
    """
    path = Path(to).expanduser()
    if not path.parent.is_dir():
        raise ConfigError(f"to={to}: there is no folder {path.parent}. Create it, or choose another folder.")
    runs = _named(_read_all(folders))
    if all(run.headline is None for run in runs.values()):
        raise ConfigError(f"Nothing to compare: no step was logged yet in {', '.join(map(str, folders))}.")
    metrics = _metrics(runs)
    runs = _best_first(runs, metrics[0])
    charts, num_not_drawn = panels.charts_of_several({name: run.record for name, run in runs.items()})
    page = render(
        "compare.html",
        charts,
        title=title,
        notes=notes,
        metrics=[(metric, better_of(metric)) for metric in metrics],
        rows=[_row(index, name, run, metrics, path) for index, (name, run) in enumerate(runs.items())],
        differences=_differences(runs),
        num_charts=len(charts),
        num_not_drawn=num_not_drawn,
    )
    files.write(path, page)
    return path


@dataclass(frozen=True)
class Compared:
    """The values of one run that the page shows. All others are dropped after reading, to save memory."""

    record: RunRecord
    """The run, its curves reduced to as many points as the page has room for."""
    outcomes: Mapping[str, Outcome]
    """The outcome of each metric."""
    headline: str | None
    seconds: float
    tokens: float


def _read_all(folders: Sequence[str | Path]) -> list[Compared]:
    """Reads the runs in parallel."""
    with ThreadPoolExecutor(max_workers=min(MAX_READERS, os.cpu_count() or 1)) as readers:
        return list(readers.map(lambda folder: _read(folder, len(folders)), folders))


def _read(folder: str | Path, num_runs: int) -> Compared:
    run = read_run(folder, with_tables=False)
    return Compared(
        record=replace(run, metrics=panels.compared_curves(run, num_runs)),
        outcomes={metric: outcome_of(metric, series) for metric, series in run.metrics.items()},
        headline=headline_metric(run),
        seconds=run.total("perf/seconds"),
        tokens=run.total("data/tokens"),
    )


def _named(runs: Sequence[Compared]) -> dict[str, Compared]:
    """Returns the runs by folder name, with as many parent folders as make the names unique."""
    parts = [run.record.folder.resolve().parts for run in runs]
    twice = next((path for path, number in Counter(parts).items() if number > 1), None)
    if twice is not None:
        raise ConfigError(f"{Path(*twice)} is given twice. Give every run once.")
    length = 1
    while len({path[-length:] for path in parts}) < len(runs):
        length += 1
    return {str(Path(*path[-length:])): run for path, run in zip(parts, runs, strict=True)}


def _metrics(runs: Mapping[str, Compared]) -> list[str]:
    """Returns the metrics of the table, starting with the headline metric of most runs."""
    headlines = Counter(run.headline for run in runs.values() if run.headline is not None)
    counts = Counter(metric for run in runs.values() for metric in run.record.evals if metric.count("/") == 1)
    first = headlines.most_common(1)[0][0]
    others = [metric for metric, _ in counts.most_common() if metric != first]
    return [first, *others][:MAX_METRICS]


def _best_first(runs: Mapping[str, Compared], metric: str) -> dict[str, Compared]:
    def rank(item: tuple[str, Compared]) -> tuple[bool, float]:
        outcome = item[1].outcomes.get(metric)
        if outcome is None:
            return True, 0
        value = outcome.last if outcome.best is None else outcome.best
        return False, -value if better_of(metric) == "max" else value

    return dict(sorted(runs.items(), key=rank))


def _row(index: int, name: str, run: Compared, metrics: Sequence[str], page: Path) -> RunRow:
    report = run.record.folder / REPORT_FILE
    return RunRow(
        name=name,
        colour=f"c{index % panels.NUM_COLOURS}",
        dash=panels.dash(index),
        status=status_of(run.record) if run.outcomes else "no step logged yet",
        num_steps=run.record.num_steps,
        steps=steps_of(run.record),
        outcomes=[run.outcomes.get(metric) for metric in metrics],
        seconds=run.seconds,
        tokens_per_second=run.tokens / run.seconds if run.seconds else 0,
        link=os.path.relpath(report, page.parent) if report.exists() else None,
    )


def _differences(runs: Mapping[str, Compared]) -> list[tuple[str, list[str]]]:
    """Returns the settings in which the runs differ, each with its value in every run."""
    texts = {name: texts_of(run.record.config) for name, run in runs.items()}
    keys = dict.fromkeys(key for settings in texts.values() for key in settings)
    rows = [(key, [settings.get(key, "") for settings in texts.values()]) for key in keys]
    return [
        (key, [shortened(value, MAX_SETTING) for value in values])
        for key, values in rows
        if key not in NAMES and len(set(values)) > 1
    ]
