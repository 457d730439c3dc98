"""Runs the quickest of the programs that `make tinker` runs, where tinker-cookbook is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


def test_programs_of_tinker_cookbook_run_to_their_ends() -> None:
    if importlib.util.find_spec("tinker_cookbook") is None:
        pytest.skip("tinker-cookbook is not installed (`make tinker` installs it and runs all programs)")
    script = Path(__file__).parent / "run.py"
    done = subprocess.run([sys.executable, str(script), "quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
