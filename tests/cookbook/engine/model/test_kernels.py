"""The kernels compute, in Triton's interpreter, what is computed without them, and compile for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cookbook.engine.model import kernels

ROOT = Path(__file__).parents[4]
Errors = dict[str, tuple[float, float]]
CASES = {
    "rotation": 1e-6,
    "rotation of 3 heads of 24": 1e-6,
    "rotation in bfloat16": 2**-7,  # the interpreter cuts bits off where a GPU rounds (`cvt.rn`)
    "trials": 0.0,
    "gated product, silu": 1e-6,
    "gated product, gelu": 1e-6,
    "gated product, gelu_tanh": 1e-6,
    "gated product of halves, silu": 1e-6,
    "gated product of halves, gelu": 1e-6,
    "gated product of halves, gelu_tanh": 1e-6,
    "gated product in bfloat16": 2**-7,  # as above
    "gated product of experts": 1e-6,
    "softmax": 1e-5,
    "softmax with an adapter and trained weights": 1e-5,
    "softmax with a softcap": 1e-5,
    "softmax of several targets": 1e-5,
    "softmax in bfloat16": None,
    "softmax in bfloat16 with trained weights": None,
}
"""The largest error of a case, or None if it may be that of the plain operations in bfloat16."""

INSTALLED = ROOT / "build" / "kernels"
"""Where `make kernels` installs Triton: with it in the environment, torch imports it in every process."""

needs_triton = pytest.mark.skipif(
    not (INSTALLED / "triton").exists() or torch.cuda.is_available(),
    reason="needs Triton where there is no GPU: run make kernels",
)


def run(*argv: str, **environment: str) -> list[Any]:
    """Returns what a program of this folder prints, run with Triton."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", INSTALLED)))
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name(argv[0]), *argv[1:]],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def errors() -> dict[str, Errors]:
    return dict(run("interpreted.py", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_the_results_and_gradients_of_float64(errors: dict[str, Errors], case: str) -> None:
    assert errors.keys() == CASES.keys()
    assert errors[case]
    limit = CASES[case]
    for name, (found, plain) in errors[case].items():
        assert found <= (limit if limit is not None else 1.1 * plain + 1e-6), name


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_a_gpu_and_hold_a_row_in_registers(tmp_path: Path, capability: str) -> None:
    found = run("compiled.py", capability, TRITON_CACHE_DIR=str(tmp_path))
    assert [kernel for kernel, *_ in found] == [
        "_rotate",
        "_softmax_block",
        "_softmax_block",
        *["_gated_product", "_gated_product_backward"] * len(kernels.ACTIVATIONS),
    ]
    for _, spilled_bytes, shared_bytes, rounds in found:
        assert spilled_bytes <= 256  # of the 64 registers of each thread
        assert shared_bytes <= 1024
        assert rounds  # to the nearest, as the interpreter does not


def test_no_kernel_is_used_on_a_cpu() -> None:
    assert not any(kernels.is_used(name, torch.device("cpu")) for name in kernels.NAMES)
