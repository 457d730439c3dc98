"""Checks every setting of an adapter_config.json: it is applied, or it is refused by name.

A supported adapter adds B A, scaled by alpha / rank or alpha / sqrt(rank), to layers and expert weights
(LoRA, rsLoRA, DoRA), and may replace whole modules (`modules_to_save`) and rows of the embeddings
(`trainable_token_indices`). PEFT settings that change anything else are refused, and so are unknown ones. The
tensors show which layers the adapter is on. They are compared with `target_modules` and the related settings,
because PEFT ignores tensors of layers that those do not name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cookbook.errors import CheckpointError
from cookbook.types import MAX_RANK, PeftSettings
from cookbook.utils import json_files
from cookbook.utils.json_files import Count, JsonOrigin, Positive

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
REPAIR = "Copy the adapter again, or load another one."

_SHAPE: Mapping[str, Any] = {
    "peft_type": str,
    "r": Positive,
    "lora_alpha": float,
    "target_modules": str | list[str] | None,
    "target_parameters": list[str] | None,
    "exclude_modules": str | list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "rank_pattern": Mapping[str, Positive] | None,
    "alpha_pattern": Mapping[str, float] | None,
    "modules_to_save": list[str] | None,
    "trainable_token_indices": list[Count] | Mapping[str, list[Count]] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "fan_in_fan_out": bool | None,
    "base_model_name_or_path": str | None,
    "lora_dropout": float | None,
    "revision": str | None,
    "auto_mapping": Mapping[str, Any] | None,
}
_FREE = {
    *_SHAPE.keys(), "inference_mode", "peft_version", "megatron_core", "runtime_config", "qalora_group_size",
} - {"peft_type", "revision", "auto_mapping"}  # fmt: skip
"""Settings that are applied, or that have no effect by themselves."""
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # These initialise A and B differently, and do not change the base weights.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "revision": ("main",),
}
"""For each further setting, the values without effect. Null, false and empty values have none either."""

PREFIX = "base_model.model."
FROZEN = ".base_layer."
TOKENS = ".token_adapter.trainable_tokens_delta"
TENSOR = re.compile(
    r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(embedding_[AB])|lora_(magnitude)_vector)"
)
"""The tensors of a LoRA: A and B of a layer, an embedding or expert weights, and DoRA's magnitudes."""
_DTYPES = ("F64", "F32", "F16", "BF16")
_MATCH_SECONDS = 1.0


def part_of(name: str) -> tuple[str, str] | None:
    """Returns the module of a LoRA's tensor, and which tensor of the LoRA it is.

    That is "A", "B", "embedding_A", "embedding_B" or "magnitude". Returns None for other tensors.
    """
    match = TENSOR.fullmatch(name)
    return None if match is None else (match[1], match[2] or match[3] or match[4])


def is_frozen_copy(name: str) -> bool:
    """Returns whether PEFT saved this tensor as a copy of a weight of the base model."""
    return FROZEN in name and part_of(name) is None


def read(folder: Path) -> dict[str, Any]:
    """Returns the settings of an adapter after checking them and the tensors.

    Raises CheckpointError, naming file and key, for a setting that is damaged or not supported.
    """
    path = folder / CONFIG_FILE
    origin = JsonOrigin(str(path), CheckpointError, REPAIR)
    config = json_files.read_object(path, CheckpointError, REPAIR)
    _check_settings(folder, config, origin)
    _check_tensors(folder, config)
    return config


def _check_settings(folder: Path, config: Mapping[str, Any], origin: JsonOrigin) -> None:
    if isinstance(kind := config.get("peft_type"), str) and kind != "LORA":
        raise CheckpointError(f"{folder} holds a {kind} adapter. Only LoRA can be loaded.")
    json_files.check(config, _SHAPE, origin)
    for key, rank in {"r": config["r"], **(config.get("rank_pattern") or {})}.items():
        if rank > MAX_RANK:
            origin.refuse(
                f"`{key}` is {rank:,}, and a rank of {MAX_RANK:,} is the largest that can be loaded"
            )
    for key, value in config.items():
        if key in _FREE or not value or any(value == one for one in _HARMLESS.get(key, ())):
            continue
        if key == "auto_mapping" and str(value.get("parent_library")).split(".")[0] == "transformers":
            continue  # auto_mapping names the class that the adapter was trained on
        raise CheckpointError(
            f"{folder} is a LoRA with {key}={json_files.shown(value)} ({CONFIG_FILE}), which is not "
            f"supported here. Merge it with PEFT itself (merge_and_unload) and give the merged model."
        )


def tensor_names(folder: Path) -> list[str]:
    """Returns the names of the tensors in the adapter's checked file; [] without a file."""
    return [*_shapes(folder)]


@dataclass(frozen=True)
class Parts:
    """What the tensors of an adapter are of, by full module names, as its file has them."""

    ranks: Mapping[str, int]
    """The rank of each module that has a LoRA. Expert weights count for the module that holds them."""
    saved: Mapping[str, str]
    """The module of each tensor that replaces a weight (`modules_to_save`), by the tensor's name."""
    token_rows: Mapping[str, list[int]]
    """The trained rows (`trainable_token_indices`) of each embedding or projection to the vocabulary."""

    @property
    def modules(self) -> set[str]:
        return {*self.ranks, *self.saved.values(), *self.token_rows}


def parts_of(folder: Path, config: Mapping[str, Any]) -> Parts:
    """Returns the parts of an adapter that `read` has checked."""
    ranks, saved, token_rows = {}, {}, {}
    for name, (_, shape) in _shapes(folder).items():
        if (part := part_of(name)) is not None:
            if part[1] in ("A", "embedding_A"):
                ranks[part[0]] = shape[0]
        elif name.endswith(TOKENS):
            module = name.removeprefix(PREFIX).removesuffix(TOKENS)
            token_rows[module] = _token_rows(module, config) or []
        elif (module_to_save := _module_to_save(name, config)) is not None:
            saved[name] = module_to_save
    return Parts(ranks, saved, token_rows)


def scaling(module: str, config: Mapping[str, Any], rank: int | None = None) -> float:
    """Returns the factor of B A on a module: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    rank = rank or _pattern_value(module, config.get("rank_pattern"), config["r"])
    alpha = _pattern_value(module, config.get("alpha_pattern"), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def settings_of(folder: Path, config: Mapping[str, Any]) -> PeftSettings:
    """Returns the settings with which a model gets the layers that a checked adapter has tensors of.

    Patterns are resolved to full names, within a time limit, because the settings may be from elsewhere.
    """
    parts = parts_of(folder, config)
    held = [module for module in parts.ranks if _holds_target_parameter(module, config)]
    modules = sorted(parts.ranks.keys() - set(held))
    values: dict[str, Any] = {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": modules,
        "target_parameters": config.get("target_parameters") if held else None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": sorted(set(parts.saved.values())) or None,
        "trainable_token_indices": dict(parts.token_rows) or None,
        **{key: bool(config.get(key)) for key in ("use_rslora", "use_dora", "fan_in_fan_out")},
    }
    for key, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        stacked = [stacked_weight_of(module, config) or module for module in held]
        for module in [*modules, *stacked] if config.get(key) else ():
            value = _pattern_value(module, config[key], default)
            if value != default:
                values[key][f"^{re.escape(module)}"] = value
    return PeftSettings(config, values)


def check_frozen(folder: Path, is_weight_of: Callable[[Tensor, str], bool]) -> None:
    """Raises CheckpointError if an adapter's copy of a frozen layer's weight differs from that of the base.

    Besides an adapter on the projection to the vocabulary, PEFT saves a copy of the frozen projection, and
    loads it too. `is_weight_of` says whether the base's module of a name has this weight (see `is_same`).
    """
    names = [name for name in tensor_names(folder) if is_frozen_copy(name)]
    if not names:
        return
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        for name in names:
            module = name.removeprefix(PREFIX).partition(FROZEN)[0]
            if not name.endswith(f"{FROZEN}weight") or not is_weight_of(file.get_tensor(name), module):
                raise CheckpointError(
                    f"{folder} holds {name}, another weight than the base model has. Merge it with PEFT "
                    f"itself (merge_and_unload) and give the merged model."
                )


def is_same(copy: Tensor, own: Tensor) -> bool:
    """Returns whether two weights are equal to the precision of the coarser dtype."""
    if copy.shape != own.shape:
        return False
    own = own.detach().to(copy.device)
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


# -- the tensors --------------------------------------------------------------------------------


def _shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns dtype and shape of each tensor in the adapter's file; {} without a file."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        return {}  # reading the weights raises an error
    origin = JsonOrigin(str(path), CheckpointError, REPAIR)
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        origin.refuse(f"it cannot be read ({error})")


def _check_tensors(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a tensor that has the wrong shape, or that no setting names."""
    origin = JsonOrigin(str(folder / ADAPTER_FILE), CheckpointError, REPAIR)
    modules, with_magnitude = set(), set()
    for name, (dtype, shape) in _shapes(folder).items():
        if not name.startswith(PREFIX):
            continue  # `check_weights_fit` refuses such a tensor
        if dtype not in _DTYPES:
            origin.refuse(f"`{name}` has dtype {dtype}, expected {', '.join(_DTYPES)}")
        if (part := part_of(name)) is None:
            _check_other_tensor(folder, name, shape, config, origin)
            continue
        module, kind = part
        modules.add(module)
        if kind == "magnitude":
            with_magnitude.add(module)
            continue
        if not _holds_target_parameter(module, config):
            rank_axis = 0 if kind.endswith("A") else 1
            rank = _pattern_value(module, config.get("rank_pattern"), config["r"], folder)
            if len(shape) != 2 or shape[rank_axis] != rank:
                origin.refuse(f"`{name}` has shape {shape}, and `r` is {rank} in {CONFIG_FILE}")
    for module in sorted(modules):
        if not (_is_target(module, config, folder) or _holds_target_parameter(module, config)):
            raise CheckpointError(
                f"{folder} holds a LoRA on {module}, which target_modules and the settings beside it in "
                f"{CONFIG_FILE} do not name: PEFT would not read it. {REPAIR}"
            )
    if torn := sorted(with_magnitude ^ (modules if config.get("use_dora") else set())):
        origin.refuse(
            f"`use_dora` is {json_files.shown(bool(config.get('use_dora')))} in {CONFIG_FILE}, and "
            f"{torn[0]} has {'a' if torn[0] in with_magnitude else 'no'} lora_magnitude_vector"
        )


def _check_other_tensor(
    folder: Path, name: str, shape: list[int], config: Mapping[str, Any], origin: JsonOrigin
) -> None:
    """Checks a tensor that is not one of a LoRA."""
    if is_frozen_copy(name):
        return
    if name.endswith(TOKENS):
        module = name.removeprefix(PREFIX).removesuffix(TOKENS)
        rows = _token_rows(module, config)
        if rows is None or len(set(rows)) != len(rows) or shape[:1] != [len(rows)]:
            origin.refuse(
                f"`{name}` has shape {shape}, and `trainable_token_indices` in {CONFIG_FILE} name "
                f"{'no' if rows is None else len(set(rows))} rows of {module}"
            )
    elif _module_to_save(name, config) is None:
        raise CheckpointError(
            f"{folder} holds {name}, which is neither a LoRA nor named in modules_to_save in {CONFIG_FILE}: "
            f"PEFT saves such a copy of embeddings that were resized. Merge it with PEFT itself "
            f"(merge_and_unload) and give the merged model."
        )


def _token_rows(module: str, config: Mapping[str, Any]) -> list[int] | None:
    """Returns the trained rows of a module, or None if the settings name none."""
    rows = config.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        return next((value for key, value in rows.items() if module.endswith(key)), None)
    return rows or None


def _module_to_save(name: str, config: Mapping[str, Any]) -> str | None:
    """Returns the module of `modules_to_save` that a tensor belongs to, or None."""
    parents = name.removeprefix(PREFIX).split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        module = ".".join(parents[:depth])
        if any(module.endswith(one) for one in config.get("modules_to_save") or ()):
            return module
    return None


def _holds_target_parameter(module: str, config: Mapping[str, Any]) -> bool:
    """Returns whether a module has a weight in `target_parameters`, on which PEFT nests its layers."""
    return bool(_target_parameters_in(_without_nesting(module), config))


def _target_parameters_in(holder: str, config: Mapping[str, Any]) -> set[str]:
    """Returns the own names of the weights of a module that `target_parameters` names.

    PEFT itself writes `gate_up_proj` and `down_proj` for experts that were targeted by `gate_proj`, `up_proj`
    and `down_proj`. Such a name may be of any module that is not targeted as a whole.
    """
    found = set()
    for name in config.get("target_parameters") or ():
        prefix, _, weight = name.rpartition(".")
        if f".{holder}".endswith(f".{prefix}") if prefix else not _is_target(holder, config, Path()):
            found.add(weight)
    return found


def _without_nesting(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def stacked_weight_of(module: str, config: Mapping[str, Any]) -> str | None:
    """Returns the name of the stacked weight of experts that a LoRA is on, or None for a linear layer.

    PEFT nests the layers of a module's weights in the order of the weights, and names tensors by the nesting:
    those of the last weight by the module's name, the one before it by `.base_layer` behind that.
    """
    holder = _without_nesting(module)
    weights = _target_parameters_in(holder, config)
    if not weights or weights == {"weight"}:
        return None
    in_order = sorted(weights, key=lambda name: (name.startswith("down"), name))
    depth = module.count(".base_layer") - holder.count(".base_layer")
    return f"{holder}.{in_order[-1 - depth]}" if depth < len(in_order) else None


def _pattern_value(
    module: str, pattern: Mapping[str, Any] | None, default: Any, folder: Path | None = None
) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, as PEFT does."""
    for key, value in (pattern or {}).items():
        if _matches(rf"(?:.*\.)?(?:{key})", module, "rank_pattern or alpha_pattern", folder or Path()):
            return value
    return default


# -- target_modules -----------------------------------------------------------------------------


def _is_target(module: str, config: Mapping[str, Any], folder: Path) -> bool:
    """Returns whether PEFT adapts a linear layer of this name, like its `check_target_module_exists`."""
    if _is_named(f"{module}.weight", config.get("target_parameters") or [], "target_parameters", folder):
        return True
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _is_named(module, excluded, "exclude_modules", folder):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return module.rpartition(".")[2] not in ("lm_head", "embed_out", "output")
    if not targets or not _is_named(module, targets, "target_modules", folder):
        return False
    is_whole_name = isinstance(targets, list) and module in targets
    return isinstance(targets, str) or is_whole_name or _is_in_layers(module, config, folder)


def _is_named(module: str, names: str | list[str], setting: str, folder: Path) -> bool:
    if isinstance(names, str):
        return _matches(names, module, setting, folder)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in_layers(module: str, config: Mapping[str, Any], folder: Path) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern")
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        if unclear := [name for name in names if not re.fullmatch(r"[\w.]+", name)]:
            raise CheckpointError(
                f"{folder} is a LoRA with layers_pattern={unclear[0]!r} ({CONFIG_FILE}), which does not name "
                f"a list of layers. {REPAIR}"
            )
        matches = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)
        found = next((match for match in matches if match is not None), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _matches(pattern: str, module: str, setting: str, folder: Path) -> bool:
    """Returns whether `re.fullmatch` matches, within a time limit because the pattern is not ours."""
    import regex

    try:
        return regex.fullmatch(pattern, module, timeout=_MATCH_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        reason = "takes too long" if isinstance(error, TimeoutError) else f"cannot be read ({error})"
        raise CheckpointError(
            f"{folder} is a LoRA with {setting}={json_files.shown(pattern)} ({CONFIG_FILE}), a regular "
            f"expression that {reason}. Give the names of the layers as a list."
        ) from error
