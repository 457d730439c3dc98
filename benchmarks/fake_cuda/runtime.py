"""The functions of torch that ask a CUDA driver, replaced by ones that answer for the fake device."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer
from torch.utils import _foreach_utils

from cookbook.engine.model import kernels

DEVICE = torch.device("cuda", 0)
TOTAL_MEMORY = 141 * 2**30


class AskedDevice(Protocol):
    """What is asked of the fake device."""

    is_there: bool
    is_capturing: bool
    kernels: Collection[str]

    def launch_graph(self) -> None:
        """Counts the launch of a graph."""

    def waited(self, how: str) -> str:
        """Records that the host waits."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Returns a copy in page-locked memory."""

    def is_pinned(self, tensor: Tensor) -> bool: ...


class _EndedStream:
    """A stream in which everything has already ended."""

    device = DEVICE
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _EndedStream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return True


def replace(device: AskedDevice) -> None:
    """Replaces what asks the driver, and what does not know fake tensors, until the process ends."""
    for name, value in _functions(device).items():
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda self, *_: device.pin(self)  # type: ignore[method-assign, assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = lambda self, *_: device.is_pinned(self)  # type: ignore[method-assign, assignment]
    torch.nn.functional.scaled_dot_product_attention = _attention
    # their trial compares numbers, which do not exist
    kernels.is_used = lambda name, place: place.type == "cuda" and name in device.kernels
    FakeTensor.tolist = lambda self: self.to("cpu").tolist()  # type: ignore[assignment]
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    for supported in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
        if FakeTensor not in supported:  # gradients are clipped and copied many at a time, as on a device
            supported.append(FakeTensor)


def _classes(device: AskedDevice) -> dict[str, Any]:
    """Returns the classes of `torch.cuda` that ask the driver."""

    class Stream(_EndedStream):
        def synchronize(self) -> None:
            device.waited("stream.synchronize")

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, stream: Any = None) -> None: ...

        def wait(self, stream: Any = None) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.waited("event.synchronize")

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    class CUDAGraph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            device.is_capturing = True

        def capture_end(self) -> None:
            device.is_capturing = False

        def replay(self) -> None:
            device.launch_graph()

    return {"Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph}


def _functions(device: AskedDevice) -> dict[str, Any]:
    """Returns the functions of `torch.cuda` that ask the driver, and its classes."""
    classes = _classes(device)
    properties = types.SimpleNamespace(
        name="a fake H200", total_memory=TOTAL_MEMORY, major=9, minor=0, multi_processor_count=132
    )
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: device.is_there,
        "is_initialized": lambda: True,
        "device_count": lambda: int(device.is_there),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        **classes,
        "graph_pool_handle": object,
        "current_stream": lambda device=None: classes["Stream"](),
        "default_stream": lambda device=None: classes["Stream"](),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device_=None: device.waited("torch.cuda.synchronize") and None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: device.is_capturing,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (TOTAL_MEMORY, TOTAL_MEMORY),
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
        **dict.fromkeys(
            ("memory_reserved", "memory_allocated", "max_memory_reserved", "max_memory_allocated"),
            lambda device=None: 0,
        ),
        **dict.fromkeys(
            ("reset_peak_memory_stats", "reset_accumulated_memory_stats"), lambda device=None: None
        ),
    }


def _apply(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Does what `Module._apply` does. Torch cannot put a fake tensor into the place of a real parameter."""
    made: dict[int, Any] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with torch.no_grad():
                    made[id(parameter)] = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = fn(buffer)
                part._buffers[name] = made[id(buffer)]
    return module


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Does what `scaled_dot_product_attention` does, with the kernel that it chooses on a recent GPU.

    A build without CUDA would choose plain products. Without a mask and in 16 bits it is flash attention, and
    else the memory-efficient kernel, where heads fit.
    """
    if not isinstance(query, FakeTensor):
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    is_half, size = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    fits = query.ndim == 4 and size % (8 if is_half else 4) == 0 and value.shape[-1] % 8 == 0
    aten = torch.ops.aten
    if fits and attn_mask is None and is_half and size <= 256 and size == value.shape[-1]:
        out: Tensor = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out
    if not fits:
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa and (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    efficient: tuple[Tensor, ...] = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )
    return efficient[0]
