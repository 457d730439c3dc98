"""The device of an engine, what it can compute, and the arithmetic that follows from it.

A CUDA device of compute capability 8.0 or higher (Ampere, 2020) multiplies bfloat16 and runs
flash-attention. Older ones (V100, T4) compute in float16 with loss scaling, and run one sequence after
another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import resource
import sys
from pathlib import Path

import torch

from cookbook.engine import processes
from cookbook.engine.options import EngineOptions, check_device, check_torch
from cookbook.errors import ConfigError

logger = logging.getLogger(__name__)

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""The sizes of cuBLAS's workspace with which it sums in the same order each time (NVIDIA's documentation)."""
_AMPERE = (8, 0)
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The variables with the settings of torch's allocator, which it reads at its first allocation."""


def resolve(options: EngineOptions) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype of an engine, and makes the device that of the calling thread.

    Raises ConfigError for a device, a dtype or a version of torch that is not supported.
    """
    if options.deterministic:
        make_deterministic()
    device = resolve_device(options.device)
    if device.type == "cuda":
        use_growing_segments()
        use_flash_attention_3(device)
    return device, resolve_dtype(options.dtype, device)


def resolve_device(device: str) -> torch.device:
    """Returns the torch device. If several processes run on a machine, each has its own CUDA device.

    A CUDA device becomes the current one of the calling thread, which is the engine's: streams, events and
    new tensors are on it.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type != "cuda":
        return resolved
    check_torch(torch.__version__)
    if processes.is_one_of_many():
        resolved = torch.device("cuda", processes.local_rank())
    elif resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(resolved)
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Returns the torch dtype. "auto" is float32 on a CPU; on CUDA bfloat16, or float16 on older devices."""
    found = getattr(torch, dtype) if dtype != "auto" else torch.float32
    if device.type != "cuda" or has_bfloat16(device):
        return torch.bfloat16 if dtype == "auto" and device.type == "cuda" else found
    major, minor = torch.cuda.get_device_capability(device)
    what = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    if found == torch.bfloat16:
        raise ConfigError(
            f"dtype=bfloat16 needs a device of compute capability 8.0; found {what}. Use dtype=auto, which "
            f"is float16 with loss scaling there, or dtype=float32."
        )
    found = torch.float16 if dtype == "auto" else found
    scaling = " with loss scaling" if found == torch.float16 else ""
    logger.warning(
        "%s has no bfloat16 and no flash-attention: dtype=%s%s, and the sequences of a row are attended to "
        "one after another.",
        what,
        str(found).removeprefix("torch."),
        scaling,
    )
    return found


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a CUDA device computes in bfloat16. torch emulates it on older ones, slowly."""
    return torch.cuda.get_device_capability(device) >= _AMPERE


def has_varlen_attention(device: torch.device) -> bool:
    """Returns whether torch's variable-length attention, which is flash-attention, runs on the device."""
    return device.type == "cuda" and has_bfloat16(device)


def has_graphs(device: torch.device) -> bool:
    """Returns whether kernels can be captured as graphs on the device."""
    return device.type == "cuda" and torch.version.hip is None


def use_flash_attention_3(device: torch.device) -> None:
    """Makes FlashAttention 3 the attention of this process, on a device of Hopper if it is installed."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return
    if importlib.util.find_spec("flash_attn_interface") is None:
        return
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        logger.warning(
            "FlashAttention 3 is installed and cannot be used: %s. torch's own kernel runs.", error
        )
    else:
        logger.info("Attention runs on FlashAttention 3.")


def use_growing_segments() -> None:
    """Makes torch's allocator extend what it holds, so that rows of many lengths leave no gaps.

    A setting of the user's own is kept. It has no effect once the allocator is in use.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def memory_use(device: torch.device) -> dict[str, float]:
    """Returns the memory that is in use, reserved and at its peak since the last call, in GiB by name.

    On CUDA these are numbers of torch's allocator, which do not wait for the device. On a CPU they are the
    process's own, nothing is reserved, and the peak is that since the process began.
    """
    if device.type == "cuda":
        found = {
            "memory_in_use_gib": torch.cuda.memory_allocated(device),
            "memory_reserved_gib": torch.cuda.memory_reserved(device),
            "memory_peak_gib": torch.cuda.max_memory_allocated(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
        return {name: number / 2**30 for name, number in found.items()}
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"memory_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        found["memory_in_use_gib"] = pages * os.sysconf("SC_PAGE_SIZE")
    return {name: number / 2**30 for name, number in found.items()}


def make_deterministic() -> None:
    """Makes every operation of this process compute the same bits each time, or raise an error.

    `index_add_`, `scatter_add_` and the backward pass of flash-attention sum without atomics then, and cuBLAS
    has a workspace of a fixed size. Raises ConfigError if CUDA has been initialised with another.
    """
    workspace = os.environ.get(_CUBLAS_WORKSPACE)
    if workspace is None and not torch.cuda.is_initialized():
        os.environ[_CUBLAS_WORKSPACE] = _DETERMINISTIC_WORKSPACES[0]
    elif torch.version.cuda is not None and workspace not in _DETERMINISTIC_WORKSPACES:
        found = "not set" if workspace is None else workspace
        raise ConfigError(
            f"deterministic=True needs {_CUBLAS_WORKSPACE}={_DETERMINISTIC_WORKSPACES[0]} before CUDA is "
            f"initialised; it is {found}. Set it in the environment of the program, and start again."
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
