"""Measures the memory that training an adapter of a base model needs, for the limits of micro-batches."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cookbook.engine.model import fsdp
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import (
    ActivationCost,
    MicrobatchLimits,
    addresses,
    in_gib,
    is_out_of_memory,
    limits_for,
    measure_activations,
    usable_memory,
)
from cookbook.engine.model.packing import TokenSequence, pack
from cookbook.engine.training.optimizer import bytes_to_train, bytes_to_undo


def limits(base: BaseModel, adapter: Adapter) -> MicrobatchLimits:
    """Returns the limits of micro-batches with one more adapter in training."""
    free_bytes = usable_memory(base.device) - reserved_bytes(base, adapter)
    return limits_for(base.options, base.device, lambda: activation_cost(base, adapter), free_bytes)


def can_undo_steps(base: BaseModel, adapter: Adapter) -> bool:
    """Returns whether memory, without activations, suffices for the copies that undo a failed step."""
    needed = reserved_bytes(base, adapter) + bytes_to_undo(_local_parts(adapter), base.options.optimizer_bits)
    return needed <= usable_memory(base.device)


def reserved_bytes(base: BaseModel, adapter: Adapter) -> int:
    """Returns the bytes held besides activations: the weights, and the state of training `adapter`."""
    return base.weight_bytes() + bytes_to_train(_local_parts(adapter), base.options.optimizer_bits)


def describe(base: BaseModel, adapter: Adapter, num_tokens: int) -> str:
    """Returns a sentence about what holds the memory of the device in a pass over one sequence."""
    parts = _local_parts(adapter)
    of_adapter = 0 if adapter.is_full else sum(part.nbytes for part in parts)
    held = {
        "weights": base.weight_bytes() - of_adapter,
        "adapter": of_adapter,
        "gradients and optimizer": bytes_to_train(parts, base.options.optimizer_bits),
    }
    told = [f"{name} {in_gib(number)}" for name, number in held.items() if number]
    cost = None
    try:
        if not base.is_sharded:  # a pass over sharded weights needs all processes
            cost = activation_cost(base, adapter)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if cost is not None:
        whole, few = (cost.bytes_of(num_tokens, is_checkpointed) for is_checkpointed in (False, True))
        least = cost.bytes_of(num_tokens, is_checkpointed=True, is_offloaded=True)
        on_host = f", or {in_gib(least)} with their inputs in host memory" if base.can_offload else ""
        told.append(
            f"activations of {num_tokens:,} tokens an estimated {in_gib(whole)}, or {in_gib(few)} with "
            f"checkpointed layers{on_host}"
        )
    return f"Of {in_gib(usable_memory(base.device))} that may be used: {', '.join(told)}."


def activation_cost(base: BaseModel, adapter: Adapter) -> ActivationCost:
    """Returns the bytes per token that a pass with `adapter` keeps, measured on two short sequences."""
    lengths = (min(64, base.context_length), min(128, base.context_length))
    short, long = (_activation_cost_at(base, adapter, num_tokens) for num_tokens in lengths)
    return short.with_growth(long, lengths)


def _activation_cost_at(base: BaseModel, adapter: Adapter, num_tokens: int) -> ActivationCost:
    config = base.model.config.get_text_config()
    tokens_T = np.zeros(num_tokens, np.int64)
    batch = pack([TokenSequence(tokens_T, tokens_T, np.ones(num_tokens, np.float32), {})], base.device, True)

    def run() -> Tensor:
        if not base.has_plain_head:
            return base.logprobs_of_whole_model(batch)
        return base.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)

    weights = [fsdp.local_part(parameter) for parameter in base.model.parameters()]
    held = addresses([*weights, *base.model.buffers()])
    with base.adapters.using(adapter), fsdp.tracking_gathered_weights(base.model, held):
        cost = measure_activations(
            run,
            held,
            num_tokens,
            config.num_hidden_layers,
            config.hidden_size * base.dtype.itemsize,
            base.decoder,
            base.mlp_tile,
        )
    base.discard_pass()
    return cost


def _local_parts(adapter: Adapter) -> list[Tensor]:
    return [fsdp.local_part(weight) for weight in adapter.weights.values()]
