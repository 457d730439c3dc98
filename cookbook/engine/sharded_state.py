"""Optimizer state of which each process holds a part: torch.distributed.checkpoint, in safetensors.

Every process writes a file with its parts and where they lie in the whole, and reads back what it needs of
all files. So a checkpoint may be read by another number of processes, one included. Nothing is unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cookbook.engine import sharding
from cookbook.engine.mesh import Mesh
from cookbook.errors import CheckpointError


def write(folder: Path, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Every process takes part. `folder` is new, and theirs."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    checkpoint.save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=mesh.host_group,
    )


def read(folder: Path, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `write` wrote, each tensor dealt out as the master is that it belongs to."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        tensors = {
            key: _room_for(meta.size, meta.properties.dtype, masters.get(key.rpartition(".")[0]))  # type: ignore[union-attr]
            for key, meta in found.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, ValueError, RuntimeError, checkpoint.CheckpointException) as error:
        raise CheckpointError(
            f"Checkpoint {folder.parent} is damaged: {folder.name} cannot be read ({error}). Load an earlier "
            f"checkpoint."
        ) from error
    return tensors


def _room_for(size: torch.Size, dtype: torch.dtype, master: Tensor | None) -> Tensor:
    if master is not None and sharding.is_dealt_out(master) and master.shape == size:
        return torch.empty_like(master.detach(), dtype=dtype)
    return torch.empty(size, dtype=dtype)
