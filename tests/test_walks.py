"""How many functions a row and a token pass (`benchmarks.walks`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_row_and_a_token_pass_few_functions() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.house"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {what: int(number) for what, number in re.findall(r"walk of (.+?) +(\d+)", printed)}
    assert found.keys() == {"a row", "learning_rate", "a token"}
    assert found["a row"] <= 60
    assert found["a token"] <= 20
