"""Tests of the number of threads on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from slow import slow_after

from cookbook.engine.threads import threads_for

PROGRAM = """
import logging, os, torch
from cookbook.engine.threads import limit_threads
logging.basicConfig(level=logging.INFO)
os.getloadavg = lambda: (LOAD, 0, 0)
torch.set_num_threads(2)
print(limit_threads(RECORDED), torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("cores", "load", "threads"),
    [(2, 0.3, 2), (2, 2.0, 2), (2, 2.1, 1), (2, 8.0, 1), (64, 70.0, 30), (64, 640.0, 5)],
)
def test_a_program_takes_its_share_of_busy_cores(cores: int, load: float, threads: int) -> None:
    assert threads_for(cores, load) == threads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "recorded", "variable", "printed"),
    slow_after(
        1,
        [
            ("1e6", "None", None, "1 1"),
            ("0.0", "None", None, "None 2"),
            ("1e6", "None", "2", "None 2"),  # the user has set the number
            ("0.0", "1", None, "1 1"),  # a resumed run sums in the order of the first one
            ("1e6", "2", None, "None 2"),
        ],
    ),
)
def test_threads_are_limited_unless_they_are_set_or_recorded(
    load: str, recorded: str, variable: str | None, printed: str
) -> None:
    env = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
    if variable is not None:
        env["OMP_NUM_THREADS"] = variable
    program = PROGRAM.replace("LOAD", load).replace("RECORDED", recorded)
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == printed, done.stderr
