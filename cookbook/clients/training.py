"""TrainingClient: validates a request, queues it on the engine, hands back a future."""

from __future__ import annotations

import functools
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from cookbook.clients.futures import APIFuture
from cookbook.clients.sampling import SamplingClient
from cookbook.engine import checkpoint
from cookbook.engine.training.trainer import CustomLossFn, PassResult, StepResult, Trainer
from cookbook.engine.worker import Engine
from cookbook.errors import CheckpointError, ClosedError, RequestError, TrainingError
from cookbook.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LoraConfig,
    LossFnType,
    ModelData,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from cookbook.utils import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")

SAMPLER_FOLDER = "sampler_weights"
_TEN_YEARS = 10 * 365 * 24 * 3600


class TrainingClient:
    """Trains one adapter. Get one from `ServiceClient.create_lora_training_client`.

    Calls return at once and run in the order they were made. A bad argument is raised by the
    call itself, a failure while it runs by its future. Every method has an `_async` twin.

    After `close`, or `close` of the service, every call raises ClosedError.
    """

    def __init__(
        self,
        engine: Engine,
        lora: LoraConfig,
        checkpoint_dir: Path,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.model_id = uuid.uuid4().hex[:12]
        self._checkpoint_dir = checkpoint_dir
        trainer: Trainer = engine.submit(Trainer, engine.base, lora, user_metadata).result()
        self._parts: tuple[Engine, Trainer] | None = (engine, trainer)
        """None once this client is closed: it holds no memory then, whoever holds it."""
        self._passes_to_step_on: list[APIFuture[ForwardBackwardOutput]] = []
        self._lock = threading.Lock()
        """Held while a pass or a step is queued, so that a step knows every pass before it."""
        # Queued work holds the trainer, not this client, and may outlive it.
        release = functools.partial(engine.base.adapters.remove, trainer.adapter)
        weakref.finalize(trainer, engine.clean_up_later, release).atexit = False
        engine.clients.add(self)

    @property
    def _engine(self) -> Engine:
        engine, _ = self._open_parts()
        if engine.is_closed:
            raise ClosedError("This client's service was closed. Create a new ServiceClient.")
        return engine

    @property
    def _trainer(self) -> Trainer:
        return self._open_parts()[1]

    def _open_parts(self) -> tuple[Engine, Trainer]:
        if self._parts is None:
            raise ClosedError("This training client was closed. Create a new one with the ServiceClient.")
        return self._parts

    def close(self) -> None:
        """Frees the weights, the gradients and the optimizer, after all that was asked for has run.

        A future that is pending completes as it would have otherwise: with its result, or its own error.
        Sampling clients that were created by this one can still be used. A second call does nothing.
        """
        with self._lock:
            parts, self._parts = self._parts, None
            self._passes_to_step_on.clear()
        if parts is None:
            return
        engine = parts[0]
        engine.wait()
        del parts  # which has the engine clean up
        engine.wait()

    # -- training ---------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        return_logprobs: Literal["all", "trained"] = "all",
        return_argmax: bool = False,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and log-probabilities, without gradients.

        `return_logprobs="trained"` leaves out positions of weight 0 (they read 0.0), which saves
        their share of the vocabulary projection. With `return_argmax` the outputs say also
        which targets are the model's most likely token: `["is_argmax"]`, 1 where every other entry of
        the vocabulary has a lower probability, at the positions that have a log-probability. A target that
        ties with another entry reads 0.
        """
        request = self._trainer.check(
            data,
            loss_fn,
            loss_fn_config,
            return_logprobs == "trained",
            with_argmax=return_argmax,
        )
        return APIFuture(self._engine.submit(self._trainer.forward, request), PassResult.output)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        return_logprobs: Literal["all", "trained"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Adds the gradient of the loss, a sum over tokens, to what is there since the last `optim_step`."""
        request = self._trainer.check(data, loss_fn, loss_fn_config, return_logprobs == "trained")
        return self._queue_pass(self._trainer.forward_backward, request)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLossFn
    ) -> APIFuture[ForwardBackwardOutput]:
        """Like `forward_backward`, with `loss_fn(data, logprobs) -> (loss, metrics)`.

        `logprobs` has one float32 tensor per datum, one entry per target. The function runs on
        the engine's thread.
        """
        request = self._trainer.check(data, "cross_entropy", None, refuse_unknown_inputs=False)
        return self._queue_pass(self._trainer.forward_backward_custom, list(data), request, loss_fn)

    def optim_step(self, adam_params: AdamParams) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the gradients so far, which it clears.

        Fails, and drops those gradients, if one of the passes it would step on failed and
        that failure was not read: half a batch is not stepped on by accident. A step that fails
        itself changes neither weights nor optimizer; its gradients are dropped too.
        """
        with self._lock:
            passes = [future for future in self._passes_to_step_on if not future.failure_was_seen]
            job = self._engine.submit(_optim_step, self._trainer, passes, adam_params)
            self._passes_to_step_on.clear()
            return APIFuture(job, StepResult.output)

    def _queue_pass(
        self, run: Callable[P, PassResult], *args: P.args, **kwargs: P.kwargs
    ) -> APIFuture[ForwardBackwardOutput]:
        with self._lock:
            job = self._engine.submit(run, *args, **kwargs)
            future: APIFuture[ForwardBackwardOutput] = APIFuture(job, PassResult.output)
            self._passes_to_step_on.append(future)
            return future

    # -- checkpoints ------------------------------------------------------------------------

    def save_state(
        self, name: str, ttl_seconds: int | None = None, *, overwrite: bool = False
    ) -> APIFuture[SaveWeightsResponse]:
        """Saves weights and optimizer under `name`: a folder that plain PEFT loads as well.

        A name that is taken is refused unless `overwrite` is set, and so are weights or optimizer values
        that are not finite. `ttl_seconds` is recorded as the time until which the checkpoint is wanted
        (`expires_at` in its `state.json`); nothing removes it then.
        """
        if name == SAMPLER_FOLDER:
            raise CheckpointError(f"{name!r} is the folder of the sampler's weights. Choose another name.")
        path = checkpoint.checkpoint_path(self._checkpoint_dir, name)
        job = self._submit_save(path, True, ttl_seconds, overwrite)
        return APIFuture(job, lambda _: SaveWeightsResponse(str(path)))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, *, overwrite: bool = False
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Saves the weights alone. The arguments are those of `save_state`."""
        files.refuse_link(self._checkpoint_dir / SAMPLER_FOLDER)
        path = checkpoint.checkpoint_path(self._checkpoint_dir / SAMPLER_FOLDER, name)
        job = self._submit_save(path, False, ttl_seconds, overwrite)
        return APIFuture(job, lambda _: SaveWeightsForSamplerResponse(str(path)))

    def _submit_save(
        self, path: Path, with_optimizer: bool, ttl_seconds: int | None, overwrite: bool
    ) -> Future[None]:
        if ttl_seconds is not None and (
            isinstance(ttl_seconds, bool)
            or not isinstance(ttl_seconds, int)
            or not 1 <= ttl_seconds <= _TEN_YEARS
        ):
            raise RequestError(
                f"ttl_seconds={ttl_seconds!r} is no number of seconds that a checkpoint is kept. Use a whole "
                f"number from 1 to {_TEN_YEARS} (ten years), or None to keep it; overwrite= goes by its name."
            )
        return self._engine.submit(
            self._trainer.save,
            path,
            with_optimizer=with_optimizer,
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
        )

    def load_state(self, path: str | os.PathLike[str]) -> APIFuture[LoadWeightsResponse]:
        """Loads weights from a checkpoint or any PEFT LoRA folder; the optimizer starts afresh."""
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(self, path: str | os.PathLike[str]) -> APIFuture[LoadWeightsResponse]:
        """Continues a checkpoint of `save_state` exactly where it stopped."""
        return self._load(path, with_optimizer=True)

    def _load(self, path: str | os.PathLike[str], with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        with self._lock:
            self._passes_to_step_on.clear()  # loading drops their gradients
            job = self._engine.submit(self._trainer.load, os.fspath(path), with_optimizer)
        return APIFuture(job, lambda _: LoadWeightsResponse(os.fspath(path)))

    # -- sampling ---------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, *, seed: int | None = None
    ) -> SamplingClient:
        """A sampler of the weights as they are now; later steps do not change it.

        With a name the weights are also saved under it, as by `save_weights_for_sampler`. Samples
        that bring no seed are drawn from `seed`, or else from this client's random numbers, which
        are part of its state.
        """
        if name is not None:
            self.save_weights_for_sampler(name).result()
        return SamplingClient.of_snapshot(self._engine, self._trainer, seed)

    def create_sampling_client(self, model_path: str | os.PathLike[str]) -> SamplingClient:
        """A sampler of saved weights, on this client's base model."""
        return SamplingClient.of_checkpoint(self._engine, model_path)

    @property
    def samples_together(self) -> bool:
        """Whether samples take all processes of a run, because each holds a part of the weights."""
        return self._engine.base.is_sharded

    # -- information ------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        base, lora = self._engine.base, self._trainer.adapter.lora
        model_data = ModelData(
            model_id=self.model_id,
            model_name=base.name,
            lora_rank=lora.rank,
            lora_alpha=lora.alpha,
            num_trained_parameters=sum(weight.numel() for weight in self._trainer.adapter.weights.values()),
            arch=base.model.config.model_type,
            device=str(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            num_logits=base.num_logits,
        )
        return GetInfoResponse(self.model_id, model_data, dict(self._trainer.user_metadata))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._engine.base.tokenizer

    # -- async twins ------------------------------------------------------------------------

    async def forward_async(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        return_logprobs: Literal["all", "trained"] = "all",
        return_argmax: bool = False,
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward(
            data,
            loss_fn,
            loss_fn_config,
            return_logprobs=return_logprobs,
            return_argmax=return_argmax,
        )

    async def forward_backward_async(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        return_logprobs: Literal["all", "trained"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(data, loss_fn, loss_fn_config, return_logprobs=return_logprobs)

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], loss_fn: CustomLossFn
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(data, loss_fn)

    async def optim_step_async(self, adam_params: AdamParams) -> APIFuture[OptimStepResponse]:
        return self.optim_step(adam_params)

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None, *, overwrite: bool = False
    ) -> APIFuture[SaveWeightsResponse]:
        return self.save_state(name, ttl_seconds, overwrite=overwrite)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, *, overwrite: bool = False
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(name, ttl_seconds, overwrite=overwrite)

    async def load_state_async(self, path: str | os.PathLike[str]) -> APIFuture[LoadWeightsResponse]:
        return self.load_state(path)

    async def load_state_with_optimizer_async(
        self, path: str | os.PathLike[str]
    ) -> APIFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(path)

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, *, seed: int | None = None
    ) -> SamplingClient:
        if name is not None:
            await self.save_weights_for_sampler(name)
        return SamplingClient.of_snapshot(self._engine, self._trainer, seed)

    async def create_sampling_client_async(self, model_path: str | os.PathLike[str]) -> SamplingClient:
        return self.create_sampling_client(model_path)

    async def get_info_async(self) -> GetInfoResponse:
        return self.get_info()

    async def get_tokenizer_async(self) -> Any:
        return self.get_tokenizer()


def _optim_step(
    trainer: Trainer, passes: Sequence[APIFuture[ForwardBackwardOutput]], adam_params: AdamParams
) -> StepResult:
    """Steps on the gradients of `passes`, unless one of them failed."""
    for future in passes:
        if (error := future.exception()) is not None:
            trainer.discard_gradients()
            raise TrainingError(
                f"optim_step was not taken: a forward_backward before it failed. {error}"
            ) from error
    return trainer.optim_step(adam_params)
