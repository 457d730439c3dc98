"""The figures at the top of a run's page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cookbook.errors import ConfigError
from cookbook.runs.directions import DEFAULT_METRIC, direction
from cookbook.runs.downsampling import smooth, smoothing_span
from cookbook.runs.metrics import Series
from cookbook.runs.record import RunRecord
from cookbook.utils.notes import counted_noun

PEAK_MEMORY = "perf/memory_peak_gib"


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ""


class Forecast(NamedTuple):
    what: str
    estimated: str
    measured: str
    note: str


@dataclass(frozen=True)
class Outcome:
    """The first, last and best values of a metric. The initial weights do not count as its best."""

    metric: str
    first: float
    last: float
    best: float | None
    """None if the better direction is unknown, and before the first evaluation of trained weights."""
    best_step: int | None


def outcome_of(metric: str, series: Series) -> Outcome:
    first, better = float(series.values[0]), better_of(metric)
    after_training = int(series.steps[0] == 0)
    values = series.values[after_training:]
    if better is None or not len(values):
        return Outcome(metric, first, series.last, None, None)
    index = int(values.argmin() if better == "min" else values.argmax())
    return Outcome(
        metric, first, series.last, float(values[index]), int(series.steps[after_training + index])
    )


def better_of(metric: str) -> Literal["min", "max"] | None:
    """Returns the better direction of a metric, by its name, or None if it is unknown."""
    try:
        return direction(metric, "auto")
    except ConfigError:
        return None


def headline_metric(run: RunRecord) -> str | None:
    """Returns the metric that a run is judged by: that of its best checkpoint, or else a measured one."""
    wanted = [run.config.get("best_metric"), DEFAULT_METRIC, *run.evals, "train/nll"]
    return next((str(metric) for metric in wanted if metric in run.metrics), None)


def facts_of(run: RunRecord) -> list[Fact]:
    facts = [Fact("Steps", steps_of(run), status_of(run))]
    if (trained := run.metrics.get("train/nll")) is not None:
        span = smoothing_span(len(trained))
        last = float(smooth(trained.values, span)[-1])
        note = f"mean of about {span} steps" if span > 1 else f"from {number(float(trained.values[0]))}"
        facts.append(Fact("train/nll", number(last), note))
    headline = headline_metric(run)
    if headline is not None and headline != "train/nll":
        series = run.metrics[headline]
        outcome = outcome_of(headline, series)
        first = int(series.steps[0])
        when = f"after {counted_noun(first, 'step')}" if first else "before training"
        note = when if len(series) == 1 else f"from {number(outcome.first)} {when}"
        facts.append(Fact(headline, number(outcome.last), note))
        if outcome.best is not None and outcome.best != outcome.last:
            facts.append(Fact(f"best {headline}", number(outcome.best), f"after {outcome.best_step:,} steps"))
    facts += _costs(run)
    device = run.environment.get("device")
    if device:
        notes = [str(run.environment.get("dtype", ""))]
        if (memory := run.metrics.get(PEAK_MEMORY)) is not None:
            notes.append(f"{memory.values.max():.1f} GiB at most")
        facts.append(Fact("Device", str(device), ", ".join(filter(None, notes))))
    return facts


def _costs(run: RunRecord) -> list[Fact]:
    seconds, tokens = run.total("perf/seconds"), run.total("data/tokens")
    if not seconds:
        return []
    trained = run.total("data/trained_tokens")
    lost, how = run.total("perf/seconds_idle"), "with the device idle"
    if "perf/seconds_idle" not in run.metrics:
        lost, how = run.total("perf/seconds_waited_for_batch"), "waiting for data"
    return [
        Fact("Time", duration(seconds), f"{lost / seconds:.1%} of it {how}"),
        Fact("Tokens", count(tokens), f"{count(trained)} of them trained"),
        Fact("Tokens per second", count(tokens / seconds), "evaluations and saving included"),
    ]


def steps_of(run: RunRecord) -> str:
    """Returns the number of steps taken, and of how many if it is fewer: "25 of 44"."""
    planned = run.planned_steps
    taken = f"{run.num_steps:,}"
    return f"{taken} of {planned:,}" if planned is not None and run.num_steps < planned else taken


def forecasts_of(run: RunRecord) -> list[Forecast]:
    """Returns what was estimated before the run, and measured in it; empty without an estimate."""
    found = []
    memory, is_cpu = run.metrics.get(PEAK_MEMORY), run.environment.get("device") == "cpu"
    if (expected := _positive(run.estimate.get("peak_bytes"))) and memory is not None:
        note = (
            "of the process, with Python and its libraries, which are not in the estimate" if is_cpu else ""
        )
        found.append(Forecast("memory", size(expected), size(memory.values.max() * 2**30), note))
    seconds = run.total("perf/seconds_forward_backward") + run.total("perf/seconds_optim_step")
    planned = run.planned_steps
    if (expected := _positive(run.estimate.get("seconds"))) and seconds and planned:
        part = min(1.0, run.num_steps / planned)
        found.append(Forecast("time of the training steps", duration(expected * part), duration(seconds), ""))
    return found


def _positive(value: object) -> float:
    """Returns a number of a file that anyone may have written, or 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < math.inf else 0.0  # type: ignore[arg-type, operator]


def status_of(run: RunRecord) -> str:
    return "finished" if run.is_finished else "not finished"


def outcomes_of(run: RunRecord) -> list[Outcome]:
    return [outcome_of(metric, series) for metric, series in run.evals.items()]


# -- in words -----------------------------------------------------------------------------------


def number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.2e}"


def count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Returns a number of bytes in GiB, or below 0.1 GiB in MiB."""
    if num_bytes >= 0.1 * 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    if seconds < 60 or seconds > 1e12:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
