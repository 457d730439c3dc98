"""Full fine-tuning, which trains a base model's own weights.

The weights are saved in the format of transformers with the tokenizer, so the folder is a model. A snapshot
is a copy of every weight, which replaces the live weights while the snapshot is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model import fsdp, text_part
from cookbook.engine.model.loading import load_model, no_progress_bar
from cookbook.engine.model.text_part import frozen_parameters


def train_all(model: Any) -> dict[str, nn.Parameter]:
    """Makes the weights trainable that text reaches, and returns them by name. Tied weights have one name."""
    frozen = frozen_parameters(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight not in frozen}
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def copy_of(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(weight.detach().clone(), requires_grad=False) for name, weight in weights.items()
    }


@contextlib.contextmanager
def swapped_in(model: Any, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Runs the body with `weights` in place of the model's own."""
    live = {name: weight for name, weight in model.named_parameters() if name in weights}
    if fsdp.is_sharded(model):
        with _copied_in(live, weights):
            yield
        return
    own = {name: parameter.data for name, parameter in live.items()}
    try:
        for name, parameter in live.items():
            parameter.data = weights[name].data
        yield
    finally:
        for name, parameter in live.items():
            parameter.data = own[name]


@contextlib.contextmanager
@torch.no_grad()
def _copied_in(live: Mapping[str, nn.Parameter], weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Copies values instead of swapping tensors, because FSDP keeps references to the memory of a shard."""
    others = {name: parameter for name, parameter in live.items() if weights[name] is not parameter}
    own = {name: parameter.detach().clone() for name, parameter in others.items()}
    for name, parameter in others.items():
        parameter.copy_(weights[name])
    try:
        yield
    finally:
        for name, parameter in others.items():
            parameter.copy_(own[name])


def write(model: Any, tokenizer: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Saves the model, with `weights` in place of its own, of which a process may hold only a part."""
    with no_progress_bar():
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(folder)


def full_tensors(weights: Mapping[str, nn.Parameter], is_kept: bool) -> dict[str, Tensor]:
    """Gathers sharded weights one after another. Returns them on the CPU if `is_kept`."""
    kept = {}
    for name, weight in weights.items():
        full = fsdp.full_tensor(weight.detach())
        if is_kept:
            kept[name] = full.cpu()
    return kept


def read(path: str, model: Any) -> dict[str, Tensor]:
    """Returns the weights of a model folder by name, on the CPU, or sharded like those of `model`.

    Raises ModelError if the folder is damaged.
    """
    frozen = frozen_parameters(model)
    live = dict(model.named_parameters())
    found = load_model(path, torch.device("cpu"), next(iter(live.values())).dtype)
    weights = text_part.by_published_names(model, dict(found.named_parameters()))
    return {
        name: fsdp.part_like(weight.detach(), live[name]) if name in live else weight.detach()
        for name, weight in weights.items()
        if live.get(name) not in frozen
    }
