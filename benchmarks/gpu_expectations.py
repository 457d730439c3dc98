"""Compares what the fake CUDA device counted with a real one: launches, waits, and the estimate of memory.

    python -m benchmarks.gpu_expectations

The step is the one of `benchmarks.roofline` on Qwen3-0.6B with four layers, whose counts are in
`tests/golden/roofline.txt`. Prints a line of JSON for each comparison. Exits with 1 if the host waited within
a step, or if launches or memory are further than a quarter from what was expected.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.gpu_step import make_model_folder
from benchmarks.side_cookbook import make_datums
from cookbook.engine.model import kernels
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.training import memory_needs
from cookbook.engine.training.trainer import Request, Trainer
from cookbook.types import AdamParams, LoraConfig

NUM_LAYERS = 4
ALLOWED = 0.25


def expected_launches(text: str, num_layers: int, title: str = "qwen3-0.6b step") -> int:
    """Returns the launches of a step with so many layers, from the text of `make roofline`."""
    found = {"layers": 0, "rest": 0}
    part = None
    for line in text.splitlines():
        if heading := re.fullmatch(rf"{re.escape(title)}, (layers|rest): .*", line):
            part = heading[1]
        elif line.startswith(" ") and part is not None:
            found[part] += int(line.split()[1])
        else:
            part = None
    return num_layers * found["layers"] + found["rest"]


def compared(what: str, expected: float, found: float, unit: str) -> dict[str, Any]:
    """Returns a comparison as one line of the results."""
    off = found / expected - 1
    return {
        "what": what,
        "expected": round(expected, 2),
        "found": round(found, 2),
        "unit": unit,
        "off_by": f"{off:+.0%}",
        "is_right": abs(off) <= ALLOWED,
    }


def step(trainer: Trainer, request: Request) -> None:
    trainer.forward_backward(request)
    trainer.optim_step(AdamParams(grad_clip_norm=1.0))


def waits(trainer: Trainer, request: Request) -> dict[str, Any]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(trainer, request)
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised.__cause__ or raised}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"what": "waits within a step", "expected": 0, "found": error or 0, "is_right": error is None}


def launches(trainer: Trainer, request: Request) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(trainer, request)
        torch.cuda.synchronize()
    found = sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")
    has_kernels = kernels.is_used("gated_product", torch.device("cuda"))
    title = "qwen3-0.6b step" if has_kernels else "qwen3-0.6b step without kernels"
    expected = expected_launches(roofline.GOLDEN.read_text(encoding="utf-8"), NUM_LAYERS, title)
    return compared("launches of a step", expected, found, "kernels and copies")


def memory(base: BaseModel, trainer: Trainer, request: Request) -> dict[str, Any]:
    cost = memory_needs.activation_cost(base, trainer.adapter)
    held = memory_needs.reserved_bytes(base, trainer.adapter)
    expected = held + sum(cost.bytes_of(length) for length in roofline.LENGTHS)
    torch.cuda.reset_peak_memory_stats()
    step(trainer, request)
    torch.cuda.synchronize()
    return compared("memory of a step", expected / 2**30, torch.cuda.max_memory_allocated() / 2**30, "GiB")


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    batch = [
        (torch.randint(1000, (length + 1,), generator=generator).tolist(), [1] * (length + 1))
        for length in roofline.LENGTHS
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model_folder("0.6B", Path(temporary, "model"), num_hidden_layers=NUM_LAYERS)
        tokens = sum(roofline.LENGTHS)
        options = EngineOptions(device="cuda", max_tokens_per_microbatch=tokens, gradient_checkpointing="off")
        base = BaseModel(str(folder), options)
        trainer = Trainer(base, LoraConfig(rank=roofline.LORA_RANK, seed=0, train_unembed=False))
        request = trainer.check(make_datums(batch), "cross_entropy", None, trained_only=True, loss_only=True)
        for _ in range(2):  # loads kernels
            step(trainer, request)
        right = []
        for result in (
            waits(trainer, request),
            launches(trainer, request),
            memory(base, trainer, request),
        ):
            right.append(result.pop("is_right"))
            print(json.dumps({**result, "is_right": right[-1]}), flush=True)
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
