"""Loads published configs, tokenizers and models, from a folder or the hub. No other file does.

Published files are treated as data. Code that comes with a model is not imported, and the user is not asked
about it, unless the environment names this very model (`runs_code_of`). Weights are read from safetensors: a
pickle can run code, so it is refused with instructions to convert it. A config is checked before it is used,
because it may name code on the hub, or sizes that fill the memory.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.errors import CheckpointError, DataError, ModelError
from cookbook.utils import json_files
from cookbook.utils.files import PLAIN_NAME
from cookbook.utils.json_files import JsonOrigin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TRUST_VARIABLE = "COOKBOOK_TRUST_REMOTE_CODE"
"""An environment variable with the models whose code may run: hub ids and folders, separated by commas.

It is no key of a config, because configs, run folders and checkpoints may be from somebody else.
"""
TRUST = f"Where you have read that code and trust it, name the model in {TRUST_VARIABLE}."
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

MAX_SIZE = 2**24
MAX_COUNT = 2**20
MAX_EXPERTS = 2**13
MAX_LAYERS = 2_000
MAX_LABELS = 2**16
MAX_GROWTH = 1_000
"""The factor by which a step of a tokenizer may lengthen a text, before tokenization or in decoding."""
MAX_PADDING = 2**20
_MAX_TOKENIZER_BYTES = 2**28
MAX_POST_PROCESSOR = 2_000
"""The number of values: each template may contain any special tokens, and each of those any ids."""
_MAX_WEIGHTS_PER_BYTE = 8
"""4-bit files hold 2 weights per byte, and tied weights only once."""


def load_config(location: str | Path, local_files_only: bool = False) -> PretrainedConfig:
    """Returns the config of a model.

    Raises ModelError if it names code or a kind of model that transformers does not have, and DataError if it
    is damaged or has unrealistic sizes.
    """
    from transformers import AutoConfig

    _check_config_file(location, local_files_only)
    needs_code = _check_model_type(location, local_files_only)
    # trust_remote_code is always passed, because transformers would otherwise ask on standard input
    config: PretrainedConfig = AutoConfig.from_pretrained(
        location, local_files_only=local_files_only, trust_remote_code=needs_code
    )
    return config


def runs_code_of(location: str | Path) -> bool:
    """Returns whether the user named this model in COOKBOOK_TRUST_REMOTE_CODE, so that its code may run.

    A folder is named by its path, a model on the hub by its id. A folder with the name of a hub id is not
    that model.
    """
    names = [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip()]
    if not Path(location).is_dir():
        return str(location) in names
    folder = Path(location).resolve()
    return any(Path(name).is_absolute() and Path(name).resolve() == folder for name in map(_expanded, names))


def _expanded(name: str) -> str:
    return os.path.abspath(os.path.expanduser(name)) if name.startswith((".", "~", "/")) else name


def is_of_own_code(model_or_config: Any) -> bool:
    """Returns whether the class is code that came with a model, which transformers keeps in a package."""
    return type(model_or_config).__module__.startswith("transformers_modules.")


def load_tokenizer(location: str | Path, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if _file_of(location, "config.json", local_files_only) is not None:
        _check_config_file(location, local_files_only)
    _check_tokenizer_file(location, local_files_only)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        location, local_files_only=local_files_only, trust_remote_code=runs_code_of(location)
    )
    return tokenizer


def load_causal_lm(location: str | Path, local_files_only: bool = False, **options: Any) -> Any:
    """Returns the model with its weights, in the class that `model_class` returns.

    `options` are those of transformers. Raises ModelError for pickles and for an adapter in the model's
    folder, and DataError for a config that needs far more weights than the files have.
    """
    config = load_config(location, local_files_only)
    if (path := _file_of(location, "adapter_config.json", local_files_only)) is not None:
        raise ModelError(
            f"{path} is in the folder of a model, and transformers would apply that adapter without "
            "being asked. Remove it, or put the adapter in a folder of its own and give that as a "
            "checkpoint."
        )
    if Path(location).is_dir():
        refuse_pickles(Path(location))
        _check_sizes_of_weights(Path(location), config)
    found, config = model_class(config)
    try:
        loaded = found.from_pretrained(
            location, config=config, local_files_only=local_files_only, use_safetensors=True, **options
        )
        find_parts(loaded[0] if options.get("output_loading_info") else loaded)
        return loaded
    except OSError as error:
        if "use_safetensors" not in str(error):
            raise
        raise ModelError(_pickled(str(location), "no .safetensors file")) from error


def load_adapter(model: Any, folder: str | Path, is_trainable: bool = False) -> Any:
    """Returns `model` with the adapter of a folder on it, loaded by PEFT itself."""
    from peft import PeftModel

    refuse_pickled_adapter(Path(folder))
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, use_safetensors=True)


def empty_causal_lm(config: PretrainedConfig) -> Any:
    """Returns a model without memory for its weights, on the device "meta"."""
    import torch

    found, config = model_class(config)
    with torch.device("meta"):
        model = found._from_config(config)
    find_parts(model)
    return model


def find_parts(model: Any) -> None:
    """Makes a model return its decoder and its head where transformers does not find them.

    ModernBERT's head has the name `decoder`, and Nemotron-H Omni's head is in its decoder.
    """
    from transformers import PreTrainedModel

    if not isinstance(model.get_decoder(), PreTrainedModel):
        model.get_decoder = model.base_model.get_decoder
    decoder = model.get_decoder()
    if model.get_output_embeddings() is None and decoder.get_output_embeddings() is not None:
        model.get_output_embeddings = decoder.get_output_embeddings
        model.set_output_embeddings = decoder.set_output_embeddings


def model_class(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """Returns the class of transformers in which a model was published, and the config for it.

    That is the class that `architectures` names. If transformers has no class of that name, it is the one
    that transformers has for the config: a class that reads pictures or sound too before one for text alone.
    A class for text alone gets the config of the text part. Raises ModelError if there is no class.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = [
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ]
    names = {
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    }
    if not config.is_encoder_decoder:  # Audio Flamingo 3 is only there
        mappings.append(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        names |= {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
    mapped: list[Any] = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    named: list[Any] = [
        getattr(transformers, name, None) for name in config.architectures or () if name in names
    ]
    text_config = config.get_text_config()
    for found in (*named, *mapped):
        if found is not None and isinstance(config, found.config_class):
            _check_has_forward(found, config)
            return found, config
        if found is not None and isinstance(text_config, found.config_class):
            if getattr(config, "quantization_config", None) is not None:
                text_config.quantization_config = config.quantization_config
            return found, text_config
    if mapped:  # a config of its own for another model's class
        return mapped[0], config
    if is_of_own_code(config) and (name := (config.auto_map or {}).get("AutoModelForCausalLM")):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        location = str(config.name_or_path)
        assert runs_code_of(location), "the class of the config was imported without permission"
        return get_class_from_dynamic_module(name, location), config
    raise ModelError(
        f"transformers {transformers.__version__} has no class that continues a text for "
        f"{_described(config.model_type, config.architectures)}. Give a language model."
    )


def _check_has_forward(found: Any, config: PretrainedConfig) -> None:
    """Raises ModelError for a class that only joins several models, such as those of Qwen's Omni models."""
    from torch import nn
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING as MAPPING

    if found.forward is not nn.Module.forward:
        return
    location = getattr(config, "name_or_path", "") or "MODEL"
    parts = [getattr(config, name, None) for name in found.config_class.sub_configs or ()]
    classes: list[Any] = [MAPPING[type(part)] for part in parts if part is not None and type(part) in MAPPING]
    names = [found_class.__name__ for found_class in classes]
    repair = "Give a language model."
    if names:
        repair = (
            f"Save the part that writes text as a model of its own, with the tokenizer, and give that "
            f"folder:\n"
            f"  from transformers import AutoTokenizer, {names[0]}\n"
            f"  {names[0]}.from_pretrained({location!r}, dtype='auto').save_pretrained(folder)\n"
            f"  AutoTokenizer.from_pretrained({location!r}).save_pretrained(folder)"
        )
    raise ModelError(f"{found.__name__} has no forward pass of its own: it joins several models. {repair}")


def _check_model_type(location: str | Path, local_files_only: bool) -> bool:
    """Returns whether the model's type is defined by code that comes with it, and that may run.

    Raises ModelError if the installed transformers does not know the type otherwise, saying what has it.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = _file_of(location, "config.json", local_files_only)
    values = {} if path is None else _read(path)[0]
    model_type = values.get("model_type")
    if model_type is None or model_type in CONFIG_MAPPING:
        return False  # transformers guesses a missing type from the name
    if values.get("auto_map") and runs_code_of(location):
        return True
    own_code = bool(values.get("auto_map"))
    saved_with = values.get("transformers_version")
    newer = f" ({path} was written by {saved_with})" if isinstance(saved_with, str) else ""
    raise ModelError(
        f"transformers {transformers.__version__} has no class for "
        f"{_described(model_type, values.get('architectures'))}.\n"
        f"Where a newer transformers has it{newer}, update: pip install -U transformers."
        + (f"\nIt needs code that comes with the model, which is not run. {TRUST}" if own_code else "")
    )


def _described(model_type: Any, architectures: Any) -> str:
    """Returns how messages name the kind of a model."""
    named = [name for name in architectures if isinstance(name, str)] if architectures else []
    return f"model_type {model_type!r}" + (f" (architecture {', '.join(named)})" if named else "")


# -- weights ------------------------------------------------------------------------------------


def refuse_pickles(folder: Path) -> None:
    """Raises ModelError for a model folder with weights only in pickles, saying how to convert them."""
    if any(folder.glob("*.safetensors")):
        return
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if found:
        raise ModelError(_pickled(str(folder), found[0]))


def refuse_pickled_adapter(folder: Path) -> None:
    """Raises CheckpointError for an adapter with tensors only in a pickle, saying how to convert it."""
    if (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_model.bin").is_file():
        return
    raise CheckpointError(
        f"The adapter in {folder} is not in safetensors format "
        f"(found: adapter_model.bin). Pickle files are never "
        f"loaded, because reading one can run code. Where you trust the adapter, convert it once:\n"
        f"  from peft import AutoPeftModelForCausalLM\n"
        f"  AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(folder)\n"
        f"and give that folder."
    )


def _pickled(model: str, found: str) -> str:
    return (
        f"The weights of {model} are not in safetensors format "
        f"(found: {found}). Pickle files are never loaded, because "
        f"reading one can run code. Where you trust the model, convert it once:\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  AutoModelForCausalLM.from_pretrained({model!r}, dtype='auto').save_pretrained(folder)\n"
        f"  AutoTokenizer.from_pretrained({model!r}).save_pretrained(folder)\n"
        f"and give that folder."
    )


def _check_sizes_of_weights(folder: Path, config: PretrainedConfig) -> None:
    """Refuses a config with far more weights than the files, because transformers would allocate them."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        return  # transformers reports this
    num_bytes = sum(path.stat().st_size for path in files)
    num_weights = sum(math.prod(weight.shape) for weight in empty_causal_lm(config).parameters())
    if num_weights > _MAX_WEIGHTS_PER_BYTE * num_bytes:
        raise DataError(
            f"{folder / 'config.json'} requires {num_weights:,} weights, and the files beside it have "
            f"{num_bytes:,} bytes: they belong to another model."
        )


# -- configs ------------------------------------------------------------------------------------


def _file_of(location: str | Path, name: str, local_files_only: bool) -> Path | None:
    from transformers.utils import cached_file

    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.exists() else None
    found = cached_file(
        str(location),
        name,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def _read(path: Path, max_bytes: int = json_files.MAX_BYTES) -> tuple[dict[str, Any], JsonOrigin]:
    origin = JsonOrigin(str(path), DataError, "")
    content = json_files.read_bytes(path, origin, max_bytes)
    return json_files.object_of(content, origin, allow_repeats=True), origin


def _check_config_file(location: str | Path, local_files_only: bool) -> None:
    path = _file_of(location, "config.json", local_files_only)
    if path is None:
        return  # transformers reports what is missing
    values, origin = _read(path)
    json_files.check(values, {"model_type": str | None, "auto_map": dict[str, Any] | None}, origin)
    _check_code(path, values, location)
    for key, value in _leaves(values, ""):
        name = key.rpartition(".")[2]
        # an implementation may also be chosen per part
        is_choice = any(part.endswith("implementation") for part in key.split("."))
        if is_choice and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{path} names code on the hub: {key}={json_files.shown(value)}. Such code is never run. "
                f"Remove that key: the attention is chosen here."
            )
        if type(value) is int and (most := _max_size(name)) is not None and value > most:
            origin.refuse(f"`{key}` is {json_files.shown(value)}, and {most:,} is the most that is built")


def _check_code(path: Path, values: Mapping[str, Any], location: str | Path) -> None:
    """Raises ModelError if a model whose code may run names code of another repository."""
    for key, value in _leaves(values.get("auto_map"), "auto_map"):
        if isinstance(value, str) and "--" in value and runs_code_of(location):
            raise ModelError(
                f"{path} names code of another repository: {key}={json_files.shown(value)}. {TRUST_VARIABLE} "
                f"allows only the code in the model's own folder."
            )


def _max_size(name: str) -> int | None:
    """Returns the largest allowed value of a config's key that is a size, or None for other keys."""
    is_count = name.startswith(("num_", "n_"))
    if re.search(r"(layers?|blocks?|depth)$", name):
        return MAX_LAYERS
    if is_count and "label" in name:
        return MAX_LABELS
    if is_count and "expert" in name:
        return MAX_EXPERTS
    if name.endswith(("_size", "_dim", "_rank")) or name.startswith("d_"):
        return MAX_SIZE
    return MAX_COUNT if is_count and not name.endswith(("positions", "ctx")) else None


# -- tokenizers ---------------------------------------------------------------------------------


def _check_tokenizer_file(location: str | Path, local_files_only: bool) -> None:
    """Refuses a tokenizer that could expand a short text until it fills the memory."""
    config_path = _file_of(location, "tokenizer_config.json", local_files_only)
    config, origin = ({}, None) if config_path is None else _read(config_path)
    if origin is not None and config.get("fast_tokenizer_files"):
        origin.refuse("`fast_tokenizer_files` names other files for other versions, which are not read here")
    if config_path is not None and origin is not None:
        _check_code(config_path, config, location)
        _check_template_names(config.get("chat_template"), origin)
    path = _file_of(location, "tokenizer.json", local_files_only)
    if path is None:
        return
    values, origin = _read(path, _MAX_TOKENIZER_BYTES)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(values.get(part))) > MAX_GROWTH:
            origin.refuse(f"its {part} makes a text up to {_in_words(growth)} times as long")
    if (num_values := sum(1 for _ in _leaves(values.get("post_processor"), ""))) > MAX_POST_PROCESSOR:
        origin.refuse(
            f"its post_processor has {num_values:,} values, and {MAX_POST_PROCESSOR:,} are the most"
        )
    for key, value in _leaves(values.get("padding"), "padding"):
        if type(value) is int and value > MAX_PADDING and not key.endswith("_id"):
            origin.refuse(f"`{key}` is {json_files.shown(value)}, and {MAX_PADDING:,} is the most")


def _check_template_names(templates: Any, origin: JsonOrigin) -> None:
    """Refuses template names that are not plain: each template becomes a file when the tokenizer is saved."""
    if isinstance(templates, list):
        json_files.check({"chat_template": templates}, {"chat_template": list[Mapping[str, str]]}, origin)
        templates = {template.get("name", ""): template for template in templates}
    for name in templates if isinstance(templates, dict) else ():
        if not PLAIN_NAME.fullmatch(name):
            origin.refuse(f"`chat_template` has the name {json_files.shown(name)}, which names no file")


def _growth(step: Any) -> int:
    """Returns the factor by which a text may grow in a step, or a sequence of steps, of a tokenizer."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    if step.get("type") == "ByteLevel":
        return 2  # a character beyond ASCII has several bytes, each of which becomes a character
    own = 1
    if isinstance(content := step.get("content"), str) and content:
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # a regular expression may match the empty string
        is_shorter = isinstance(text, str) and len(text) >= len(content)
        own = 1 if is_shorter else 1 + len(content)
    if isinstance(prepended := step.get("prepend"), str):
        own = 1 + len(prepended)
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        own = _longest_replacement(charsmap)
    return own * math.prod(map(_growth, step.values()))


def _longest_replacement(charsmap: str) -> int:
    """Returns the length of the longest replacement in SentencePiece's character map.

    The map holds the size of a trie, the trie, and texts that end with a zero byte.
    """
    content = base64.b64decode(charsmap)
    texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def _in_words(growth: int) -> str:
    return f"{growth:,}" if growth < 10**12 else "10^12 and more"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value
