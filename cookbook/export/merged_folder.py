"""Writes a merged model for transformers: sharded safetensors, config, generation config, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from cookbook import models
from cookbook.engine.model.loading import load_model, no_progress_bar
from cookbook.engine.model.peft_settings import check_frozen, is_same
from cookbook.errors import CheckpointError, ModelError
from cookbook.export.chat_format import ChatFormat
from cookbook.export.merge import (
    INDEX_FILE,
    MergedWeights,
    base_model_folder,
    merged_weights,
    tied_weights,
    unties,
    with_transposed,
)
from cookbook.export.updates import ReplacedRows, read_updates
from cookbook.runs.find import TrainedModel
from cookbook.utils import files, json_files
from cookbook.utils.json_files import JsonOrigin

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Merged:
    """The result of a merge. `held_bytes` is the peak size of the tensors in memory."""

    num_files: int
    num_bytes: int
    held_bytes: int
    is_shard_by_shard: bool


def write_merged(
    source: TrainedModel, chat_format: ChatFormat, folder: Path, dtype: Dtype, max_shard_size: str
) -> Merged:
    """Fills a folder that plain transformers loads; its logits equal those of base model and adapter.

    A `dtype` of auto keeps every weight in the type in which the base model stores it.
    """
    base_folder = base_model_folder(source)
    config = _read_json(base_folder / "config.json")
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)  # code of the base model, which this project never runs
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    if chosen is not None:
        _set(config, "dtype", dtype)
        config.pop("torch_dtype", None)
    weights = merged_weights(source, base_folder)
    if weights is not None:
        merged = _write_shards(weights, folder, chosen, max_shard_size)
        if weights.num_rows > models.load_config(str(base_folder)).get_text_config().vocab_size:
            _set(config, "vocab_size", weights.num_rows)
        if weights.untied:
            _set(config, "tie_word_embeddings", False)
        _write_json(folder / "config.json", config)
    else:
        merged = _write_whole_model(source, base_folder, folder, chosen, max_shard_size)
        written = _read_json(folder / "config.json")
        written.pop("auto_map", None)
        _write_json(folder / "config.json", written)
    write_generation_config(base_folder, chat_format, folder)
    chat_format.write_tokenizer(folder)
    return merged


def _write_shards(
    weights: MergedWeights, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> Merged:
    shapes = {
        name: torch.empty(weights.shape_of(name), dtype=_output_dtype(weights, name, dtype), device="meta")
        for name in weights.names
    }
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    held = 0
    for file_name, names in plan.filename_to_tensors.items():
        shard = {name: weights.read(name).to(shapes[name].dtype).contiguous() for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        merging = max((2 * 4 * shapes[name].numel() for name in names if name in weights.adapter), default=0)
        held = max(held, sum(tensor.nbytes for tensor in shard.values()) + merging)
    num_bytes = sum(tensor.nbytes for tensor in shapes.values())
    if plan.is_sharded:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX_FILE, index)
    return Merged(len(plan.filename_to_tensors), num_bytes, held, True)


def _output_dtype(weights: MergedWeights, name: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = weights.dtype_of(name)
    return stored if dtype is None or not stored.is_floating_point else dtype


def _write_whole_model(
    source: TrainedModel, base_folder: Path, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> Merged:
    """Merges in memory and saves with transformers, which renames the weights for the files."""
    stored: Any = models.load_config(str(base_folder)).dtype or torch.float32
    model = load_model(source.base_model, torch.device("cpu"), dtype or stored)
    updates = with_transposed(read_updates(source), base_folder)
    rows = [update.shape[0] for update in updates.values() if isinstance(update, ReplacedRows)]
    if max(rows, default=0) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    head, embeddings = tied_weights(base_folder)
    if not source.is_full:
        check_frozen(
            source.folder, lambda copy, name: name in modules and is_same(copy, modules[name].weight)
        )
    with torch.no_grad():
        if head is not None and unties(updates, head, str(embeddings)):
            for part in (model.config, model.config.get_text_config()):
                part.tie_word_embeddings = False
        for name, update in updates.items():
            weight = parameters.get(name)
            if weight is None or update.shape_on(tuple(weight.shape)) is None:
                raise CheckpointError(
                    f"The adapter does not fit its base model {source.base_model!r}: it is on {name}, "
                    f"{update.shape}. Give base_model= with the one that it was trained on."
                )
            merged = torch.nn.Parameter(update.added_to(weight).to(weight.dtype), requires_grad=False)
            places = [name]
            if isinstance(update, ReplacedRows) and name == embeddings and head not in updates:
                places.append(str(head))
            for place in places:
                module, _, leaf = place.rpartition(".")
                setattr(modules[module], leaf, merged)
    with no_progress_bar():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return Merged(len(list(folder.glob("*.safetensors"))), num_bytes, num_bytes, False)


def write_generation_config(base_folder: Path, chat_format: ChatFormat, folder: Path) -> None:
    """Writes the base model's generation config with the stop sequences of the chat format."""
    config = _read_json(base_folder / "generation_config.json")
    shape = {"eos_token_id": int | list[int] | None, "pad_token_id": int | None}
    repair = "Copy or download the model again."
    json_files.check(
        config, shape, JsonOrigin(str(base_folder / "generation_config.json"), ModelError, repair)
    )
    ends = config.get("eos_token_id")
    earlier = ends if isinstance(ends, list) else [] if ends is None else [ends]
    stops = [*chat_format.stop_token_ids, *(i for i in earlier if i not in chat_format.stop_token_ids)]
    config["eos_token_id"] = stops if len(stops) != 1 else stops[0]
    if not stops:
        del config["eos_token_id"]
    for key in ("auto_map", "custom_generate"):  # code of the base model
        config.pop(key, None)
    if chat_format.stop_strings:
        config["stop_strings"] = list(chat_format.stop_strings)
    if config.get("pad_token_id") is None and stops:
        pad = chat_format.tokenizer.pad_token_id
        config["pad_token_id"] = stops[0] if pad is None else pad
    _write_json(folder / "generation_config.json", config)


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key in the config of the model, and in that of its text part if it has one."""
    config[key] = value
    if isinstance(part := config.get("text_config"), dict):
        part[key] = value
        part.pop("torch_dtype", None)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return json_files.read_object(path, ModelError, "Copy or download the model again.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
