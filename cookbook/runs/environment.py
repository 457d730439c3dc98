"""environment.json, which records the machine and the versions of the last start of a run."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from cookbook.engine.threads import num_threads
from cookbook.errors import DataError
from cookbook.types import ModelData
from cookbook.utils import files, json_files
from cookbook.utils.versions import installed_versions

PACKAGES = ("sft-cookbook", "torch", "transformers", "peft", "datasets", "numpy", "bitsandbytes")


def describe(model: ModelData) -> dict[str, str]:
    """Returns the facts on which a run's numbers depend, without names of the machine or of its users."""
    found = {
        "device": _device_name(model.device),
        "dtype": model.dtype,
        "trained parameters": f"{model.num_trained_parameters:,}",
        "cpus": str(os.cpu_count()),
        "threads": str(num_threads()),
        "system": platform.platform(),
    }
    return found | installed_versions(PACKAGES)


def record(folder: Path, model: ModelData) -> None:
    text = json.dumps(describe(model), indent=2, ensure_ascii=False) + "\n"
    files.write(folder / "environment.json", text)


def recorded_threads(folder: Path) -> int | None:
    """Returns the number of threads of an earlier start of the run, or None if it is unknown."""
    path = folder / "environment.json"
    if not path.exists():
        return None
    number = json_files.read_object(path, DataError, "Restore or remove it.").get("threads")
    return int(number) if isinstance(number, str) and number.isdigit() and int(number) > 0 else None


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{torch.cuda.get_device_name(device)} ({device})"
