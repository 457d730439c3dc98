"""SamplingClient: an immutable snapshot of weights to sample from."""

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
    """The future of `sample`. It also answers `.sequences` straight away, waiting for the result."""

    @property
    def sequences(self) -> list[SampledSequence]:
        return self.result().sequences


class SamplingClient:
    """Samples from a base model, or from the weights of one moment. Get one from a service or
    training client. Calls return at once; training that goes on meanwhile changes nothing here.

    After `close`, or `close` of the service, every call raises ClosedError.
    """

    def __init__(self, engine: Engine, prepare: Callable[[], tuple[Adapter | None, int | None]]) -> None:
        """`prepare` runs on the engine, in order with what was queued before. It returns the
        adapter, which this client owns, and the seed of samples that bring none."""
        prepared: Prepared = engine.submit(prepare)
        sampler = Sampler(engine.base, prepared)
        self._parts: tuple[Engine, Sampler, Prepared] | None = (engine, sampler, prepared)
        """None once this client is closed: it holds no memory then, whoever holds it."""
        self._num_unseeded = 0
        self._lock = threading.Lock()
        # What is queued holds the sampler, and so the weights, when this client is gone.
        weakref.finalize(sampler, _release, engine, prepared).atexit = False
        engine.clients.add(self)

    @property
    def _engine(self) -> Engine:
        engine = self._open_parts()[0]
        if engine.is_closed:
            raise ClosedError("This client's service was closed. Create a new ServiceClient.")
        return engine

    @property
    def _sampler(self) -> Sampler:
        return self._open_parts()[1]

    @property
    def _prepared(self) -> Prepared:
        return self._open_parts()[2]

    def _open_parts(self) -> tuple[Engine, Sampler, Prepared]:
        if self._parts is None:
            raise ClosedError("This sampling client was closed. Create a new one.")
        return self._parts

    def close(self) -> None:
        """Frees the snapshot, after all that was asked for has run.

        A future that is pending completes as it would have otherwise: with its result, or its own error.
        A second call does nothing.
        """
        with self._lock:
            parts, self._parts = self._parts, None
        if parts is None:
            return
        engine = parts[0]
        engine.wait()
        del parts  # which has the engine clean up
        engine.wait()

    @classmethod
    def of_base(cls, engine: Engine) -> SamplingClient:
        return cls(engine, _of_base)

    @classmethod
    def of_snapshot(cls, engine: Engine, trainer: Trainer, seed: int | None = None) -> SamplingClient:
        """Of the weights that `trainer` has when everything queued before has run."""

        return cls(engine, functools.partial(_of_snapshot, trainer, seed))

    @classmethod
    def of_checkpoint(cls, engine: Engine, path: str | os.PathLike[str]) -> SamplingClient:
        """Of saved weights. Raises CheckpointError where they are missing, damaged or do not fit."""
        info = checkpoint.read_info(path)
        if info.lora.rank == 0:
            raise CheckpointError(
                f"Checkpoint {path} is a model of its own, not an adapter on {engine.base.name}. Sample from "
                f"it with ServiceClient().create_sampling_client(model_path=...)."
            )
        weights = checkpoint.read_weights(path)
        client = cls(engine, functools.partial(_of_checkpoint, engine.base, os.fspath(path), info, weights))
        try:
            client._prepared.result()
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
        """`num_samples` continuations of `prompt`.

        With a seed they are the same every time, to rounding, whatever else is sampled meanwhile.
        """
        request = sample_request(
            self._engine.base, prompt.to_ints(), num_samples, sampling_params, include_prompt_logprobs
        )
        self._submit(request)
        return SampleFuture(request.future)

    def stream(
        self, prompt: ModelInput, sampling_params: SamplingParams | None = None
    ) -> TokenStream[SampledSequence]:
        """One continuation, token by token as it is sampled; `.result()` is all of it."""
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
        """The log-probability of every token given those before it; None for the first."""
        request = score_request(self._engine.base, prompt.to_ints())
        self._engine.submit_to(self._sampler, request)
        return APIFuture(request.future)

    def score(self, prompt: ModelInput) -> APIFuture[PromptScores]:
        """`compute_logprobs`, and whether each token is more likely than every other in its place."""
        request = score_request(self._engine.base, prompt.to_ints())
        self._engine.submit_to(self._sampler, request)
        return APIFuture(request.future, lambda logprobs: PromptScores(logprobs, list(request.is_argmax_T)))

    def _submit(self, request: SampleRequest) -> None:
        with self._lock:
            request.unseeded_index = self._num_unseeded
            self._num_unseeded += request.params.seed is None
            self._engine.submit_to(self._sampler, request)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
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
    adapter = base.adapters.add(info.lora)
    with base.adapters.removing_on_failure(adapter):
        check_weights_fit(path, info, weights, adapter, base)
        for name, parameter in adapter.weights.items():
            parameter.data.copy_(weights[name])
    return adapter, None


def _release(engine: Engine, prepared: Prepared) -> None:
    """Frees a snapshot's adapter once its client is gone and what it queued has run.

    That may be before the adapter is there: then the client is gone before the engine takes its snapshot.
    """
    prepared.add_done_callback(functools.partial(_remove_later, engine))


def _remove_later(engine: Engine, prepared: Prepared) -> None:
    engine.clean_up_later(functools.partial(_remove, engine.base, prepared))


def _remove(base: BaseModel, prepared: Prepared) -> None:
    if prepared.exception() is None and (adapter := prepared.result()[0]) is not None:
        base.adapters.remove(adapter)
