"""Continuations on their way through the model: prompts in, then one token of each at a time.

Shape suffixes: P prompts, R continuations, N tokens of a packed row, S scored positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cookbook.engine import projection
from cookbook.engine.attention import AttentionLayout
from cookbook.engine.base_model import BaseModel
from cookbook.engine.sampling.kv_cache import KVCache, Row, capacity_for

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 8
"""Passes are padded to a multiple: matrix products of fewer rows round in another way on some CPUs, and a
continuation would differ in the last bit with what it shares a batch with."""


@dataclass(frozen=True)
class Prompt:
    """Tokens of which `num_copies` continuations are to go on."""

    tokens_T: Sequence[int]
    num_copies: int
    wants_logprobs: bool = False


@dataclass(frozen=True)
class Started:
    """Prompts that were read: their continuations, the logits behind each, and what was asked for."""

    handles: list[list[Any]]
    """For each prompt those of its copies; only the decoder knows what they are."""
    logits_PV: Tensor
    logprobs: list[list[float | None] | None]


class Decoder(ABC):
    @abstractmethod
    def start(self, prompts: Sequence[Prompt]) -> Started:
        """Reads prompts."""

    @abstractmethod
    def step(self, handles: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """Reads one token of every continuation that there is, and returns the logits behind it: [R, V]."""

    @abstractmethod
    def remove(self, handle: Any) -> None:
        """Frees what a continuation holds."""

    def cached_tokens(self, length: int) -> int:
        """How many positions are held for a continuation of so many."""
        return length


def make_decoder(base: BaseModel) -> Decoder:
    """The packed one, if this model comes out the same with it; that is tried once."""
    if base.decodes_packed is None:
        base.decodes_packed = _decodes_packed(base)
    return PackedDecoder(base) if base.decodes_packed else WholeModelDecoder(base)


class PackedDecoder(Decoder):
    """All continuations in one row, over a cache of our own."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._cache = KVCache()

    def start(self, prompts: Sequence[Prompt]) -> Started:
        lengths = [len(prompt.tokens_T) for prompt in prompts]
        rows = [[Row(len(prompt.tokens_T)) for _ in range(prompt.num_copies)] for prompt in prompts]
        padding = -sum(lengths) % _ROWS_AT_A_TIME
        lengths_and_padding = [*lengths, padding] if padding else lengths
        ends = np.cumsum(lengths_and_padding)
        tokens_N = np.concatenate([*(prompt.tokens_T for prompt in prompts), np.zeros(padding, np.int64)])
        positions_N = np.concatenate([np.arange(length) for length in lengths_and_padding])
        segments = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        starts = self._to_device(np.array([0, *ends], np.int32))
        layout = AttentionLayout(segments, starts, max(lengths_and_padding), cache=self._cache)
        self._cache.expect_prompts(rows)
        hidden_ND = self._base.hidden_of(
            self._to_device(tokens_N[None]), self._to_device(positions_N[None]), layout
        )
        last_P = np.array([stop - 1 for _, stop in segments[: len(prompts)]])
        logprobs = [
            self._prompt_logprobs(hidden_ND[start:stop], prompt) if prompt.wants_logprobs else None
            for prompt, (start, stop) in zip(prompts, segments, strict=False)
        ]
        return Started(rows, self._logits(hidden_ND[self._to_device(last_P)]), logprobs)

    def step(self, handles: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        order = self._cache.expect_tokens(handles)
        num_rows = len(order)
        num_tokens = num_rows + -num_rows % _ROWS_AT_A_TIME
        tokens_N, positions_N = np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.int64)
        tokens_N[:num_rows] = [tokens[number] for number in order]
        positions_N[:num_rows] = [handles[number].length - 1 for number in order]
        segments = [(place, place + 1) for place in range(num_tokens)]
        starts = torch.empty(0, dtype=torch.int32)  # only the cache looks at this row
        layout = AttentionLayout(segments, starts, longest=1, cache=self._cache)
        hidden_ND = self._base.hidden_of(
            self._to_device(tokens_N[None]), self._to_device(positions_N[None]), layout
        )
        place_R = np.empty(num_rows, np.int64)
        place_R[order] = np.arange(num_rows)
        return self._logits(hidden_ND[self._to_device(place_R)])

    def remove(self, handle: Row) -> None:
        self._cache.remove(handle)

    def cached_tokens(self, length: int) -> int:
        return capacity_for(length)

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        padding = -len(hidden_RD) % _ROWS_AT_A_TIME
        padded_RD = torch.nn.functional.pad(hidden_RD, (0, 0, 0, padding))
        return self._base.head().logits(padded_RD)[: len(hidden_RD)]

    def _prompt_logprobs(self, hidden_TD: Tensor, prompt: Prompt) -> list[float | None]:
        targets_S = self._to_device(np.asarray(prompt.tokens_T[1:], np.int64))
        return [None, *projection.score(self._base.head(), hidden_TD[:-1], targets_S).tolist()]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._base.device, non_blocking=True)


@dataclass(eq=False)
class _Copies:
    """The continuations of one prompt, in the order of the rows of their cache."""

    cache: Any
    handles: list[object]


class WholeModelDecoder(Decoder):
    """With the model's own attention and transformers' cache: the copies of each prompt in one batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._groups: list[_Copies] = []

    def start(self, prompts: Sequence[Prompt]) -> Started:
        logits, logprobs = [], []
        handles: list[list[Any]] = []
        for prompt in prompts:
            cache = _make_cache(self._base.model.config)
            tokens_1T = torch.tensor([list(prompt.tokens_T)], device=self._base.device)
            kept = {} if prompt.wants_logprobs else {"logits_to_keep": 1}
            out = self._base.model(tokens_1T, past_key_values=cache, use_cache=True, **kept)
            logits.append(out.logits[0, -1].float())
            logprobs.append(_logprobs_of(out.logits[0], tokens_1T[0]) if prompt.wants_logprobs else None)
            _select_rows(cache, [0] * prompt.num_copies)
            group = _Copies(cache, [object() for _ in range(prompt.num_copies)])
            self._groups.append(group)
            handles.append(group.handles[:])
        return Started(handles, torch.stack(logits), logprobs)

    def step(self, handles: Sequence[object], tokens: Sequence[int]) -> Tensor:
        tokens_by_handle = dict(zip(handles, tokens, strict=True))
        found: dict[object, Tensor] = {}
        for group in self._groups:
            tokens_R1 = torch.tensor([[tokens_by_handle[handle]] for handle in group.handles])
            out = self._base.model(
                tokens_R1.to(self._base.device), past_key_values=group.cache, use_cache=True
            )
            found.update(zip(group.handles, out.logits[:, -1].float(), strict=True))
        return torch.stack([found[handle] for handle in handles])

    def remove(self, handle: object) -> None:
        (group,) = (group for group in self._groups if handle in group.handles)
        place = group.handles.index(handle)
        del group.handles[place]
        if not group.handles:
            self._groups.remove(group)
            return
        others = [row for row in range(len(group.handles) + 1) if row != place]
        _select_rows(group.cache, others)


def _make_cache(config: Any) -> Any:
    """Keeps all positions also where attention is local: some models name a window and do not use it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers
    ]
    return cache


def _select_rows(cache: Any, rows: list[int]) -> None:
    """By what beam search does, which layers without keys and values know too."""
    cache.reorder_cache(torch.tensor(rows))


def _logprobs_of(logits_TV: Tensor, tokens_T: Tensor) -> list[float | None]:
    logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
    return [None, *logprobs_TV.gather(1, tokens_T[1:, None])[:, 0].tolist()]


@torch.no_grad()
def _decodes_packed(base: BaseModel) -> bool:
    """Whether the logits behind some tokens are those of one pass over them all."""
    if not base.is_packed:
        return False
    ids_T = torch.randint(base.vocab_size, (6,), generator=torch.Generator().manual_seed(0)).tolist()
    expected_V = PackedDecoder(base).start([Prompt(ids_T, 1)]).logits_PV[0]
    try:
        decoder = PackedDecoder(base)
        ((handle,),) = decoder.start([Prompt(ids_T[:3], 1)]).handles
        for token in ids_T[3:]:
            found_V = decoder.step([handle], [token])[0]
        difference = ((found_V - expected_V).abs().max() / expected_V.abs().max()).item()
        reason = f"its logits would move by {difference:.1%}"
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        difference, reason = torch.inf, f"{type(error).__name__}: {error}"
    if difference <= (1e-4 if base.dtype == torch.float32 else 0.05):
        return True
    logger.info("%s samples one prompt at a time: %s.", base.name, reason)
    return False
