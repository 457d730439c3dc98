"""Puts adapters of PEFT on a model: their settings, their trained weights, and the modules around them.

Besides a LoRA an adapter may hold copies of whole modules (`modules_to_save`) and rows of the embeddings
(`trainable_token_indices`), for which PEFT wraps the modules.

Shape suffixes: X anything before the last axis, M trained rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cookbook.engine.model import fsdp, peft_targets
from cookbook.engine.model.dropout import KeyedDropout
from cookbook.engine.model.fp8 import Fp8Linear
from cookbook.engine.model.peft_names import names_of_saved, own_layer_names
from cookbook.engine.model.peft_settings import CONFIG_FILE
from cookbook.engine.model.unembedding import LoraOnHead, TrainedRows
from cookbook.errors import ConfigError
from cookbook.types import LoraConfig, PeftSettings
from cookbook.utils import files


def config_of(lora: LoraConfig, base: str, **settings: Any) -> Any:
    """Returns PEFT's config of an adapter. `settings` say which layers it is on."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    ours: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
    return PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        lora_dropout=lora.dropout,
        base_model_name_or_path=base,
        inference_mode=True,
        **{**ours, **settings},
    )


def write_config(config: Any, lora: LoraConfig, folder: Path, keys: Mapping[str, str]) -> None:
    """Writes adapter_config.json. A continued adapter keeps the settings that its own file had.

    `keys` are those of the saved tensors, by the tensors' own names.
    """
    values = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    if lora.peft is not None:
        ours = ("base_model_name_or_path", "inference_mode", "peft_version", "lora_dropout")
        kept = {key: value for key, value in lora.peft.written.items() if key in values and key not in ours}
        values |= kept
    for setting in ("target_modules", "target_parameters"):
        if isinstance(values.get(setting), list):
            values[setting] = names_of_saved(values[setting], keys)
    files.create(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True))


_NAMING = (
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""The settings that name layers."""


def under_published_names(model: Any, settings: PeftSettings) -> PeftSettings:
    """Returns the settings of an adapter that may name layers of the model's class for text alone."""
    explicit = settings.explicit
    lists = [explicit[key] or () for key in ("target_modules", "target_parameters", "modules_to_save")]
    used = {name for names in (*lists, explicit["trainable_token_indices"] or ()) for name in names}
    new = own_layer_names(model, used)
    if all(name == old for old, name in new.items()):
        return settings
    new |= {f"^{re.escape(old)}": f"^{re.escape(name)}" for old, name in new.items()}
    renamed = {
        key: {new.get(name, name): item for name, item in value.items()}
        if isinstance(value, Mapping)
        else [new.get(name, name) for name in value]
        if isinstance(value, list)
        else value
        for key, value in explicit.items()
    }
    written = {key: value for key, value in settings.written.items() if key not in _NAMING}
    return PeftSettings(written, renamed)


def check_supported(model: Any, model_name: str, lora: LoraConfig) -> None:
    """Raises ConfigError, naming the setting, for a saved adapter that cannot be put on this model."""
    assert lora.peft is not None
    explicit = lora.peft.explicit
    others = {key: explicit[key] for key in ("modules_to_save", "trainable_token_indices", "use_dora")}
    used = [key for key, value in others.items() if value]
    repair = "Merge it with PEFT itself (merge_and_unload) and give the merged model."
    if used and fsdp.is_sharded(model):
        raise ConfigError(
            f"An adapter with {used[0]} is not supported on a model whose weights are sharded over "
            f"processes. Use shard=none. {repair}"
        )
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    if explicit["use_dora"] and any(modules.get(name) is head for name in explicit["target_modules"]):
        raise ConfigError(
            f"use_dora=true on the projection to the vocabulary of {model_name} is not supported. {repair}"
        )
    if explicit["use_dora"] and any(isinstance(module, Fp8Linear) for module in modules.values()):
        raise ConfigError(
            f"use_dora=true is not supported with quantization=fp8: PEFT reads the weights of {model_name} "
            f"for it, and knows them in 4 bits alone. Use quantization=nf4, or none. {repair}"
        )
    if explicit["use_dora"] and lora.dropout:
        raise ConfigError(f"lora_dropout={lora.dropout:g} is not supported for DoRA. Set lora_dropout=0.")
    num_rows = model.get_input_embeddings().weight.shape[0]
    for name, rows in (explicit["trainable_token_indices"] or {}).items():
        if max(rows) >= num_rows:
            raise ConfigError(
                f"The adapter trains row {max(rows)} of {name} (trainable_token_indices), and {model_name} "
                f"has {num_rows}: it was resized for the adapter. Resize it, save it with its tokenizer, "
                f"and give that folder as the base model."
            )
    for name in explicit["modules_to_save"] or ():
        weights = [*modules[name].parameters()] if name in modules else []
        if any(not weight.is_floating_point() for weight in weights):
            raise ConfigError(
                f"The adapter trains all of {name} (modules_to_save), which is quantised here. Use "
                f"quantization=None."
            )


def weights_of(peft_model: Any, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of an adapter, under the names by which PEFT saves them."""
    from peft import get_peft_model_state_dict

    live = dict(peft_model.named_parameters(remove_duplicate=False))
    live |= dict(peft_model.named_buffers(remove_duplicate=False))
    saved = get_peft_model_state_dict(
        peft_model, state_dict=live, adapter_name=name, save_embedding_layers=False
    )
    alone = peft_targets.names_alone(peft_model, name)

    def named(key: str) -> str:
        layer, lora, part = key.rpartition(".lora_")
        return alone.get(layer, layer) + lora + part

    return {named(key): value for key, value in saved.items() if isinstance(value, nn.Parameter)}


def unwrap(model: Any) -> None:
    """Puts the modules of the base model back in the place of PEFT's wrappers."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)


class Projection(NamedTuple):
    """The projection to the vocabulary with what the active adapter changes of it."""

    module: Any
    """Holds the weight and the bias."""
    lora: LoraOnHead | None
    rows: TrainedRows | None


def projection_of(module: Any) -> Projection:
    """Returns the parts of a projection to the vocabulary that may have an adapter."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = None if module.disable_adapters else active_in(module, module.modules_to_save)
        return Projection(
            module.original_module if active is None else module.modules_to_save[active], None, None
        )
    if isinstance(module, TrainableTokensWrapper):
        return Projection(module.original_module, None, _rows_of(module.token_adapter))
    base = getattr(module, "base_layer", module)
    if base is module or module.disable_adapters or (active := active_in(module, module.lora_A)) is None:
        return Projection(base, None, None)
    a, b = module.lora_A[active].weight, module.lora_B[active].weight
    dropout = module.lora_dropout[active]
    keyed = dropout if isinstance(dropout, KeyedDropout) else None
    return Projection(base, LoraOnHead(a, b, module.scaling[active], keyed), None)


def active_in(module: Any, held: Any) -> str | None:
    """Returns the active adapter of one of PEFT's layers, if `held` has its part there."""
    return next((name for name in module.active_adapters if name in held), None)


# -- trained rows of the embeddings -------------------------------------------------------------


def replace_token_rows(model: nn.Module) -> None:
    """Makes trained rows of embeddings cost as much as their tokens, not as the whole vocabulary.

    PEFT copies all embeddings in each forward pass. Here only the rows that are looked up are replaced.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and isinstance(module.base_layer, nn.Embedding):
            module.forward = types.MethodType(_embed, module)  # type: ignore[method-assign]


def _rows_of(layer: Any) -> TrainedRows | None:
    """Returns the rows of the active adapter, or None."""
    active = active_in(layer, layer.trainable_tokens_delta)
    if layer.disable_adapters or active is None:
        return None
    tables = vars(layer).setdefault("row_tables", {})
    if active not in tables:
        tables[active] = TrainedRows.table(layer.token_indices[active], layer.base_layer.weight)
    return TrainedRows(layer.token_indices[active], layer.trainable_tokens_delta[active], tables[active])


def _embed(self: Any, tokens_X: Tensor) -> Tensor:
    """Replaces the forward pass of PEFT's layer of trained embeddings."""
    embedded_XD: Tensor = self.base_layer(tokens_X)
    rows = _rows_of(self)
    if rows is None:
        return embedded_XD
    place_X = rows.place_V[tokens_X]
    trained_XD = rows.values_MD.to(embedded_XD.dtype)[place_X.clamp(min=0)]
    scale = self._get_embed_scale()
    if scale is not None:
        trained_XD = trained_XD * scale.to(embedded_XD.dtype)
    return torch.where((place_X >= 0)[..., None], trained_XD, embedded_XD)
