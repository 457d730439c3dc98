"""Runs a recurrent layer once over a row in which what several sequences share stands once.

A state depends on what is before it, not on what follows. So the row is cut where a branch leaves its stem,
the pieces that follow others get their last states, and gradients flow back through these states. All pieces
with as many pieces before them run as a few zero-padded batches. A short convolution needs no state: each
segment is convolved together with the few tokens before it.

This replaces the functions that transformers uses without kernels. All else in such a layer acts on each
token alone, so the layer itself runs over the row. A layer that mixes tokens in another way runs over each
sequence as a whole (`recurrence`).

Shape suffixes: N tokens of the row, P tokens of all batches with their padding, R pieces of a batch, L tokens
of the longest of them, K kernel size of a convolution, C channels, H heads, D size of a head.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cookbook.engine.model.packing import copy_to
from cookbook.engine.model.prefix_tree import Segment
from cookbook.engine.model.replaced_functions import ReplacedFunctions
from cookbook.engine.model.selective_scan import selective_scan
from cookbook.engine.model.tree_attention import TreeLayout

_CHUNK_TOKENS = 64
"""The largest chunk of a scan."""
_CHUNK_MULTIPLE = 16

Scan = Callable[[list[Tensor], Tensor | None, bool], tuple[Tensor, Tensor | None]]
"""Runs a batch of pieces, tensors [R, L, ...], from their states at the beginning, None for zeros. Returns
the outputs [R, L, ...] and, if they are asked for, the states at the end [R, ...]. Tokens of zeros change no
state."""


@dataclass(frozen=True)
class _PieceBatch:
    """Pieces that run together."""

    shape: tuple[int, int]
    """R and L."""
    parents: Tensor | None
    """The place of each piece's state among those of the level before, or None without pieces before."""
    has_children: bool


@dataclass(frozen=True)
class StateTree:
    """The pieces of a row's segments, in the order in which they can run."""

    num_tokens: int
    levels: list[list[_PieceBatch]]
    rows_P: Tensor
    """The place in the row of each token of the batches, N for padding."""
    place_N: Tensor
    """The place in [P] of each token of the row."""
    segments: Sequence[Segment]
    ancestors: Sequence[Sequence[Segment]]
    _windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tree: TreeLayout, batches_by_length: Callable[[list[int]], list[list[int]]], device: torch.device
    ) -> StateTree:
        """Returns the tree of a row without cached tokens."""
        pieces, parents = _pieces(tree)
        by_level: list[list[int]] = []
        level_of: list[int] = []
        for number, parent in enumerate(parents):  # a piece is behind its parent
            level_of.append(0 if parent is None else level_of[parent] + 1)
            if level_of[-1] == len(by_level):
                by_level.append([])
            by_level[level_of[-1]].append(number)
        num_tokens = tree.segments[-1][1]
        levels: list[list[_PieceBatch]] = []
        rows: list[np.ndarray] = []
        place_N = np.empty(num_tokens, np.int64)
        num_places = 0
        places_before: dict[int, int] = {}
        with_children = set(parents)
        for numbers in by_level:
            has_children = not with_children.isdisjoint(numbers)
            lengths = [pieces[number][1] - pieces[number][0] for number in numbers]
            batches: list[_PieceBatch] = []
            places: dict[int, int] = {}
            for members in batches_by_length(lengths):
                chosen = [numbers[member] for member in members]
                width = max(lengths[member] for member in members)
                rows_RL = np.full((len(chosen), width), num_tokens, np.int64)
                for row, number in enumerate(chosen):
                    start, stop = pieces[number]
                    rows_RL[row, : stop - start] = np.arange(start, stop)
                    place_N[start:stop] = num_places + row * width + np.arange(stop - start)
                    places[number] = len(places)
                num_places += rows_RL.size
                rows.append(rows_RL.ravel())
                before = [
                    places_before[parent] for number in chosen if (parent := parents[number]) is not None
                ]
                indices = copy_to(device, np.array(before, np.int64)) if before else None
                batches.append(_PieceBatch(rows_RL.shape, indices, has_children))
            levels.append(batches)
            places_before = places
        return cls(
            num_tokens,
            levels,
            copy_to(device, np.concatenate(rows)),
            copy_to(device, place_N),
            tree.segments,
            tree.ancestors,
        )

    def scan(self, tensors: Sequence[Tensor], scan: Scan) -> Tensor:
        """Returns the outputs of a scan over the row, [1, N, ...], given its inputs [1, N, ...]."""
        sizes = [math.prod(batch.shape) for batches in self.levels for batch in batches]
        in_batches = [
            F.pad(tensor[0], (0, 0) * (tensor.ndim - 2) + (0, 1)).index_select(0, self.rows_P).split(sizes)
            for tensor in tensors
        ]
        outs: list[Tensor] = []
        states: Tensor | None = None
        for batches in self.levels:
            found: list[Tensor] = []
            for batch in batches:
                parts = [parts[len(outs)].unflatten(0, batch.shape) for parts in in_batches]
                before = None
                if batch.parents is not None:
                    assert states is not None
                    before = states.index_select(0, batch.parents)
                out, state = scan(parts, before, batch.has_children)
                outs.append(out.flatten(0, 1))
                if state is not None:
                    found.append(state)
            states = torch.cat(found) if found else None
        return torch.cat(outs).index_select(0, self.place_N)[None]

    def convolve(self, x_1CN: Tensor, kernel_size: int, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns a causal convolution over the row: [1, C, N]. `convolve` pads its input with zeros."""
        if kernel_size not in self._windows:
            self._windows[kernel_size] = self._window(kernel_size - 1, x_1CN.device)
        rows, own_N = self._windows[kernel_size]
        return convolve(F.pad(x_1CN, (0, 1)).index_select(2, rows)).index_select(2, own_N)

    def _window(self, num_before: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the places in the row of each segment with the tokens before it, and those of its own."""
        rows: list[np.ndarray] = []
        own: list[np.ndarray] = []
        end = 0
        for (start, stop), ancestors in zip(self.segments, self.ancestors, strict=True):
            before = np.full(num_before, self.num_tokens)
            missing = num_before
            for first, last in reversed(ancestors):
                number = min(missing, last - first)
                before[missing - number : missing] = np.arange(last - number, last)
                missing -= number
            rows += [before, np.arange(start, stop)]
            own.append(end + num_before + np.arange(stop - start))
            end += num_before + stop - start
        return copy_to(device, np.concatenate(rows)), copy_to(device, np.concatenate(own))


def _pieces(tree: TreeLayout) -> tuple[list[Segment], list[int | None]]:
    """Returns the pieces of the segments in the order of the row, and the number of the piece before each."""
    cuts = {ancestors[-1][1] for ancestors in tree.ancestors if ancestors}
    pieces: list[Segment] = []
    parents: list[int | None] = []
    ends: dict[int, int] = {}
    for (start, stop), ancestors in zip(tree.segments, tree.ancestors, strict=True):
        parent = ends[ancestors[-1][1]] if ancestors else None
        for end in (*sorted(cut for cut in cuts if start < cut < stop), stop):
            parents.append(parent)
            parent = ends[end] = len(pieces)
            pieces.append((start, end))
            start = end
    return pieces, parents


def chunk_size_for(length: int, largest: int) -> int:
    """Returns the chunk size of a Mamba-2 scan over sequences of `length` tokens, up to the model's own.

    It changes the result by rounding alone. The time within a chunk grows with the square of its size, and
    the torch fallback pads to whole chunks, so the 128 to 256 tokens of most models are slow on a CPU.
    """
    return math.ceil(length / math.ceil(length / min(largest, _CHUNK_TOKENS)))


class TreeFunctions:
    """The functions by which a mixer mixes tokens, and what they are over a row with a tree."""

    def __init__(self, mixer: nn.Module) -> None:
        self.tree: StateTree | None = None
        self._functions = ReplacedFunctions(
            mixer, _FUNCTIONS, lambda name, theirs: functools.partial(_FUNCTIONS[name], self, theirs)
        )

    @property
    def are_known(self) -> bool:
        """Whether the mixer has any of these functions."""
        return self._functions.are_found

    def tree_of(self, value: Tensor, axis: int = 1) -> StateTree:
        """Returns the tree of the row. Raises ValueError if a function gets something else than the row."""
        tree = self.tree
        if tree is None or value.shape[0] != 1 or value.shape[axis] != tree.num_tokens:
            raise ValueError(f"its recurrent layers scan {list(value.shape)}, not the tokens of the row")
        return tree

    @contextlib.contextmanager
    def in_use(self, tree: StateTree) -> Iterator[None]:
        """Lets the mixer's code run over a row with this tree in the body."""
        self.tree = tree
        try:
            with self._functions.in_use():
                yield
        finally:
            self.tree = None


def _convolution(
    functions: TreeFunctions,
    theirs: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    tree = functions.tree_of(hidden_states, 2)
    return tree.convolve(hidden_states, weight.shape[-1], lambda x: theirs(x, weight, *args, **kwargs))


def _delta_rule(
    functions: TreeFunctions,
    theirs: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = _CHUNK_TOKENS,
    initial_state: None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A token of zeros writes nothing and forgets nothing, because `g` is the log of what remains."""
    tree = functions.tree_of(value)

    def scan(parts: list[Tensor], state: Tensor | None, has_children: bool) -> tuple[Tensor, Tensor | None]:
        query, key, value, g, beta = parts
        size = min(chunk_size, -(-value.shape[1] // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
        return theirs(
            query,
            key,
            value,
            g=g,
            beta=beta,
            chunk_size=size,
            initial_state=state,
            output_final_state=has_children,
            **kwargs,
        )

    return tree.scan([query, key, value, g, beta], scan), None


def _mamba2_scan(
    functions: TreeFunctions,
    theirs: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The time steps are computed here, so that those of padding are 0: such a token changes no state."""
    tree = functions.tree_of(hidden_states)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    def scan(parts: list[Tensor], state: Tensor | None, has_children: bool) -> tuple[Tensor, Tensor | None]:
        hidden_states, dt, B, C = parts
        size = chunk_size_for(dt.shape[1], chunk_size)
        out = theirs(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size=size,
            D=D,
            initial_states=state,
            return_final_states=has_children,
            **kwargs,
        )
        return out if has_children else (out, None)

    return tree.scan([hidden_states, dt, B, C], scan)


def _mamba_scan(
    functions: TreeFunctions,
    theirs: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Tensor:
    """transformers' scan, which kernels may replace on CUDA, begins with a state of zeros. The recurrence is
    linear, so what a state adds to the outputs is added to them: the state, after the decay since it, read by
    C. On a CPU the scan of `selective_scan` begins with the state."""
    tree = functions.tree_of(hidden_states, 2)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)

    def scan(parts: list[Tensor], state: Tensor | None, has_children: bool) -> tuple[Tensor, Tensor | None]:
        hidden_states, dt, B, C = (part.transpose(1, 2) for part in parts)
        if hidden_states.device.type == "cpu":
            out, last = selective_scan(
                hidden_states, dt, A, B, C, return_last_state=True, initial_state=state
            )
            return out.transpose(1, 2), last if has_children else None
        out, last = theirs(hidden_states, dt, A, B, C, return_last_state=True, **kwargs)
        if state is not None:
            decay_RCTN = (dt.float().cumsum(-1)[..., None] * A[:, None]).exp()
            kept_RCTN = decay_RCTN * state[:, :, None]
            out = out + (kept_RCTN * C.float().transpose(1, 2)[:, None]).sum(-1).to(out.dtype)
            last = last + kept_RCTN[:, :, -1].to(last.dtype)
        return out.transpose(1, 2), last if has_children else None

    inputs = [part.transpose(1, 2) for part in (hidden_states, dt, B, C)]
    out = tree.scan(inputs, scan).transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    return out


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba_selective_scan": _mamba_scan,
}
"""By their names in transformers 5.23."""
