"""Samples from one snapshot by continuous batching: requests that wait at the same time run together.

Sequences are admitted and leave between two tokens, so short ones do not wait for long ones. A sample does
not depend on the others, because each sequence has its own random stream. What is computed of its prompt
depends on what others left, so its log-probabilities are the same to rounding, not to the bit.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cookbook.engine.model import microbatches, unembedding
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.loading import return_freed_memory
from cookbook.engine.model.memory import bytes_for_sampling, in_gib, is_out_of_memory
from cookbook.engine.model.packing import TokenSequence, copy_to, pack
from cookbook.engine.model.prefix_tree import Family, families
from cookbook.engine.sampling.choice import choose
from cookbook.engine.sampling.decoder_probe import make_decoder
from cookbook.engine.sampling.decoders import Decoder
from cookbook.engine.sampling.kv_cache import capacity_for
from cookbook.engine.sampling.prompt_tree import PromptTree
from cookbook.engine.sampling.requests import Request, SampleRequest, ScoreRequest
from cookbook.engine.sampling.sequence import Sequence
from cookbook.errors import TrainingError
from cookbook.types import IGNORED_TARGET, SampledSequence, SampleResponse

logger = logging.getLogger(__name__)

_MAX_SEQUENCES = {"cpu": 64, "cuda": 256}
"""The number of sequences that run at a time. More are hardly faster (`benchmarks/LOG.md`)."""
_MAX_PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
"""The number of tokens of one prefill. A longer prompt is prefilled alone."""
_MAX_PREFILL_TOKENS_RECURRENT = {"cpu": 4096, "cuda": 8192}
"""The same for models with recurrent layers, which run prompts of similar lengths as one batch: the more
prompts, the larger the batches."""
_KEPT_SHARE = 0.25
"""The share of the memory for sampling that may hold what later prompts reuse, until the model is trained."""


_SHARED_SCORES = 4
"""How many times as many tokens texts with a common beginning may take in one pass, when they are scored:
what they share is computed for each pass."""


@dataclass(frozen=True)
class SamplingLimits:
    """Limits on the sequences and tokens that run at the same time."""

    max_sequences: int
    max_prefill_tokens: int
    max_cached_tokens: int
    """The number of cached positions. A sequence that runs alone may have more."""
    state_positions: int = 0
    """How many cached positions take the memory of one sequence's states of recurrent layers."""
    end_positions: int = 0
    """The same for the states, and the logits, that are kept after a text."""
    max_kept_tokens: int = 0
    """The number of cached positions that are kept for later prompts, where running sequences leave them."""

    @classmethod
    def on(cls, base: BaseModel) -> SamplingLimits:
        """Returns the limits for the model's device, given the memory that is free now."""
        kind = "cuda" if base.device.type == "cuda" else "cpu"
        make_decoder(base)  # measures the cache
        per_position, state_bytes = base.cache_bytes
        per_position = per_position or _cache_bytes_per_token(base)
        num_kept = sum(tree.num_positions for tree in base.prompt_trees)
        room = bytes_for_sampling(base.device, held=num_kept * per_position)
        if base.is_sharded:  # all processes admit the same sequences
            (room,) = base.world.all_reduce_min(room)
        max_prefill_tokens = _MAX_PREFILL_TOKENS_RECURRENT if base.recurrent.mixers else _MAX_PREFILL_TOKENS
        return cls(
            _MAX_SEQUENCES[kind],
            max_prefill_tokens[kind],
            room // per_position,
            math.ceil(state_bytes / per_position),
            math.ceil((state_bytes + 4 * base.vocab_size) / per_position) if state_bytes else 0,
            int(_KEPT_SHARE * room) // per_position,
        )

    def halved(self, num_unanswered: int) -> SamplingLimits:
        """Returns half of each limit, and at most half as many sequences as there are unanswered ones.

        Then nothing is kept for later prompts.
        """
        max_sequences = max(1, min(self.max_sequences, num_unanswered) // 2)
        max_prefill_tokens = 1 if max_sequences == 1 else max(1, self.max_prefill_tokens // 2)
        return replace(
            self,
            max_sequences=max_sequences,
            max_prefill_tokens=max_prefill_tokens,
            max_cached_tokens=self.max_cached_tokens // 2,
            max_kept_tokens=0,
        )


Prepared = Future[tuple[Adapter | None, int | None]]
"""The adapter of a snapshot, and the seed of its unseeded samples."""


class Sampler:
    """Answers the requests to one snapshot. As a `worker.Batcher` it runs on the engine's thread. If an
    error leaves requests without an answer, the engine fails them."""

    def __init__(self, base: BaseModel, prepared: Prepared, limits: SamplingLimits | None = None) -> None:
        """`limits` default to those for the memory that is free when a batch starts."""
        self._base = base
        self._limits = limits
        self._prepared = prepared
        self._prompts: PromptTree | None = None
        """What was computed with the weights of this snapshot, for later prompts."""

    def run(self, first: Request, take_waiting: Callable[[], list[Request]]) -> None:
        batch = None
        try:
            arrived = [first, *take_waiting()]
            adapter, seed = self._prepared.result()
            with torch.no_grad(), self._base.adapters.using(adapter):
                limits = self._limits or SamplingLimits.on(self._base)
                self._prompts = self._prompts or PromptTree(self._base.prompt_trees, limits.end_positions)
                batch = _RunningBatch(self._base, seed, limits, self._prompts)
                while arrived or batch.scores or batch.waiting or batch.running:
                    for request in arrived:
                        if request.future.set_running_or_notify_cancel():
                            batch.add(request)
                    batch.advance()
                    arrived = take_waiting()
        finally:
            if self._prompts is not None and self._base.is_sharded:
                self._prompts.clear()  # all processes must reuse the same, and may free other snapshots
            del batch
            return_freed_memory()


class _RunningBatch:
    """The sequences that run, and those that wait for room."""

    def __init__(
        self, base: BaseModel, seed: int | None, limits: SamplingLimits, prompts: PromptTree
    ) -> None:
        """`seed` is the seed of unseeded requests. If it is None, those are not reproducible."""
        self.scores: list[ScoreRequest] = []
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """The sequences in the decoder's cache, the oldest first."""
        self._sequences: dict[SampleRequest, list[Sequence]] = {}
        """All sequences of each request that is not complete."""
        self._base = base
        self._seed = seed
        self._limits = limits
        self._prompts = prompts
        self._decoder = self._make_decoder()

    def _make_decoder(self) -> Decoder:
        decoder = make_decoder(self._base)
        decoder.prompts = self._prompts
        return decoder

    def add(self, request: Request) -> None:
        """Queues the sequences of a request, or a request for scores."""
        if isinstance(request, ScoreRequest):
            self.scores.append(request)
            return
        seed = request.params.seed
        if seed is None:
            entropy = None if self._seed is None else [self._seed, request.unseeded_index]
            seed = int(np.random.default_rng(entropy).integers(2**31))
        self._sequences[request] = [
            Sequence(request, index, np.random.default_rng([seed, index]))
            for index in range(request.num_samples)
        ]
        self.waiting.extend(self._sequences[request])

    def advance(self) -> None:
        """Admits waiting sequences while there is room, then samples a token of every running sequence."""
        try:
            if self.scores:
                self._score()
            while self.waiting and (groups := self._admit()):
                self._prefill(groups)
            if len(self.running) > 1 or any(tree.num_tokens for tree in self._base.prompt_trees):
                self._preempt()
            if self.running:
                self._draw(self.running[:], self._decoder.decode(self.running))
        except (RuntimeError, MemoryError) as error:
            if self._base.is_sharded:  # the other processes are still running the pass that failed here
                raise self._base.world.abort(error) from error
            if not is_out_of_memory(error):
                raise
            self._restart_with_less()

    # -- the phases -------------------------------------------------------------------------

    def _score(self) -> None:
        """Answers all score requests, in packed passes."""
        for request in self.scores:
            if len(request.tokens_T) == 1 and not request.future.done():
                request.is_argmax_T = [None]
                request.top_logprobs = [None] if request.num_top_logprobs else None
                if request.targets_TJ is not None:
                    request.target_logprobs_TJ = np.zeros(request.targets_TJ.shape, np.float32)
                request.future.set_result([None])
            elif not request.future.done() and (request.num_top_logprobs or request.targets_TJ is not None):
                self._score_more(request)
        requests = self.scores = [request for request in self.scores if not request.future.done()]
        texts = [request.tokens_T for request in requests]
        sequences = [
            TokenSequence(text_T[:-1], text_T[1:], np.ones(len(text_T) - 1, np.float32), {})
            for text_T in texts
        ]
        inputs = [sequence.tokens_T for sequence in sequences]
        kinds = microbatches.rope_kinds(self._base, list(map(len, inputs)))
        waiting = self._plan_scores(families(inputs, self._base.min_shared_tokens, kinds))
        while waiting:
            microbatch = waiting.pop()
            indices = [index for family in microbatch for index in family.indices]
            chosen = [sequences[index] for index in indices]
            batch = pack(chosen, self._base.device, False, microbatch, self._base.is_padded)
            columns = [batch.layout.split(values_S.cpu().numpy()) for values_S in self._base.scores(batch)]
            if len(indices) > len(microbatch) and any(np.isnan(values_T).any() for values_T in columns[0]):
                # A token that leads to nan also spoils what its text shares with others.
                waiting += self._plan_scores(
                    [Family([index], [len(sequences[index])], [0]) for index in indices]
                )
                continue
            for index, logprobs_T, is_argmax_T in zip(indices, *columns, strict=True):
                logprobs = [None, *logprobs_T.tolist()]
                if (error := self._error_of(logprobs)) is not None:
                    requests[index].future.set_exception(error)
                    continue
                requests[index].is_argmax_T = [None, *(is_argmax_T != 0).tolist()]
                requests[index].future.set_result(logprobs)
        self.scores = []

    def _score_more(self, request: ScoreRequest) -> None:
        """Sets the log-probabilities of the most likely tokens and of targets, in the place of each token."""
        inputs_T, outputs_T = request.tokens_T[:-1], request.tokens_T[1:]
        ones_T = np.ones(len(inputs_T), np.float32)
        if (count := request.num_top_logprobs) > 0:
            text = TokenSequence(inputs_T, outputs_T, ones_T, {})
            batch = pack([text], self._base.device, False, is_padded=self._base.is_padded)
            columns = [values.tolist() for values in self._base.top_tokens(batch, count)]
            request.top_logprobs = [None, *([*zip(*row, strict=True)] for row in zip(*columns, strict=True))]
        if request.targets_TJ is None:
            return
        targets_TJ = np.where(request.targets_TJ < 0, IGNORED_TARGET, request.targets_TJ)
        scores_TJ = np.zeros(targets_TJ.shape, np.float32)
        is_named_TJ = targets_TJ != IGNORED_TARGET
        if is_named_TJ.any():
            weights_TJ = is_named_TJ.astype(np.float32)
            text = TokenSequence(inputs_T, targets_TJ, weights_TJ, {})
            batch = pack([text], self._base.device, True, is_padded=self._base.is_padded)
            (found_TJ,) = batch.layout.split(self._base.logprobs(batch).cpu().numpy())
            scores_TJ = np.where(is_named_TJ, found_TJ.reshape(targets_TJ.shape), np.float32(0))
        request.target_logprobs_TJ = scores_TJ

    def _plan_scores(self, families: list[Family]) -> list[list[Family]]:
        """Returns the families of each pass, the first one last. A large family may share a longer row."""
        limit = self._limits.max_prefill_tokens
        plan = microbatches.plan(self._base, families, limit, max_in_memory=_SHARED_SCORES * limit)
        return plan[::-1]

    def _admit(self) -> list[list[Sequence]]:
        """Removes from the queue the sequences for one prefill, and returns them grouped by shared text."""
        groups: list[list[Sequence]] = []
        num_tokens, num_sequences = 0, len(self.running)
        cached_tokens = admitted_tokens = self._needed_positions()
        while self.waiting and num_sequences < self._limits.max_sequences:
            sequence = self.waiting[0]
            cached_tokens += self._positions_of(sequence)
            if num_sequences and cached_tokens > self._limits.max_cached_tokens:
                break
            last = groups[-1][0] if groups else None
            if last is not None and last.request is sequence.request and not (last.tokens or sequence.tokens):
                groups[-1].append(self.waiting.popleft())
            else:
                num_new = sequence.length - self._decoder.num_known(sequence)
                if groups and num_tokens + num_new > self._limits.max_prefill_tokens:
                    break
                num_tokens += num_new
                groups.append([self.waiting.popleft()])
            num_sequences, admitted_tokens = num_sequences + 1, cached_tokens
        self._leave_to_prompts(admitted_tokens)
        return groups

    def _prefill(self, groups: list[list[Sequence]]) -> None:
        """Runs the model over the text of each group, and samples the next token of each of its sequences."""
        logits_GV = self._decoder.prefill(groups)
        admitted = [sequence for group in groups for sequence in group]
        self.running += admitted
        for request in {group[0].request: None for group in groups}:
            if request.prompt_logprobs and (error := self._error_of(request.prompt_logprobs)):
                self._fail(request, error)
        if len(admitted) > len(groups):
            group_R = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
            logits_GV = logits_GV.index_select(0, copy_to(logits_GV.device, group_R))
        self._draw(admitted, logits_GV)

    def _preempt(self) -> None:
        """Preempts the youngest sequences if the cache is too small for all. They are prefilled later."""
        while (needed := self._needed_positions()) > self._limits.max_cached_tokens and len(self.running) > 1:
            youngest = self.running.pop()
            self._decoder.remove(youngest)
            self.waiting.appendleft(youngest)
        self._leave_to_prompts(needed)

    def _leave_to_prompts(self, needed: int) -> None:
        """Leaves to prompts what sequences that need so many positions do not take."""
        left = max(0, self._limits.max_cached_tokens - needed)
        self._prompts.limit(min(left, self._limits.max_kept_tokens))

    def _draw(self, sequences: list[Sequence], logits_RV: Tensor) -> None:
        """Samples the next token of each sequence, and answers the requests that are complete."""
        params = [sequence.request.params for sequence in sequences]
        chosen_3R = choose(logits_RV, params, [sequence.uniform for sequence in sequences])
        columns = chosen_3R.tolist()  # waits for the device
        if asking := [row for row, each in enumerate(sequences) if each.request.num_top_logprobs]:
            self._note_top_logprobs(sequences, asking, logits_RV)
        for sequence, token, logprob, is_undefined in zip(sequences, *columns, strict=True):
            request = sequence.request
            if request.future.done():
                continue  # the request failed because of its prompt or another of its samples
            if is_undefined:
                self._fail(request, _no_distribution(self._base, sequence.length))
                continue
            try:
                sequence.append(int(token), logprob)
            except Exception as error:  # raised by the request's own stop rule or listener
                if self._base.is_sharded:
                    raise
                self._fail(request, error)
                continue
            if sequence.stop_reason is None:
                continue
            self._decoder.remove(sequence)
            self.running.remove(sequence)
            samples = self._sequences[request]
            if all(each.stop_reason is not None for each in samples):
                del self._sequences[request]
                sampled = [
                    SampledSequence(
                        each.tokens,
                        each.logprobs,
                        reason,
                        topk_logprobs=each.top_logprobs if request.num_top_logprobs else None,
                    )
                    for each in samples
                    if (reason := each.stop_reason) is not None
                ]
                num_hits = request.prompt_cache_hit_tokens or 0
                request.future.set_result(SampleResponse(sampled, request.prompt_logprobs, num_hits))

    def _note_top_logprobs(self, sequences: list[Sequence], asking: list[int], logits_RV: Tensor) -> None:
        """Notes the most likely tokens for the sequences in rows whose requests ask for them."""
        logprobs_RV = logits_RV[copy_to(logits_RV.device, np.array(asking))].float().log_softmax(1)
        most = max(sequences[row].request.num_top_logprobs for row in asking)
        best, tokens = (values.tolist() for values in unembedding.top(logprobs_RV, most))
        for row, tokens_J, best_J in zip(asking, tokens, best, strict=True):
            count = sequences[row].request.num_top_logprobs
            sequences[row].top_logprobs.append([*zip(tokens_J[:count], best_J[:count], strict=True)])

    def _needed_positions(self) -> int:
        """Returns how many positions the running sequences need, including the next token of each."""
        return sum(map(self._positions_of, self.running))

    def _positions_of(self, sequence: Sequence) -> int:
        return capacity_for(sequence.length + 1) + self._limits.state_positions

    # -- failures ---------------------------------------------------------------------------

    def _error_of(self, logprobs: list[float | None]) -> TrainingError | None:
        """Returns the error of a request whose tokens the model gives no probabilities, or None."""
        is_nan = (place for place, each in enumerate(logprobs) if each is not None and math.isnan(each))
        first = next(is_nan, None)
        return None if first is None else _no_distribution(self._base, first)

    def _fail(self, request: SampleRequest, error: Exception) -> None:
        """Answers one request with an error. The others continue."""
        for sequence in self._sequences.pop(request):
            if sequence in self.running:
                self._decoder.remove(sequence)
                self.running.remove(sequence)
        self.waiting = deque(sequence for sequence in self.waiting if sequence.request is not request)
        request.future.set_exception(error)

    def _restart_with_less(self) -> None:
        """Preempts all sequences and halves the limits. A request that does not fit alone fails."""
        self._decoder = self._make_decoder()
        self._base.forget_prompts()
        self.running = []
        if self._limits.max_sequences == self._limits.max_prefill_tokens == 1:
            request: Request = self.scores.pop(0) if self.scores else next(iter(self._sequences))
            num_tokens = len(request.tokens_T) if isinstance(request, ScoreRequest) else 0
            if isinstance(request, SampleRequest):
                num_tokens = max(sequence.length for sequence in self._sequences.pop(request))
            request.future.set_exception(
                TrainingError(
                    f"{num_tokens} tokens do not fit in the memory of {self._base.device} even alone. Use a "
                    f"shorter prompt, a smaller max_tokens, or a smaller model. {self._memory_in_words()}"
                )
            )
        self.waiting = deque(
            sequence
            for sequences in self._sequences.values()
            for sequence in sequences
            if sequence.stop_reason is None
        )
        num_unanswered = len(self.waiting) + len(self.scores)
        self._limits = self._limits.halved(num_unanswered)
        if num_unanswered:
            logger.warning(
                "Sampling does not fit in memory: continuing with at most %d sequences at a time.",
                self._limits.max_sequences,
            )

    def _memory_in_words(self) -> str:
        per_position = self._base.cache_bytes[0] or _cache_bytes_per_token(self._base)
        return (
            f"The weights hold {in_gib(self._base.weight_bytes())}, and keys and values of 1,000 tokens "
            f"{in_gib(1000 * per_position)}."
        )


def _no_distribution(base: BaseModel, num_tokens: int) -> TrainingError:
    dtype = str(base.dtype).removeprefix("torch.")
    return TrainingError(
        f"{base.name} has no probabilities for the token after the first {num_tokens}: its logits there are "
        f"nan or infinite. The weights have diverged, or a number is too large for dtype={dtype}. Sample "
        f"from an earlier checkpoint, train with a lower learning_rate, or use dtype=float32."
    )


def _cache_bytes_per_token(base: BaseModel) -> int:
    """Returns the bytes of one position's keys and values in all layers: an upper bound for some models."""
    config = base.model.config.get_text_config()
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    total = 0
    for layer in layers:
        num_query_heads = getattr(layer, "num_attention_heads", None) or 1
        num_heads = getattr(layer, "num_key_value_heads", None) or num_query_heads
        head_size = getattr(layer, "head_dim", None) or layer.hidden_size // num_query_heads
        total += 2 * num_heads * head_size * base.dtype.itemsize
    return max(1, total)
