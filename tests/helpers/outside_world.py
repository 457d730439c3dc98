"""Replaces parts of the outside world at their interface to the project, with one function for each."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.machinery
import io
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import datasets
import huggingface_hub
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import chat_template_utils

from cookbook.engine import devices
from cookbook.utils import pretrained


@contextlib.contextmanager
def day_of_transformers(now: datetime.datetime) -> Iterator[None]:
    """Sets the clock that transformers' `apply_chat_template` passes to a template as `strftime_now`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: now))
        yield


def let_use_cores(patch: pytest.MonkeyPatch, number: int) -> None:
    """Sets the number of cores that the operating system lets this process use."""
    patch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))


def replace_hub_datasets(patch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Replaces datasets on the hub, as the `datasets` package loads them by name."""
    patch.setattr(datasets, "load_dataset", load)


def replace_hub_commits(patch: pytest.MonkeyPatch, commits: Iterator[str]) -> None:
    """Replaces the hub by one that returns the next of `commits` at each request for a dataset's commit."""

    class Api:
        def dataset_info(self, hub_id: str) -> Any:
            return huggingface_hub.hf_api.DatasetInfo(id=hub_id, sha=next(commits), tags=[])

    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # behind a proxy only the hub's client can tell
    patch.setattr(huggingface_hub, "HfApi", Api)


def point_hub_client_at(patch: pytest.MonkeyPatch, address: str) -> None:
    """Sets the address of the hub that `huggingface_hub` read from the environment when it was imported."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        patch.delenv(name, raising=False)


def retry_at_once(patch: pytest.MonkeyPatch) -> None:
    """Makes a teacher's server be asked again after 10 ms, in the place of half a second and more."""
    patch.setattr("cookbook.data.distill.MAX_WAIT_SECONDS", 0.01)


def log_out_of_hub(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Removes the hub's token from the environment and from where `hf auth login` keeps it."""
    patch.delenv("HF_TOKEN")
    patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))


def remove_package(patch: pytest.MonkeyPatch, name: str) -> None:
    """Makes an optional package look as if it were not installed: it is neither found nor imported."""
    patch.setitem(sys.modules, name, None)


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """Makes the disk look like one of 1 GiB without a free byte."""
    full = type(shutil.disk_usage("/"))(2**30, 2**30, 0)
    patch.setattr(shutil, "disk_usage", lambda path: full)


def type_into_pipe(patch: pytest.MonkeyPatch, text: str) -> None:
    """Sets standard input to a pipe with this text."""
    patch.setattr(sys, "stdin", io.StringIO(text))


def type_at_prompt(patch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """Sets the line that a user types at a terminal, given the prompt."""
    patch.setattr("builtins.input", answer)


def keep_temporary_files_in(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Sets the folder for temporary files, which `tempfile` looks up once per process."""
    patch.setattr(tempfile, "tempdir", str(folder))


def forget_inspect(patch: pytest.MonkeyPatch) -> None:
    """Resets Inspect, and Python's hook for exceptions, as in a process that has not run Inspect before."""
    from inspect_ai._util import error, logger

    patch.setitem(logger._logHandler, "handler", None)
    patch.setattr(error, "_exception_hook_set", False)
    patch.setattr(sys, "excepthook", sys.__excepthook__)


def hide_tasks_of_lm_eval(patch: pytest.MonkeyPatch) -> None:
    """Hides the 14,000 tasks that come with the harness, which take seconds to list."""
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__
    without = {"include_defaults": False}
    patch.setattr(TaskManager, "__init__", lambda self, **options: init(self, **{**options, **without}))


def install_kernels(patch: pytest.MonkeyPatch, modeling: ModuleType, keep_apart: bool = True) -> list[str]:
    """Replaces the functions of a modeling file of transformers for which kernels exist by stand-ins.

    Like those of `fla`, `causal_conv1d` and `mamba_ssm` they take the borders of packed sequences. Unless
    `keep_apart`, they ignore them. Returns a list to which each call with borders appends its function.
    """
    calls: list[str] = []

    def replace(name: str, token_axis: int, function: Callable[..., Any]) -> None:
        def kernel(*args: Any, cu_seqlens: Any = None, seq_idx: Any = None, **kwargs: Any) -> Any:
            if cu_seqlens is not None:
                lengths = cu_seqlens.diff().tolist()
            elif seq_idx is not None:
                lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
            else:
                return function(*args, **kwargs)
            calls.append(name)
            if not keep_apart:
                return function(*args, **kwargs)
            num_tokens = args[0].shape[token_axis]

            def split(value: Any) -> list[Any]:
                is_of_row = isinstance(value, torch.Tensor) and value.ndim > 2
                if not is_of_row or value.shape[token_axis] != num_tokens:
                    return [value] * len(lengths)
                return list(value.split(lengths, token_axis))

            split_args = [split(value) for value in args]
            split_kwargs = {key: split(value) for key, value in kwargs.items()}
            outs = [
                function(
                    *(parts[index] for parts in split_args),
                    **{key: parts[index] for key, parts in split_kwargs.items()},
                )
                for index in range(len(lengths))
            ]
            if isinstance(outs[0], tuple):
                return torch.cat([out for out, _ in outs], token_axis), outs[-1][1]
            return torch.cat(outs, token_axis)

        patch.setattr(modeling, name, kernel)

    for name, token_axis in (
        ("causal_conv1d_fn", 2),
        ("torch_chunk_gated_delta_rule", 1),
        ("mamba2_chunk_scan", 1),
    ):
        if hasattr(modeling, name):
            replace(name, token_axis, getattr(modeling, name))
    return calls


def draw_blank_pictures(patch: pytest.MonkeyPatch) -> None:
    """Makes matplotlib write one white pixel for each picture, as drawing takes longer than a run."""
    from matplotlib.figure import Figure
    from PIL import Image

    def save(figure: Figure, file: Any, **options: Any) -> None:
        Image.new("RGB", (1, 1), "white").save(file, "PNG")

    patch.setattr(Figure, "savefig", save)


def fail_to_load(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Makes every load of a model's weights raise `error`."""

    def load(*args: Any, **options: Any) -> Any:
        raise error

    patch.setattr(pretrained, "load_causal_lm", load)


def install_cuda_runtime(
    patch: pytest.MonkeyPatch,
    num_devices: int = 2,
    capability: tuple[int, int] = (9, 0),
    is_initialized: bool = False,
    torch_version: str = torch.__version__,
) -> list[tuple[str, Any]]:
    """Replaces the CUDA runtime by one with these devices, on which nothing can be computed.

    1 GiB of each is in use, 2 were at the peak, and 3 are reserved. Returns a list of what is called, with
    the device: "set_device", "record" (of an event on a stream), "reset_peak_memory_stats".
    """
    calls: list[tuple[str, Any]] = []
    current = [torch.device("cuda", 0)]

    class Event:
        def __init__(self, **options: Any) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            calls.append(("record", current[0] if stream is None else stream.device))

        def synchronize(self) -> None:
            pass

    def set_device(device: torch.device) -> None:
        calls.append(("set_device", device))
        current[0] = device

    runtime = {
        "is_available": lambda: True,
        "is_initialized": lambda: is_initialized,
        "device_count": lambda: num_devices,
        "current_device": lambda: current[0].index,
        "current_stream": lambda device=None: SimpleNamespace(device=device or current[0]),
        "set_device": set_device,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a device",
        "memory_allocated": lambda device=None: 2**30,
        "max_memory_allocated": lambda device=None: 2 * 2**30,
        "memory_reserved": lambda device=None: 3 * 2**30,
        "reset_peak_memory_stats": lambda device=None: calls.append(("reset_peak_memory_stats", device)),
        "Event": Event,
    }
    for name, value in runtime.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch, "__version__", torch_version)
    return calls


def install_flash_attention_3(patch: pytest.MonkeyPatch, activates: bool = True) -> list[str]:
    """Makes the package of FlashAttention 3 look installed. Returns a list of what torch is told to use.

    Unless `activates`, torch itself looks for kernels in it, and finds none.
    """
    module = ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    patch.setitem(sys.modules, "flash_attn_interface", module)
    activated: list[str] = []
    if activates:
        patch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    return activated


@contextlib.contextmanager
def fake_cuda_tensors(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes new tensors fake ones, without values, which may be on devices of `install_cuda_runtime`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    empty = torch.empty
    patch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    patch.setattr(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
    with FakeTensorMode():
        yield


@contextlib.contextmanager
def run_varlen_attention_on_the_cpu() -> Iterator[None]:
    """Replaces the variable-length attention of torch, which needs CUDA, by a plain softmax in fp64.

    The last query of a sequence sees its last key, and earlier queries fewer (`torch.nn.attention.varlen`).
    """

    def attend(
        query: Any, key: Any, value: Any, starts_q: Any, starts_k: Any, window: list[int], scale: Any
    ) -> Any:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1], "flash-attention takes heads of one size"
        outs = []
        for number in range(len(starts_q) - 1):
            part = slice(int(starts_q[number]), int(starts_q[number + 1]))
            keys = slice(int(starts_k[number]), int(starts_k[number + 1]))
            q, k, v = query[part], key[keys], value[keys]
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
            places = torch.arange(len(k))
            distance = places[len(k) - len(q) :, None] - places
            is_seen = (distance >= -window[1]) & ((distance <= window[0]) | (window[0] < 0))
            weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs)

    def forward(
        query: Any,
        key: Any,
        value: Any,
        starts_q: Any,
        starts_k: Any,
        longest_q: int,
        longest_k: int,
        is_causal: bool,
        scale: Any,
        window: list[int],
        enable_gqa: bool,
    ) -> Any:
        assert longest_q == int(starts_q.diff().max())
        assert longest_k == int(starts_k.diff().max())
        assert is_causal == (window == [-1, 0])
        assert enable_gqa
        unused = torch.zeros(2)
        return attend(query, key, value, starts_q, starts_k, window, scale), unused, unused

    def backward(
        grad: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        sums: Any,
        starts_q: Any,
        starts_k: Any,
        longest_q: int,
        longest_k: int,
        is_causal: bool,
        rng_state: Any,
        scale: Any,
        window: list[int],
    ) -> Any:
        with torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in (query, key, value)]
            result = attend(*inputs, starts_q, starts_k, window, scale)
        return torch.autograd.grad(result, inputs, grad)

    importlib.import_module("torch.nn.attention.varlen")  # registers the kernels
    kernels = SimpleNamespace(_varlen_attn=forward, _varlen_attn_backward=backward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "torch_attn", kernels)
        yield


class RecordedGraph:
    """Stands for `torch.cuda.CUDAGraph` on a CPU: replays what ran between its begin and its end.

    As on a device, what is captured is not computed: its results are nan, or 0 for integers, until a replay.
    The replay writes them to the same memory. Reading a value is refused. Tensors that were made before the
    capture are filled with nan or 0 when it ends, unless `kept` has them: a captured pass must not read what
    a later one has anew.
    """

    kept: ClassVar[Callable[[], Iterable[torch.Tensor]]] = staticmethod(lambda: ())
    made: ClassVar[set[int]] = set()
    """The memory of the results of all captures, which later ones may read."""
    alive: ClassVar[list[torch.Tensor]] = []

    def __init__(self) -> None:
        self._operators: list[tuple[Any, Any, Any, Any]] = []
        self._read: dict[int, torch.Tensor] = {}
        self._recorder = _GraphRecorder(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        kept = {_memory_of(tensor) for tensor in self.kept()}
        for memory, tensor in self._read.items():
            if memory not in kept:
                _spoil(tensor)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _READS_OF_VALUES:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        memory = {_memory_of(tensor) for tensor in inputs}
        self._read |= {_memory_of(each): each for each in inputs if _memory_of(each) not in self.made}
        out = func(*args, **kwargs)
        new = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        is_view = not func._schema.is_mutable and all(_memory_of(tensor) in memory for tensor in new)
        if not is_view:
            self._operators.append((func, args, kwargs, out))
        for tensor in new:
            if _memory_of(tensor) not in memory:
                self.made.add(_memory_of(tensor))
                self.alive.append(tensor)
                _spoil(tensor)
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._operators:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for to, value in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(to, torch.Tensor):
                        to.copy_(value)


_READS_OF_VALUES = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.bincount.default,
}


class _GraphRecorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._graph.record(func, args, kwargs or {})


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)


def replace_cuda_graphs(patch: pytest.MonkeyPatch, kept: Callable[[], Iterable[torch.Tensor]]) -> None:
    """Gives a CPU graphs of CUDA, which may read the tensors of `kept` and those that they copy to."""

    class Stream:
        def __init__(self, device: Any = None) -> None: ...

        def wait_stream(self, stream: Any) -> None: ...

    patch.setattr(devices, "has_graphs", lambda device: True)
    patch.setattr(RecordedGraph, "kept", staticmethod(kept))
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph_pool_handle", object)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
