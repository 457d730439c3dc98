"""SamplingClient: samples from an immutable snapshot of weights."""

from __future__ import annotations

import functools
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cookbook.clients.futures import APIFuture, ClientFuture, TokenStream
from cookbook.clients.pickled import PickledClient
from cookbook.clients.recorded import RECORDED
from cookbook.engine import checkpoint
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.peft_names import by_own_names
from cookbook.engine.sampling.requests import (
    OnToken,
    SampleRequest,
    ScoreRequest,
    sample_request,
    score_request,
)
from cookbook.engine.sampling.sampler import Prepared, Sampler
from cookbook.engine.sampling.stop_rule import end_tokens
from cookbook.engine.training.state_checks import check_weights_fit
from cookbook.engine.training.trainer import Trainer
from cookbook.engine.worker import Engine
from cookbook.errors import CheckpointError, ClosedError, RequestError
from cookbook.types import (
    ModelInput,
    PromptScores,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class SampleFuture(APIFuture[SampleResponse]):
    """The future of `SamplingClient.sample`."""

    def __init__(
        self,
        job: Future[Any],
        read: Callable[[Any], SampleResponse] | None = None,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        """`abandon` ends the sequences early."""
        super().__init__(job, read)
        self._abandon = abandon

    def close(self) -> None:
        """Stops sampling after the current tokens. The result holds the tokens sampled by then."""
        if self._abandon is not None:
            self._abandon()

    @property
    def sequences(self) -> list[SampledSequence]:
        """Waits for the result and returns its sequences."""
        return self.result().sequences


class SamplingClient(ClientFuture):
    """Samples from a base model, a saved checkpoint, or the weights that a training client had at one moment.

    A service or a training client creates it. Calls return a future at once, and requests that are queued
    together run as one batch. Training that continues meanwhile does not change the snapshot. After `close`,
    or after the service was closed, every call raises ClosedError.

    A prompt that begins like an earlier prompt or its reply, or like another prompt of the batch, is computed
    from where they part. The keys and values that this needs are kept in a part of the memory for sampling,
    until this client is closed, the engine trains, or sequences need their place.

    A client can be pickled and sampled with in another process, which loads the base model once. `await
    client` and `client.result()` return the client itself.
    """

    def __init__(
        self,
        engine: Engine,
        prepare: Callable[[], tuple[Adapter | None, int | None]],
        record_stability_info: bool = False,
    ) -> None:
        """`prepare` runs on the engine, in order with the jobs queued before it.

        It returns the adapter, which this client owns (None: the base model), and the seed of unseeded
        requests.
        """
        prepared: Prepared = engine.submit(prepare)
        sampler = Sampler(engine.base, prepared)
        self._parts: tuple[Engine, Sampler, Prepared] | None = (engine, sampler, prepared)
        """None once this client is closed, so that it holds no memory while it is still referenced."""
        self._num_unseeded = 0
        self._num_sequences = 0
        self._records = record_stability_info
        self._id = uuid.uuid4().hex[:12]
        self._lock = threading.Lock()
        # Queued requests reference the sampler, and with it the weights, after this client is garbage.
        weakref.finalize(sampler, _release, engine, prepared).atexit = False
        engine.clients.add(self)
        _OPEN[self._id] = self

    @property
    def _engine(self) -> Engine:
        return self._open_parts()[0]

    def _open_parts(self) -> tuple[Engine, Sampler, Prepared]:
        if self._parts is None:
            raise ClosedError("This sampling client was closed. Create a new one.")
        if self._parts[0].is_closed:
            raise ClosedError("This client's service was closed. Create a new ServiceClient.")
        return self._parts

    def close(self) -> None:
        """Waits until all queued requests have run, then frees the snapshot.

        Pending futures complete as usual, with a result or an error. A second call does nothing.
        """
        with self._lock:
            parts, self._parts = self._parts, None
        if parts is None:
            return
        engine = parts[0]
        engine.wait()
        del parts  # the finalizer makes the engine clean up
        engine.wait()

    @classmethod
    def of_base(cls, engine: Engine, record_stability_info: bool = False) -> SamplingClient:
        """Returns a client of the base model, without an adapter."""
        return cls(engine, _of_base, record_stability_info)

    @classmethod
    def of_snapshot(
        cls,
        engine: Engine,
        trainer: Trainer,
        seed: int | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Returns a client of the weights that `trainer` has when all jobs queued so far have run.

        `seed` is the seed of unseeded requests. If it is None, one is drawn from the trainer's generator.
        """
        return cls(engine, functools.partial(_of_snapshot, trainer, seed), record_stability_info)

    @classmethod
    def of_checkpoint(
        cls, engine: Engine, path: str | os.PathLike[str], record_stability_info: bool = False
    ) -> SamplingClient:
        """Returns a client of saved weights.

        Raises CheckpointError if they are missing, damaged or do not fit.
        """
        info = checkpoint.read_info(path)
        if info.lora.rank == 0:
            raise CheckpointError(
                f"Checkpoint {path} is a full model, not an adapter on {engine.base.name}. Sample from "
                f"it with ServiceClient().create_sampling_client(model_path=...)."
            )
        if tuple(info.lora.add_tokens) != engine.base.add_tokens:
            raise CheckpointError(
                f"Checkpoint {path} adds the tokens {[*info.lora.add_tokens]}, and this client's model "
                f"{[*engine.base.add_tokens]}. Sample from it with "
                f"ServiceClient().create_sampling_client(model_path=...)."
            )
        weights = checkpoint.read_weights(path)
        prepare = functools.partial(_of_checkpoint, engine.base, os.fspath(path), info, weights)
        client = cls(engine, prepare, record_stability_info)
        try:
            client._open_parts()[2].result()
        except BaseException:
            client.close()
            raise
        return client

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleFuture:
        """Samples `num_samples` sequences that continue `prompt`.

        The future returns a SampleResponse. `sequences[i].tokens` include the stop token, if one ended the
        sequence. `.logprobs` has one entry for each token, in nats, before temperature, top-k and top-p.
        `.stop_reason` is "stop", or "length" if `max_tokens` (default: the context length) was reached. With
        `include_prompt_logprobs`, `prompt_logprobs` has one entry for each token of the prompt, None for the
        first, and all of the prompt is computed. `prompt_cache_hit_tokens` says how many tokens of the prompt
        were not. With a seed the sequences are the same every time, to rounding, whatever else is sampled
        meanwhile.

        `topk_prompt_logprobs` and `topk_sample_logprobs` are how many of the most likely tokens are returned
        with their log-probabilities, in the place of each token of the prompt and of each sampled one.
        `target_prompt_logprobs` are tokens to score in the place of each token of the prompt but the first,
        int64 [len(prompt) - 1, K], in which -1 names none. `prompt_logprobs_last_n` returns the
        log-probabilities of the prompt's last tokens only.

        Raises RequestError for an empty or too long prompt and for unsupported settings. The future raises
        TrainingError if the request alone does not fit in memory, or its logits are not finite.
        """
        engine, sampler, _ = self._open_parts()
        tokens = ModelInput.model_validate(prompt).to_ints()
        if prompt_alt_tokens_k:
            raise RequestError(
                "prompt_alt_tokens_k is not supported. Use topk_prompt_logprobs for the most likely "
                "alternatives to each token of the prompt."
            )
        _check_last(prompt_logprobs_last_n, include_prompt_logprobs, len(tokens))
        request = sample_request(
            engine.base,
            tokens,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            num_top_logprobs=topk_sample_logprobs,
        )
        scores = None
        if topk_prompt_logprobs or target_prompt_logprobs is not None:
            targets_TJ = None
            if target_prompt_logprobs is not None:
                targets_TJ = TensorData.model_validate(target_prompt_logprobs).to_numpy(pad_value=-1)
            scores = score_request(engine.base, tokens, topk_prompt_logprobs, targets_TJ)
        first = self._submit(request)
        if scores is not None:
            engine.submit_to(sampler, scores)
        read = functools.partial(_read, self._id, first, self._records, scores, prompt_logprobs_last_n)
        return SampleFuture(request.future, read)

    def sample_with_listener(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams | None,
        on_token: OnToken | None,
        num_top_logprobs: int = 0,
    ) -> SampleFuture:
        """Does `sample`, and can be ended early with `close` of the future.

        `on_token` is called on the engine's thread with the index of a sequence, each of its tokens as soon
        as it is sampled, and the token's log-probability.
        """
        request = sample_request(
            self._engine.base,
            prompt.to_ints(),
            num_samples,
            sampling_params,
            on_token=on_token,
            num_top_logprobs=num_top_logprobs,
        )
        self._submit(request)
        return SampleFuture(request.future, abandon=request.abandon)

    def stream(
        self, prompt: ModelInput, sampling_params: SamplingParams | None = None
    ) -> TokenStream[SampledSequence]:
        """Samples one sequence. Iterating over the stream yields its tokens as they are sampled.

        `.result()` waits for the complete sequence. Errors are those of `sample`.
        """
        request = sample_request(
            self._engine.base,
            prompt.to_ints(),
            params=sampling_params,
            on_token=lambda _, token, logprob: stream.put(token),
        )
        stream = TokenStream(request.future, lambda response: response.sequences[0], request.abandon)
        self._submit(request)
        return stream

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """Returns the log-probability of every token of `prompt` given the tokens before it, in nats.

        The first one is None, and with `prompt_logprobs_last_n` all but the last so many.

        Raises RequestError for an empty or too long prompt.
        """
        engine, sampler, _ = self._open_parts()
        tokens = ModelInput.model_validate(prompt).to_ints()
        _check_last(prompt_logprobs_last_n, True, len(tokens))
        request = score_request(engine.base, tokens)
        engine.submit_to(sampler, request)
        return APIFuture(request.future, functools.partial(_last, prompt_logprobs_last_n))

    def score(self, prompt: ModelInput) -> APIFuture[PromptScores]:
        """Returns the results of `compute_logprobs`, and whether each token is the most likely one.

        Raises RequestError for an empty or too long prompt.
        """
        engine, sampler, _ = self._open_parts()
        request = score_request(engine.base, prompt.to_ints())
        engine.submit_to(sampler, request)
        return APIFuture(request.future, lambda logprobs: PromptScores(logprobs, list(request.is_argmax_T)))

    def _submit(self, request: SampleRequest) -> int:
        """Queues the request. Returns the number of its first sequence among those of this client."""
        engine, sampler, _ = self._open_parts()
        with self._lock:  # the indices of unseeded requests follow the order of the queue
            request.unseeded_index = self._num_unseeded
            self._num_unseeded += request.params.seed is None
            first = self._num_sequences
            self._num_sequences += request.num_samples
            engine.submit_to(sampler, request)
        return first

    def _pickled(self) -> PickledClient:
        engine, _, prepared = self._open_parts()
        if engine.base.is_sharded:
            raise RequestError(
                "A sampling client of sharded weights cannot be pickled. Save them and send their path."
            )
        job = engine.submit(PickledClient.of_prepared, self._id, self._records, engine.base, prepared)
        pickled: PickledClient = job.result()
        return pickled

    def __reduce__(self) -> tuple[Any, tuple[PickledClient]]:
        """Returns what another process needs: the adapter's weights, and how the base model is loaded."""
        return _of_pickled, (self._pickled(),)

    def get_sampler_handle(self) -> str:
        """Returns a text from which `from_sampler_handle` makes a client of these weights in any process."""
        return self._pickled().handle()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Returns a client for a handle of `get_sampler_handle`. Raises RequestError for another text."""
        return _of_pickled(PickledClient.from_handle(handle))

    def get_base_model(self) -> str:
        """Returns the name of the base model."""
        return self._engine.base.name

    async def get_base_model_async(self) -> str:
        return self.get_base_model()

    def get_end_tokens(self) -> list[int]:
        """Returns the tokens that end a sequence if a request has no stop tokens of its own."""
        return end_tokens(self._engine.base)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer of the base model."""
        return self._engine.base.tokenizer

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )

    async def compute_logprobs_async(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        return await self.compute_logprobs(prompt, prompt_logprobs_last_n)

    async def score_async(self, prompt: ModelInput) -> PromptScores:
        return await self.score(prompt)

    async def get_tokenizer_async(self) -> Any:
        return self.get_tokenizer()


def _read(
    sampler_id: str,
    first: int,
    records: bool,
    scores: ScoreRequest | None,
    last_n: int | None,
    response: SampleResponse,
) -> SampleResponse:
    """Returns the response with an id for each sequence, and with further scores of the prompt."""
    sequences = [
        replace(sequence, sequence_id=f"{sampler_id}:{number}")
        for number, sequence in enumerate(response.sequences, first)
    ]
    if records:
        RECORDED.add(sequences)
    prompt_logprobs = response.prompt_logprobs
    if prompt_logprobs is not None:
        prompt_logprobs = _last(last_n, prompt_logprobs)
    response = replace(response, sequences=sequences, prompt_logprobs=prompt_logprobs)
    if scores is None:
        return response
    scores.future.result()
    targets = scores.target_logprobs_TJ
    return replace(
        response,
        topk_prompt_logprobs=None if scores.top_logprobs is None else _last(last_n, scores.top_logprobs),
        target_prompt_logprobs=None if targets is None else TensorData(targets, "float32"),
    )


_OPEN: weakref.WeakValueDictionary[str, SamplingClient] = weakref.WeakValueDictionary()
"""The clients of this process, which pickles of them stand for here."""


def _of_pickled(pickled: PickledClient) -> SamplingClient:
    """Returns the client itself in its own process, and a client of the same weights in another."""
    here = _OPEN.get(pickled.client_id) if pickled.process_id == os.getpid() else None
    if here is not None and here._parts is not None:
        return here
    engine = pickled.engine()
    return SamplingClient(engine, functools.partial(pickled.add_adapter, engine.base), pickled.records)


T = TypeVar("T")


def _last(count: int | None, values: list[T | None]) -> list[T | None]:
    """Returns the values with None for all but the last `count`; None keeps all."""
    if count is None:
        return values
    return [None] * (len(values) - count) + values[len(values) - count :]


def _check_last(count: int | None, includes_prompt: bool, num_tokens: int) -> None:
    if count is None:
        return
    if not includes_prompt:
        raise RequestError("prompt_logprobs_last_n needs include_prompt_logprobs=True.")
    if not 1 <= count < max(2, num_tokens):
        raise RequestError(
            f"Invalid prompt_logprobs_last_n={count}: must be 1 to {num_tokens - 1}, the prompt's tokens but "
            f"the first."
        )


def _of_base() -> tuple[None, None]:
    return None, None


def _of_snapshot(trainer: Trainer, seed: int | None) -> tuple[Adapter, int]:
    drawn = int(trainer.rng.integers(2**31)) if seed is None else seed
    return trainer.base.adapters.clone(trainer.adapter), drawn


def _of_checkpoint(
    base: BaseModel, path: str, info: checkpoint.StateInfo, weights: Mapping[str, Tensor]
) -> tuple[Adapter, None]:
    weights = by_own_names(base.model, dict(weights))
    adapter = base.adapters.add(info.lora)
    with base.adapters.removing_on_failure(adapter):
        check_weights_fit(path, info, weights, adapter, base)
        for name, parameter in adapter.weights.items():
            parameter.data.copy_(weights[name])
    return adapter, None


def _release(engine: Engine, prepared: Prepared) -> None:
    """Frees a snapshot's adapter once its client is garbage and its queued requests have run.

    The engine may not have taken the snapshot yet, so this waits for `prepared`.
    """
    prepared.add_done_callback(functools.partial(_remove_later, engine))


def _remove_later(engine: Engine, prepared: Prepared) -> None:
    engine.clean_up_later(functools.partial(_remove, engine.base, prepared))


def _remove(base: BaseModel, prepared: Prepared) -> None:
    if prepared.exception() is None and (adapter := prepared.result()[0]) is not None:
        base.adapters.remove(adapter)
