"""Recurrent layers over packed sequences: short convolutions, Mamba, linear attention.

Such a layer passes a state from each token to the next. In transformers without kernels it does so across the
borders of packed sequences too. Here the row is split at the borders, the sequences run through the layer as
a few zero-padded batches of similar lengths, and the results are joined again. The layers are causal, so
padding on the right changes nothing.

Shape suffixes: N tokens of a packed row, P tokens of all batches with their padding, R sequences of a batch,
L tokens of the longest of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.engine.model.attention import AttentionLayout, Segment
from cookbook.engine.model.packing import copy_to

_STATE_METHODS = {
    *("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"),
    "get_linear_cache",
}
"""The methods of transformers' caches for the states of recurrent layers."""
_BATCH_TOKENS = 256
"""The cost of one more batch, in padding tokens (`benchmarks/hybrids.py`)."""
_CHUNK_TOKENS = 64
"""The largest chunk of a Mamba-2 scan on a CPU."""


def recurrent_mixers(decoder: nn.Module) -> list[nn.Module]:
    """Returns the modules that mix tokens other than by attention, in the order of the layers.

    A mixer reads or writes such a state of the cache, or owns a convolution over tokens. Where mixers are
    nested, the outermost is returned.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if _is_mixer(child):
                found.append(child)
            else:
                visit(child)

    visit(decoder)
    return found


def _is_mixer(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    functions = (inspect.unwrap(value) for value in vars(type(module)).values() if inspect.isfunction(value))
    return any(not _STATE_METHODS.isdisjoint(function.__code__.co_names) for function in functions)


@dataclass(frozen=True)
class SplitRow:
    """The places of a packed row's tokens in its batches. All batches are parts of one row of P tokens."""

    place_N: Tensor
    """The place of each token in [P]."""
    shapes: list[tuple[int, int]]
    """The R and L of each batch."""
    num_tokens: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> SplitRow:
        place_N = np.empty(segments[-1][1], np.int64)
        shapes, first = [], 0
        for indices in batches_by_length([stop - start for start, stop in segments]):
            longest = max(segments[index][1] - segments[index][0] for index in indices)
            for row, index in enumerate(indices):
                start, stop = segments[index]
                place_N[start:stop] = first + row * longest + np.arange(stop - start)
            shapes.append((len(indices), longest))
            first += len(indices) * longest
        return cls(copy_to(device, place_N), shapes, len(place_N))

    def is_of_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (1, self.num_tokens)

    def split(self, value: Any) -> list[Any]:
        """Returns the part of an argument for each batch: tensors [1, N, ...] become [R, L, ...]."""
        if isinstance(value, tuple | list):
            parts = [self.split(each) for each in value]
            return [type(value)(each[batch] for each in parts) for batch in range(len(self.shapes))]
        if not self.is_of_row(value):
            return [value] * len(self.shapes)
        sizes = [num_rows * length for num_rows, length in self.shapes]
        padded_P = value.new_zeros(sum(sizes), *value.shape[2:]).index_copy(0, self.place_N, value[0])
        parts = padded_P.split(sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[Any]) -> Any:
        """Returns the result for the whole row: tensors [R, L, ...] of the batches become one [1, N, ...].

        Other results, such as a state that the row has no use for, become None.
        """
        if isinstance(parts[0], tuple | list):
            return type(parts[0])(self.join(each) for each in zip(*parts, strict=True))
        for part, shape in zip(parts, self.shapes, strict=True):
            if not isinstance(part, Tensor) or part.shape[:2] != shape:
                return None
        padded_P = torch.cat([part.flatten(0, 1) for part in parts])
        return padded_P.index_select(0, self.place_N)[None]


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Returns the indices of the sequences of each batch, chosen so that batches and padding cost least."""
    order_R = np.argsort(lengths, kind="stable")
    sorted_R = np.asarray(lengths)[order_R]
    num_rows = len(order_R)
    costs, firsts = np.zeros(num_rows + 1), np.zeros(num_rows + 1, np.int64)
    for end in range(1, num_rows + 1):  # costs[i] is the least cost of the i shortest sequences
        candidates = costs[:end] + _BATCH_TOKENS + np.arange(end, 0, -1) * sorted_R[end - 1]
        firsts[end] = candidates.argmin()
        costs[end] = candidates.min()
    batches, end = [], num_rows
    while end:
        batches.append(order_R[firsts[end] : end].tolist())
        end = firsts[end]
    return batches


class RecurrentLayers:
    """The recurrent mixers of a model, whose forward passes keep packed sequences apart."""

    def __init__(self, decoder: nn.Module) -> None:
        self.mixers = recurrent_mixers(decoder)
        self.num_calls = 0
        """How many mixers ran in the last forward pass."""
        self._row: SplitRow | None = None
        """The row of the last forward pass, which stays for its backward pass."""
        for mixer in self.mixers:
            mixer.forward = self._splitting(mixer, mixer.forward)
        if self.mixers:
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Prepares for a pass of the model. Without a layout nothing is split."""
        layout: AttentionLayout | None = kwargs.get("layout")
        self.num_calls = 0
        self._row = None if layout is None else SplitRow.of(layout.segments, layout.starts.device)

    def _splitting(self, mixer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        own_chunk_size = getattr(mixer, "chunk_size", None)

        # The batches differ for every row, so a compiled layer would be recompiled for each row.
        @torch.compiler.disable
        def split_forward(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            row = self._row
            if row is None:
                return forward(*args, **kwargs)
            outs = []
            batches = zip(row.shapes, row.split(args), row.split(tuple(kwargs.values())), strict=True)
            try:
                for (_, length), some, others in batches:
                    if isinstance(own_chunk_size, int) and row.place_N.device.type == "cpu":
                        mixer.chunk_size = _chunk_size_for(length, own_chunk_size)
                    outs.append(forward(*some, **dict(zip(kwargs, others, strict=True))))
            finally:
                if own_chunk_size is not None:
                    mixer.chunk_size = own_chunk_size
            return row.join(outs)

        return split_forward


def _chunk_size_for(length: int, largest: int) -> int:
    """Returns the chunk size of a Mamba-2 scan over sequences of `length` tokens, up to the model's own.

    It changes the result by rounding alone. The time within a chunk grows with the square of its size, and
    the torch fallback pads to whole chunks, so the 128 to 256 tokens of most models are slow on a CPU.
    """
    return math.ceil(length / math.ceil(length / min(largest, _CHUNK_TOKENS)))
