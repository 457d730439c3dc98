"""Chooses the cases of a test that run each time; the others run in `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(number: int, cases: Iterable[Any]) -> list[Any]:
    """Returns the cases, with those after the first `number` marked as slow."""
    return [case if index < number else _slow(case) for index, case in enumerate(cases)]


def slow_except(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns the cases, with those that are not in `quick` marked as slow."""
    every, chosen = list(cases), list(quick)
    unknown = [case for case in chosen if case not in every]
    assert not unknown, f"not among the cases: {unknown}"
    return [case if case in chosen else _slow(case) for case in every]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
