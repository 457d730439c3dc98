"""Puts PEFT's layers on targets that are named in full, and names them so that PEFT finds the same ones.

PEFT itself matches names, and rewrites those of layers that other versions of transformers had.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def named_in(model: Any, explicit: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the full names of the targets in a saved adapter's settings, and its other settings."""
    others = {key: value for key, value in explicit.items() if not key.startswith("target_")}
    linear = {
        _without_adapters(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    targets = list(explicit["target_modules"])
    wanted = explicit["target_parameters"] or ()
    for name, _ in model.named_parameters():
        name = _without_adapters(name)
        if any(name == one or name.endswith(f".{one}") for one in wanted):
            layer = name.removesuffix(".weight")
            targets.append(layer if layer in linear else name)
    return targets, others


def put_on(
    peft_model: Any, model: Any, targets: list[str], config: Any, adapter: str, module_names: Collection[str]
) -> None:
    """Puts an adapter on linear layers and on stacked weights of experts.

    The config then names them for PEFT. `module_names` are those of the model without adapters.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    for name in targets:
        is_module = name in module_names
        place = name if is_module else name.rpartition(".")[0]
        parent, _, leaf = place.rpartition(".")
        holder = model.get_submodule(parent)
        target = getattr(holder, leaf)
        parameter = None if is_module else name.rpartition(".")[2]
        for layer in _layers_on(target):
            if parameter is not None and layer.parameter_name == parameter:
                target = layer  # another adapter is on this weight
        peft_model.base_model._create_and_replace(
            config, adapter, target, leaf, holder, current_key=name, parameter_name=parameter
        )
    cast_adapter_dtype(peft_model.base_model, adapter)
    config.target_modules, config.target_parameters = names_for_peft(targets, module_names, config, model)


def names_for_peft(
    targets: list[str], module_names: Collection[str], config: Any, model: Any
) -> tuple[list[str], list[str] | None]:
    """Returns `target_modules` and `target_parameters` with which PEFT finds these targets and no others.

    Short names are used if no other module has one of them. PEFT takes the names of some linear layers for
    those of experts (`gate_proj` in a mixture of experts), even full ones. Such a layer is named by its
    weight, among the parameters: the adapter's tensors are the same.
    """
    modules = sorted(name for name in targets if name in module_names)
    parameters = [name for name in targets if name not in module_names]
    for leaf in sorted({_leaf(name) for name in modules}):
        if _is_rewritten(leaf, config, model):
            parameters += [f"{name}.weight" for name in modules if _leaf(name) == leaf]
            modules = [name for name in modules if _leaf(name) != leaf]
    leaves = {_leaf(name) for name in modules}
    others = {_leaf(name) for name in set(module_names).difference(modules)}
    return (modules if leaves & others else sorted(leaves)), sorted(parameters) or None


def _is_rewritten(leaf: str, config: Any, model: Any) -> bool:
    """Returns whether PEFT would take a layer's name for one of a stacked weight in this model."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    tried = copy.copy(config)
    tried.target_modules, tried.target_parameters = {leaf}, None
    tried.rank_pattern, tried.alpha_pattern = {}, {}
    try:
        convert_peft_config_for_transformers(tried, model, None)
    except ValueError:  # the name is one of several that PEFT would replace by one
        return True
    return bool(tried.target_modules != {leaf})


def _layers_on(module: nn.Module) -> Iterator[Any]:
    """Yields PEFT's layers around the module that holds stacked weights, from the outside in."""
    while hasattr(module, "parameter_name"):
        yield module
        module = module.base_layer  # type: ignore[assignment]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _without_adapters(name: str) -> str:
    return name.replace(".base_layer", "")
