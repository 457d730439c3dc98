"""Recurrent layers over packed sequences: short convolutions, Mamba, linear attention.

Such a layer passes a state from each token to the next. In transformers without kernels it does so across the
borders of packed sequences too. Here the row is split at the borders, the sequences run through the layer as
a few zero-padded batches of similar lengths, and the results are joined again. The layers are causal, so
padding on the right changes nothing.

What sequences of a row share stands once in it. Layers whose functions are known run over it once, and states
are handed to the branches (`recurrent_trees`). Through others each sequence runs as a whole, and only its own
tokens are joined again (`shared_projections`).

The kernels of `fla`, `causal_conv1d` and `mamba_ssm` keep packed sequences apart themselves when they get the
borders. With them a row without a cache or shared beginnings is not split.

Shape suffixes: N tokens of a packed row, P tokens of all batches with their padding, R sequences of a batch,
L tokens of the longest of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.engine.model.attention import AttentionLayout, Segment
from cookbook.engine.model.packing import copy_to
from cookbook.engine.model.recurrent_kernels import SamplingFunctions
from cookbook.engine.model.recurrent_trees import StateTree, TreeFunctions, chunk_size_for
from cookbook.engine.model.selective_scan import TrainingFunctions
from cookbook.engine.model.shared_projections import SharedProjections
from cookbook.engine.model.tree_attention import TreeLayout

_STATE_METHODS = {
    *("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"),
    "get_linear_cache",
}
"""The methods of transformers' caches for the states of recurrent layers."""
_CACHE_NAMES, _MASK_NAMES = ("cache_params", "past_key_values"), ("attention_mask", "conv_mask")
"""What mixers call the cache, and the mask [R, L] of tokens that are not padding."""
_PREFILL_MULTIPLE = 64
"""Prompts are padded to a multiple of this many tokens."""
_BATCH_TOKENS = 256
"""The cost of one more batch, in padding tokens (`benchmarks/hybrids.py`)."""


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


class _Parameters:
    """The parameters of a mixer's forward pass: names of those for the cache and the mask, or empty."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._signature = inspect.signature(forward)
        names = [*self._signature.parameters]
        self.cache = next((name for name in _CACHE_NAMES if name in names), "")
        self.mask = next((name for name in _MASK_NAMES if name in names), "")
        kinds = {parameter.kind: name for name, parameter in self._signature.parameters.items()}
        self.further = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        """The name of what takes all others."""
        self.takes_states = bool(self.cache and self.mask)
        self._num_before = min(map(names.index, (self.cache, self.mask))) if self.takes_states else -1

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        return arguments | arguments.pop(self.further, {})

    def are_before_states(self, args: tuple[Any, ...]) -> bool:
        """Returns whether the cache and the mask are parameters, and none of these arguments."""
        return len(args) <= self._num_before


@dataclass(frozen=True)
class SplitRow:
    """The places of a packed row's tokens in its batches. All batches are parts of one row of P tokens."""

    place_N: Tensor
    """The place of each token of the row in [P]."""
    shapes: list[tuple[int, int]]
    """The R and L of each batch."""
    states: Sequence[Any] | None = None
    """When sampling, a cache of transformers for each batch, with the states of its sequences."""
    is_padded: Sequence[bool] = ()
    """When sampling, whether each batch has padding."""
    is_single_tokens: bool = False
    """Whether every sequence is one token, so that the batch has the tokens in their order."""
    places_Q: Tensor | None = None
    """The place in [P] of each token of the tree's paths, if the row has one."""
    rows_Q: Tensor | None = None
    """The place of those tokens in the row."""
    own_in_batches: Sequence[Tensor] = ()
    """The places in each batch of the tokens that are joined again, if the row has a tree."""

    @classmethod
    def of(cls, layout: AttentionLayout) -> SplitRow:
        device, lengths = layout.starts.device, [stop - start for start, stop in layout.segments]
        cache = layout.cache
        if cache is None and layout.tree is not None:
            return cls._of_paths(layout.segments, layout.tree, batches_by_length(layout.tree.lengths), device)
        if cache is None:
            place_N, shapes = _placed(layout.segments, batches_by_length(lengths))
            return cls(copy_to(device, place_N), shapes)
        if not cache.is_prefill:  # each segment is one token
            num_rows = len(lengths)
            return cls(
                torch.arange(num_rows, device=device),
                [(num_rows, 1)],
                [cache.states(num_rows)],
                [False],
                is_single_tokens=True,
            )
        # A state is that after the last token, so padding is on the left. How much there is depends on a
        # sequence alone. Padding would change a state that is continued, so such a sequence has none.
        by_width: dict[tuple[int, bool], list[int]] = {}
        for index, length in enumerate(lengths):
            is_continued = cache.is_continued(index)
            width = length if is_continued else length + -length % _PREFILL_MULTIPLE
            by_width.setdefault((width, is_continued), []).append(index)
        batches, widths = list(by_width.values()), [width for width, _ in by_width]
        is_padded = [
            any(lengths[index] != width for index in batch)
            for width, batch in zip(widths, batches, strict=True)
        ]
        place_N, shapes = _placed(layout.segments, batches, widths)
        return cls(copy_to(device, place_N), shapes, cache.new_states(batches), is_padded)

    @classmethod
    def _of_paths(
        cls,
        segments: Sequence[Segment],
        tree: TreeLayout,
        batches: Sequence[Sequence[int]],
        device: torch.device,
    ) -> SplitRow:
        """Returns the row as one in which each path of the tree is a sequence, with what it shares."""
        ends = np.cumsum(tree.lengths).tolist()
        paths = list(zip([0, *ends[:-1]], ends, strict=True))
        places_Q, shapes = _placed(paths, batches)
        own_N = np.concatenate(
            [np.arange(end - (stop - start), end) for end, (start, stop) in zip(ends, segments, strict=True)]
        )
        own_in_batches, first = [], 0
        for num_rows, length in shapes:
            places = places_Q[own_N] - first
            own_in_batches.append(copy_to(device, places[(places >= 0) & (places < num_rows * length)]))
            first += num_rows * length
        return cls(
            copy_to(device, places_Q[own_N]),
            shapes,
            places_Q=copy_to(device, places_Q),
            rows_Q=tree.rows_P,
            own_in_batches=own_in_batches,
        )

    def project(
        self,
        of_row: dict[str, list[Tensor]],
        number: int,
        input_1ND: Tensor,
        name: str,
        forward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns a projection of a layer's input for one batch. `of_row` keeps those of the whole row."""
        if name not in of_row:
            of_row[name] = self.split(forward(input_1ND))
        return of_row[name][number]

    def is_of_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (1, len(self.place_N))

    def split(self, value: Any) -> list[Any]:
        """Returns the part of an argument for each batch: tensors [1, N, ...] become [R, L, ...]."""
        if self.is_single_tokens:
            return [self.single_tokens(value)]
        if isinstance(value, tuple | list):
            parts = [self.split(each) for each in value]
            return [type(value)(each[batch] for each in parts) for batch in range(len(self.shapes))]
        if isinstance(value, dict):
            values = self.split(tuple(value.values()))
            return [dict(zip(value, each, strict=True)) for each in values]
        if not self.is_of_row(value):
            return [value] * len(self.shapes)
        sizes = [num_rows * length for num_rows, length in self.shapes]
        of_row, places = value[0], self.place_N
        if self.places_Q is not None and self.rows_Q is not None:
            of_row, places = of_row.index_select(0, self.rows_Q), self.places_Q
        padded_P = value.new_zeros(sum(sizes), *value.shape[2:]).index_copy(0, places, of_row)
        parts = padded_P.split(sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def single_tokens(self, value: Any) -> Any:
        """Returns an argument for a batch of single tokens: tensors [1, N, ...] become [N, 1, ...]."""
        if isinstance(value, tuple | list):
            return type(value)(map(self.single_tokens, value))
        if isinstance(value, dict):
            return {name: self.single_tokens(each) for name, each in value.items()}
        return value.transpose(0, 1) if self.is_of_row(value) else value

    def step(
        self,
        forward: Callable[..., Any],
        parameters: _Parameters,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Returns the result of a mixer for single tokens, without what splitting takes."""
        assert self.states is not None
        of_cache = {parameters.cache: self.states[0], parameters.mask: None}
        return self.join([forward(*self.single_tokens(args), **self.single_tokens(kwargs) | of_cache)])

    def join(self, parts: Sequence[Any]) -> Any:
        """Returns the result for the whole row: tensors [R, L, ...] of the batches become one [1, N, ...].

        Other results, such as a state that the row has no use for, become None.
        """
        if isinstance(parts[0], tuple | list):
            return type(parts[0])(self.join(each) for each in zip(*parts, strict=True))
        for part, shape in zip(parts, self.shapes, strict=True):
            if not isinstance(part, Tensor) or part.shape[:2] != shape:
                return None
        if self.is_single_tokens:
            return parts[0].transpose(0, 1)
        padded_P = torch.cat([part.flatten(0, 1) for part in parts])
        return padded_P.index_select(0, self.place_N)[None]


def _placed(
    segments: Sequence[Segment],
    batches: Sequence[Sequence[int]],
    padded_lengths: Sequence[int] | None = None,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Returns the place of each token and the shape of each batch.

    Sequences are padded on the right to the longest, or on the left to the given lengths.
    """
    place_N = np.empty(segments[-1][1], np.int64)
    shapes, first = [], 0
    for number, indices in enumerate(batches):
        lengths = [segments[index][1] - segments[index][0] for index in indices]
        width = max(lengths) if padded_lengths is None else padded_lengths[number]
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            padding = 0 if padded_lengths is None else width - length
            place_N[slice(*segments[index])] = first + row * width + padding + np.arange(length)
        shapes.append((len(indices), width))
        first += len(indices) * width
    return place_N, shapes


def batches_by_length(lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
    """Returns the indices of the sequences of each batch, chosen so that batches and padding cost least.

    A batch of several sequences has at most `max_tokens` with its padding.
    """
    order_R = np.argsort(lengths, kind="stable")
    sorted_R = np.asarray(lengths)[order_R]
    num_rows = len(order_R)
    costs, firsts = np.zeros(num_rows + 1), np.zeros(num_rows + 1, np.int64)
    for end in range(1, num_rows + 1):  # costs[i] is the least cost of the i shortest sequences
        tokens = np.arange(end, 0, -1) * sorted_R[end - 1]
        candidates = costs[:end] + _BATCH_TOKENS + tokens
        if max_tokens is not None:
            candidates[:-1][tokens[:-1] > max_tokens] = np.inf
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
        self.passes_borders = False
        """Whether the mixers get the borders of a row's sequences instead of split rows. Only kernels heed
        them, so `base_model` sets this where a trial gives the right results."""
        self.hands_states_on = True
        """Whether the states of a shared beginning are handed to the branches behind it, in layers whose
        functions are known. `base_model` unsets it where a trial gives other results."""
        self._tree: StateTree | None = None
        """The row of the last forward pass, if it has a tree and states are handed on."""
        self._borders: dict[str, Tensor] | None = None
        """The borders in the last forward pass, if they were passed, under transformers' names."""
        self._row: SplitRow | None = None
        """The row of the last forward pass, which stays for its backward pass."""
        self._has_other_functions = False
        """Whether the functions of a mixer are not known."""
        for mixer in self.mixers:
            mixer.forward = self._splitting(mixer, mixer.forward)
        if self.mixers:
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True)

    @property
    def runs_paths(self) -> bool:
        """Whether sequences that share a beginning run as wholes through a mixer, sharing its projections."""
        return bool(self.mixers) and (self._has_other_functions or not self.hands_states_on)

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Prepares for a pass of the model. Without a layout nothing is split."""
        layout: AttentionLayout | None = kwargs.get("layout")
        self.num_calls = 0
        self._row = self._borders = self._tree = None
        if layout is None:
            return
        if layout.tree is not None and layout.cache is None and self.hands_states_on:
            self._tree = StateTree.of(layout.tree, batches_by_length, layout.starts.device)
            if not self._has_other_functions:
                return
        if self.passes_borders and layout.cache is None and layout.tree is None:
            lengths = [stop - start for start, stop in layout.segments]
            index_1N = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
            device = layout.starts.device
            self._borders = {"cu_seq_lens_q": layout.starts, "seq_idx": copy_to(device, index_1N)}
        else:
            self._row = SplitRow.of(layout)

    def _splitting(self, mixer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        own_chunk_size, layer_idx = getattr(mixer, "chunk_size", None), getattr(mixer, "layer_idx", None)
        parameters = _Parameters(forward)
        sampling_functions, training_functions = SamplingFunctions(mixer), TrainingFunctions(mixer)
        projections, tree_functions = SharedProjections(mixer), TreeFunctions(mixer)
        self._has_other_functions |= not tree_functions.are_known

        # The batches differ for every row, so a compiled layer would be recompiled for each row.
        @torch.compiler.disable
        def split_forward(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self._borders is not None:
                if not parameters.further:
                    raise ValueError(f"{type(mixer).__name__} does not take the borders of sequences")
                return forward(*args, **(kwargs | self._borders))
            if self._tree is not None and tree_functions.are_known:
                with tree_functions.in_use(self._tree):
                    return forward(*args, **kwargs)
            if (row := self._row) is None:
                return forward(*args, **kwargs)
            is_on_cpu = row.place_N.device.type == "cpu"
            if row.is_single_tokens and parameters.are_before_states(args):
                assert row.states is not None
                sampling_functions.continue_from(row.states[0].get_recurrent_state(layer_idx))
                with sampling_functions.in_use() if is_on_cpu else contextlib.nullcontext():
                    return row.step(forward, parameters, args, kwargs)
            arguments = parameters.bound(args, kwargs)
            if row.states is not None:
                if not parameters.takes_states:
                    raise ValueError(f"{type(mixer).__name__} takes no cache that holds its states")
                arguments[parameters.mask] = torch.ones_like(row.place_N, dtype=torch.bool)[None]
            names_of_row = (name for name, value in arguments.items() if row.is_of_row(value))
            input_name = next(names_of_row) if row.own_in_batches else ""
            of_row: dict[str, list[Tensor]] = {}
            functions = training_functions if row.states is None else sampling_functions
            outs: list[Any] = []
            try:
                for number, part in enumerate(row.split(arguments)):
                    if row.states is not None:
                        part[parameters.cache] = states = row.states[number]
                        sampling_functions.continue_from(states.get_recurrent_state(layer_idx))
                        if not row.is_padded[number]:
                            part[parameters.mask] = None
                    if isinstance(own_chunk_size, int) and is_on_cpu:
                        mixer.chunk_size = chunk_size_for(row.shapes[number][1], own_chunk_size)
                    with functions.in_use() if is_on_cpu else contextlib.nullcontext():
                        if not input_name:
                            outs.append(forward(**part))
                            continue
                        project = partial(row.project, of_row, number, arguments[input_name])
                        own = row.own_in_batches[number]
                        with projections.in_use(part[input_name], own, project) as made:
                            outs.append(forward(**part))
                        projections.remember(made, outs[-1])
            finally:
                if own_chunk_size is not None:
                    mixer.chunk_size = own_chunk_size
            return row.join(outs)

        return split_forward
