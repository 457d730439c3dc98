"""Model names: where a model is stored, its tokenizer, and the renderer that suits it.

A name is that of the embedded model, a folder, or a hub id. Importing this module loads neither torch nor
transformers.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import embedded
from cookbook.errors import ModelError
from cookbook.utils import extras, hub, pretrained, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_RENDERER_BY_NAME = tuple(
    (re.compile(pattern, re.IGNORECASE), renderer_name)
    for pattern, renderer_name in (
        (r"qwen/qwen3-(0\.6b|1\.7b|4b|8b|14b|32b|30b-a3b|235b-a22b)$", "qwen3"),
        (r"qwen/qwen3-\d+b(-a\d+b)?-instruct-2507$", "qwen3_instruct"),
        (r"qwen/qwen2\.5-[\d.]+b-instruct$", "qwen2_5"),
        (r"meta-llama/(meta-)?llama-3(\.1)?-\d+b-instruct$", "llama3"),
        (r"google/gemma-3-(270m|1b|4b|12b|27b)-it$", "gemma3"),
        (r"google/gemma-4-(e2b|e4b|12b|26b-a4b|31b)-it$", "gemma4"),
        (r"openai/gpt-oss-(20b|120b)$", "gpt_oss"),
        (r"microsoft/phi-3-mini-(4k|128k)-instruct$", "phi3"),
        (r"qwen/qwen3\.5-(0\.8b|2b)$", "qwen3_5_disable_thinking"),
        (r"qwen/qwen3\.5-(4b|9b|27b|35b-a3b|122b-a10b|397b-a17b)$", "qwen3_5"),
        (r"qwen/qwen3\.6-(27b|35b-a3b)$", "qwen3_6"),
        (r"qwen/qwen3\.8-27b$", "qwen3_8"),
        (r"qwen/qwen3-vl-(2b|4b|8b|32b|30b-a3b|235b-a22b)-instruct$", "qwen3_vl"),
        (r"zai-org/glm-4\.(5|5-air|6)(-fp8)?$", "glm4_5"),
        (r"zai-org/glm-(4\.7|4\.7-flash|5)(-fp8)?$", "glm5"),
        (r"nvidia/nvidia-nemotron-3-nano-30b-a3b-(bf16|fp8)$", "nemotron3"),
        (r"nvidia/nvidia-nemotron-3-super-120b-a12b-(bf16|fp8)$", "nemotron3"),
        (r"nvidia/nvidia-nemotron-3-ultra-550b-a55b-(bf16|fp8)$", "nemotron3_ultra"),
        (r"nvidia/nvidia-nemotron-3\.5-lightning-30b-a3b-bf16$", "nemotron3_ultra"),
        (r"moonshotai/kimi-k2-instruct(-0905)?$", "kimi_k2"),
        (r"moonshotai/kimi-k2-thinking$", "kimi_k2_thinking"),
        (r"moonshotai/kimi-k2\.5$", "kimi_k25"),
        (r"moonshotai/kimi-k2\.6$", "kimi_k26"),
        (r"deepseek-ai/deepseek-v3\.1(-terminus)?$", "deepseekv3_1"),
    )
)
"""These apply only if the renderer was compared with the format that the model was published with."""

RENDERER_BY_TEMPLATE = {
    "a55ee1b1660128b7": "qwen3",
    "64f85b198065d0fb": "qwen3_instruct",
    "55b2f4a26ac9ee71": "qwen2_5",
    "ba03a121d097859c": "llama3",  # of Llama 3
    "93c0e9aa3629bbd7": "llama3",  # of Llama 3.1
    "8d9e3a3c114fb205": "gemma3",
    "6a1015c47ccfcfa6": "gemma4",  # of 12B and larger models
    "603a42db292c2527": "gemma4",  # of E2B and E4B
    "a4c9919cbbd4acdd": "gpt_oss",
    "dcaee66df77bfbb7": "phi3",
    "a4aee8afcf2e0711": "qwen3_5",
    "273d8e0e683b8850": "qwen3_5_disable_thinking",  # of the small models, which do not think by default
    "e84f32a23fdda276": "qwen3_6",
    "02e91795d2270374": "kimi_k2",
    "52c3031506cc6033": "kimi_k25",
    "45690185067ea25c": "deepseekv3_1",
    "44f815868bf02fa4": "glm4_5",
    "43a92aacc2e169bb": "nemotron3",  # of Nano
    "3b74d76d8b903752": "nemotron3",  # of Super
    "82753bef5cedc493": "nemotron3_ultra",
    "58933db77d3099b4": "nemotron3_ultra",  # of 3.5 Lightning
    "c3cf9e34abf4f9e3": "qwen3_8",
    "9d879ef91075acbf": "qwen3_vl",
}
"""The renderer in the default mode of each published template, by `fingerprint`.

Each renderer was compared with this very template, which is also that of fine-tunes and local copies."""


def model_location(model_name: str) -> str:
    """Returns the folder or hub id from which transformers loads `model_name`.

    Raises ModelError for a path that does not exist or is not a model folder.
    """
    if model_name == embedded.MODEL_NAME:
        return str(embedded.MODEL_PATH)
    path = Path(model_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json.")
        return str(path)
    if path.exists() or model_name.startswith(("/", "./", "../", "~")) or model_name.count("/") != 1:
        raise ModelError(
            f"Model {model_name!r} is neither a folder on this machine nor a hub id (owner/name). "
            f"The embedded model is {embedded.MODEL_NAME!r}."
        )
    return model_name


def canonical_name(model_name: str) -> str:
    """Returns a name that means the same model in any working directory."""
    location = model_location(model_name)
    is_own_folder = location != str(embedded.MODEL_PATH) and Path(location).is_dir()
    return str(Path(location).resolve()) if is_own_folder else model_name


def load_from_hub_or_disk(what: str, model_name: str, load: Any, **options: Any) -> Any:
    """Returns `load(location, **options)` from a folder, the hub's cache, or the hub, in this order.

    `load` is a function of `pretrained`, which runs code that comes with a model only with the user's
    permission. Raises ModelError saying what to do.
    """
    location = model_location(model_name)
    is_folder = Path(location).is_dir()
    try:
        try:
            return load(location, local_files_only=True, **options)
        except ModelError:
            raise
        except OSError:
            if is_folder:
                raise
            if (reason := hub.why_unreachable()) is not None:
                raise _not_here(what, model_name, reason) from None
            return load(location, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers and its backends raise many kinds of errors for a bad folder
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"Cannot load the {what} of {model_name!r}: it needs code that comes with the model, which "
                f"is not run. {pretrained.TRUST} Or give a model of an architecture that transformers has."
            ) from error
        reason, repair = _why_and_repair(error, is_folder)
        raise ModelError(f"Cannot load the {what} of {model_name!r}: {reason}\n{repair}") from error


def _why_and_repair(error: Exception, is_folder: bool) -> tuple[str, str]:
    """Returns the first line of an error of loading, and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, ImportError):
        package = re.search(r"pip install ([\w.-]+)", str(error))
        if package is None:
            return reason, "Install the package that is named here, and run it again."
        # transformers says how to install it too, and to restart a notebook
        reason = reason.partition(". ")[0] + "."
        return reason, f"Install it with `{extras.pip()} install {package[1]}`, and run it again."
    if is_folder:
        return reason, "The folder is damaged or incomplete: copy or download it again."
    return reason, "Check the name on the hub; for a gated model run `hf auth login` first."


def model_folder(model_name: str) -> Path:
    """Returns the folder of a model's files, downloaded from the hub if needed."""
    folder: Path = load_from_hub_or_disk("weights", model_name, weight_files.folder_of)
    return folder


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def check_files(model_name: str) -> None:
    """Raises ModelError if weights are neither on this machine nor downloadable. Does not read them."""
    location = model_location(model_name)
    if Path(location).is_dir():
        folder = Path(location)
        pretrained.refuse_pickles(folder)
        if next(folder.glob("*.safetensors"), None) is None:
            raise ModelError(
                f"{folder} has no weights: no .safetensors file. Copy or download the model again, or give "
                f"another folder as model_name."
            )
        return
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(location, name), str) for name in WEIGHT_FILES):
        return
    if (reason := hub.why_unreachable()) is not None:
        raise _not_here("weights", model_name, reason)


def _not_here(what: str, model_name: str, reason: str) -> ModelError:
    return ModelError(
        f"Cannot load the {what} of {model_name!r}: it is not on this machine, and {reason}.\n"
        f"On a machine with network access run `hf download {model_name}`, or give a folder that "
        f"holds the model: model_name=/path/to/model. The embedded model works offline: "
        f"model_name={embedded.MODEL_NAME}"
    )


@functools.lru_cache(maxsize=8)
def get_tokenizer(model_name: str, add_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model, with `add_tokens` added to its vocabulary.

    A text that contains an added token is encoded with it, wherever the text is from.
    """
    tokenizer: PreTrainedTokenizerBase = load_from_hub_or_disk(
        "tokenizer", model_name, pretrained.load_tokenizer
    )
    if add_tokens:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in add_tokens])
    return tokenizer


def load_config(model_name: str) -> PretrainedConfig:
    config: PretrainedConfig = load_from_hub_or_disk("config", model_name, pretrained.load_config)
    return config


def text_config(model_name: str) -> PretrainedConfig:
    """Returns the config of the part of the model that reads and writes text."""
    return load_config(model_name).get_text_config()


def context_length(model_name: str) -> int | None:
    """Returns the maximum number of tokens that the model reads, or None if its config does not say."""
    return getattr(text_config(model_name), "max_position_embeddings", None)


def check_vocabulary(model_name: str) -> None:
    """Raises ModelError if the tokenizer has tokens for which the model's embedding has no row.

    A token for pictures or sound (Gemma 3's `image_token`) may lie beyond the embedding, because no text is
    encoded to it.
    """
    size = getattr(text_config(model_name), "vocab_size", None)
    tokenizer = get_tokenizer(model_name)
    vocabulary = tokenizer.get_vocab()
    if size is None or max(vocabulary.values(), default=0) < size:
        return
    named = tokenizer.special_tokens_map
    of_media = {str(named[key]) for key in named if key not in type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES}
    beyond = sorted(
        (index, token) for token, index in vocabulary.items() if index >= size and token not in of_media
    )
    if not beyond:
        return
    shown = ", ".join(f"{token!r} (id {index:,})" for index, token in beyond[:3])
    more = f" and {len(beyond) - 3:,} more" if len(beyond) > 3 else ""
    raise ModelError(
        f"The embedding of {model_name!r} has {size:,} rows and its tokenizer {len(vocabulary):,} tokens: "
        f"there is no row for {shown}{more}.\n"
        "Resize the embedding once, save model and tokenizer, and train what was saved:\n"
        "  model.resize_token_embeddings(len(tokenizer))\n"
        "  model.save_pretrained(folder); tokenizer.save_pretrained(folder)\n"
        "A LoRA leaves the new rows of the embedding as they are; lora_rank=0 trains them."
    )


def recommended_renderer(model_name: str) -> str:
    """Returns the renderer for a model: a hand-written one if there is one for exactly this model or its
    template, `chat_template` if the tokenizer has another template, and `role_colon` for a base model."""
    for pattern, renderer_name in _RENDERER_BY_NAME:
        if pattern.search(model_name):
            return renderer_name
    template = get_tokenizer(model_name).chat_template
    if not isinstance(template, str):  # templates by name are the tokenizer's own affair
        return "chat_template" if template else "role_colon"
    return RENDERER_BY_TEMPLATE.get(fingerprint(template), "chat_template") if template else "role_colon"


def fingerprint(template: str) -> str:
    """Returns the key of a template in `RENDERER_BY_TEMPLATE`, of its text without white space around it."""
    return hashlib.sha256(template.strip().encode()).hexdigest()[:16]
