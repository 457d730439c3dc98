"""Replays the passes that decode one token on CUDA: the host does not launch their kernels one by one.

A pass is captured as one CUDA graph for each part between two calls of the attention. The attention itself
runs as ever, over the cache as it is now: sequences come, grow, move between buckets and leave, and nothing
that was captured depends on them. What is captured depends on the number of rows, which is rounded up to a
few sizes, and on the weights: their addresses are compared when a batch begins. What was captured for others
is forgotten.

The first pass of a size runs as ever and warms up, the second one is captured, replayed and compared with the
same pass uncaptured. A model whose pass cannot be captured, because its code asks the device for a value, or
has another result, is decoded as ever from then on, and a line of the log says so.

Shape suffixes: N rows, D hidden size, H heads, T tokens.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cookbook.engine import devices
from cookbook.engine.model.attention import AttentionLayout, Cache
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import is_out_of_memory
from cookbook.engine.model.stacked_4bit import StackedIn4Bits

logger = logging.getLogger(__name__)

ROWS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The numbers of rows of a pass. A pass of more rows is not captured."""
_MAX_PASSES = 6
"""How many passes are kept. The one that was not replayed for longest is forgotten first."""
SWITCH = "COOKBOOK_CUDA_GRAPHS"
"""The environment variable that turns this off with `0`."""
_TOLERANCE = 0.02
"""The largest difference between a replayed pass and the same one uncaptured, as a share of the largest
number. Libraries may choose other kernels in a capture, which round differently."""

Attend = Callable[..., Tensor]
"""The attention of a layer, of queries, keys and values [1, H, N, .], over a cache: [1, N, H, .]."""


def num_rows(num_sequences: int, multiple: int) -> int:
    """Returns the rows of a pass over so many sequences."""
    place = bisect.bisect_left(ROWS, num_sequences)
    return ROWS[place] if place < len(ROWS) else num_sequences + -num_sequences % multiple


def why_not(base: BaseModel) -> str | None:
    """Returns why the passes of a model are not captured, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if base.recurrent.mixers:
        return "its layers keep states, which move with their sequences"
    if base.is_sharded:
        return "its weights are gathered in each pass"
    if base.options.compile:
        return "its layers are compiled"
    if any(isinstance(weight, StackedIn4Bits) for weight in base.model.parameters()):
        return "its experts in 4 bits wait for the number of their rows"
    return None


@dataclass
class _Warmed:
    """What a pass that ran as ever shows of its attention."""

    results: list[Tensor] = field(default_factory=list)
    """A tensor for the result of each call, of its shape and dtype."""

    def __call__(self, attend: Attend, *qkv_and_cache: Any) -> Tensor:
        result = attend(*qkv_and_cache)
        self.results.append(torch.empty_like(result))
        return result


class _Captured:
    """A captured pass, with the tensors that it reads and writes."""

    def __init__(self, tokens_2N: Tensor, results: list[Tensor]) -> None:
        self.tokens_2N = tokens_2N.clone()
        """Tokens and positions, which each replay reads."""
        self.hidden_ND: Tensor
        """The result, which each replay writes."""
        self._results = results
        self._calls: list[tuple[Attend, Tensor, Tensor, Tensor]] = []
        self._parts: list[Any] = []
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[Tensor, Any], Tensor]) -> None:
        """Records the pass `run(tokens, around the attention)`, without running it."""
        self._begin()
        try:
            self.hidden_ND = run(self.tokens_2N, self._between_parts)
        finally:
            self._parts[-1].capture_end()

    def _begin(self) -> None:
        part = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        part.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._parts.append(part)

    def _between_parts(self, attend: Attend, *qkv_and_cache: Any) -> Tensor:
        """Ends a part, and begins the one behind a call of the attention."""
        *qkv, _ = qkv_and_cache
        self._parts[-1].capture_end()
        self._calls.append((attend, *qkv))
        self._begin()
        return self._results[len(self._calls) - 1]

    def replay(self, tokens_2N: Tensor, cache: Cache) -> Tensor:
        """Returns the hidden states of these tokens: [N, D]. The next replay overwrites them."""
        self.tokens_2N.copy_(tokens_2N)
        for part, call, result in zip(self._parts, self._calls, self._results, strict=False):
            part.replay()
            attend, *qkv = call
            result.copy_(attend(*qkv, cache))
        self._parts[-1].replay()
        return self.hidden_ND


class DecodeGraphs:
    """The captured passes of a model. They belong to one adapter and one place of all weights at a time."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._of: Any = None
        """What they were captured for."""
        self._warmed: dict[int, list[Tensor]] = {}
        self._captured: OrderedDict[int, _Captured] = OrderedDict()
        self._stream: Any = None
        self._is_off = False
        self.num_captured = 0
        self.num_replays = 0

    def begin(self) -> None:
        """Forgets the passes of another adapter, or of weights that have moved since."""
        found = self._base.adapters.in_use, tuple(_addresses(self._base.model))
        if found != self._of:
            self.forget()
            self._of = found

    def forget(self) -> None:
        """Frees the memory of all passes."""
        self._warmed.clear()
        self._captured.clear()

    def hidden_of(self, tokens_2N: Tensor, layout: AttentionLayout) -> Tensor:
        """Returns the hidden states after a token of each sequence in the layout's cache: [N, D].

        They are valid until the next call. `tokens_2N` has the tokens and their positions.
        """
        number, cache = tokens_2N.shape[1], layout.cache
        assert cache is not None

        def run(tokens_2N: Tensor, around: Any = None) -> Tensor:
            return self._base.hidden_of(tokens_2N[:1], tokens_2N[1:], replace(layout, around=around))

        if number not in ROWS or self._is_off:
            return run(tokens_2N)
        if number in self._captured:
            self._captured.move_to_end(number)
            self.num_replays += 1
            return self._captured[number].replay(tokens_2N, cache)
        if number not in self._warmed:
            warmed = _Warmed()
            hidden_ND = run(tokens_2N, warmed)
            self._warmed[number] = warmed.results
            return hidden_ND
        with self._on_stream_of_capture():
            hidden_ND = run(tokens_2N)  # libraries make what they need for this stream
        with self._turning_off_on_failure():
            captured = _Captured(tokens_2N, self._warmed.pop(number))
            torch.cuda.synchronize(self._base.device)
            with self._on_stream_of_capture():
                captured.capture(run)
            _check_equal(captured.replay(tokens_2N, cache), hidden_ND)
            self._captured[number] = captured
            self.num_captured += 1
            while len(self._captured) > _MAX_PASSES:
                self._captured.popitem(last=False)
        return hidden_ND

    @contextlib.contextmanager
    def _on_stream_of_capture(self) -> Iterator[None]:
        device = self._base.device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(device).wait_stream(self._stream)

    @contextlib.contextmanager
    def _turning_off_on_failure(self) -> Iterator[None]:
        """Decodes as ever, from now on, if the body fails. The pass has its result already."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.forget()
            if is_out_of_memory(error):
                raise
            self._is_off, self._base.is_captured, self._base.decode_graphs = True, False, None
            logger.warning(
                "%s is decoded without CUDA graphs, kernel by kernel, which is slower: %s",
                self._base.name,
                str(error).partition("\n")[0],
            )


def graphs_of(base: BaseModel) -> DecodeGraphs | None:
    """Returns the captured passes of a model on CUDA for a batch that begins, or None if there are none.

    Says once in the log why a model on CUDA has none.
    """
    if not devices.has_graphs(base.device) or base.is_captured is False:
        return None
    if base.is_captured is None:
        reason = why_not(base)
        base.is_captured = reason is None
        if reason is not None:
            logger.info("%s is decoded without CUDA graphs: %s.", base.name, reason)
            return None
        base.decode_graphs = DecodeGraphs(base)
    base.decode_graphs.begin()
    return base.decode_graphs


def _check_equal(found_ND: Tensor, expected_ND: Tensor) -> None:
    """Raises ValueError if a replayed pass differs from the same pass uncaptured by more than rounding."""
    is_known = expected_ND.isfinite()
    largest = expected_ND.where(is_known, 0).abs().max()
    difference = (found_ND - expected_ND).where(is_known, 0).abs().max() / largest.clamp_min(1e-6)
    if not difference.item() <= _TOLERANCE:
        raise ValueError(f"a captured pass differs by {difference.item():.1e} of the largest number")


def _addresses(model: torch.nn.Module) -> Iterator[int]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.data_ptr()
