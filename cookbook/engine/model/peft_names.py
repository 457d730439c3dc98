"""The names under which PEFT reads the tensors of an adapter from a file.

PEFT renames them as transformers renames the published weights of the model. For some families that changes
the names of modules in the loaded model, too: `mlp.shared_experts.` of Laguna becomes `mlp.shared_experts..`,
and PEFT then loads the adapter without those tensors, with no more than a warning. Such tensors are saved
under the published names instead, from which PEFT arrives at those of the loaded model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from cookbook.engine.model.peft_settings import PREFIX
from cookbook.engine.model.text_part import by_published_names

logger = logging.getLogger(__name__)

T = TypeVar("T")


def keys_to_save(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns for each tensor's name the key that PEFT reads as that name."""
    keys = _keys_that_peft_reads(model, names)
    for name, key in keys.items():
        if key is None:
            logger.warning("PEFT cannot read %s of this adapter: it knows no key for it.", name)
    return {name: key or name for name, key in keys.items()}


def names_of_saved(names: Collection[str], keys: Mapping[str, str]) -> list[str]:
    """Returns full names of layers, or of weights in them, with those that the keys of their tensors have.

    PEFT puts an adapter on the layers of the loaded model, whose names the settings must have. Readers of the
    file find the names of the saved tensors there too.
    """
    saved = {_layer_of(name): _layer_of(key) for name, key in keys.items() if name != key}
    others: set[str] = set()
    for name in names:
        holder, _, leaf = name.rpartition(".")
        if name in saved:
            others.add(saved[name])
        elif holder in saved:
            others.add(f"{saved[holder]}.{leaf}")
    return [*names, *sorted(others.difference(names))]


def _keys_that_peft_reads(model: Any, names: Iterable[str]) -> dict[str, str | None]:
    """Returns for each tensor's name the key that PEFT reads as that name, or None if there is none."""
    names = list(names)
    read_as = _read_by_peft(model, names)
    keys: dict[str, str | None] = {name: name if read_as[name] == name else None for name in names}
    changed = [name for name in names if keys[name] is None]
    for published in _reversed_renamings(model) if changed else ():
        tried = {name: published(name) for name in changed if keys[name] is None}
        read_as = _read_by_peft(model, tried.values())
        keys |= {
            name: key for name, key in tried.items() if read_as[key] == name and _leaf(key) == _leaf(name)
        }
    return keys


def unreadable(model: Any, targets: Iterable[str], modules: Collection[str]) -> list[str]:
    """Returns those of the targets on which PEFT reads an adapter from no file.

    Those that are not among the `modules` are weights of modules.
    """
    names = {
        target: f"{PREFIX}{target if target in modules else target.rpartition('.')[0]}.lora_A.weight"
        for target in targets
    }
    keys = _keys_that_peft_reads(model, dict.fromkeys(names.values()))
    return [target for target, name in names.items() if keys[name] is None]


def by_own_names(model: Any, tensors: dict[str, T]) -> dict[str, T]:
    """Returns the tensors of a saved adapter under the names that they have in the loaded model."""
    tensors = by_published_names(model, tensors)
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    known |= {name.replace(".base_layer", "") for name in known}
    others = [key for key in tensors if ".lora_" in key and _layer_of(key) not in known]
    read_as = _read_by_peft(model, others) if others else {}
    return {read_as.get(key, key): tensor for key, tensor in tensors.items()}


def own_layer_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns the name in the loaded model of each layer that a saved adapter names."""
    keys = {f"{PREFIX}{name}.lora_A.weight": name for name in names}
    return {name: _layer_of(key) for key, name in by_own_names(model, keys).items()}


def _layer_of(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0].removesuffix(".base_layer")


def _leaf(key: str) -> str:
    return _layer_of(key).rpartition(".")[2]


def _read_by_peft(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Returns the name to which PEFT loads each key; the key itself if PEFT reads it from no file."""
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )
    except ImportError:  # an earlier PEFT reads every key as it is
        return {key: key for key in keys}
    from peft import LoraConfig

    keys = list(keys)
    read = {key: key for key in keys}
    with torch.device("cpu"):  # an estimate makes adapters on "meta", where numbers cannot be read
        numbered = {key: torch.tensor(number) for number, key in enumerate(keys) if ".lora_" in key}
        for name, number in convert(model, LoraConfig(), numbered).items():
            if number.ndim == 0:
                read[keys[int(number)]] = name
    return read


def _reversed_renamings(model: Any) -> Iterator[Callable[[str], str]]:
    """Yields functions from names in the loaded model to published ones: each renaming alone, and all."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each.reverse_transform() for each in reversed(mapping) if isinstance(each, WeightRenaming)]

    def published(name: str, some: list[Any]) -> str:
        key, _ = rename_source_key(name.removeprefix(PREFIX), some, [], reverse=True)
        return PREFIX + key

    for some in (*([one] for one in renamings), renamings):
        yield functools.partial(published, some=some)
