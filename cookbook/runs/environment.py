"""environment.json: the machine and the versions that a run was last started with."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from cookbook.types import ModelData
from cookbook.utils import files
from cookbook.utils.versions import installed_versions

PACKAGES = ("sft-cookbook", "torch", "transformers", "peft", "datasets", "numpy", "bitsandbytes")


def describe(model: ModelData) -> dict[str, str]:
    """Returns the facts that a figure of a run depends on, without names of the machine or of its users."""
    found = {
        "device": _device_name(model.device),
        "dtype": model.dtype,
        "trained parameters": f"{model.num_trained_parameters:,}",
        "cpus": str(os.cpu_count()),
        "system": platform.platform(),
    }
    return found | installed_versions(PACKAGES)


def record(folder: Path, model: ModelData) -> None:
    text = json.dumps(describe(model), indent=2, ensure_ascii=False) + "\n"
    files.write(folder / "environment.json", text)


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{torch.cuda.get_device_name(device)} ({device})"
