"""The memory that this process has taken at most, on its device."""

from __future__ import annotations

import resource
import sys


def peak_memory(device: str) -> int:
    """Returns the most bytes of tensors on a CUDA device so far, or of the whole process on a CPU.

    Does not wait for the device.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
