"""Writes merged weights, or an adapter, as a GGUF file for llama.cpp and programs built on it.

llama.cpp's package `gguf` knows the file format, the tensor names and the data types, but not how to convert
a model. Only architectures whose files were compared with llama.cpp are supported; for others `why_not` gives
the reason, and convert_hf_to_gguf.py converts their merged weights.

In Llama's queries and keys, RoPE rotates pairs of adjacent components in llama.cpp, and the two halves of a
head in transformers, so the rows of those projections are permuted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cookbook.errors import ConfigError
from cookbook.export.chat_format import ChatFormat
from cookbook.export.config import GgufType
from cookbook.export.gguf_vocabulary import add_vocabulary, pre_tokenizer_name
from cookbook.export.merge import MergedWeights
from cookbook.export.updates import LowRank
from cookbook.utils import extras

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_ARCHITECTURES = {"LlamaForCausalLM": "LLAMA", "Qwen2ForCausalLM": "QWEN2", "Qwen3ForCausalLM": "QWEN3"}
_AUTO = {torch.bfloat16: "bf16", torch.float16: "f16"}


def why_not(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the reason why a model is not supported here, or None."""
    architecture = (config.architectures or ["?"])[0]
    if architecture not in _ARCHITECTURES:
        return f"it is a {architecture}, and {', '.join(_ARCHITECTURES)} are written here"
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        return f"its RoPE scaling is {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1) != 1 or getattr(config, "partial_rotary_factor", None) not in (
        None,
        1,
    ):
        return "its RoPE covers only a part of each head"
    if getattr(config, "use_sliding_window", False):
        return "it has sliding-window attention"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if pre_tokenizer_name(tokenizer) is None:
        return "its tokenizer is not a byte-level BPE with a known way to split text"
    return None


@dataclass(frozen=True)
class _GgufLayout:
    """The names, order and types of a model's weights in a GGUF file."""

    config: PretrainedConfig
    type_name: str

    @property
    def head_size(self) -> int:
        size: int | None = getattr(self.config, "head_dim", None)
        return size or self.config.hidden_size // self.config.num_attention_heads

    @property
    def architecture(self) -> Any:
        from gguf import MODEL_ARCH

        return MODEL_ARCH[_ARCHITECTURES[(self.config.architectures or ["?"])[0]]]

    def name_of(self, name: str) -> str:
        from gguf import get_tensor_name_map

        found = get_tensor_name_map(self.architecture, self.config.num_hidden_layers).get_name(
            name, (".weight", ".bias")
        )
        if found is None:
            raise ConfigError(f"llama.cpp has no place for the weight {name}. Export format=merged instead.")
        return str(found)

    def in_order(self, name: str, weight: Tensor) -> Tensor:
        """Returns the weight with its rows in llama.cpp's order."""
        projection = name.rsplit(".", 2)[-2]
        if self.architecture.name != "LLAMA" or projection not in ("q_proj", "k_proj"):
            return weight
        pairs = weight.reshape(-1, 2, self.head_size // 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)

    def type_of(self, shape: tuple[int, ...]) -> Any:
        """Returns the type of a tensor. Vectors stay in float32, as in the files of llama.cpp's converter."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(shape) == 1:
            return GGMLQuantizationType.F32
        chosen = GGMLQuantizationType[self.type_name.upper()]
        return chosen if shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16


def write_model(
    weights: MergedWeights,
    config: PretrainedConfig,
    chat_format: ChatFormat,
    path: Path,
    type_name: GgufType,
    name: str,
) -> str:
    """Writes a model that `why_not` supports, tensor by tensor. Returns the type of its weights."""
    gguf = package()
    if type_name == "auto":
        embeddings = next(weight for weight in weights.names if "embed_tokens" in weight)
        chosen = _AUTO.get(weights.dtype_of(embeddings), "f32")
    else:
        chosen = type_name
    layout = _GgufLayout(config, chosen)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_hyperparameters(writer, layout)
    add_vocabulary(writer, chat_format, config.vocab_size)
    tensors = []
    if (factors := _rope_factors(config, layout.head_size)) is not None:
        tensors.append(_GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    skipped = ("lm_head.",) if config.tie_word_embeddings and not weights.is_untied else ()
    for found in weights.names:
        if found.startswith(skipped) or found.endswith("rotary_emb.inv_freq"):
            continue  # a copy of the embeddings, or computed from the config
        make = functools.partial(lambda key: layout.in_order(key, weights.read(key)), found)
        tensors.append(_GgufTensor(layout.name_of(found), weights.shape_of(found), make))
    _write(writer, layout, tensors)
    return chosen


def write_adapter(
    adapter: dict[str, LowRank], config: PretrainedConfig, path: Path, alpha: float, name: str
) -> None:
    """Writes a LoRA, by the names of the weights, for a model that `why_not` supports.

    The LoRA must not be on a head tied to the embeddings, for which llama.cpp has no weight.
    """
    gguf = package()
    layout = _GgufLayout(config, "f32")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    tensors = []
    for weight, low_rank in sorted(adapter.items()):
        # llama.cpp scales by alpha / rank
        b_OR = low_rank.b_OR.float() * (low_rank.scaling * low_rank.b_OR.shape[1] / alpha)
        pair = {"a": low_rank.a_RI, "b": layout.in_order(weight, b_OR)}
        for half, tensor in pair.items():
            place = f"{layout.name_of(weight)}.lora_{half}"
            tensors.append(_GgufTensor(place, tuple(tensor.shape), functools.partial(torch.clone, tensor)))
    _write(writer, layout, tensors)


class _GgufTensor(NamedTuple):
    """A tensor of the file, which is computed when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _write(writer: gguf.GGUFWriter, layout: _GgufLayout, tensors: Sequence[_GgufTensor]) -> None:
    """Writes all names and shapes, as the format requires, then the data, one tensor at a time."""
    from gguf import quant_shape_to_byte_shape, quantize

    for tensor in tensors:
        kind = layout.type_of(tensor.shape)
        num_bytes = math.prod(quant_shape_to_byte_shape(tensor.shape, kind))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        numbers = tensor.make().float().contiguous().numpy()
        writer.write_tensor_data(quantize(numbers, layout.type_of(tensor.shape)))
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, layout: _GgufLayout) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config = layout.config
    file_type = "ALL_F32" if layout.type_name == "f32" else f"MOSTLY_{layout.type_name.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(layout.head_size)
    writer.add_value_length(layout.head_size)
    writer.add_rope_dimension_count(layout.head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _rope_factors(config: PretrainedConfig, head_size: int) -> Tensor | None:
    """Returns the divisors of frequencies, [head_size / 2], of Llama 3.1's RoPE scaling, else None."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def package() -> Any:
    """Returns llama.cpp's package `gguf`. Raises ConfigError if it is not installed."""
    extras.require("gguf", "A GGUF file")
    import gguf

    return gguf
