"""Finds the part of a model that reads and writes text, and keeps the other parts off the device.

A model that was published for pictures or sound too has towers, which encode them, and projectors. Training
and sampling here give it text alone, so these parts never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from cookbook.engine.model.peft_settings import PREFIX
from cookbook.utils import pretrained

T = TypeVar("T")


def text_decoder(model: Any) -> Any:
    """Returns the module that computes the hidden states that are projected to the vocabulary."""
    pretrained.find_parts(model)
    decoder = model.get_decoder()
    if decoder.get_output_embeddings() is not None:  # Llama 4: a model of text alone inside a multimodal one
        return next(child for child in decoder.children() if isinstance(child, PreTrainedModel))
    return decoder


def towers(model: Any) -> dict[str, nn.Module]:
    """Returns the modules that text alone does not run through, by name; {} if the model reads only text."""
    # The decoder of some models is a model of text alone, with its projection to the vocabulary.
    ends = {
        id(end) for end in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    }
    text_config = model.config.get_text_config()
    is_composite = text_config is not model.config
    kinds = (type(model.config), type(text_config))

    def found_in(module: nn.Module, prefix: str, is_text: bool) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            inside = is_text or id(child) in ends
            around = any(id(part) in ends for part in child.modules())
            is_model_of_its_own = isinstance(child, PreTrainedModel) and type(child.config) not in kinds
            if not around and (is_model_of_its_own or (is_composite and not inside)):
                yield prefix + name, child
            else:
                yield from found_in(child, f"{prefix}{name}.", inside)

    return dict(found_in(model, "", is_text=False))


def frozen_parameters(model: Any) -> set[nn.Parameter]:
    """Returns the parameters of the towers, which get no gradient from text."""
    return {parameter for tower in towers(model).values() for parameter in tower.parameters()}


def move_to(model: Any, device: torch.device) -> None:
    """Moves a model to a device without its towers, which stay on the CPU or go there.

    A model that calls a tower for text too gets it on the device then. Towers come last among the modules
    around them: transformers takes the device of the first weight for that of the model.
    """

    def follow(module: nn.Module, inputs: Any) -> None:
        module.to(device)

    apart = towers(model) if device.type != "cpu" else {}
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in apart]
    for parent, leaf in places:
        delattr(parent, leaf)
    try:
        model.to(device)
    finally:
        for (parent, leaf), tower in zip(places, apart.values(), strict=True):
            setattr(parent, leaf, tower)
    for tower in apart.values():
        tower.to("cpu").register_forward_pre_hook(follow)


def by_published_names(model: Any, tensors: dict[str, T]) -> dict[str, T]:
    """Returns the values under the names that a model's weights and modules have in its published class.

    Earlier versions of this project, and other programs, load a multimodal model in its class for text alone,
    where `model.language_model.layers.0` is `model.layers.0`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = text_decoder(model)
    head = names.get(id(getattr(model.get_output_embeddings(), "base_layer", model.get_output_embeddings())))
    known = set(names.values())
    inner = {name for name, _ in decoder.named_children()}

    def published(name: str) -> str:
        prefix = PREFIX if name.startswith(PREFIX) else ""
        parts = name.removeprefix(prefix).split(".")
        if parts[0] == "lm_head" and "lm_head" not in known and head is not None:
            return ".".join([prefix + head.removesuffix(".base_layer"), *parts[1:]])
        if len(parts) > 1 and parts[0] == "model" and parts[1] in inner and f"model.{parts[1]}" not in known:
            return ".".join([prefix + names[id(decoder)], *parts[1:]])
        return name

    return {published(name): value for name, value in tensors.items()}
