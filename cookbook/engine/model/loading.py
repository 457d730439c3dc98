"""Loads a model's weights from disk to the device."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine.model import expert_lora, fused, text_part
from cookbook.engine.model import quantization as quantized
from cookbook.engine.options import Quantization
from cookbook.utils import pretrained


def load_model(
    model_name: str, device: torch.device, dtype: torch.dtype, quantization: Quantization | None = None
) -> Any:
    """Returns the language model on `device`, in evaluation mode, with all weights frozen.

    It has the class in which it was published. Towers for other media stay on the CPU. Raises ModelError if
    files are missing or damaged, or lack a weight. On CUDA each weight goes to the device as it is read and
    converted, so that the host never holds the model.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if device.type == "cuda":
        options["device_map"] = {"": device}
    if quantization is not None:
        options |= quantized.from_pretrained_options(quantization, device, dtype)
    with no_progress_bar():
        model = models.load_from_hub_or_disk("weights", model_name, _load_all_weights, **options)
    if quantization is not None:
        quantized.check_quantized(model, model_name)
        expert_lora.run_quantized(model)
    quantized.set_compute_dtype(model, dtype)  # the published weights may already be in 4 bits
    _run_as_in_training(model)
    text_part.move_to(model, device)
    return model.eval().requires_grad_(False)


def _run_as_in_training(model: nn.Module) -> None:
    """Removes what transformers does to the recurrent layers of RWKV and xLSTM in evaluation mode.

    RWKV divides the hidden states by 2 every `rescale_every` layers, and the weights of the layers behind by
    the same power of 2, against overflow in float16. An adapter's results would not be divided, full
    fine-tuning would save the divided weights, and those in 4 bits would be rounded twice. xLSTM runs texts
    of more than `max_inference_chunksize` tokens without gradients.

    The states of xLSTM are float32 unless they come from a cache, and transformers multiplies them with 16
    bits, which torch refuses. So its recurrence runs in float32, and only its results are rounded.
    """
    modules: Any = model.modules()
    for module in modules:
        kind: Any = type(module)
        if hasattr(module, "layers_are_rescaled"):
            module._rescale_layers = _do_nothing
        elif kind.__name__ == "xLSTMModel":
            config = copy.copy(module.config)  # that of the whole model is saved with it
            config.max_inference_chunksize = sys.maxsize
            module.config = config
        elif kind.__name__ == "xLSTMBackend":
            module.__class__ = fused.class_with(kind, _forward_in_float32)


def _do_nothing() -> None:
    pass


def _forward_in_float32(self: Any, **inputs: Any) -> tuple[Tensor, Any]:
    dtype = inputs["value"].dtype
    as_float32 = {name: each.float() if isinstance(each, Tensor) else each for name, each in inputs.items()}
    hidden, states = self.plain_forward(**as_float32)
    return hidden.to(dtype), states


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hides the progress bar of loading from disk. A download keeps the hub's progress bar."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _load_all_weights(location: str, **options: Any) -> Any:
    """Returns a loaded model. Its files may lack all weights of the towers, which text does not reach.

    Raises ValueError if they lack another weight, which transformers would initialise randomly.
    """
    model, report = pretrained.load_causal_lm(location, output_loading_info=True, **options)
    towers = tuple(f"{name}." for name in text_part.towers(model))
    of_towers = {name for name in model.state_dict() if name.startswith(towers)}
    absent = of_towers if of_towers <= set(report["missing_keys"]) else set()
    if missing := sorted(set(report["missing_keys"]) - absent):
        raise ValueError(f"{len(missing)} of its weights are missing from its files, first {missing[0]}.")
    return model


def return_freed_memory() -> None:
    """Returns freed memory to the system, because glibc keeps 100 MiB after reading a tokenizer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
