"""SamplingClient: samples from an immutable snapshot of weights."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cookbook.clients.futures import APIFuture, TokenStream
from cookbook.engine import checkpoint
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.peft_names import by_own_names
from cookbook.engine.sampling.requests import SampleRequest, sample_request, score_request
from cookbook.engine.sampling.sampler import Prepared, Sampler
from cookbook.engine.training.trainer import Trainer, check_weights_fit
from cookbook.engine.worker import Engine
from cookbook.errors import CheckpointError, ClosedError
from cookbook.types import ModelInput, PromptScores, SampledSequence, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class SampleFuture(APIFuture[SampleResponse]):
    """The future of `SamplingClient.sample`."""

    @property
    def sequences(self) -> list[SampledSequence]:
        """Waits for the result and returns its sequences."""
        return self.result().sequences


class SamplingClient:
    """Samples from a base model, a saved checkpoint, or the weights that a training client had at one moment.

    A service or a training client creates it. Calls return a future at once, and requests that are queued
    together run as one batch. Training that continues meanwhile does not change the snapshot. After `close`,
    or after the service was closed, every call raises ClosedError.

    A prompt that begins like an earlier prompt or its reply, or like another prompt of the batch, is computed
    from where they part. The keys and values that this needs are kept in a part of the memory for sampling,
    until this client is closed, the engine trains, or sequences need their place.
    """

    def __init__(self, engine: Engine, prepare: Callable[[], tuple[Adapter | None, int | None]]) -> None:
        """`prepare` runs on the engine, in order with the jobs queued before it.

        It returns the adapter, which this client owns (None: the base model), and the seed of unseeded
        requests.
        """
        prepared: Prepared = engine.submit(prepare)
        sampler = Sampler(engine.base, prepared)
        self._parts: tuple[Engine, Sampler, Prepared] | None = (engine, sampler, prepared)
        """None once this client is closed, so that it holds no memory while it is still referenced."""
        self._num_unseeded = 0
        self._lock = threading.Lock()
        # Queued requests reference the sampler, and with it the weights, after this client is garbage.
        weakref.finalize(sampler, _release, engine, prepared).atexit = False
        engine.clients.add(self)

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
    def of_base(cls, engine: Engine) -> SamplingClient:
        """Returns a client of the base model, without an adapter."""
        return cls(engine, _of_base)

    @classmethod
    def of_snapshot(cls, engine: Engine, trainer: Trainer, seed: int | None = None) -> SamplingClient:
        """Returns a client of the weights that `trainer` has when all jobs queued so far have run.

        `seed` is the seed of unseeded requests. If it is None, one is drawn from the trainer's generator.
        """
        return cls(engine, functools.partial(_of_snapshot, trainer, seed))

    @classmethod
    def of_checkpoint(cls, engine: Engine, path: str | os.PathLike[str]) -> SamplingClient:
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
        client = cls(engine, functools.partial(_of_checkpoint, engine.base, os.fspath(path), info, weights))
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
    ) -> SampleFuture:
        """Samples `num_samples` sequences that continue `prompt`.

        The future returns a SampleResponse. `sequences[i].tokens` include the stop token, if one ended the
        sequence. `.logprobs` has one entry for each token, in nats, before temperature, top-k and top-p.
        `.stop_reason` is "stop", or "length" if `max_tokens` (default: the context length) was reached. With
        `include_prompt_logprobs`, `prompt_logprobs` has one entry for each token of the prompt, None for the
        first, and all of the prompt is computed. `prompt_cache_hit_tokens` says how many tokens of the prompt
        were not. With a seed the sequences are the same every time, to rounding, whatever else is sampled
        meanwhile.

        Raises RequestError for an empty or too long prompt and for unsupported settings. The future raises
        TrainingError if the request alone does not fit in memory, or its logits are not finite.
        """
        request = sample_request(
            self._engine.base, prompt.to_ints(), num_samples, sampling_params, include_prompt_logprobs
        )
        self._submit(request)
        return SampleFuture(request.future)

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
            on_token=lambda _, token: stream.put(token),
        )
        stream = TokenStream(request.future, lambda response: response.sequences[0], request.abandon)
        self._submit(request)
        return stream

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """Returns the log-probability of every token of `prompt` given the tokens before it, in nats.

        The first one is None.

        Raises RequestError for an empty or too long prompt.
        """
        engine, sampler, _ = self._open_parts()
        request = score_request(engine.base, prompt.to_ints())
        engine.submit_to(sampler, request)
        return APIFuture(request.future)

    def score(self, prompt: ModelInput) -> APIFuture[PromptScores]:
        """Returns the results of `compute_logprobs`, and whether each token is the most likely one.

        Raises RequestError for an empty or too long prompt.
        """
        engine, sampler, _ = self._open_parts()
        request = score_request(engine.base, prompt.to_ints())
        engine.submit_to(sampler, request)
        return APIFuture(request.future, lambda logprobs: PromptScores(logprobs, list(request.is_argmax_T)))

    def _submit(self, request: SampleRequest) -> None:
        engine, sampler, _ = self._open_parts()
        with self._lock:  # the indices of unseeded requests follow the order of the queue
            request.unseeded_index = self._num_unseeded
            self._num_unseeded += request.params.seed is None
            engine.submit_to(sampler, request)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer of the base model."""
        return self._engine.base.tokenizer

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
    ) -> SampleResponse:
        return await self.sample(prompt, num_samples, sampling_params, include_prompt_logprobs)

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        return await self.compute_logprobs(prompt)

    async def score_async(self, prompt: ModelInput) -> PromptScores:
        return await self.score(prompt)

    async def get_tokenizer_async(self) -> Any:
        return self.get_tokenizer()


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
