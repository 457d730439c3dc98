"""A base model's own weights as what is trained: full fine-tuning.

They are saved as transformers saves a model, with the tokenizer, so that the folder is a model. A snapshot
is a copy of every weight, which stands in for the live ones while it is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model import fsdp
from cookbook.engine.model.loading import load_model, no_progress_bar


def train_all(model: Any) -> dict[str, nn.Parameter]:
    """Every weight of the model, to be trained; one that is tied to another has one name."""
    model.requires_grad_(True)
    return dict(model.named_parameters())


def copy_of(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(weight.detach().clone(), requires_grad=False) for name, weight in weights.items()
    }


@contextlib.contextmanager
def standing_in(model: Any, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Runs the model with `weights` in place of its own."""
    live = dict(model.named_parameters())
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
    """FSDP has its own names for the memory of a part, so other values go into it, not other memory."""
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
    """`weights`: those to write in place of the model's own, of which a process may hold a part."""
    with no_progress_bar():
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(folder)


def whole_weights(weights: Mapping[str, nn.Parameter], is_kept: bool) -> dict[str, Tensor]:
    """Weights that are dealt out, one after another put together, and kept on the CPU of those that want."""
    kept = {}
    for name, weight in weights.items():
        whole = fsdp.full_tensor(weight.detach())
        if is_kept:
            kept[name] = whole.cpu()
    return kept


def read(path: str, model: Any) -> dict[str, Tensor]:
    """The weights of a model folder that are to go into `model`, on the CPU, or where its parts lie.

    Raises ModelError where the folder is damaged.
    """
    live = dict(model.named_parameters())
    found = load_model(path, torch.device("cpu"), model.dtype)
    return {
        name: fsdp.part_like(parameter.detach(), live[name]) if name in live else parameter.detach()
        for name, parameter in found.named_parameters()
    }
