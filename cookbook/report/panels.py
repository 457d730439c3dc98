"""Charts of a page: series of points, reduced so that the page of any run stays small.

A chart is a dict that page/charts.js draws. Colours are CSS classes, c0 to c7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from cookbook.runs.downsampling import keep_evenly, keep_extremes, smooth, smoothing_span
from cookbook.runs.metrics import Series
from cookbook.runs.record import RunRecord, is_eval, needs_log_axis
from cookbook.runs.summary import PEAK_MEMORY

Chart: TypeAlias = dict[str, Any]

NUM_COLOURS = 8
MAX_POINTS_OF_A_PAGE = 100_000
MAX_POINTS_OF_A_COMPARISON = 300_000
MAX_POINTS_OF_A_SERIES = 1_600
MAX_SERIES_OF_A_CHART = NUM_COLOURS

SPAN_PREFIX = "perf/seconds_"
NO_SPANS = ("perf/seconds_left",)
"""Metrics with the prefix of spans that are not spans."""

_TRAINING = (
    "optim/learning_rate",
    "optim/grad_norm",
    "perf/tokens_per_second",
    "data/trained_tokens",
    PEAK_MEMORY,
)
_NOISY = ("train/nll", "optim/grad_norm", "perf/tokens_per_second", "data/trained_tokens")
_TITLES = {
    "optim/learning_rate": "Learning rate",
    "optim/grad_norm": "Gradient norm, before clipping",
    "perf/tokens_per_second": "Throughput, tokens per second",
    "data/trained_tokens": "Trained tokens of a batch",
    PEAK_MEMORY: "Memory at its peak, GiB",
    "perf/memory_in_use_gib": "Memory in use after a step, GiB",
    "perf/memory_reserved_gib": "Memory reserved by torch, GiB",
}


def max_points(num_series: int) -> int:
    """Returns the number of points that each of `num_series` series may have."""
    return max(60, min(MAX_POINTS_OF_A_SERIES, MAX_POINTS_OF_A_PAGE // max(1, num_series)))


def line(
    name: str, series: Series, colour: int, most: int, style: str = "line", label: str | None = None
) -> dict[str, Any]:
    """Returns a series, reduced to at most `most` points that draw the same curve."""
    steps, values = keep_extremes(series.steps, series.values, most)
    return {
        "name": name, "label": label or name, "colour": f"c{colour % NUM_COLOURS}", "style": style,
        "x": steps.tolist(), "y": rounded(values),
    }  # fmt: skip


def noisy_lines(name: str, series: Series, colour: int, most: int) -> list[dict[str, Any]]:
    """Returns a noisy series as a faint line, and its running mean on top of it."""
    span = smoothing_span(len(series))
    if span == 1:
        return [line(name, series, colour, most)]
    steps, values = keep_evenly(series.steps, smooth(series.values, span), most // 2)
    mean = {
        "name": name, "label": f"{name}, mean of about {span} steps", "colour": f"c{colour % NUM_COLOURS}",
        "style": "smooth", "x": steps.tolist(), "y": rounded(values),
    }  # fmt: skip
    return [line(name, series, colour, most // 2, style="raw", label=f"{name}, of the step"), mean]


def chart(title: str, series: Sequence[dict[str, Any]], **options: Any) -> Chart:
    values = [value for one in series for value in one["y"]]
    can_be_log = min(values) > 0 and max(values) > 3 * min(values)
    return {"title": title, "series": list(series), "canBeLog": can_be_log, **options}


# -- the charts of one run --------------------------------------------------------------------------


def loss_chart(run: RunRecord, most: int) -> Chart | None:
    """Returns the chart of the training NLL and the NLLs of evaluations."""
    series: list[dict[str, Any]] = []
    if (trained := run.metrics.get("train/nll")) is not None:
        series += noisy_lines("train/nll", trained, 0, most)
    for colour, name in enumerate(_nlls(run.evals), 1):
        series.append(line(name, run.evals[name], colour, most))
    if not series:
        return None
    values = [value for one in series for value in one["y"]]
    return chart(
        "Loss, nats per trained token", series, height=340, note=_note(run, ["train/nll"]),
        log=needs_log_axis(min(values), max(values)),
    )  # fmt: skip


def _nlls(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith("/nll") and name.count("/") == 1][: NUM_COLOURS - 1]


def eval_charts(run: RunRecord, most: int) -> list[Chart]:
    """Returns charts of all other evaluation metrics. Parts of a metric (sources, turns) share a chart."""
    shown = set(_nlls(run.evals))
    parts: dict[tuple[str, str], list[str]] = {}
    charts = []
    for name in run.evals:
        words = name.split("/")
        if len(words) > 2:
            parts.setdefault((words[0], words[-1]), []).append(name)
        elif name not in shown:
            charts.append(chart(name, [line(name, run.evals[name], 1, most)], note=_note(run, [name])))
    for (first, last), names in parts.items():
        for start in range(0, len(names), MAX_SERIES_OF_A_CHART):
            some = names[start : start + MAX_SERIES_OF_A_CHART]
            title = f"{first}/…/{last}" + (f" ({start + 1} to {start + len(some)})" if start else "")
            series = [
                line(name, run.evals[name], colour, most, label=name[len(first) + 1 : -len(last) - 1])
                for colour, name in enumerate(some)
            ]
            charts.append(chart(title, series, note=_note(run, some)))
    return charts


def training_charts(run: RunRecord, most: int) -> list[Chart]:
    return [_chart_of(run, name, most) for name in _TRAINING if name in run.metrics]


def other_charts(run: RunRecord, most: int) -> list[Chart]:
    """Returns charts of the metrics that no other chart shows."""
    shown = {"train/nll", "perf/seconds", *_TRAINING, *spans_of(run)}
    return [_chart_of(run, name, most) for name in run.metrics if name not in shown and not is_eval(name)]


def spans_of(run: RunRecord) -> list[str]:
    return [name for name in run.metrics if name.startswith(SPAN_PREFIX) and name not in NO_SPANS]


def _chart_of(run: RunRecord, name: str, most: int) -> Chart:
    series = run.metrics[name]
    lines = noisy_lines(name, series, 0, most) if name in _NOISY else [line(name, series, 0, most)]
    from_zero = name == "perf/tokens_per_second"
    return chart(_TITLES.get(name, name), lines, legend=False, fromZero=from_zero, note=_note(run, [name]))


def _note(run: RunRecord, names: Sequence[str]) -> str | None:
    left_out = sum(run.metrics[name].num_skipped for name in names if name in run.metrics)
    return f"{left_out:,} values that are not numbers are not drawn" if left_out else None


# -- the charts of several runs -----------------------------------------------------------------------


def is_compared(metric: str) -> bool:
    """Returns whether a metric of several runs is drawn in one chart."""
    return metric == "train/nll" or metric in _TRAINING[:3] or is_eval(metric)


def compared_curves(run: RunRecord, num_runs: int) -> dict[str, Series]:
    """Returns the curves by which a run is compared, reduced to fit a page of `num_runs` runs."""
    most = min(MAX_POINTS_OF_A_SERIES, max(_least_points(num_runs), MAX_POINTS_OF_A_PAGE // num_runs))
    curves = {}
    for name, series in run.metrics.items():
        if is_compared(name):
            is_noisy = name in _NOISY
            values = smooth(series.values, smoothing_span(len(series))) if is_noisy else series.values
            curves[name] = Series(*keep_extremes(series.steps, values, most))
    return curves


def _least_points(num_runs: int) -> int:
    """Returns the fewest points that a curve may be reduced to: 60, fewer for thousands of runs."""
    return max(8, min(60, MAX_POINTS_OF_A_COMPARISON // num_runs))


def charts_of_several(runs: Mapping[str, RunRecord]) -> tuple[list[Chart], int]:
    """Returns a chart for each metric, with a curve for each run, and the number of omitted charts.

    The metrics of the runs are their `compared_curves`. The last charts are omitted if the page would become
    too large.
    """
    names = dict.fromkeys(name for run in runs.values() for name in run.metrics)
    wanted = [name for name in names if name == "train/nll" or is_eval(name)]
    wanted.sort(key=lambda name: (name.count("/") > 1, name != "test/nll", name != "train/nll"))
    training = [name for name in _TRAINING[:3] if name in names]
    least = _least_points(len(runs))
    room = max(1, MAX_POINTS_OF_A_COMPARISON // (least * len(runs)) - len(training))
    drawn = wanted[:room] + training
    most = max(least, min(MAX_POINTS_OF_A_SERIES, MAX_POINTS_OF_A_PAGE // max(1, len(drawn) * len(runs))))
    charts = []
    for name in drawn:
        series = [
            line(run_name, run.metrics[name], index, most) | {"dash": dash(index)}
            for index, (run_name, run) in enumerate(runs.items())
            if name in run.metrics
        ]
        smoothed = "running means" if name in _NOISY else None
        heights = [value for one in series for value in one["y"]]
        charts.append(
            chart(
                _TITLES.get(name, name), series, legend=False, note=smoothed, height=260,
                log=name.endswith("/nll") and needs_log_axis(min(heights), max(heights)),
            )
        )  # fmt: skip
    return charts, len(wanted) - len(wanted[:room])


def dash(index: int) -> str:
    """Returns the dash pattern that distinguishes a run from others of the same colour."""
    return ("", "dashed", "dotted")[index // NUM_COLOURS % 3]


def rounded(values: np.ndarray) -> list[float]:
    """Rounds to six significant digits, more than a chart can show."""
    return [float(f"{value:.6g}") for value in values.tolist()]
