"""Estimates what a model needs in training from its config alone, without memory for its weights.

The model is made on the device "meta" with its adapter, and one pass over it lists what autograd would keep.
The limits of micro-batches then follow as they do for a loaded model (`memory.limits_for`), so that the
estimate describes the micro-batches that the engine plans on that device.

Shape suffixes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from cookbook.engine.model import attention, linear_scan
from cookbook.engine.model.adapters import Adapters
from cookbook.engine.model.memory import (
    MARGIN,
    ActivationCost,
    addresses,
    limits_for,
    measure_activations,
    usable_share,
)
from cookbook.engine.model.recurrence import RecurrentLayers
from cookbook.engine.model.targets import TargetTable
from cookbook.engine.model.text_part import frozen_parameters, text_decoder
from cookbook.engine.model.tiled_mlp import tile_for
from cookbook.engine.model.unembedding import BlockSizes
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.optimizer import bytes_to_train, bytes_to_undo
from cookbook.types import LoraConfig
from cookbook.utils import pretrained

logger = logging.getLogger(__name__)

NAME = "cookbook_estimate"
LENGTHS = (512, 1024)
"""The lengths at which activations are listed. Two of them show what grows quadratically."""
BYTES_IN_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""The bytes of a weight in nf4, with a scale of 8 bits for 64 weights and one of 32 bits for 256 scales."""
BYTES_OF_SCALE = 4
"""The bytes of the scale of a row of weights in fp8, each of which takes one byte."""
BYTES_OF_CUDA = 600 * 2**20
"""The bytes that are assumed for the CUDA context and the workspaces of its libraries. They depend on the
driver."""


@dataclass(frozen=True)
class Footprint:
    """The needs of a model in training on a kind of device. Sizes are in bytes."""

    num_weights: int
    """The number of weights of the language model."""
    num_active: int
    """Those that a token passes through: of its experts only the chosen ones, and no embeddings."""
    num_head: int
    """The number of weights of the projection to the vocabulary, through which only trained tokens pass."""
    num_trained: int
    weights: float
    adapter: int
    """The weights of the adapter; 0 if the model's own weights are trained."""
    training: int
    """Gradients, moments and masters."""
    undo: int
    """The copies with which a failed step is undone, if there is memory for them."""
    blocks: int
    """The largest temporary tensors: blocks of logits, and a dequantised weight."""
    activations: ActivationCost | None
    """None if the architecture cannot be run without memory."""
    heads_times_size: int
    """The number of attention heads times their size, in all layers, for counts of operations."""

    @property
    def fixed(self) -> float:
        """The bytes that are held besides activations."""
        return self.weights + self.adapter + self.training


@dataclass(frozen=True)
class MemoryPlan:
    """The largest micro-batch on a device with a given memory. Sizes are in bytes."""

    tokens: int
    is_checkpointed: bool
    activations: float
    """What it keeps for the backward pass on the device."""
    on_host: float
    """The inputs of checkpointed layers that are kept in host memory."""
    temporary: float
    """Blocks of logits, a dequantised weight, workspaces of kernels as the engine counts them, and what CUDA
    itself takes."""
    fixed: float
    usable: float
    fits: bool
    """Whether a micro-batch of one sequence fits."""

    @property
    def total(self) -> float:
        return self.fixed + self.activations + self.temporary


def footprint(
    config: PretrainedConfig, model_name: str, lora: LoraConfig, options: EngineOptions, device_type: str
) -> Footprint:
    """Returns the needs of a model with this config on "cuda" or "cpu".

    They are kept for later runs of this process, since for a model of many layers they take seconds.
    """
    text = config.to_json_string(use_diff=False)
    key = (type(config), text, model_name, repr(lora), repr(options), device_type)
    if key not in _footprints:
        _footprints[key] = _footprint(config, model_name, lora, options, device_type)
    return _footprints[key]


_footprints: dict[tuple[Any, ...], Footprint] = {}


def _footprint(
    config: PretrainedConfig, model_name: str, lora: LoraConfig, options: EngineOptions, device_type: str
) -> Footprint:
    dtype = _dtype(options.dtype, device_type)
    model = pretrained.empty_causal_lm(config).to(dtype).eval().requires_grad_(False)
    adapters = Adapters(model, model_name, tokenizer=None)
    table = adapters.targets
    towers = frozen_parameters(model)
    own = [weight for weight in model.parameters() if weight not in towers]
    num_weights, num_active = sum(weight.numel() for weight in own), _num_active(model, table)
    weights = _weight_bytes(table, own, options, dtype)
    largest = max((target.num_weights for target in table.targets.values()), default=0)
    largest = largest if options.quantization else 0
    blocks = BlockSizes.on(torch.device(device_type))
    head = model.get_output_embeddings().weight
    block_bytes = 4 * 3 * blocks.positions * min(blocks.vocabulary, head.shape[0])
    with torch.device("meta"):
        adapter = adapters.add(lora if lora.rank else LoraConfig(rank=0))
    trained = list(adapter.weights.values())
    tile = tile_for(options, torch.device(device_type), is_sharded=options.shard == "full")
    with adapters.using(adapter):
        activations = _activations(model, device_type, tile)
    text_config = model.config.get_text_config()
    head_size = getattr(text_config, "head_dim", None) or (
        text_config.hidden_size // max(1, getattr(text_config, "num_attention_heads", 1) or 1)
    )
    heads = (getattr(text_config, "num_attention_heads", 0) or 0) * text_config.num_hidden_layers
    return Footprint(
        num_weights=num_weights,
        num_active=num_active,
        num_head=head.numel(),
        num_trained=sum(weight.numel() for weight in trained),
        weights=weights,
        adapter=sum(weight.nbytes for weight in trained) if lora.rank else 0,
        training=bytes_to_train(trained, options.optimizer_bits),
        undo=bytes_to_undo(trained, options.optimizer_bits),
        blocks=block_bytes + largest * dtype.itemsize,
        activations=activations,
        heads_times_size=heads * head_size,
    )


def plan(
    found: Footprint,
    options: EngineOptions,
    device_type: str,
    memory: float,
    longest: int,
    batch_tokens: int | None = None,
) -> MemoryPlan:
    """Returns the largest micro-batch of a device with `memory` bytes, as the engine would plan it.

    It consists of sequences of `longest` tokens, and of no more than the `batch_tokens` of a batch. Without
    an estimate of activations none are counted. A sequence that does not fit as planned is counted with
    checkpointed layers, or with their inputs in host memory too, as the engine tries it again after memory
    ran out.
    """
    usable = memory * usable_share(device_type)
    cost = found.activations or ActivationCost(0.0, 0.0)
    temporary: float = found.blocks + (BYTES_OF_CUDA if device_type == "cuda" else 0)
    limits = limits_for(options, torch.device(device_type), lambda: cost, usable - found.fixed)
    num_sequences = max(1.0, limits.max_tokens / limits.size(longest))
    tokens = int(num_sequences * longest)
    if batch_tokens is not None:
        tokens = max(longest, min(tokens, batch_tokens))
    planned = tokens / longest * limits.size_without_checkpointing(longest)
    is_checkpointed = planned > limits.max_tokens_without_checkpointing
    is_offloaded = is_checkpointed and tokens > limits.max_tokens_without_offloading
    ways = [(tokens, is_checkpointed, is_offloaded)]
    if options.gradient_checkpointing == "auto":
        ways += [(longest, True, False), (longest, True, True)][: 2 if device_type == "cuda" else 1]
    room = (usable - found.fixed - temporary) / MARGIN
    fitting = [way for way in ways if cost.bytes_of(longest, *way[1:]) <= room]
    tokens, is_checkpointed, is_offloaded = (fitting or ways[-1:])[0]
    activations = tokens / longest * cost.bytes_of(longest, is_checkpointed, is_offloaded)
    return MemoryPlan(
        tokens,
        is_checkpointed,
        activations,
        on_host=tokens * cost.inputs if is_offloaded else 0.0,
        temporary=temporary + (MARGIN - 1) * activations,
        fixed=found.fixed,
        usable=usable,
        fits=bool(fitting),
    )


def longest_sequence(
    found: Footprint, options: EngineOptions, device_type: str, memory: float, context: int
) -> int:
    """Returns the length of the longest sequence, of at most `context` tokens, that fits; 0 if none does."""

    def fits(length: int) -> bool:
        return plan(found, options, device_type, memory, length, batch_tokens=length).fits

    # `bisect` wants False before True, so it looks for the shortest length that does not fit
    return bisect.bisect_left(range(1, context + 1), True, key=lambda length: not fits(length))


def _dtype(name: str, device_type: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _weight_bytes(
    table: TargetTable, own: list[nn.Parameter], options: EngineOptions, dtype: torch.dtype
) -> float:
    num_weights = sum(weight.numel() for weight in own)
    if options.quantization is None:
        return num_weights * dtype.itemsize
    held = [target for target in table.targets.values() if target.group != "train_unembed"]
    num_held = sum(target.num_weights for target in held)
    if options.quantization == "fp8":
        num_bytes: float = num_held + BYTES_OF_SCALE * sum(target.num_rows for target in held)
    else:
        num_bytes = num_held * BYTES_IN_4_BITS
    return num_bytes + (num_weights - num_held) * dtype.itemsize


def _num_active(model: Any, table: TargetTable) -> int:
    """Returns the number of weights that are multiplied with the hidden state of a token."""
    text_config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    num_experts = next((getattr(text_config, name) for name in names if getattr(text_config, name, None)), 0)
    chosen = getattr(text_config, "num_experts_per_tok", None) or getattr(text_config, "top_k_experts", None)
    share = chosen / num_experts if num_experts and chosen else 1.0
    return round(
        sum(target.num_weights * (share if target.is_stacked else 1) for target in table.targets.values())
    )


# -- activations ------------------------------------------------------------------------------


def _activations(model: Any, device_type: str, tile: int) -> ActivationCost | None:
    """Returns the activations of the model, run as on a device of this type, or None if it cannot be run.

    `tile` is that of MLPs in checkpointed layers, in tokens.
    """
    decoder = text_decoder(model)
    linear_scan.install(decoder)
    RecurrentLayers(decoder)
    AttentionInterface.register(NAME, _attention_on_cuda if device_type == "cuda" else _attention_on_cpu)
    text_config = model.config.get_text_config()

    def cost_at(length: int) -> ActivationCost:
        tokens_BT = torch.zeros(1, length, dtype=torch.long, device="meta")
        positions_BT = torch.arange(length, device="meta")[None]

        def run() -> Tensor:
            found: Tensor = decoder(
                input_ids=tokens_BT, position_ids=positions_BT, use_cache=False
            ).last_hidden_state
            return found

        held = addresses([*model.parameters(), *model.buffers()])
        return measure_activations(
            run,
            held,
            length,
            text_config.num_hidden_layers,
            text_config.hidden_size * next(decoder.parameters()).itemsize,
            decoder,
            tile,
        )

    context = getattr(text_config, "max_position_embeddings", None) or 2**20
    lengths = (min(LENGTHS[0], context), min(LENGTHS[1], context))
    try:
        model.set_attn_implementation(NAME)
        short, long = (cost_at(length) for length in lengths)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.info("No estimate of activations: the model cannot be run without weights (%s).", error)
        return None
    return short.with_growth(long, lengths)


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values, the result, and a normaliser for each query."""

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> Tensor:
        out_BHTD = value_BHTD.new_empty(*query_BHTD.shape[:-1], value_BHTD.shape[-1])
        normaliser_BHT = query_BHTD.new_empty(query_BHTD.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query_BHTD, key_BHTD, value_BHTD, out_BHTD, normaliser_BHT)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("The pass of an estimate has no backward part.")


def _attention_on_cuda(
    module: nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """Stands for `attention.packed_attention` on CUDA."""
    if more.get("softcap") is not None or more.get("s_aux") is not None:
        return attention.packed_attention(module, query_BHTD, key_BHTD, value_BHTD, None, **more)
    qkv = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query_BHTD, key_BHTD, value_BHTD)
    )
    out_BHTD: Tensor = _FusedAttention.apply(*qkv)
    return out_BHTD.transpose(1, 2), None


def _attention_on_cpu(
    module: nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """Stands for `attention.packed_attention` on a CPU."""
    if more.get("softcap") is not None or more.get("s_aux") is not None:
        return attention.packed_attention(module, query_BHTD, key_BHTD, value_BHTD, None, **more)
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    if groups > 1:
        key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
        value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
    out_BHTD: Tensor = _FusedAttention.apply(query_BHTD, key_BHTD, value_BHTD)
    return torch.cat([out_BHTD], dim=2).transpose(1, 2).contiguous(), None
