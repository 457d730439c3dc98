"""Shards base weights over the processes of a run with FSDP2, one decoder layer at a time.

Each process holds a part of every weight. A layer is gathered before its forward and its backward pass, and
resharded after each. The weights outside the layers (embedding, last norm, projection) form one group that
stays gathered until `reshard`, because the projection reads its weight without a forward of its own.

A gather needs all processes, so all run the same passes in the same order. The gradients of trained weights
are reduced and scattered as the backward pass leaves each layer. Adapters are not sharded.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cookbook import models
from cookbook.engine.model.memory import addresses, decoder_layers, usable_memory
from cookbook.engine.model.text_part import frozen_parameters, text_decoder
from cookbook.engine.options import EngineOptions
from cookbook.engine.processes import World
from cookbook.errors import ConfigError
from cookbook.utils import pretrained

_SHARE_FOR_WEIGHTS = 0.7
"""The share of the usable memory that weights may take. The rest is for activations."""


def should_shard(
    options: EngineOptions,
    world: World,
    model_name: str,
    device: torch.device,
    dtype: torch.dtype,
    is_trained: bool,
) -> bool:
    """Returns whether to shard, by `options.shard`. Where the answer depends on memory, rank 0 decides.

    Weights in 4 bits and those with moments in 8 bits are never sharded.
    """
    never = options.shard == "none" or options.quantization is not None or options.optimizer_bits == 8
    if world.is_alone or never:
        return False
    return options.shard == "full" or world.on_rank0(
        lambda: bytes_needed(model_name, dtype, is_trained) > _SHARE_FOR_WEIGHTS * usable_memory(device)
    )


def bytes_needed(model_name: str, dtype: torch.dtype, is_trained: bool) -> int:
    """Returns the bytes of the weights and, in training, of gradients, fp32 masters and moments.

    The towers of a multimodal model are not counted: they stay on the CPU.
    """
    model = pretrained.empty_causal_lm(models.load_config(model_name))
    others = frozen_parameters(model)
    per_weight = dtype.itemsize
    if is_trained:
        per_weight += 12 if dtype == torch.float32 else dtype.itemsize + 16
    return per_weight * sum(weight.numel() for weight in model.parameters() if weight not in others)


def shard(model: Any, world: World, device: torch.device, model_name: str) -> None:
    """Shards the weights of a model and moves this process's part to its device."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"shard=full shards a model by its layers, and {model_name} has none that transformers knows. "
            f"Use shard=none."
        )
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(f"shard=full needs torch 2.13 or newer; found {torch.__version__}. Use shard=none.")
    assert world.device_group is not None
    how: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(world.device_group, device.type),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "ignored_params": frozen_parameters(model),
    }
    for module in (*layers, model):
        fully_shard(module, **how)
        # The loss is a sum over all sequences, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # A process whose sequences reach no part of a layer (an expert, the projection) adds zeros.
        module.set_reduce_scatter_unused_params(True, recurse=False)
    model.set_reshard_after_backward(False, recurse=False)
    model.decode = types.MethodType(_decode, model)
    register_fsdp_forward_method(model, "decode")


def _decode(model: Any, **inputs: Any) -> Any:
    """Runs the decoder as a pass of the full model, which gathers the weights outside the layers too."""
    return text_decoder(model)(**inputs)


def is_sharded(model: Any) -> bool:
    return hasattr(model, "decode")


def is_dtensor(tensor: Tensor) -> bool:
    """Returns whether a tensor is sharded over processes. Does not import DTensor."""
    return hasattr(tensor, "to_local")


def reshard(model: Any) -> None:
    """Frees what a request gathered, so that the next one gathers the weights as they are then."""
    if is_sharded(model):
        model.reshard()


def reset(model: Any) -> None:
    """Resets FSDP after a pass that was not completed, on all processes at the same place."""
    model.reset_iter_state()


def local_part(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds: all of it if the tensor is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole tensor on every process. All processes have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """Returns this process's part of `full`, sharded as `like` is. Every process has `full`."""
    if not is_dtensor(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def bytes_held(model: Any) -> int:
    """Returns the bytes of this process's part, of the group outside the layers, and of two layers: the one
    that runs and the one that is being gathered."""
    layers = decoder_layers(model)
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    weights = {*model.parameters()} - frozen_parameters(model)
    outside = sum(weight.nbytes for weight in weights - in_layers)
    largest = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers)
    parts = sum(local_part(weight).nbytes for weight in weights)
    return int(parts + outside + 2 * largest)


@contextlib.contextmanager
def tracking_gathered_weights(model: Any, storages: set[int]) -> Iterator[None]:
    """Keeps the addresses of the currently gathered weights in `storages` while the body runs."""
    if not is_sharded(model):
        yield
        return
    others = set(storages)

    def note(module: nn.Module, inputs: Any) -> None:
        storages.clear()
        storages.update(others, addresses(p for p in model.parameters() if not is_dtensor(p)))

    hooks = [
        module.register_forward_pre_hook(note) for module in (text_decoder(model), *decoder_layers(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
