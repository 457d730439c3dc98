"""What a training step and a sampled token of Qwen3-0.6B cost on a CUDA device equals a text that is kept.

A change that adds launches, bytes, operations or waits shows up as a diff of the text. The times that are
derived from them are in `docs/rehearsal.md`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fake_cuda import library
from benchmarks.roofline import CARDS, GOLDEN

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(library.why_unavailable() is not None, reason=library.why_unavailable() or "")
def test_costs_of_a_step_and_of_a_token_are_those_of_the_golden_text() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.roofline", "--classes", "--model", "qwen3-0.6b"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout == GOLDEN.read_text(encoding="utf-8"), (
        "costs have changed: `make roofline` writes them"
    )


def test_a_kernel_takes_as_long_as_its_operations_its_bytes_or_the_shortest_kernel() -> None:
    from benchmarks.fake_cuda.costs import Cost

    card = CARDS["a100"]
    assert card.seconds(Cost("matmul", "product", 10**6, 312 * 10**12)) == pytest.approx(1 / 0.6)
    assert card.seconds(Cost("elementwise", "memory", 2_039 * 10**9, 0)) == pytest.approx(1 / 0.8)
    assert card.seconds(Cost("matmul", "thin product", 2_039 * 10**9, 0)) == pytest.approx(2 / 0.8)
    assert card.seconds(Cost("elementwise", "memory", 4, 0)) == 2.5e-6
