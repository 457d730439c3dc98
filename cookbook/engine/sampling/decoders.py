"""Continuations on their way through the model: prompts in, then one token of each at a time.

Shape suffixes: P prompts, R continuations, N tokens of a packed row, S scored positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model import architecture, unembedding
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import is_out_of_memory
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
    """The fastest decoder whose logits are those of the model's own forward pass without a cache.

    Each is compared with that pass once for each model that is loaded, when it is first sampled from. The
    last one is that pass, and needs no comparison.
    """
    make = base.make_decoder or _find_decoder(base)
    return make(base)


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
        return [None, *unembedding.score(self._base.head(), hidden_TD[:-1], targets_S).tolist()]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._base.device, non_blocking=True)


@dataclass(eq=False)
class _Copies:
    """The continuations of one prompt, in the order of the rows of their cache."""

    cache: Any
    handles: list[_Copy]


@dataclass(eq=False)
class _Copy:
    tokens_T: list[int]
    """All that the cache has of it."""


class WholeModelDecoder(Decoder):
    """With the model's own attention and transformers' cache: the copies of each prompt in one batch."""

    def __init__(self, base: BaseModel) -> None:
        accepted = inspect.signature(base.model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in accepted]
        if not names:
            raise ValueError(f"{type(base.model).__name__} takes no cache that is made outside of it")
        self._base = base
        self._cache_name = names[0]
        self._takes_positions = "position_ids" in accepted
        self._border = architecture.longrope_threshold(base.model.config.get_text_config())
        self._groups: list[_Copies] = []

    def start(self, prompts: Sequence[Prompt]) -> Started:
        logits, logprobs = [], []
        handles: list[list[Any]] = []
        for prompt in prompts:
            tokens_1T = torch.tensor([list(prompt.tokens_T)], device=self._base.device)
            kept = {} if prompt.wants_logprobs else _only_the_last(self._base)
            logits_1TV, cache = self._read(tokens_1T, **kept)
            logits.append(logits_1TV[0, -1].float())
            logprobs.append(_logprobs_of(logits_1TV[0], tokens_1T[0]) if prompt.wants_logprobs else None)
            _select_rows(cache, [0] * prompt.num_copies)
            group = _Copies(cache, [_Copy(list(prompt.tokens_T)) for _ in range(prompt.num_copies)])
            self._groups.append(group)
            handles.append([*group.handles])
        return Started(handles, torch.stack(logits), logprobs)

    def step(self, handles: Sequence[_Copy], tokens: Sequence[int]) -> Tensor:
        for handle, token in zip(handles, tokens, strict=True):
            handle.tokens_T.append(token)
        found: dict[_Copy, Tensor] = {}
        for group in self._groups:
            found.update(zip(group.handles, self._logits_of(group).float(), strict=True))
        return torch.stack([found[handle] for handle in handles])

    def _logits_of(self, group: _Copies) -> Tensor:
        """[R, V]: behind the newest token of each copy, which the cache does not have yet."""
        length = len(group.handles[0].tokens_T)
        if length - 1 == self._border:  # what the cache has was rotated in another way
            tokens = [handle.tokens_T for handle in group.handles]
            logits_RTV, group.cache = self._read(
                torch.tensor(tokens, device=self._base.device), **_only_the_last(self._base)
            )
            return logits_RTV[:, -1]
        tokens_R1 = torch.tensor([handle.tokens_T[-1:] for handle in group.handles], device=self._base.device)
        # Not every model counts what is in its cache, so it is told where the token stands.
        positions_R1 = torch.full_like(tokens_R1, length - 1)
        positions = {"position_ids": positions_R1} if self._takes_positions else {}
        return self._run(tokens_R1, group.cache, **positions)[:, -1]

    def remove(self, handle: _Copy) -> None:
        (group,) = (group for group in self._groups if handle in group.handles)
        place = group.handles.index(handle)
        del group.handles[place]
        if not group.handles:
            self._groups.remove(group)
            return
        others = [row for row in range(len(group.handles) + 1) if row != place]
        _select_rows(group.cache, others)

    def _read(self, tokens_RT: Tensor, **more: Any) -> tuple[Tensor, Any]:
        cache = _make_cache(self._base.model.config)
        return self._run(tokens_RT, cache, **more), cache

    def _run(self, tokens_RT: Tensor, cache: Any, **more: Any) -> Tensor:
        caching = {self._cache_name: cache, "use_cache": True}
        logits_RTV: Tensor = self._base.model(tokens_RT, **caching, **more).logits
        return logits_RTV


class RereadingDecoder(Decoder):
    """Without a cache: the model reads each continuation anew for every token. Slow, and always right."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def start(self, prompts: Sequence[Prompt]) -> Started:
        logits, logprobs = [], []
        for prompt in prompts:
            logits_TV = self.logits(
                prompt.tokens_T, **({} if prompt.wants_logprobs else _only_the_last(self._base))
            )
            logits.append(logits_TV[-1])
            tokens_T = torch.tensor(list(prompt.tokens_T), device=self._base.device)
            logprobs.append(_logprobs_of(logits_TV, tokens_T) if prompt.wants_logprobs else None)
        handles = [[list(prompt.tokens_T) for _ in range(prompt.num_copies)] for prompt in prompts]
        return Started(handles, torch.stack(logits), logprobs)

    def step(self, handles: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
        logits = []
        for tokens_T, token in zip(handles, tokens, strict=True):
            tokens_T.append(token)
            logits.append(self.logits(tokens_T, **_only_the_last(self._base))[-1])
        return torch.stack(logits)

    def remove(self, handle: list[int]) -> None:
        """Nothing is held but its tokens."""

    def logits(self, tokens_T: Sequence[int], **more: Any) -> Tensor:
        """[T, V]"""
        tokens_1T = torch.tensor([list(tokens_T)], device=self._base.device)
        logits_TV: Tensor = self._base.model(input_ids=tokens_1T, use_cache=False, **more).logits[0]
        return logits_TV.float()


def _only_the_last(base: BaseModel) -> dict[str, int]:
    """The argument with which a model that knows it returns the logits of the last position alone."""
    return (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.model.forward).parameters else {}
    )


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


_DECODERS: tuple[type[Decoder], ...] = (PackedDecoder, WholeModelDecoder, RereadingDecoder)
"""From the fastest to the one that is always right."""


_TOLERANCE, _TOLERANCE_OF_16_BITS = 2e-5, 0.05
"""How far logits may be off, as a share of the largest. In fp32 rounding is below 5e-6; what transformers
5.23 caches for Zamba2 is another computation, and moves them by 2e-5 to 4e-4."""


@torch.no_grad()
def _find_decoder(base: BaseModel) -> Callable[[BaseModel], Decoder]:
    """The first decoder that passes the trial, kept as `base.make_decoder`. Warns of each that does not.

    Where the model's own logits are not finite nothing can be compared: then it is the last one, and the
    trial is left to a later time.
    """
    *candidates, last = _DECODERS if base.is_packed else _DECODERS[1:]
    with base.adapters.using(None):
        trial = _Trial.of(base)
        if not trial.is_conclusive:
            return last
        found = next((decoder for decoder in candidates if _passes(base, decoder, trial)), last)
    base.make_decoder, base.decodes_packed = found, found is PackedDecoder
    return found


def _passes(base: BaseModel, decoder: type[Decoder], trial: _Trial) -> bool:
    reason = trial.why_not(decoder)
    if reason is not None:
        slower = _DECODERS[_DECODERS.index(decoder) + 1].__name__
        logger.warning(
            "%s is not sampled from with %s: %s. Sampling falls back to %s, which is slower.",
            base.name,
            decoder.__name__,
            reason,
            slower,
        )
    return reason is None


@dataclass(frozen=True)
class _Trial:
    """Three short continuations, and what the model's own forward pass without a cache says of each.

    The first is alone for a token; then two copies of another prompt, longer, join it and go different ways,
    of which one leaves early.
    """

    base: BaseModel
    sequences: list[list[int]]
    expected_TV: list[Tensor]

    @classmethod
    def of(cls, base: BaseModel) -> _Trial:
        generator = torch.Generator().manual_seed(0)
        first, second, third = (
            torch.randint(base.vocab_size, (length,), generator=generator).tolist() for length in (6, 7, 8)
        )
        third[:6] = second[:6]
        sequences = [first, second, third]
        reader = RereadingDecoder(base)
        return cls(base, sequences, [reader.logits(tokens_T) for tokens_T in sequences])

    @property
    def is_conclusive(self) -> bool:
        return not any(logits_TV.isnan().any() for logits_TV in self.expected_TV)

    def why_not(self, make: Callable[[BaseModel], Decoder]) -> str | None:
        """Why sampling with this decoder would be another model's; None if it would not."""
        try:
            difference = max(self._differences(make(self.base)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.base.discard_pass()
            return f"{type(error).__name__}: {error}"
        tolerance = _TOLERANCE if self.base.dtype == torch.float32 else _TOLERANCE_OF_16_BITS
        return (
            None if difference <= tolerance else f"its logits would move by {difference:.1e} of the largest"
        )

    def _differences(self, decoder: Decoder) -> Iterator[float]:
        """How far the logits of each pass are from what is expected, as a share of the largest."""
        first, second, third = self.sequences

        def compare(number: int, length: int, found_V: Tensor) -> float:
            expected_V = self.expected_TV[number][length - 1]
            off_V = torch.where(found_V == expected_V, 0.0, found_V - expected_V)
            largest = expected_V.masked_fill(expected_V.isinf(), 0.0).abs().max()
            share = (off_V.abs().max() / largest.clamp_min(1e-6)).item()
            return math.inf if math.isnan(share) else share

        started = decoder.start([Prompt(first[:3], 1)])
        ((alone,),) = started.handles
        yield compare(0, 3, started.logits_PV[0])
        yield compare(0, 4, decoder.step([alone], first[3:4])[0])
        started = decoder.start([Prompt(second[:6], 2)])
        ((one, other),) = started.handles
        yield compare(1, 6, started.logits_PV[0])
        logits_RV = decoder.step([alone, one, other], [first[4], second[6], third[6]])
        yield compare(0, 5, logits_RV[0])
        yield compare(1, 7, logits_RV[1])
        yield compare(2, 7, logits_RV[2])
        decoder.remove(one)
        logits_RV = decoder.step([other, alone], [third[7], first[5]])
        yield compare(2, 8, logits_RV[0])
        yield compare(0, 6, logits_RV[1])
