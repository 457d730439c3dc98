"""What a micro-batch costs in memory, and so how large it may be and when to checkpoint its layers.

The estimate is measured once, on a short sequence: the bytes that autograd keeps for the backward
pass. It depends on the model and the device alone, never on what happens to be free, so that a
resumed run cuts its batches as before.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cookbook.engine import mesh
from cookbook.engine.options import EngineOptions

_USEFUL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Micro-batches beyond this are no faster (`benchmarks/LOG.md`). Other devices are treated as a CPU."""
FEWEST_TOKENS = 1024
"""With less room than this, layers are checkpointed rather than micro-batches cut further."""

_MARGIN = 1.25
"""Kernels need room to work in beside what is kept."""
_USABLE = {"cpu": 0.5, "cuda": 0.9}
"""The share of the device's memory to count on: on a CPU others need some too."""


@dataclass(frozen=True)
class MicrobatchLimits:
    """How many tokens a micro-batch may have, and with how many its layers are checkpointed."""

    max_tokens: int
    max_tokens_without_checkpointing: int

    def checkpoints(self, num_tokens: int) -> bool:
        return num_tokens > self.max_tokens_without_checkpointing


@dataclass(frozen=True)
class ActivationCost:
    """Bytes kept for the backward pass, per token."""

    whole: float
    checkpointed: float


def limits_for(
    options: EngineOptions, device: torch.device, cost: Callable[[], ActivationCost], reserved_bytes: int
) -> MicrobatchLimits:
    """The limits that the options set, and for what they leave open those of the device's memory.

    `reserved_bytes` are needed for other things: weights, gradients, optimizer state.
    """
    wanted, checkpointing = options.max_tokens_per_microbatch, options.gradient_checkpointing
    if wanted is not None and checkpointing != "auto":
        return MicrobatchLimits(wanted, 0 if checkpointing == "on" else 2**62)
    found = cost()
    kind = "cuda" if device.type == "cuda" else "cpu"
    room = max(0.0, usable_memory(device) - reserved_bytes) / _MARGIN
    tokens_without = 2**62 if checkpointing == "off" else _ratio(room, found.whole)
    if checkpointing == "on":
        tokens_without = 0
    fits_without = tokens_without >= FEWEST_TOKENS
    fitting = _ratio(room, found.whole if fits_without else found.checkpointed)
    return MicrobatchLimits(wanted or max(1, min(_USEFUL_TOKENS[kind], fitting)), tokens_without)


def _ratio(room: float, bytes_per_token: float) -> int:
    """How many tokens fit. Where the projection alone is trained, a token costs nothing here."""
    return int(room / max(bytes_per_token, 1))


def measure_activations(
    run: Callable[[], Tensor], held: Collection[int], num_tokens: int, num_layers: int, layer_bytes: int
) -> ActivationCost:
    """What the forward pass `run` keeps besides `held`, the weights, which are there anyway.

    `held`: the `addresses` of them, which may change on the way. `layer_bytes`: of the input of one
    layer, per token.
    """
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # The tensor itself would hold the graph that is to hold it: a cycle that no garbage collector sees.
        values = tensor.detach()
        storage = values.untyped_storage()
        if storage.data_ptr() not in held:  # a frozen layer keeps a view of its weight
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(values)  # else its address could be given to another
        return values

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    whole = sum(storages.values()) / num_tokens
    return ActivationCost(whole, layer_bytes * num_layers + whole / num_layers)


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Of what holds them: a view has that of what it views."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def bytes_for_sampling(device: torch.device) -> int:
    """How much may hold keys and values; what is sampled does not depend on it."""
    if device.type != "cuda":
        return _total_memory(device) // 4
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (free + unused))


def usable_memory(device: torch.device) -> float:
    """The bytes to count on. Processes of one machine share its memory, and have a GPU each."""
    if device.type == "cuda":
        return _total_memory(device) * _USABLE["cuda"]
    return _total_memory(device) * _USABLE["cpu"] / mesh.local_size()


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit.read_text()))
    return total


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def decoder_layers(model: Any) -> list[Any]:
    """The layers that transformers can checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def checkpointed_layers(model: Any, enabled: bool) -> Iterator[None]:
    """Keeps the inputs of the decoder's layers alone and runs each again in the backward pass.

    Layers checkpoint themselves in training mode, but run in evaluation mode both times: some ask
    for their own mode where they drop out.
    """
    if not enabled:
        yield
        return
    layers = decoder_layers(model)
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_checkpoint, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func  # which holds the layer


def _checkpoint(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    def evaluate(*inputs: Any) -> Any:
        was_training, layer.training = layer.training, False
        try:
            return forward(*inputs)
        finally:
            layer.training = was_training

    return checkpoint(evaluate, *inputs, use_reentrant=False, preserve_rng_state=False)
