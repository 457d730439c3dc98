"""Sampling from one snapshot: requests that wait at the same time go through the model together.

Between two tokens, whatever has arrived joins, and what is complete leaves; so short continuations wait for
no long ones. What is sampled does not depend on the company: each continuation has its own random numbers.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.loading import return_freed_memory
from cookbook.engine.model.memory import bytes_for_sampling, is_out_of_memory
from cookbook.engine.model.packing import TokenSequence, pack, plan_microbatches
from cookbook.engine.sampling.choice import choose
from cookbook.engine.sampling.decoders import Decoder, Prompt, make_decoder
from cookbook.engine.sampling.requests import Request, SampleRequest, ScoreRequest
from cookbook.errors import TrainingError
from cookbook.types import SampledSequence, SampleResponse, StopReason

logger = logging.getLogger(__name__)

_MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Continuations at a time; more bring little (`benchmarks/LOG.md`)."""
_PROMPT_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Of prompts that are read in one pass; a longer one is read alone."""

Prepared = Future[tuple[Adapter | None, int | None]]
"""A snapshot's adapter, and the seed of samples that bring none."""


@dataclass(eq=False)
class _Continuation:
    request: SampleRequest
    index: int
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None
    handle: Any = None
    _uniform: float | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt_T) + len(self.tokens)

    def uniform(self) -> float:
        """The random number of the next token, the same until there is that token."""
        if self._uniform is None:
            self._uniform = self.generator.random()
        return self._uniform

    def add(self, token: int, logprob: float) -> None:
        self._uniform = None
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.request.stop_rule.is_met(self.tokens):
            self.stop_reason = "stop"
        elif len(self.tokens) == self.request.max_tokens or self.request.is_abandoned:
            self.stop_reason = "length"
        if self.request.on_token is not None:
            self.request.on_token(self.index, token)


@dataclass(eq=False)
class _Answer:
    """What there is so far of the answer to a request."""

    continuations: list[_Continuation]
    prompt_logprobs: list[float | None] | None = None

    def response(self) -> SampleResponse:
        sequences = []
        for each in self.continuations:
            assert each.stop_reason is not None
            sequences.append(SampledSequence(each.tokens, each.logprobs, each.stop_reason))
        return SampleResponse(sequences, self.prompt_logprobs)


class Sampler:
    """Answers requests on one snapshot. Runs on the engine's thread: a `worker.Batcher`, which fails what an
    error leaves without an answer."""

    def __init__(self, base: BaseModel, prepared: Prepared) -> None:
        self._base = base
        self._prepared = prepared

    def run(self, first: Request, take_waiting: Callable[[], list[Request]]) -> None:
        batch = None
        try:
            arrived = _not_cancelled([first, *take_waiting()])
            adapter, seed = self._prepared.result()
            with torch.no_grad(), self._base.adapters.using(adapter):
                batch = _Batch(self._base, seed)
                while arrived or batch.is_busy:
                    batch.add(arrived)
                    batch.advance()
                    arrived = _not_cancelled(take_waiting())
        finally:
            del batch
            return_freed_memory()


class _Batch:
    """The continuations that are in progress, and those that wait for room."""

    def __init__(self, base: BaseModel, seed: int | None) -> None:
        kind = "cuda" if base.device.type == "cuda" else "cpu"
        self._base = base
        self._seed = seed
        self._decoder: Decoder = make_decoder(base)
        self._max_rows = _MOST_ROWS[kind]
        self._max_prompt_tokens = _PROMPT_TOKENS[kind]
        room = bytes_for_sampling(base.device)
        if base.is_sharded:  # what runs together is the same on all processes
            (room,) = base.world.all_reduce_min(room)
        self._max_cached_tokens = room // _cache_bytes_per_token(base)
        self._scores: list[ScoreRequest] = []
        self._waiting: deque[_Continuation] = deque()
        self._running: list[_Continuation] = []
        self._answers: dict[SampleRequest, _Answer] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._scores or self._waiting or self._running)

    def add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if isinstance(request, ScoreRequest):
                self._scores.append(request)
                continue
            seed = request.params.seed
            if seed is None:
                entropy = None if self._seed is None else [self._seed, request.index_of_unseeded]
                seed = int(np.random.default_rng(entropy).integers(2**31))
            continuations = [
                _Continuation(request, index, np.random.default_rng([seed, index]))
                for index in range(request.num_samples)
            ]
            self._answers[request] = _Answer(continuations)
            self._waiting.extend(continuations)

    def advance(self) -> None:
        """Lets in what waits, as far as there is room, then takes one token of everything that is running."""
        try:
            self._score()
            self._let_in()
            self._step()
        except (RuntimeError, MemoryError) as error:
            if self._base.is_sharded:  # the other processes are still at what failed here
                raise self._base.world.abort(error) from error
            if not is_out_of_memory(error):
                raise
            self._start_over_with_less()

    # -- parts of a step --------------------------------------------------------------------

    def _score(self) -> None:
        requests = self._scores = [request for request in self._scores if not request.future.done()]
        lengths = [len(request.tokens_T) - 1 for request in requests]
        most = self._max_prompt_tokens if self._base.is_packed else 1
        for indices in plan_microbatches(lengths, most) if requests else []:
            sequences = [_to_score(requests[index].tokens_T) for index in indices if lengths[index]]
            scores = iter(self._scores_of(sequences) if sequences else [])
            for index in indices:
                logprobs, is_argmax = next(scores) if lengths[index] else ([], [])
                if (error := self._error_of_scores([None, *logprobs])) is not None:
                    requests[index].future.set_exception(error)
                    continue
                requests[index].is_argmax_T = [None, *is_argmax]
                requests[index].future.set_result([None, *logprobs])
        self._scores = []

    def _scores_of(self, sequences: Sequence[TokenSequence]) -> list[tuple[list[float], list[bool]]]:
        batch = pack(sequences, self._base.device, trained_only=False)
        logprobs, is_argmax = (batch.layout.split(of_S.cpu().numpy()) for of_S in self._base.scores(batch))
        return [
            (logprobs_T.tolist(), (is_argmax_T != 0).tolist())
            for logprobs_T, is_argmax_T in zip(logprobs, is_argmax, strict=True)
        ]

    def _let_in(self) -> None:
        while self._waiting:
            arriving = self._next_prompts()
            if not arriving:
                return
            prompts = [
                Prompt(
                    [*copies[0].request.prompt_T, *copies[0].tokens],
                    len(copies),
                    copies[0].request.include_prompt_logprobs and not copies[0].tokens,
                )
                for copies in arriving
            ]
            started = self._decoder.start(prompts)
            for copies, handles, logprobs in zip(arriving, started.handles, started.logprobs, strict=True):
                for continuation, handle in zip(copies, handles, strict=True):
                    continuation.handle = handle
                    self._running.append(continuation)
                if logprobs is None:
                    continue
                self._answers[copies[0].request].prompt_logprobs = logprobs
                if (error := self._error_of_scores(logprobs)) is not None:
                    self._fail(copies[0].request, error)
            copies_P = torch.tensor([len(copies) for copies in arriving], device=self._base.device)
            self._take_tokens(
                [continuation for copies in arriving for continuation in copies],
                started.logits_PV.repeat_interleave(copies_P, dim=0),
            )

    def _next_prompts(self) -> list[list[_Continuation]]:
        """Takes from the queue what is to be let in by one pass, those that share a prompt together."""
        arriving: list[list[_Continuation]] = []
        num_tokens, num_rows = 0, len(self._running)
        cached = self._cached_tokens(self._running)
        while self._waiting and num_rows < self._max_rows:
            next_one = self._waiting[0]
            cached += self._decoder.cached_tokens(next_one.length + 1)
            if num_rows and cached > self._max_cached_tokens:
                break
            shares = (
                arriving
                and arriving[-1][0].request is next_one.request
                and not (arriving[-1][0].tokens or next_one.tokens)
            )
            if not shares and arriving and num_tokens + next_one.length > self._max_prompt_tokens:
                break
            if shares:
                arriving[-1].append(self._waiting.popleft())
            else:
                num_tokens += next_one.length
                arriving.append([self._waiting.popleft()])
            num_rows += 1
        return arriving

    def _step(self) -> None:
        self._put_back_what_does_not_fit()
        if not self._running:
            return
        logits_RV = self._decoder.step(
            [continuation.handle for continuation in self._running],
            [continuation.tokens[-1] for continuation in self._running],
        )
        self._take_tokens(list(self._running), logits_RV)

    def _take_tokens(self, continuations: Sequence[_Continuation], logits_RV: Tensor) -> None:
        choice = choose(
            logits_RV,
            [continuation.request.params for continuation in continuations],
            [continuation.uniform() for continuation in continuations],
        )
        chosen = (of_R.tolist() for of_R in (choice.tokens_R, choice.logprobs_R, choice.has_none_R))
        for continuation, token, logprob, has_none in zip(continuations, *chosen, strict=True):
            if continuation.request not in self._answers:
                continue  # it failed by its prompt, or by another of its samples
            if has_none:
                self._fail(continuation.request, _no_distribution(self._base, continuation.length))
                continue
            try:
                continuation.add(token, logprob)
            except Exception as error:  # of what came with the request: its stop rule, or whom it tells
                if self._base.is_sharded:
                    raise
                self._fail(continuation.request, error)
                continue
            if continuation.stop_reason is not None:
                self._leave(continuation)

    def _fail(self, request: SampleRequest, error: Exception) -> None:
        """Answers one request with an error; the others go on."""
        for continuation in self._answers.pop(request).continuations:
            if continuation in self._running:
                self._decoder.remove(continuation.handle)
                self._running.remove(continuation)
        self._waiting = deque(each for each in self._waiting if each.request is not request)
        request.future.set_exception(error)

    def _error_of_scores(self, logprobs: Sequence[float | None]) -> TrainingError | None:
        """What a request is to be told for whose tokens the model has no probabilities."""
        is_missing = (place for place, each in enumerate(logprobs) if each is not None and math.isnan(each))
        first = next(is_missing, None)
        return None if first is None else _no_distribution(self._base, first)

    def _leave(self, continuation: _Continuation) -> None:
        self._decoder.remove(continuation.handle)
        self._running.remove(continuation)
        answer = self._answers[continuation.request]
        if all(each.stop_reason is not None for each in answer.continuations):
            del self._answers[continuation.request]
            continuation.request.future.set_result(answer.response())

    # -- memory -----------------------------------------------------------------------------

    def _cached_tokens(self, continuations: Sequence[_Continuation]) -> int:
        return sum(self._decoder.cached_tokens(continuation.length + 1) for continuation in continuations)

    def _put_back_what_does_not_fit(self) -> None:
        """The youngest continuations wait, and read their tokens so far again when there is room."""
        while len(self._running) > 1 and self._cached_tokens(self._running) > self._max_cached_tokens:
            youngest = self._running.pop()
            self._decoder.remove(youngest.handle)
            self._waiting.appendleft(youngest)

    def _start_over_with_less(self) -> None:
        """All continuations wait again, and half as much is held from now on."""
        self._decoder = make_decoder(self._base)
        self._running = []
        if self._max_rows == self._max_prompt_tokens == 1:
            self._give_up_on_the_first()
        unfinished = [
            each for answer in self._answers.values() for each in answer.continuations if not each.stop_reason
        ]
        self._waiting = deque(unfinished)
        self._max_rows = max(1, min(self._max_rows, len(unfinished) + len(self._scores)) // 2)
        self._max_prompt_tokens = 1 if self._max_rows == 1 else max(1, self._max_prompt_tokens // 2)
        self._max_cached_tokens //= 2
        if self.is_busy:
            logger.warning(
                "Sampling does not fit in memory: going on with at most %d at a time.", self._max_rows
            )

    def _give_up_on_the_first(self) -> None:
        """It ran alone."""
        request: Request = self._scores.pop(0) if self._scores else next(iter(self._answers))
        num_tokens = len(request.tokens_T) if isinstance(request, ScoreRequest) else len(request.prompt_T)
        if isinstance(request, SampleRequest):
            num_tokens += max(len(each.tokens) for each in self._answers.pop(request).continuations)
        request.future.set_exception(
            TrainingError(
                f"{num_tokens} tokens do not fit in the memory of {self._base.device} even alone. Use a "
                f"shorter prompt, a smaller max_tokens, or a smaller model."
            )
        )


def _not_cancelled(requests: Iterable[Request]) -> list[Request]:
    return [request for request in requests if request.future.set_running_or_notify_cancel()]


def _no_distribution(base: BaseModel, num_tokens: int) -> TrainingError:
    dtype = str(base.dtype).removeprefix("torch.")
    return TrainingError(
        f"{base.name} has no probabilities for the token behind the first {num_tokens}: its logits there are "
        f"nan or infinite. The weights that are sampled from have diverged, or a number is too large for "
        f"dtype={dtype}. Sample from an earlier checkpoint, train with a lower learning_rate, or use "
        f"dtype=float32."
    )


def _to_score(tokens_T: Sequence[int]) -> TokenSequence:
    ids_T = np.asarray(tokens_T, dtype=np.int64)
    return TokenSequence(ids_T[:-1], ids_T[1:], np.ones(len(ids_T) - 1, np.float32), {})


def _cache_bytes_per_token(base: BaseModel) -> int:
    """Of keys and values in all layers; an estimate from above where a model keeps less."""
    config = base.model.config.get_text_config()
    num_query_heads = getattr(config, "num_attention_heads", None) or 1
    num_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_query_heads
    return max(1, 2 * config.num_hidden_layers * num_heads * head_size * base.dtype.itemsize)
