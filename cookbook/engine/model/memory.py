"""Estimates the memory that a micro-batch needs, and derives the size limits and when to checkpoint layers.

The estimate is measured once, on two short sequences, as the bytes that autograd keeps for the backward pass.
These grow linearly with the tokens, and quadratically where attention keeps its scores (Gemma 2, gpt-oss).
The estimate depends on the model and the device alone, not on the free memory, so a resumed run plans the
same micro-batches.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cookbook.engine import processes
from cookbook.engine.model.offloading import NUM_ON_DEVICE, InputsOnHost
from cookbook.engine.model.stacked_4bit import StackedIn4Bits
from cookbook.engine.model.text_part import text_decoder
from cookbook.engine.model.tiled_mlp import MlpActivations
from cookbook.engine.options import EngineOptions

_USEFUL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Larger micro-batches are no faster (`benchmarks/LOG.md`). Other devices are treated as a CPU."""
_SMALL_MODEL_TOKENS, _SMALL_MODEL_BYTES = 4096, 100_000_000
"""Up to so many tokens on a CPU while their activations are no larger: in small models the fixed time of a
pass counts more than that of its tokens."""
MIN_TOKENS = 1024
"""If fewer tokens than this fit, layers are checkpointed instead of making micro-batches smaller."""

MARGIN = 1.25
"""A safety factor for the workspace that kernels need besides the activations."""
_USABLE = {"cpu": 0.5, "cuda": 0.9}
"""The share of the device's memory to use. On a CPU other programs need memory too."""


NEVER = 2**62
"""A number of tokens that no micro-batch has."""


@dataclass(frozen=True)
class MicrobatchLimits:
    """The maximum number of tokens of a micro-batch, and the number above which layers are checkpointed.

    Where memory grows quadratically, a sequence counts as more tokens than it has.
    """

    max_tokens: int
    max_tokens_without_checkpointing: int
    growth: float = 0.0
    """Without checkpointing, a sequence of T tokens takes the memory of T + growth * T^2 short ones."""
    growth_planned: float = 0.0
    """The growth for the planned kind of pass, which may be checkpointed."""
    share: float = 1.0
    """Scales these sizes to `max_tokens`, which may be smaller than what fits in memory."""
    max_in_memory: int = 2**62
    """The number of tokens that fit in memory. Sequences that share much may take them."""
    max_tokens_without_offloading: int = NEVER
    """The number of tokens above which the inputs of checkpointed layers are kept in host memory."""

    def size_in_memory(self, length: int) -> int:
        """Returns the number of tokens that a sequence counts as against `max_in_memory`."""
        return length + math.ceil(self.growth_planned * length**2)

    def size(self, length: int) -> int:
        """Returns the number of tokens that a sequence counts as against `max_tokens`."""
        return max(length, math.ceil(self.share * (length + self.growth_planned * length**2)))

    def size_without_checkpointing(self, length: int) -> int:
        """Returns what a sequence counts as against `max_tokens_without_checkpointing`, in tokens."""
        return length + math.ceil(self.growth * length**2)


@dataclass(frozen=True)
class Recovery:
    """Raises limits again that were lowered because memory ran out.

    After `patience` passes without a failure the limits are doubled, up to the initial limits. Each failure
    doubles the patience, so that limits that are too large are tried less and less often.
    """

    patience: int = 0
    """0 means that the limits are the initial ones."""
    passes_left: int = 0

    @property
    def is_needed(self) -> bool:
        return self.patience > 0

    def after_failure(self, first_patience: int) -> Recovery:
        patience = min(2 * self.patience, _MAX_PATIENCE) if self.is_needed else first_patience
        return Recovery(patience, patience)

    def after_pass(
        self, limits: MicrobatchLimits, full: MicrobatchLimits
    ) -> tuple[Recovery, MicrobatchLimits]:
        """Returns the recovery and the limits after a pass without a failure."""
        if not self.is_needed:
            return self, limits
        if self.passes_left > 1:
            return replace(self, passes_left=self.passes_left - 1), limits
        raised = _doubled(limits, full)
        if raised == limits:
            return Recovery(), limits
        return replace(self, passes_left=self.patience), raised


FIRST_PATIENCE = 100
_MAX_PATIENCE = 100 * 2**10


def _doubled(limits: MicrobatchLimits, full: MicrobatchLimits) -> MicrobatchLimits:
    without = limits.max_tokens_without_checkpointing
    return replace(
        limits,
        max_tokens=min(2 * limits.max_tokens, full.max_tokens),
        max_tokens_without_checkpointing=min(2 * without + 1, full.max_tokens_without_checkpointing),
        max_in_memory=min(2 * limits.max_in_memory, full.max_in_memory),
        max_tokens_without_offloading=min(
            2 * limits.max_tokens_without_offloading + 1, full.max_tokens_without_offloading
        ),
    )


@dataclass(frozen=True)
class ActivationCost:
    """The bytes per token that are kept for the backward pass."""

    full: float
    """Without checkpointing."""
    checkpointed: float
    full_squared: float = 0.0
    """Per pair of tokens of a sequence."""
    checkpointed_squared: float = 0.0
    inputs: float = 0.0
    """The part of `checkpointed` that can be in host memory instead: inputs of layers."""
    tiled: float = 0.0
    """The part of `checkpointed` that is kept for a tile alone: activations of one layer's MLP."""
    tile: int = 0
    """The tokens of a tile."""

    def with_growth(self, longer: ActivationCost, lengths: tuple[int, int]) -> ActivationCost:
        """Returns the cost with its quadratic part, given costs at the first length (`self`) and second."""
        short, long = lengths
        if long == short:
            return self
        squared = max(0.0, (longer.full - self.full) / (long - short))
        checkpointed_squared = max(0.0, (longer.checkpointed - self.checkpointed) / (long - short))
        return ActivationCost(
            self.full - squared * short,
            self.checkpointed - checkpointed_squared * short,
            squared,
            checkpointed_squared,
            self.inputs,
            self.tiled,
            self.tile,
        )

    def bytes_of(self, length: int, is_checkpointed: bool = False, is_offloaded: bool = False) -> float:
        """Returns the bytes that a sequence keeps on the device."""
        if is_checkpointed:
            per_token = self.checkpointed - (self.inputs if is_offloaded else 0.0)
            beyond = self.tiled * max(0, length - self.tile)
            return per_token * length - beyond + self.checkpointed_squared * length**2
        return self.full * length + self.full_squared * length**2

    def longest_checkpointed(self, room: float) -> int:
        """Returns the tokens of the longest sequence that keeps at most `room` bytes with checkpointing."""
        linear = self.checkpointed
        if self.tiled and self.bytes_of(self.tile, is_checkpointed=True) < room:
            linear, room = linear - self.tiled, room - self.tiled * self.tile
        linear, squared = max(linear, 1.0), self.checkpointed_squared
        if squared:
            return int((math.sqrt(linear**2 + 4 * squared * room) - linear) / (2 * squared))
        return int(room / linear)


def limits_for(
    options: EngineOptions, device: torch.device, cost: Callable[[], ActivationCost], free_bytes: float
) -> MicrobatchLimits:
    """Returns the limits that the options set. Limits that they do not set follow from the device's memory.

    `free_bytes` is what `usable_memory` leaves besides weights, gradients and optimizer state.
    """
    wanted, checkpointing = options.max_tokens_per_microbatch, options.gradient_checkpointing
    kind = "cuda" if device.type == "cuda" else "cpu"
    is_offloaded = checkpointing == "offload" and kind == "cuda"
    without_offloading = 0 if is_offloaded else NEVER
    if wanted is not None and checkpointing != "auto":
        tokens_without = NEVER if checkpointing == "off" else 0
        return MicrobatchLimits(
            wanted,
            tokens_without,
            max_in_memory=wanted,
            max_tokens_without_offloading=without_offloading,
        )
    found = cost()
    room = max(0.0, free_bytes) / MARGIN
    tokens_without = {"off": NEVER, "auto": _ratio(room, found.full)}.get(checkpointing, 0)
    if checkpointing == "auto" and kind == "cuda":
        without_offloading = found.longest_checkpointed(room)
    growth = found.full_squared / max(found.full, 1)
    fits_without = tokens_without >= MIN_TOKENS + growth * MIN_TOKENS**2
    if wanted is not None:
        return MicrobatchLimits(
            wanted,
            tokens_without,
            growth,
            max_in_memory=wanted,
            max_tokens_without_offloading=without_offloading,
        )
    growth_planned = growth if fits_without else found.checkpointed_squared / max(found.checkpointed, 1)
    checkpointed = found.checkpointed - (found.inputs if is_offloaded else 0.0)
    fitting = max(1, _ratio(room, found.full if fits_without else checkpointed))
    useful = _USEFUL_TOKENS[kind]
    while kind == "cpu" and useful < _SMALL_MODEL_TOKENS and 2 * useful * found.full <= _SMALL_MODEL_BYTES:
        useful *= 2
    max_tokens = min(useful, fitting)
    share = max_tokens / fitting if growth_planned else 1.0
    return MicrobatchLimits(
        max_tokens, tokens_without, growth, growth_planned, share, fitting, without_offloading
    )


def _ratio(room: float, bytes_per_token: float) -> int:
    """Returns how many tokens fit. If only the projection is trained, a token keeps no bytes."""
    return int(room / max(bytes_per_token, 1))


def measure_activations(
    run: Callable[[], Tensor],
    held: Collection[int],
    num_tokens: int,
    num_layers: int,
    layer_bytes: int,
    decoder: nn.Module | None = None,
    tile: int = 0,
) -> ActivationCost:
    """Returns the bytes that the forward pass `run` keeps besides the weights.

    `held` has the `addresses` of the weights, which may change during the pass. `layer_bytes` is the size of
    a layer's input per token. With checkpointed layers only one layer at a time keeps all its activations,
    and with a `tile` the MLPs of `decoder` keep those of so many tokens.
    """
    storages: dict[int, int] = {}
    of_mlps: dict[int, int] = {}
    kept: list[Tensor] = []
    mlps = MlpActivations(decoder if tile and decoder is not None else nn.Module())

    def pack(tensor: Tensor) -> Tensor:
        # Returning the tensor itself would create a reference cycle that the garbage collector misses.
        values = tensor.detach()
        address = _address(values)
        if address not in held:  # a frozen layer keeps a view of its weight
            size = values.untyped_storage().nbytes()
            if address not in storages and mlps.is_kept_by_mlp(values, _address):
                of_mlps[address] = size
            storages[address] = size
            kept.append(values)  # keeps the tensor alive, so that its address is not reused
        return values

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), hooks, mlps.watching():
        run()
    full = sum(storages.values()) / num_tokens
    inputs = layer_bytes * max(0, num_layers - NUM_ON_DEVICE)
    tiled = sum(of_mlps.values()) / num_tokens / num_layers
    return ActivationCost(
        full, layer_bytes * num_layers + full / num_layers, inputs=inputs, tiled=tiled, tile=tile
    )


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Returns the addresses of the tensors' storages. Views share the storage of their tensor."""
    held = (tensor.packed_EB if isinstance(tensor, StackedIn4Bits) else tensor for tensor in tensors)
    return {_address(tensor) for tensor in held}


def _address(tensor: Tensor) -> int:
    """Returns the address of a tensor's storage, or of its description on the device "meta"."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def bytes_for_sampling(device: torch.device, held: int = 0) -> int:
    """Returns the number of bytes that keys and values may take. Samples do not depend on it.

    `held` bytes of them are taken already.
    """
    if device.type != "cuda":
        return total_memory(device) // 4
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (free + unused + held))


def usable_memory(device: torch.device) -> float:
    """Returns the number of bytes to use. Processes of one machine share its memory, but each has a GPU."""
    usable = total_memory(device) * usable_share(device.type)
    return usable if device.type == "cuda" else usable / processes.local_size()


def usable_share(device_type: str) -> float:
    """Returns the share of a device's memory that is used, as in `usable_memory`."""
    return _USABLE["cuda" if device_type == "cuda" else "cpu"]


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit.read_text(encoding="utf-8")))
    return total


def in_gib(num_bytes: float) -> str:
    """Returns a number of bytes as a message says it."""
    return f"{num_bytes / 2**30:,.3g} GiB"


_OUT_OF_MEMORY = re.compile(
    r"""
    (CUDA|HIP|XPU|MPS|NPU)\ out\ of\ memory | (CUDA|HIP)\ error:\ out\ of\ memory
    | (cuda|hip)ErrorMemoryAllocation | (CUDA|HIP)_ERROR_OUT_OF_MEMORY | (cuda|hip)ErrorOutOfMemory
    | MPS\ backend\ out\ of\ memory
    | (CU|HIP|ROC)BLAS(LT)?_STATUS_ALLOC_FAILED | (rocblas|hipblas)_status_(memory_error|alloc_failed)
    | CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)
    | MIOPEN_STATUS_ALLOC_FAILED | miopenStatusAllocFailed
    | (CU|HIP)(SPARSE(LT)?|SOLVER|FFT|RAND)_STATUS_(ALLOC(ATION)?_FAILED|INSUFFICIENT_RESOURCES)
    | (CU|HIP)(FFT|RAND)_(STATUS_)?ALLOC(ATION)?_FAILED
    | DefaultCPUAllocator:\ (can't\ allocate|not\ enough)\ memory | std::bad_alloc | bad\ allocation
    | (Cuda|Hip)\ failure\ (\d+\ )?'out\ of\ memory' | NCCL.*(out\ of\ memory|failed\ to\ [mc]?alloc)
    | Failed\ to\ (CUDA|Cuda|cuda)\ ?(host\ )?([mcMC]?alloc|Alloc)
    | _ERROR_OUT_OF_(DEVICE|HOST)_MEMORY
    | \[Errno\ 12\]\ Cannot\ allocate\ memory | unable\ to\ mmap\ .*Cannot\ allocate\ memory
    """,
    re.VERBOSE | re.DOTALL,
)
"""Matches the out-of-memory messages of the libraries below torch, which raise a plain RuntimeError."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether the device or the host ran out of memory, so that a smaller micro-batch may fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def decoder_layers(model: Any) -> list[Any]:
    """Returns the layers of the text decoder that transformers can checkpoint, without nested ones.

    A nested layer (Zamba2) would be checkpointed in the forward pass and not when the outer one runs again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = text_decoder(model)
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in inner]


@contextlib.contextmanager
def checkpointed_layers(
    model: Any,
    enabled: bool,
    inputs_on_host: InputsOnHost | None = None,
    tiling: Callable[[nn.Module], contextlib.AbstractContextManager[None]] | None = None,
) -> Iterator[None]:
    """Keeps only the inputs of the decoder's layers, and runs each layer again in the backward pass.

    `inputs_on_host`, if given, keeps those inputs. It is for one pass. A layer runs in `tiling` of it, both
    times.

    transformers checkpoints a layer only in training mode. The layer's forward still runs in evaluation mode,
    both times, because some layers apply dropout by their own mode.
    """
    if not enabled:
        yield
        return
    layers = decoder_layers(model)
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_checkpoint, layer, inputs_on_host, tiling)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func  # the function references the layer


def _checkpoint(
    layer: nn.Module,
    inputs_on_host: InputsOnHost | None,
    tiling: Callable[[nn.Module], contextlib.AbstractContextManager[None]] | None,
    forward: Callable[..., Any],
    *inputs: Any,
) -> Any:
    def evaluate(*inputs: Any) -> Any:
        was_training, layer.training = layer.training, False
        try:
            with contextlib.nullcontext() if tiling is None else tiling(layer):
                return forward(*inputs)
        finally:
            layer.training = was_training

    with contextlib.nullcontext() if inputs_on_host is None else inputs_on_host.saving():
        return checkpoint(evaluate, *inputs, use_reentrant=False, preserve_rng_state=False)
