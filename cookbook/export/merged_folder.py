"""Writes a merged model for transformers: sharded safetensors, config, generation config, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cookbook import models
from cookbook.engine.model.published_files import (
    read_json,
    set_dtype,
    set_everywhere,
    set_vocabulary,
    write_files_for_media,
    write_json,
)
from cookbook.errors import ModelError
from cookbook.export.chat_format import ChatFormat
from cookbook.export.config import Dtype
from cookbook.export.merge import base_model_folder, merged_weights
from cookbook.runs.find import TrainedModel
from cookbook.utils import json_files, pretrained, weight_files
from cookbook.utils.json_files import JsonOrigin
from cookbook.utils.weight_files import REPAIR


@dataclass(frozen=True)
class Merged:
    """The result of a merge. `held_bytes` is the peak size of the tensors in memory."""

    num_files: int
    num_bytes: int
    held_bytes: int


def write_merged(
    source: TrainedModel, chat_format: ChatFormat, folder: Path, dtype: Dtype, max_shard_size: str
) -> Merged:
    """Fills a folder that plain transformers loads; its logits equal those of base model and adapter.

    It has every tensor of the base model's folder under its name there, those too that transformers does not
    load. A `dtype` of auto keeps each in the type in which the base model stores it.
    """
    base_folder = base_model_folder(source)
    if pretrained.is_of_own_code(models.load_config(source.base_model)):
        raise ModelError(
            f"{source.base_model!r} needs code that comes with the model, which is not copied into an "
            "export. Export format=adapter."
        )
    config = read_json(base_folder / "config.json")
    config.pop("_name_or_path", None)
    weights = merged_weights(source, base_folder)
    if dtype == "auto":
        published = _published_types(source)
    else:
        published = {}
        set_dtype(config, getattr(torch, dtype))

    def dtype_of(name: str) -> torch.dtype:
        stored = weights.dtype_of(name)
        if dtype == "auto" or not stored.is_floating_point:
            return published.get(name, stored)
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen

    num_bytes, held_bytes = weights.write(folder, dtype_of, max_shard_size)
    written = {dtype_of(name) for name in weights.names} if published else set()
    if kinds := [kind for kind in (torch.bfloat16, torch.float16, torch.float32) if kind in written]:
        set_dtype(config, kinds[0])
    if weights.num_rows > len(weights.published.model.get_input_embeddings().weight):
        set_vocabulary(config, weights.num_rows)
    if weights.is_untied:
        set_everywhere(config, "tie_word_embeddings", False)
    write_json(folder / "config.json", config)
    write_generation_config(base_folder, chat_format, folder)
    write_files_for_media(base_folder, folder)
    chat_format.write_tokenizer(folder)
    return Merged(len(list(folder.glob("*.safetensors"))), num_bytes, held_bytes)


def _published_types(source: TrainedModel) -> dict[str, torch.dtype]:
    """Returns the types in which the model was published that a full fine-tune began with.

    Returns {} for an adapter, and if that model is not on this machine: then each tensor keeps its own type.
    """
    if not source.is_full:
        return {}
    try:
        folder = weight_files.folder_of(models.model_location(source.origin), local_files_only=True)
    except (ModelError, OSError):
        return {}
    found = weight_files.find(folder)
    opened = {path: weight_files.open_file(path) for path in set(found.values())}
    return {name: weight_files.dtype_of(opened[path], name) for name, path in found.items()}


def write_generation_config(base_folder: Path, chat_format: ChatFormat, folder: Path) -> None:
    """Writes the base model's generation config with the stop sequences of the chat format."""
    config = read_json(base_folder / "generation_config.json")
    shape = {"eos_token_id": int | list[int] | None, "pad_token_id": int | None}
    origin = JsonOrigin(str(base_folder / "generation_config.json"), ModelError, REPAIR)
    json_files.check(config, shape, origin)
    ends = config.get("eos_token_id")
    earlier = ends if isinstance(ends, list) else [] if ends is None else [ends]
    stops = [*chat_format.stop_token_ids, *(i for i in earlier if i not in chat_format.stop_token_ids)]
    config["eos_token_id"] = stops if len(stops) != 1 else stops[0]
    if not stops:
        del config["eos_token_id"]
    if chat_format.stop_strings:
        config["stop_strings"] = list(chat_format.stop_strings)
    if config.get("pad_token_id") is None and stops:
        pad = chat_format.tokenizer.pad_token_id
        config["pad_token_id"] = stops[0] if pad is None else pad
    write_json(folder / "generation_config.json", config)
