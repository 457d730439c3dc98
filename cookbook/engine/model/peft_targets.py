"""Puts PEFT's layers on targets that are named in full, and names them so that PEFT finds the same ones.

PEFT itself matches names, and rewrites those of layers that other versions of transformers had.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
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

    create = peft_model.base_model._create_and_replace
    for name in targets:
        is_module = name in module_names
        place, _, parameter = (name, "", "") if is_module else name.rpartition(".")
        parent, _, leaf = place.rpartition(".")
        holder = model.get_submodule(parent)
        if is_module:
            create(config, adapter, getattr(holder, leaf), leaf, holder, current_key=name)
            continue
        holder, leaf, target = _place_of_layer(holder, leaf, parameter)
        if getattr(target, "parameter_name", None) == parameter:
            create(config, adapter, target, leaf, holder, current_key=name, parameter_name=parameter)
        else:
            # PEFT would take another adapter's layer on another weight for one on this weight.
            around, experts = nn.Module(), _without_layers(target)
            create(config, adapter, experts, "new", around, current_key=name, parameter_name=parameter)
            around.new.base_layer = target  # type: ignore[union-attr]
            setattr(holder, leaf, around.new)
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


def _place_of_layer(holder: Any, leaf: str, parameter: str) -> tuple[Any, str, Any]:
    """Returns the place of PEFT's layer on a stacked weight: the module around it, its name, what is there.

    That is the layer itself, or what it belongs around.
    Layers on the weights of one module are nested in the order of the weights, the first one innermost, as in
    a model that has no other adapter.
    """
    target = getattr(holder, leaf)
    order = [name for name, _ in _without_layers(target).named_parameters(recurse=False)]
    while hasattr(target, "parameter_name") and order.index(target.parameter_name) > order.index(parameter):
        holder, leaf, target = target, "base_layer", target.base_layer
    return holder, leaf, target


def _without_layers(module: Any) -> Any:
    while hasattr(module, "parameter_name"):
        module = module.base_layer
    return module


def names_alone(model: nn.Module, adapter: str) -> dict[str, str]:
    """Returns the names that layers on stacked weights have if there is no other adapter, by their own.

    A name shows how deep a layer is in layers on other weights of the module, which other adapters may have.
    """
    names: dict[str, str] = {}
    for outermost, layer in model.named_modules():
        if not hasattr(layer, "parameter_name") or outermost.endswith(".base_layer"):
            continue
        name = alone = outermost
        while hasattr(layer, "parameter_name"):
            if adapter in layer.lora_A:
                names[name] = alone
                alone += ".base_layer"
            name, layer = f"{name}.base_layer", layer.base_layer
    return names


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _without_adapters(name: str) -> str:
    return name.replace(".base_layer", "")
