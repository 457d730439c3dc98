"""Full fine-tuning, which trains a base model's own weights.

The weights are saved in the format of transformers with the tokenizer, so the folder is a model. A snapshot
is a copy of every weight, which replaces the live weights while the snapshot is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from cookbook import models
from cookbook.engine.model import fsdp
from cookbook.engine.model.loading import load_model, no_progress_bar
from cookbook.engine.model.published_files import (
    ChangedFiles,
    PublishedFiles,
    read_json,
    set_dtype,
    set_vocabulary,
    write_files_for_media,
    write_json,
)
from cookbook.engine.model.text_part import by_published_names, frozen_parameters
from cookbook.utils import pretrained


def train_all(model: Any) -> dict[str, nn.Parameter]:
    """Makes the weights trainable that text reaches, and returns them by name. Tied weights have one name.

    The gradient of the projection to the vocabulary, a sum over all positions, is kept in fp32, and with
    float16 all gradients are (`loss_scaling`). FSDP reduces gradients of one dtype alone.
    """
    weights = _weights_for_text(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    if not fsdp.is_sharded(model):
        narrow = [weight for weight in weights.values() if weight.dtype == torch.float16]
        for weight in (*model.get_output_embeddings().parameters(), *narrow):
            weight.grad_dtype = torch.float32  # torch 2.10 and newer; older ones ignore it
    return weights


def _weights_for_text(model: Any) -> dict[str, nn.Parameter]:
    frozen = frozen_parameters(model)
    return {name: weight for name, weight in model.named_parameters() if weight not in frozen}


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


def write(
    model: Any, model_name: str, tokenizer: Any, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Saves a model folder with the tensors of the published one, and the trained values of those trained.

    `weights` are the trained ones, of which a process may hold only a part; without it, those of `model`.
    """
    published_folder = models.model_folder(model_name)
    config = read_json(published_folder / "config.json")
    if config.get("quantization_config") is not None:  # its tensors hold no weights as they are trained
        model._weight_conversions = get_model_conversion_mapping(model)  # without those to dequantise
        with no_progress_bar():
            model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(folder)
        return
    published = PublishedFiles(published_folder, pretrained.empty_causal_lm(models.load_config(model_name)))
    if weights is None:
        weights = _weights_for_text(model)
    names_of = {id(weight): name for name, weight in model.named_parameters()}
    aliases = {name: names_of[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    values = {name: weights[own].detach() for name, own in aliases.items() if own in weights}
    is_tied = {name for name, own in aliases.items() if name != own}
    added = {name: name for name in values if name not in published.parameters and name not in is_tied}
    changed = ChangedFiles(published, {name: _constant(value) for name, value in values.items()}, added)
    embeddings = model.get_input_embeddings().weight

    def dtype_of(name: str) -> torch.dtype:
        return embeddings.dtype if changed.is_changed(name) else published.dtype_of(name)

    shapes = {name: tuple(value.shape) for name, value in values.items()}
    outline = {name: changed.outline_of(name, dtype_of(name), shapes) for name in changed.names}
    changed.write(folder, outline, "50GB")
    set_dtype(config, embeddings.dtype)
    if embeddings.shape != published.model.get_input_embeddings().weight.shape:
        set_vocabulary(config, embeddings.shape[0])
    config.setdefault("architectures", [type(model).__name__])
    write_json(folder / "config.json", config)
    if generation := read_json(published_folder / "generation_config.json"):
        write_json(folder / "generation_config.json", generation)
    write_files_for_media(published_folder, folder)
    tokenizer.save_pretrained(folder)


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


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
    weights = by_published_names(model, dict(found.named_parameters()))
    return {
        name: fsdp.part_like(weight.detach(), live[name]) if name in live else weight.detach()
        for name, weight in weights.items()
        if live.get(name) not in frozen
    }
