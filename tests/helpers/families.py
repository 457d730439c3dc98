"""A tiny random model of each family of chat models, in the class in which its checkpoints are published.

`make(name)` builds one in this process. `save(name, folder)` writes it as a checkpoint is published, with a
tokenizer, and `load(folder)` reads such a checkpoint with plain transformers. All have the same sizes, where
they have such a size. `family_table` has what distinguishes a family: which layers attend to a window, which
have experts, what is shared, scaled, capped or tied.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from family_table import (
    AUDIO,
    FAMILIES,
    IMAGE,
    REFUSED,
    SIZES,
    TOWER_SIZES,
    VIDEO,
    VISION_END,
    VISION_START,
    TinyFamily,
)
from safetensors.torch import load_file, save_file
from tiny_tokenizer import make_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
)


def make(name: str) -> Any:
    """Returns a model of the family with the same random weights each time, in evaluation mode."""
    family = (FAMILIES | REFUSED)[name]
    autos = (
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,  # Audio Flamingo 3
    )
    config = _config(family)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    if family.text is None and type(config) in AutoModelForCausalLM._model_mapping:
        auto = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = auto.from_config(config, dtype=torch.float32)
        _randomise(model)
    return model.eval()


def save(name: str, folder: str | Path) -> Path:
    """Writes a model of the family as such checkpoints are published, and returns the folder."""
    folder, family, model = Path(folder), (FAMILIES | REFUSED)[name], make(name)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if family.extra_tensor is not None:
        path = folder / "model.safetensors"
        save_file(
            {
                **load_file(path),
                family.extra_tensor: torch.randn(4, 4, generator=torch.Generator().manual_seed(0)),
            },
            path,
            metadata={"format": "pt"},
        )
    if family.text is not None:
        processor = json.dumps(
            {"processor_class": type(model).__name__.replace("ForConditionalGeneration", "Processor")}
        )
        (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the model in the class that its config names, from plain transformers."""
    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def _config(family: TinyFamily) -> Any:
    kind = CONFIG_MAPPING[family.model_type]
    if family.text is None:
        return kind(**_filled(kind, SIZES, family.config))
    ids = {
        "initializer_range": SIZES["initializer_range"],
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": VISION_START,
        "video_end_token_id": VISION_END,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
        "boa_token_id": VISION_START,
        "eoa_token_id": VISION_END,
        "eoa_token_index": VISION_END,
    }
    given = {**family.config, "text_config": family.text}
    if family.vision is not None:
        given["vision_config"] = family.vision
    return kind(**_with_parts(kind(), ids, given))


def _with_parts(default: Any, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a config that has other configs, such as those of towers."""
    parts: dict[str, Any] = {}
    for name in type(default).sub_configs or {}:
        part = getattr(default, name, None)
        own = {key: value for key, value in given.get(name, {}).items() if key != "model_type"}
        model_type = given.get(name, {}).get("model_type", getattr(part, "model_type", None))
        if model_type is None:
            continue
        if model_type != getattr(part, "model_type", None):
            part = CONFIG_MAPPING[model_type]()
        sizes_of_part = SIZES if name == "text_config" else TOWER_SIZES
        parts[name] = {"model_type": model_type, **_with_parts(part, sizes_of_part, own)}
    others = {key: value for key, value in given.items() if key not in parts}
    return {**_filled(type(default), sizes, others), **parts}


def _filled(kind: Any, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a config: of `sizes` those that it has, ids of the tokenizer, and `given`."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}

    def own_name(name: str) -> str:
        mapped = kind.attribute_map.get(name, name)
        return mapped if mapped in fields else name

    values = {own_name(name): value for name, value in sizes.items() if own_name(name) in fields}
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if name in fields and (name == "eos_token_id" or fields[name] is not None):
            values[name] = token
    return values | {own_name(name): value for name, value in given.items()}


def _randomise(model: torch.nn.Module) -> None:
    """Adds noise to what a model initialises to a constant: norms, biases, sinks, corrections of routers."""
    with torch.no_grad():
        for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
            is_constant = tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
            if tensor.is_floating_point() and is_constant:
                tensor.add_(0.1 * torch.randn(tensor.shape))
