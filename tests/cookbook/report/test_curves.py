"""The picture of a run's curves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cookbook.runs import curves


@pytest.mark.slow
def test_a_picture_is_drawn_from_the_rows_of_a_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        json.loads(line) for line in (make_run() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    path = curves.draw(rows, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] >= 1000
    colours = {
        tuple(colour) for colour in (picture[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()
    }
    for wanted in ("#1769aa", "#c2410c"):
        assert tuple(bytes.fromhex(wanted[1:])) in colours, "the curves of train/nll and test/nll"


@pytest.mark.slow
def test_more_metrics_make_a_taller_picture(tmp_path: Path) -> None:
    rows = [{"step": step, "train/nll": 1.0 + step} for step in range(30)]
    more = [{**row, "qa/accuracy": 0.5, "qa/f1": 0.2} for row in rows]
    heights = [
        matplotlib.image.imread(curves.draw(some, tmp_path / "curves.png")).shape[0] for some in (rows, more)
    ]
    assert heights[1] > heights[0]


def test_without_a_loss_or_an_evaluation_there_is_no_picture(tmp_path: Path) -> None:
    assert curves.draw([{"step": 0, "perf/seconds": 1.0}], tmp_path / "curves.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_single_step_is_a_dot(tmp_path: Path) -> None:
    path = curves.draw([{"step": 0, "train/nll": 1.0}], tmp_path / "curves.png")
    assert path is not None
    picture = matplotlib.image.imread(path)[..., :3]
    assert (np.abs(picture - np.array([0x17, 0x69, 0xAA]) / 255).max(-1) < 0.02).sum() > 5


def test_no_metric_name_is_read_as_a_formula(tmp_path: Path) -> None:
    """Matplotlib reads text between dollars as a formula, which would be an error or another name."""
    rows = [
        {
            "step": step,
            "train/nll": 1.0,
            "test/nll": 1.0,
            r"qa/$\frac$": 0.5,
            "qa/$x_1$": 0.5,
            "qa/\x1b[2J": 1.0,
        }
        for step in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that the font lacks
        path = curves.draw(rows, tmp_path / "curves.png")
    assert path is not None
    assert matplotlib.image.imread(path).size
    assert [curves._label(name) for name in ("qa/$x_1$", "qa/\x1b[2J")] == [r"qa/\$x_1\$", "qa/␛[2J"]
