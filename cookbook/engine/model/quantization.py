"""Holds the linear layers and experts of a base model in 4 bits (QLoRA) with bitsandbytes, or in 8 bits.

"nf4" rounds a weight to one of 16 values times a scale that 64 weights share. The scales are held in 8 bits,
so a weight takes 0.52 bytes. A layer dequantises its weight to the engine's dtype for each product and does
not keep the result. Experts dequantise the weights of those that have rows, one at a time. "fp8" is described
in `fp8`. The embeddings, the projection to the vocabulary and what only chooses experts are not quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.fp8 import Fp8Linear, stack_of
from cookbook.engine.model.stacked_4bit import StackedIn4Bits
from cookbook.engine.model.text_part import frozen_parameters
from cookbook.engine.options import Quantization
from cookbook.errors import ConfigError

# bitsandbytes warns on import about a missing kernel, which `set_compute_dtype` disables.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def from_pretrained_options(
    quantization: Quantization, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the arguments with which `from_pretrained` quantises a model, directly on `device`."""
    from cookbook.engine.model.quantizer import Fp8Config, LayersAndExpertsConfig

    if quantization == "fp8":
        return {"quantization_config": Fp8Config()}
    config = LayersAndExpertsConfig(
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every 4-bit layer compute in `dtype`, the engine's.

    A CPU with bfloat16 instructions would otherwise run a layer whose input needs no gradient in bfloat16,
    and permanently repack its weight into a form without a backward pass.
    """
    for module in model.modules():
        if _is_in_4_bits(module):
            module.compute_dtype = dtype  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_quantized(model: Any, model_name: str) -> None:
    """Raises ConfigError if most weights of a language model are outside linear layers and experts."""
    others = frozen_parameters(model)
    layers = [m for m in model.modules() if is_quantized(m) and m.weight not in others]
    stacked = {id(weight): weight.numel() for weight in quantized_stacks(model)}
    held = sum(m.in_features * m.out_features for m in layers) + sum(stacked.values())
    known = {*stacked, *(id(layer.weight) for layer in layers)}
    looked_up = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(m.weight) for m in (*looked_up, model.get_input_embeddings(), model.get_output_embeddings())}
    as_before = sum(
        p.numel() for p in model.parameters() if not (id(p) in known or id(p) in ends or p in others)
    )
    if held < as_before:
        raise ConfigError(
            f"quantization holds the weights of linear layers and experts in fewer bits. Those are {held:,} "
            f"of the {held + as_before:,} weights in the layers of {model_name}: convolutions, and "
            f"experts in a form that is not known here, are not among them. Use quantization=None."
        )


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a linear layer holds its weight in 4 or 8 bits."""
    return isinstance(module, Fp8Linear) or _is_in_4_bits(module)


def _is_in_4_bits(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")


def quantized_stacks(model: nn.Module) -> Iterator[Tensor]:
    """Yields the stacked weights of experts that are held in 4 or 8 bits."""
    for module in model.modules():
        yield from own_quantized_stacks(module)


def own_quantized_stacks(module: nn.Module) -> Iterator[Tensor]:
    """Yields those that are parameters of the module itself."""
    for name, weight in module.named_parameters(recurse=False):
        is_in_8_bits = weight.ndim == 3 and stack_of(module, name) is not None
        if is_in_8_bits or isinstance(weight, StackedIn4Bits):
            yield weight


def weight_of(linear: Any, dtype: torch.dtype) -> Tensor:
    """Returns the weight of a linear layer that computes in `dtype`: [O, I], dequantised if quantised."""
    if isinstance(linear, Fp8Linear):
        return linear.weight_in(dtype)
    weight_OI: Tensor = linear.weight
    if not hasattr(weight_OI, "quant_state"):
        return weight_OI
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight_OI, weight_OI.quant_state).to(dtype)
