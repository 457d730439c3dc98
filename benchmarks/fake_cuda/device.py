"""The fake CUDA device: tensors without values, and what the host would have waited for.

    with FakeCuda(answers) as device, device.recording() as record:
        trainer.forward_backward(request)
    print(record.waits, record.num_launches)

Operators on tensors of the CPU run as ever. Those on tensors of the device run torch's fake kernels, which
find shapes, dtypes and tensors on different devices. What those kernels do not check is checked here: the
operands of a product must have one dtype, and copies between host and device that wait are recorded, with the
function that waits. A value that the host reads is 0 (False) unless `answers` has one for that function.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.fake_cuda import runtime
from cookbook.engine.model.kernels import NAMES

NO_KERNEL = {
    "_fused_sdp_choice", "_nested_tensor_size", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "chunk", "detach", "device", "diagonal", "empty", "empty_like", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "record_stream", "reshape", "resize_",
    "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "sym_numel", "sym_size",
    "sym_storage_offset", "sym_stride", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "view_as_complex", "view_as_real",
}  # fmt: skip
"""Operators that only make a view, allocate, or look at shapes."""

_PRODUCTS: dict[str, int] = {
    "mm": 2, "bmm": 2, "mv": 2, "dot": 2, "addmm": 3, "addmm_": 3, "baddbmm": 3, "baddbmm_": 3, "addmv": 3,
    "_scaled_mm": 2, "addbmm": 3, "_addmm_activation": 3, "_grouped_mm": 2,
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_efficient_attention": 4, "_scaled_dot_product_cudnn_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 5, "_scaled_dot_product_efficient_attention_backward": 5,
    "_varlen_attn": 3, "_varlen_attn_backward": 5, "convolution": 3, "convolution_backward": 3,
    "_flash_attention_forward": 3, "_flash_attention_backward": 5, "index_put_": 2, "index_put": 2,
    "index_copy": 4, "index_copy_": 4, "index_add": 4, "index_add_": 4, "scatter": 4, "scatter_": 4,
    "scatter_add": 4, "scatter_add_": 4, "masked_scatter": 3, "masked_scatter_": 3,
}  # fmt: skip
"""Operators whose kernels refuse operands of different dtypes, and how many of their first arguments are such
operands. Their fake kernels accept any."""

_FLASH = {"_varlen_attn", "_flash_attention_forward", "_scaled_dot_product_flash_attention"}


def _norm(x: Tensor, shape: Any, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(
        (*x.shape[: -len(shape)], *(1 for _ in shape)), dtype=torch.float32
    )


def _norm_backward(
    grad: Tensor, x: Tensor, shape: Any, scale: Tensor, weight: Tensor | None, wanted: Any
) -> tuple[Tensor | None, Tensor | None]:
    is_weight_wanted = wanted[1] and weight is not None
    return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if is_weight_wanted else None


_OF_CUDA_ALONE: dict[str, Callable[..., Any]] = {
    "_fused_rms_norm": _norm,
    "_fused_rms_norm_backward": _norm_backward,
    "silu_backward": lambda grad, x: torch.empty_like(x),
}
"""Shapes of the results of operators that torch composes of others where they have no kernel of CUDA."""


class FakeCudaError(RuntimeError):
    """An operator that a CUDA device would refuse."""


@dataclass(frozen=True)
class OperatorCall:
    """An operator that launches kernels on the device, or copies between host and device."""

    operator: str
    """Its name without namespace and overload, or `memcpy`."""
    inputs: tuple[Any, ...]
    out: Any


@dataclass
class Recording:
    """What happened while it was recorded."""

    num_launches: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the host waited, by function (`path:name`) and by what it waited with."""
    doubles: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often an operator made a tensor of float64 on the device, by function and operator."""
    on_call: Callable[[OperatorCall], None] | None = None


class FakeCuda(TorchDispatchMode):
    """The device, while it is entered. Raises FakeCudaError for what a CUDA device would refuse."""

    def __init__(self, answers: Mapping[str, Any] | None = None, kernels: Collection[str] = NAMES) -> None:
        """`answers` are the values that the host reads, by the function (`path:name`) that reads them.

        For a copy to the host it may be a function of that function's local variables.
        `kernels` are those of `cookbook.engine.model.kernels` that are installed.
        """
        super().__init__()
        self.kernels = kernels
        self._answers = answers or {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._records: list[Recording] = []
        self._pinned = WeakIdKeyDictionary()
        self.is_there = True
        self.is_capturing = False
        """Whether kernels are recorded for a graph, in which case they do not run."""

    def __enter__(self) -> FakeCuda:
        runtime.replace(self)
        self._library = torch.library.Library("aten", "IMPL")  # its kernels are removed with it
        for name in _OF_CUDA_ALONE:
            self._library.impl(name, _OF_CUDA_ALONE[name], "CUDA")
        # or torch.tensor(..., device="cuda") asks for a real device
        torch._C._set_only_lift_cpu_tensors(True)
        # this mode is that of one thread, and layers that run again in the backward pass make tensors
        torch.autograd.set_multithreading_enabled(False)
        super().__enter__()
        return self

    @contextlib.contextmanager
    def recording(self, on_call: Callable[[OperatorCall], None] | None = None) -> Iterator[Recording]:
        """Records what happens in the body. `on_call` is called for each operator on the device."""
        record = Recording(on_call=on_call)
        self._records.append(record)
        try:
            yield record
        finally:
            self._records.remove(record)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Runs the body as if there were no CUDA device, as far as it asks for one."""
        self.__exit__(None, None, None)
        self.is_there = False
        try:
            yield
        finally:
            self.is_there = True
            self.__enter__()

    def waited(self, how: str) -> str:
        """Records that the host waits for the device. Returns the function that waits."""
        place = calling_function()
        for record in self._records:
            record.waits[place, how] += 1
        if self.is_capturing:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing ({how}, {place})"
            )
        return place

    def pin(self, tensor: Tensor) -> Tensor:
        """Returns a copy in page-locked memory, from which copies need not wait."""
        pinned = tensor.clone()
        self._pinned[pinned] = True
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor in self._pinned

    # -- operators --------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        leaves = tree_leaves((args, kwargs))
        if not any(_is_on_device(leaf) for leaf in leaves):
            is_pinned = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            if is_pinned:
                self._pinned[out] = True
            return out
        if name in ("_to_copy", "copy_") and (copied := self._copied(name, func, args, kwargs)) is not None:
            return copied
        if (reads := _READS.get(name)) is not None and kwargs.get("output_size") is None:
            return self._answer(name, reads, func, args, kwargs)
        if name == "record_stream":
            return None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._indices(args[1]), *args[2:])
        _check_operands(name, args)
        with self._fake:
            out = (_OF_CUDA_ALONE.get(name) or func)(*args, **kwargs)
        if name not in NO_KERNEL and func._schema.name != "prim::device":
            self._launched(name, (*args, kwargs), out)
        return out

    def launch_graph(self) -> None:
        """Counts the launch of a graph."""
        self._launched("graph", (), None)

    def _launched(self, name: str, inputs: tuple[Any, ...], out: Any) -> None:
        if self.is_capturing:
            return
        doubles = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float64]
        for record in self._records:
            record.num_launches += 1
            record.operators[name] += 1
            if doubles:
                record.doubles[calling_function(), name] += 1
            if record.on_call is not None:
                record.on_call(OperatorCall(name, inputs, out))

    def _copied(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Returns the result of a copy between host and device, or None if it is no such copy."""
        is_async = kwargs.get("non_blocking", False)
        if name == "_to_copy":
            source: Tensor = args[0]
            to_device = torch.device(kwargs.get("device") or source.device).type == "cuda"
            if to_device == isinstance(source, FakeTensor):
                return None
        else:
            target, source = args[:2]
            is_async = is_async or (len(args) > 2 and args[2])
            to_device = isinstance(target, FakeTensor)
            if to_device == isinstance(source, FakeTensor):
                return None
        host = source if to_device else (target if name == "copy_" else None)
        if not is_async or host is None or host not in self._pinned:
            what = "copy to the device" if to_device else "copy to the host"
            place = self.waited(what if not is_async else f"{what} from memory that is not pinned")
        else:
            place = ""
        if to_device:
            inputs = [self._fake.from_tensor(arg) if arg is source else arg for arg in args]
            with self._fake:
                out = func(*inputs, **kwargs)
        else:
            dtype = kwargs.get("dtype") or source.dtype
            out = torch.empty(source.shape, dtype=dtype) if name == "_to_copy" else target
            answer = self._answers.get(place, 0)
            out.copy_(torch.as_tensor(answer(_calling()[1]) if callable(answer) else answer))
        for record in self._records:
            record.num_launches += 1
            record.operators["memcpy"] += 1
            if record.on_call is not None:
                record.on_call(OperatorCall("memcpy", args, out))
        return out

    def _answer(
        self, name: str, reads: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        place = self.waited(name)
        with self._fake:
            out = reads(self._answers.get(place), *args, **kwargs)
        self._launched(name, args, out)
        return out

    def _indices(self, indices: Any) -> list[Tensor | None]:
        """Returns the indices with masks as positions. A CUDA device waits to learn how many there are."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or not isinstance(index, Tensor):
                found.append(index)
                continue
            if not isinstance(index, FakeTensor):
                self.waited("index on the host")
                found.append(index)
            elif index.dtype in (torch.bool, torch.uint8):
                self.waited("index with a mask")
                with self._fake:
                    size = max(1, index.numel() // 2)
                    found += [index.new_empty(size, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                found.append(index)
        return found


def _is_on_device(leaf: Any) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _scalar(answer: Any, tensor: Tensor) -> Any:
    if answer is None:
        answer = 0
    return (
        bool(answer)
        if tensor.dtype == torch.bool
        else (float(answer) if tensor.is_floating_point() else int(answer))
    )


def _some_rows(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(max(1, tensor.numel() // 2), *shape, dtype=torch.int64)


_READS: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _scalar,
    "equal": lambda answer, one, other: bool(answer),
    "nonzero": lambda answer, tensor: _some_rows(tensor, tensor.ndim),
    "masked_select": lambda answer, tensor, mask: tensor.new_empty(max(1, tensor.numel() // 2)),
    "repeat_interleave": lambda answer, repeats, **_: repeats.new_empty(answer or len(repeats)),
    "bincount": lambda answer, tensor, weights=None, minlength=0: tensor.new_empty(max(1, minlength)),
}
"""Operators that return a value to the host, or a tensor whose shape depends on values: the host has to wait.
Each has a function that returns a possible result, given the caller's answer."""


def _check_operands(name: str, args: tuple[Any, ...]) -> None:
    """Raises FakeCudaError for operands that the operator's CUDA kernel would refuse."""
    number = _PRODUCTS.get(name)
    if number is None:
        return
    tensors = [t for t in args[:number] if isinstance(t, Tensor)]
    if name in ("index_put_", "index_put"):
        tensors = [args[0], args[2]]
    if name.startswith(("index_", "scatter", "masked_")):
        tensors = [t for t in tensors if t.dtype not in (torch.int64, torch.int32, torch.bool)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise FakeCudaError(
            f"{name} of {' and '.join(sorted(map(str, dtypes)))}, in {calling_function()}: CUDA kernels take "
            f"operands of one dtype"
        )
    if name in _FLASH and len({tensor.shape[-1] for tensor in tensors}) > 1:
        raise FakeCudaError(f"{name} in {calling_function()}: flash attention takes heads of one size")
    if name in _FLASH and (dtypes - {torch.float16, torch.bfloat16} or args[0].shape[-1] > 256):
        raise FakeCudaError(
            f"{name} of {dtypes} with heads of {args[0].shape[-1]}, in {calling_function()}: flash attention "
            f"takes 16 bits and heads of up to 256"
        )


# -- the caller ---------------------------------------------------------------------------------

_ROOT = Path(__file__).parents[2]


def calling_function() -> str:
    """Returns the innermost function of the project, transformers or PEFT that is running: `path:name`."""
    return _calling()[0]


def _calling() -> tuple[str, dict[str, Any]]:
    """Returns the innermost such function, and its local variables."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(str(Path(__file__).parent)):
            relative = _relative(path)
            if relative is not None:
                return f"{relative}:{frame.f_code.co_qualname.replace('.<locals>', '')}", frame.f_locals
        frame = frame.f_back
    return "?", {}


def _relative(path: str) -> str | None:
    if path.startswith(f"{_ROOT}/") and "site-packages" not in path:
        return path.removeprefix(f"{_ROOT}/")
    _, found, tail = path.rpartition("site-packages/")
    return tail if found and tail.startswith(("transformers/", "peft/", "fla/")) else None
