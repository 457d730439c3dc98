"""Writes report.html, the page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from cookbook.report import panels
from cookbook.report.rendering import render
from cookbook.report.table_views import views_of
from cookbook.report.time_chart import time_chart
from cookbook.runs import curves
from cookbook.runs.metrics import MetricsReader
from cookbook.runs.record import RunRecord, read_run
from cookbook.runs.settings import settings_of
from cookbook.runs.summary import facts_of, forecasts_of, outcomes_of, status_of
from cookbook.utils import files, notes

REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"
MAX_METRICS = 1_000
MAX_CHECKPOINTS = 200
"""The page shows this many of the newest checkpoints, and the best one."""


def write_report(
    run_folder: str | Path, with_curves: bool = True, metrics: MetricsReader | None = None
) -> Path:
    """Writes report.html, and with `with_curves` curves.png, to a run's folder. Returns the page's path.

    The run may be finished or in progress, also without a step yet. Raises ConfigError if the folder is not
    that of a run. To write the page repeatedly, pass the same reader of the run's `metrics`.
    """
    run = read_run(run_folder, metrics)
    if with_curves:
        curves.draw(run.metrics, run.folder / CURVES_FILE)
    path = run.folder / REPORT_FILE
    files.write(path, page_of(run))
    return path


def page_of(run: RunRecord) -> str:
    charts: list[panels.Chart] = []

    def places(some: list[panels.Chart]) -> list[int]:
        charts.extend(some)
        return list(range(len(charts) - len(some), len(charts)))

    drawn = replace(run, metrics=dict(islice(run.metrics.items(), MAX_METRICS)))
    most = panels.max_points(len(drawn.metrics) + 8)
    checkpoints = [
        record
        for index, record in enumerate(run.checkpoints)
        if record.get("metric") or index >= len(run.checkpoints) - MAX_CHECKPOINTS
    ]
    loss = panels.loss_chart(run, most)
    time = time_chart(run)
    return render(
        "report.html",
        charts,
        run=run,
        status=status_of(run),
        facts=facts_of(run),
        outcomes=outcomes_of(drawn),
        forecasts=forecasts_of(run),
        loss_charts=places([loss] if loss else []),
        eval_charts=places(panels.eval_charts(drawn, most)),
        training_charts=places(panels.training_charts(run, most)),
        time_charts=places([time] if time else []),
        other_charts=places(panels.other_charts(drawn, most)),
        tables=views_of(run.tables),
        sources=[_source(source) for source in run.data.get("sources", [])],
        evaluation_sources=[_source(source) for source in run.data.get("evaluation_sources", [])],
        settings=settings_of(run.config),
        num_metrics_left_out=len(run.metrics) - len(drawn.metrics),
        checkpoints=[_checkpoint(run, record) for record in checkpoints],
        num_checkpoints_left_out=len(run.checkpoints) - len(checkpoints),
        files=[name for name in _FILES if (run.folder / name).exists()],
    )


_FILES = ("train.log", "metrics.jsonl", "tables.jsonl", "config.json", "data.json", CURVES_FILE)


def _checkpoint(run: RunRecord, record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "is_there": (run.folder / record["path"]).is_dir()}


def _notes_of(source: Mapping[str, Any]) -> dict[notes.Note, int]:
    return {
        notes.Note(note["noun"], note["what"], note["item"]): note["count"]
        for note in source.get("notes", [])
    }


_WIDTH, _HEIGHT = 600, 90


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a data report with the bars of its histogram in SVG units."""
    histogram = source.get("length_histogram") or {}
    counts, edges = histogram.get("counts", []), histogram.get("edges", [])
    tallest, width = max(counts, default=0), _WIDTH / max(1, len(counts))
    bars = [
        {
            "x": f"{index * width:.2f}", "width": f"{width * 0.88:.2f}",
            "y": f"{_HEIGHT * (1 - number / tallest):.2f}", "height": f"{_HEIGHT * number / tallest:.2f}",
            "title": f"{number:,} examples of {edges[index]:,} to {edges[index + 1] - 1:,} tokens",
        }
        for index, number in enumerate(counts)
        if number
    ]  # fmt: skip
    longest = edges[-1] - 1 if edges else 0
    return {
        **source,
        "note_lines": notes.lines(_notes_of(source)),
        "bars": bars,
        "shortest": edges[0] if edges else 0,
        "longest_bar": longest,
        "tallest": tallest,
    }
