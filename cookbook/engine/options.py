"""The options of an engine: the device, the format of the weights, and what memory is used for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from cookbook.engine import processes
from cookbook.errors import ConfigError
from cookbook.utils import extras

GradientCheckpointing = Literal["auto", "on", "off", "offload"]
Quantization = Literal["nf4", "fp8"]
Shard = Literal["auto", "none", "full"]
OptimizerBits = Literal[32, 8]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """All options except `dtype`, `quantization` and `optimizer_bits` change results by rounding at most.

    `device` is "auto" (CUDA if there is one) or a torch device. `dtype` is "auto" (bfloat16 on CUDA, or
    float16 where the device has no bfloat16, and float32 on CPU), "float32", "bfloat16" or "float16".
    Adapters are always float32.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_tokens_per_microbatch: int | None = None
    """None: as many as fit in memory, up to the size beyond which more tokens are not faster."""
    gradient_checkpointing: GradientCheckpointing = "auto"
    """"auto": checkpoint if the activations of a micro-batch would not fit otherwise, and keep the inputs of
    the layers in host memory if not even those would fit. "offload": do both always (on a CPU as "on").
    Long MLPs of checkpointed layers run in tiles of tokens."""
    quantization: Quantization | None = None
    """"nf4": hold the frozen linear layers in 4 bits, and compute in `dtype`. "fp8": hold them in 8 bits, and
    compute the forward products of linear layers in 8 bits on CUDA devices that do so."""
    compile: bool = False
    """Compile the decoder's layers. The first steps take a minute longer, later ones run fewer kernels."""

    shard: Shard = "auto"
    """Whether each of several processes holds all base weights ("none") or a part of them ("full").
    "auto": a part if all weights, with the memory that training adds, do not fit on one device."""
    deterministic: bool = False
    """Compute the same bits each time on the same device and versions. On CUDA this makes backward passes
    slower; on a CPU it is so in any case."""
    optimizer_bits: OptimizerBits = 32
    """8: hold the moments of AdamW in 8 bits (bitsandbytes) where a weight has 4,096 values or more."""
    pack_weights: bool = False
    """Keep a second copy of the linear layers for sampling on a CPU, if it takes at most an eighth of the
    memory: a lone reply is then computed without padding (`engine.model.packed_weights`)."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device={self.device!r} is not a torch device. Use auto, cpu, cuda or cuda:0.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not supported. Use {', '.join(DTYPES)}.")
        if self.shard not in get_args(Shard):
            raise ConfigError(f"shard={self.shard!r} is not known. Use {', '.join(get_args(Shard))}.")
        if self.shard == "full" and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization} is not supported with shard=full: quantised "
                f"weights are not sharded. Remove one of the two."
            )
        if self.optimizer_bits not in get_args(OptimizerBits):
            raise ConfigError(f"optimizer_bits={self.optimizer_bits!r} is not supported. Use 32 or 8.")
        if self.optimizer_bits == 8:
            if self.shard == "full":
                raise ConfigError(
                    "optimizer_bits=8 is not supported with shard=full: the scales of moments belong to "
                    "blocks of a whole weight, and a process holds a part of it. Remove one of the two."
                )
            extras.require("bitsandbytes", "optimizer_bits=8", extra="qlora")
        if self.gradient_checkpointing not in get_args(GradientCheckpointing):
            raise ConfigError(
                f"gradient_checkpointing={self.gradient_checkpointing!r} is not known. "
                f"Use {', '.join(get_args(GradientCheckpointing))}."
            )
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise ConfigError(
                f"Invalid max_tokens_per_microbatch={self.max_tokens_per_microbatch}: must be >= 1, or None "
                f"for what fits in memory."
            )
        if self.quantization is None:
            return
        if self.quantization not in get_args(Quantization):
            raise ConfigError(
                f"quantization={self.quantization!r} is not known. Use "
                f"{', '.join(get_args(Quantization))}, or remove it for weights in dtype={self.dtype}."
            )
        if self.quantization == "nf4":
            extras.require("bitsandbytes", "quantization=nf4", extra="qlora")


def check_device(device: str) -> None:
    """Raises ConfigError if this machine lacks the device, or its torch is too old for CUDA.

    Imports torch only for CUDA, and checks "auto" only where several processes need a device each.
    """
    if device == "cpu" or (device == "auto" and not processes.is_one_of_many()):
        return
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and not num_devices:
        return
    if num_devices:
        check_torch(torch.__version__)
    if not num_devices:
        raise ConfigError(f"device={device!r}, but this machine has no CUDA device. Use device=auto.")
    _, _, index = device.partition(":")
    if not processes.is_one_of_many():
        if int(index or 0) >= num_devices:
            raise ConfigError(f"device={device!r}, but this machine has {num_devices} CUDA devices.")
    elif index:
        raise ConfigError(f"device={device}, but each process has a device of its own. Use device=cuda.")
    elif processes.local_rank() >= num_devices:
        raise ConfigError(
            f"{processes.local_size()} processes on a machine of {num_devices} CUDA devices: each needs one. "
            f"Start with --nproc-per-node={num_devices}, or use device=cpu."
        )


def check_torch(version: str) -> None:
    """Raises ConfigError if torch is too old for CUDA: its variable-length attention lacks arguments."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 12):
        raise ConfigError(
            f"CUDA needs torch 2.12 or newer, and found {version}, with which packed sequences would run one "
            f"at a time. Run `pip install --upgrade torch`, or use device=cpu."
        )
