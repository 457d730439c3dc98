"""The host does not hold a model that is loaded for a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fake_cuda import library

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason=library.why_unavailable() or "")


@pytest.mark.slow
def test_a_model_that_is_converted_goes_to_the_device_weight_by_weight(
    make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Its files of 99 MiB in float32 become bfloat16, for which the host needs a copy of each weight."""
    folder = make_model_folder(
        tmp_path / "model", "qwen3", hidden_size=512, intermediate_size=2048, num_hidden_layers=8
    )
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert num_bytes > 90 * 2**20
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load.py")), str(folder), "bfloat16"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["weights"] == ["cuda:0 torch.bfloat16"]
    assert found["rise"] < 0.5 * num_bytes
