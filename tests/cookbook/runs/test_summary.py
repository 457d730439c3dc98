"""Tests of the results of metrics, and of the text of figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cookbook.runs.metrics import Series
from cookbook.runs.record import RunRecord
from cookbook.runs.summary import Outcome, duration, facts_of, number, outcome_of


def series(steps: list[int], values: list[float]) -> Series:
    return Series(np.asarray(steps), np.asarray(values))


def test_the_best_is_the_lowest_or_the_highest_depending_on_the_name() -> None:
    steps, values = [10, 20, 30], [0.5, 0.2, 0.4]
    assert outcome_of("test/nll", series(steps, values)) == Outcome("test/nll", 0.5, 0.4, 0.2, 20)
    assert outcome_of("qa/accuracy", series(steps, values)) == Outcome("qa/accuracy", 0.5, 0.4, 0.5, 10)
    assert outcome_of("my/thing", series(steps, values)) == Outcome("my/thing", 0.5, 0.4, None, None)


def test_the_initial_weights_of_a_run_are_not_its_best() -> None:
    assert outcome_of("test/nll", series([0, 10, 20], [0.1, 0.3, 0.2])).best_step == 20
    assert outcome_of("test/nll", series([0], [0.1])).best is None


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ([0], "before training"),
        ([10], "after 10 steps"),
        ([0, 10], "from 0.5000 before training"),
        ([10, 20], "from 0.5000 after 10 steps"),
    ],
)
def test_the_first_evaluation_is_said_to_be_of_its_step(steps: list[int], note: str) -> None:
    values = [0.5, 0.4][: len(steps)]
    run = RunRecord(Path("a"), "a", {}, {"test/nll": series(steps, values)}, num_steps=20)
    (fact,) = (one for one in facts_of(run) if one.label == "test/nll")
    assert (fact.value, fact.note) == (number(values[-1]), note)


@pytest.mark.parametrize(
    ("value", "text"), [(0.34711, "0.3471"), (5.8834, "5.883"), (1234.5, "1,234"), (2e-5, "2.00e-05")]
)
def test_numbers_keep_four_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(18.44, "18.4 s"), (61, "1 min 01 s"), (7500, "2 h 05 min"), (4e6, "1,111 h 06 min")],
)
def test_durations_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
