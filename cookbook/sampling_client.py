"""SamplingClient: an immutable snapshot of weights to sample from."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from cookbook.engine import state
from cookbook.engine.adapters import Adapter
from cookbook.engine.sampler import check_prompt, check_sampling, compute_logprobs, sample
from cookbook.engine.trainer import Trainer, check_weights_fit
from cookbook.engine.worker import Engine
from cookbook.errors import CheckpointError
from cookbook.futures import APIFuture
from cookbook.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SampleFuture(APIFuture[SampleResponse]):
    """The future of `sample`. It also answers `.sequences` straight away, waiting for the result."""

    @property
    def sequences(self) -> list[SampledSequence]:
        return self.result().sequences


class SamplingClient:
    """Samples from a base model, or from the weights of one moment. Get one from a service or
    training client. Calls return at once; training that goes on meanwhile changes nothing here.
    """

    def __init__(self, engine: Engine, prepare: Callable[[], tuple[Adapter | None, int | None]]) -> None:
        """`prepare` runs on the engine, in order with what was queued before. It returns the
        adapter, which this client owns, and the seed of samples that bring none."""
        self._engine = engine
        self._prepared: Future[tuple[Adapter | None, int | None]] = engine.submit(prepare)
        self._num_unseeded = 0
        self._lock = threading.Lock()
        weakref.finalize(self, _release, engine, self._prepared).atexit = False

    @classmethod
    def of_base(cls, engine: Engine) -> SamplingClient:
        return cls(engine, lambda: (None, None))

    @classmethod
    def of_snapshot(cls, engine: Engine, trainer: Trainer) -> SamplingClient:
        """Of the weights that `trainer` has when everything queued before has run."""

        def prepare() -> tuple[Adapter, int]:
            return engine.base.adapters.clone(trainer.adapter), int(trainer.rng.integers(2**31))

        return cls(engine, prepare)

    @classmethod
    def of_checkpoint(cls, engine: Engine, path: str | os.PathLike[str]) -> SamplingClient:
        """Of saved weights. Raises CheckpointError where they are missing, damaged or do not fit."""
        info = state.read_info(path)
        if info.lora.rank == 0:
            raise CheckpointError(
                f"Checkpoint {path} is a model of its own, not an adapter on {engine.base.name}. Sample from "
                f"it with ServiceClient().create_sampling_client(model_path=...)."
            )
        weights = state.read_weights(path)

        def prepare() -> tuple[Adapter, None]:
            adapter = engine.base.adapters.add(info.lora)
            try:
                check_weights_fit(os.fspath(path), info, weights, adapter, engine.base)
            except CheckpointError:
                engine.base.adapters.remove(adapter)
                raise
            for name, parameter in adapter.weights.items():
                parameter.data.copy_(weights[name])
            return adapter, None

        client = cls(engine, prepare)
        client._prepared.result()
        return client

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
    ) -> SampleFuture:
        """`num_samples` continuations of `prompt`. With a seed they are the same every time."""
        params = sampling_params or SamplingParams()
        tokens = prompt.to_ints()
        base = self._engine.base
        check_sampling(base, tokens, num_samples, params)
        with self._lock:
            index_of_unseeded = self._num_unseeded
            self._num_unseeded += params.seed is None

        def run() -> SampleResponse:
            adapter, base_seed = self._prepared.result()
            seed = params.seed
            if seed is None:
                entropy = None if base_seed is None else [base_seed, index_of_unseeded]
                seed = int(np.random.default_rng(entropy).integers(2**31))
            return sample(base, adapter, tokens, num_samples, params, seed, include_prompt_logprobs)

        return SampleFuture(self._engine.submit(run))

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """The log-probability of every token given those before it; None for the first."""
        tokens = prompt.to_ints()
        base = self._engine.base
        check_prompt(base, tokens)
        return APIFuture(
            self._engine.submit(lambda: compute_logprobs(base, self._prepared.result()[0], tokens))
        )

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

    async def get_tokenizer_async(self) -> Any:
        return self.get_tokenizer()


def _release(engine: Engine, prepared: Future[tuple[Adapter | None, int | None]]) -> None:
    """Frees a snapshot's adapter once its client is gone and what it queued has run."""

    def remove() -> None:
        if prepared.exception() is None and (adapter := prepared.result()[0]) is not None:
            engine.base.adapters.remove(adapter)

    engine.clean_up_later(remove)
