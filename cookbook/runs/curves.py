"""Draws a run's curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cookbook.runs.downsampling import keep_evenly, keep_extremes, smooth, smoothing_span
from cookbook.runs.metrics import Series, series_of
from cookbook.runs.record import is_eval, needs_log_axis
from cookbook.utils import files
from cookbook.utils.control_characters import visible_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 7
"""The loss, and as many other metrics as fit in a picture."""

_INK, _SOFT, _LINE = "#1f2328", "#656d76", "#d8dbe0"
_COLOURS = ("#1769aa", "#c2410c", "#2f855a", "#7c3aed", "#b7791f", "#b83280", "#0e7490", "#5b6470")
_MAX_POINTS = 2000
_LABELS = 0.6
"""The inches left of a panel, where the labels of its axis stand."""


def draw(metrics: Iterable[Mapping[str, Any]] | Mapping[str, Series], path: str | Path) -> Path | None:
    """Draws the losses, and below them the other metrics of evaluators, as a PNG at `path`.

    `metrics` are the rows of metrics.jsonl, or the result of `series_of`. If there is no curve to draw, this
    returns None and writes nothing.
    """
    series = dict(metrics) if isinstance(metrics, Mapping) else series_of(metrics)
    losses = {name: series[name] for name in ("train/nll", "test/nll") if name in series}
    # Metrics by source and by turn can be many, so a picture shows only the metrics themselves.
    others = [name for name in series if is_eval(name) and name not in losses and name.count("/") < 2]
    panels: list[tuple[str, dict[str, Series]]] = [("Loss, nats per trained token", losses)] if losses else []
    panels += [(name, {name: series[name]}) for name in others]
    if not panels:
        return None
    _draw(panels[:MAX_PANELS], Path(path))
    return Path(path)


def _draw(panels: list[tuple[str, dict[str, Series]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_small = len(panels) - 1
    num_columns = min(3, max(1, num_small))
    num_rows = -(-num_small // num_columns)
    width, height = 8.0, 4 + 2.1 * num_rows
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    # The margins are given, since finding them (layout="constrained") takes 40% of the time of a picture.
    grid = figure.add_gridspec(
        1 + num_rows,
        num_columns,
        height_ratios=[4] + [2.1] * num_rows,
        left=_LABELS / width,
        right=1 - 0.15 / width,
        bottom=0.35 / height,
        top=1 - 0.4 / height,
        hspace=0.85 * (1 + num_rows) / (height - 0.75 - 0.85 * num_rows),
        wspace=_LABELS * num_columns / (width - 0.15 - _LABELS * num_columns),
    )
    for index, (title, lines) in enumerate(panels):
        place = grid[0, :] if index == 0 else grid[1 + (index - 1) // num_columns, (index - 1) % num_columns]
        _draw_panel(figure.add_subplot(place), title, lines, is_large=index == 0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "sft-cookbook"}, pad_inches=0.1)
    files.write(path, picture.getvalue())


def _draw_panel(axes: Axes, title: str, lines: Mapping[str, Series], is_large: bool) -> None:
    for index, (name, series) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        if name == "train/nll":
            _draw_noisy(axes, name, series, colour)
            continue
        marker = "o" if len(series) <= 60 else ""
        axes.plot(
            *keep_extremes(series.steps, series.values, _MAX_POINTS),
            color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=_label(name),
        )  # fmt: skip
    values = [series.values for series in lines.values()]
    if is_large and needs_log_axis(min(map(np.min, values)), max(map(np.max, values))):
        _make_logarithmic(axes)
    else:
        axes.locator_params(axis="y", nbins=6 if is_large else 4)
    # With a given place, since to find one matplotlib lays out the labels of both axes once more.
    axes.set_title(_label(title), loc="left", y=1.0, fontsize=10 if is_large else 8.5, color=_INK, pad=8)
    axes.tick_params(colors=_SOFT, labelsize=8 if is_large else 7, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.locator_params(axis="x", nbins=8 if is_large else 4, integer=True)
    axes.margins(x=0.01)
    if all(len(series) == 1 for series in lines.values()):
        (step, *_) = (int(series.steps[0]) for series in lines.values())
        axes.set_xlim(step - 1, step + 1)
    if is_large:
        axes.set_xlabel("step", fontsize=8, color=_SOFT)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)


def _label(name: str) -> str:
    """Returns a name to draw, with dollars escaped, because matplotlib would read formulas between them."""
    return visible_line(name).replace("$", r"\$")


def _make_logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_noisy(axes: Axes, name: str, series: Series, colour: str) -> None:
    """Draws the measured values faintly, and their running mean."""
    span = smoothing_span(len(series))
    dot = "." if len(series) == 1 else ""
    raw = keep_extremes(series.steps, series.values, _MAX_POINTS)
    if span == 1:
        axes.plot(*raw, color=colour, linewidth=1.6, marker=dot, label=name)
        return
    axes.plot(*raw, color=colour, linewidth=0.7, alpha=0.35)
    mean = keep_evenly(series.steps, smooth(series.values, span), _MAX_POINTS)
    axes.plot(*mean, color=colour, linewidth=1.6, label=f"{name}, mean of about {span} steps")
