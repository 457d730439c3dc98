"""Checkpoints of weights that are sharded over processes. Any number of processes can read them.

Rank 0 gathers and saves the weights, so the folder is a model. Every process writes its part of the optimizer
and the place of that part, and reads back what it needs of all parts, with torch.distributed.checkpoint in
safetensors. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cookbook.engine import checkpoint
from cookbook.engine.model import fsdp, full_weights
from cookbook.engine.model.text_part import by_published_names
from cookbook.engine.processes import World
from cookbook.errors import CheckpointError
from cookbook.utils import files

if TYPE_CHECKING:
    from cookbook.engine.model.base_model import BaseModel


def save(
    path: Path,
    info: checkpoint.StateInfo,
    base: BaseModel,
    weights: Mapping[str, nn.Parameter],
    optimizer: Mapping[str, Tensor] | None,
    overwrite: bool,
) -> None:
    """Does `checkpoint.save` with all processes of `base.world`. Rank 0 renames the complete folder."""
    world = base.world
    with contextlib.ExitStack() as stack:

        def make_folder() -> Path | None:
            checkpoint.check_name_is_free(path, overwrite)
            if optimizer is None:
                return None
            return stack.enter_context(files.temporary_folder(path)) / checkpoint.OPTIMIZER_FOLDER

        parts = world.on_rank0(make_folder)
        full = full_weights.full_tensors(weights, is_kept=world.is_main)
        with world.failing_together():
            if optimizer is not None:
                assert parts is not None
                _write(parts, optimizer, world)
        write = functools.partial(_write_model, base, full, parts)
        world.on_rank0(functools.partial(checkpoint.save, path, info, write, None, overwrite))


def _write_model(base: BaseModel, full: Mapping[str, Tensor], parts: Path | None, folder: Path) -> None:
    """Writes the weights into `folder` and moves the optimizer's parts there."""
    full_weights.write(base.model, base.name, base.tokenizer, folder, full)
    if parts is not None:
        files.rename(parts, folder / checkpoint.OPTIMIZER_FOLDER)


def read_optimizer(path: str, masters: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Returns the optimizer's tensors of a checkpoint on `model`, each sharded like its weight."""
    folder = checkpoint.optimizer_folder(path)
    if folder is not None:
        return _read(folder, masters, model)
    return {
        key: fsdp.part_like(tensor, master)
        if (master := _master_of(key, tensor, masters)) is not None
        else tensor
        for key, tensor in by_published_names(model, checkpoint.read_optimizer(path)).items()
    }


def _master_of(key: str, tensor: Tensor | torch.Size, masters: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the weight that the tensor belongs to, or None if the shapes do not agree."""
    master = masters.get(key.rpartition(".")[0])
    shape = tensor if isinstance(tensor, torch.Size) else tensor.shape
    return master if master is not None and master.shape == shape else None


def _write(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Writes the tensors into a new `folder`, with all processes."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    checkpoint.save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=world.host_group,
    )


def _read(folder: Path, masters: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Returns the tensors that `_write` wrote, by published names, each sharded like its master."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        published = {
            key: name for name, key in by_published_names(model, {key: key for key in found}).items()
        }
        tensors = {
            key: _empty_like_master(published[key], meta.size, meta.properties.dtype, masters)  # type: ignore[union-attr]
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
    return {published[key]: tensor for key, tensor in tensors.items()}


def _empty_like_master(
    key: str, size: torch.Size, dtype: torch.dtype, masters: Mapping[str, Tensor]
) -> Tensor:
    master = _master_of(key, size, masters)
    return (
        torch.empty(size, dtype=dtype) if master is None else torch.empty_like(master.detach(), dtype=dtype)
    )
