"""Checks of what a trainer saves and loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cookbook import models
from cookbook.engine import checkpoint
from cookbook.engine.model import fsdp, peft_settings
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.processes import World
from cookbook.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)


def check_finite(
    path: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], world: World
) -> None:
    """Raises TrainingError on all processes if a weight or an optimizer value is nan or infinite."""
    tensors = {**weights, **{f"{name} (optimizer)": of for name, of in optimizer.items()}}
    parts = [fsdp.local_part(tensor.detach()) for tensor in tensors.values()]
    # one read for all of them: the device is waited for once
    are_finite = torch.stack([part.isfinite().all() for part in parts]).tolist()
    wrong = [name for name, is_finite in zip(tensors, are_finite, strict=True) if not is_finite]
    with world.failing_together():
        if wrong:
            raise TrainingError(
                f"Training diverged: {len(wrong)} of the {len(tensors)} tensors to save have values that "
                f"are nan or infinite ({wrong[0]} is one). Nothing was saved as {path}. Start again from "
                f"an earlier checkpoint with a lower learning_rate."
            )


def check_weights_agree(weights: Mapping[str, Tensor], world: World) -> None:
    """Raises TrainingError if a process has other weights than rank 0."""
    own = [weight for weight in weights.values() if not fsdp.is_dtensor(weight)]
    checksums = world.all_gather_object(None if world.is_alone else checkpoint.checksum(own))
    for rank, checksum in enumerate(checksums):
        if checksum != checksums[0]:
            raise TrainingError(
                f"Process {rank} of {world.size} has other weights than process 0. Do all "
                f"run on devices of one kind, with the same packages? Nothing was saved."
            )


def check_weights_fit(
    path: str, info: checkpoint.StateInfo, weights: Mapping[str, Tensor], adapter: Adapter, base: BaseModel
) -> None:
    """Raises CheckpointError, naming both, if a checkpoint lacks this adapter's shape or scale."""
    location = models.model_location(base.name)
    if info.base_model not in (models.canonical_name(base.name), location) and path != location:
        logger.warning(
            "Checkpoint %s was trained on %s and is loaded onto %s.", path, info.base_model, base.name
        )
    expected = {name: list(weight.shape) for name, weight in adapter.weights.items()}
    found = {name: list(weight.shape) for name, weight in weights.items()}
    if expected == found and (adapter.is_full or info.lora.alpha == adapter.lora.alpha):
        if not adapter.is_full:
            peft_settings.check_frozen(Path(path).expanduser(), base.has_weight)
        return
    names = sorted(expected.keys() | found.keys())
    differing = [
        f"{name} has shape {found.get(name, 'none')} there, {expected.get(name, 'none')} here"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    raise CheckpointError(
        f"Checkpoint {path} (an adapter of rank {info.lora.rank} and alpha {info.lora.alpha:g} on "
        f"{info.base_model}) does not fit rank {adapter.lora.rank} and alpha {adapter.lora.alpha:g} on "
        f"{base.name}{': ' + differing[0] if differing else ''}. "
        f"Create the client with the checkpoint's own model and LoRA settings."
    )
