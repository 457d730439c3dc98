"""TrainingClient, which validates each request, queues it on the engine and returns a future."""

from __future__ import annotations

import functools
import os
import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cookbook import models
from cookbook.clients.futures import APIFuture, ClientFuture
from cookbook.clients.recorded import RECORDED
from cookbook.clients.sampling import SamplingClient
from cookbook.engine import checkpoint, checkpoint_root, devices
from cookbook.engine.checkpoint_root import CheckpointRoot
from cookbook.engine.training.results import PassResult, Readback
from cookbook.engine.training.trainer import CustomLossFn, Trainer
from cookbook.engine.worker import Engine
from cookbook.errors import ClosedError, RequestError, TrainingError
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
    SamplingClientKind,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    check_ttl,
)
from cookbook.utils import extras, files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingClient(ClientFuture):
    """Trains one adapter. `ServiceClient.create_lora_training_client` creates it.

    Calls return futures at once and run in the order of the calls. The call itself raises the error of a bad
    argument; its future raises the error of a failure while it runs. Every method has an `_async` twin.

    Checkpoints are named by their folders, or by paths `tinker://<run>/weights/<name>`. After `close`, or
    `close` of the service, every call raises ClosedError. `await client` and `client.result()` return the
    client itself.
    """

    def __init__(
        self,
        engine: Engine,
        lora: LoraConfig,
        checkpoint_dir: Path,
        user_metadata: Mapping[str, str] | None = None,
        *,
        model_id: str | None = None,
        root: CheckpointRoot | None = None,
    ) -> None:
        self.model_id = model_id or uuid.uuid4().hex[:12]
        self._checkpoint_dir = checkpoint_dir
        self._root = root or CheckpointRoot()
        trainer: Trainer = engine.submit(Trainer, engine.base, lora, user_metadata).result()
        self._parts: tuple[Engine, Trainer] | None = (engine, trainer)
        """None once this client is closed, so that it holds no memory while it is still referenced."""
        self._passes_to_step_on: list[APIFuture[ForwardBackwardOutput]] = []
        self._lock = threading.Lock()
        """Held while a pass or a step is queued, so that a step knows every pass before it."""
        # Queued jobs reference the trainer, not this client, and may outlive it.
        release = functools.partial(engine.base.adapters.remove, trainer.adapter)
        weakref.finalize(trainer, engine.clean_up_later, release).atexit = False
        engine.clients.add(self)

    @property
    def _engine(self) -> Engine:
        return self._open_parts()[0]

    @property
    def _trainer(self) -> Trainer:
        return self._open_parts()[1]

    def _open_parts(self) -> tuple[Engine, Trainer]:
        if self._parts is None:
            raise ClosedError("This training client was closed. Create a new one with the ServiceClient.")
        if self._parts[0].is_closed:
            raise ClosedError("This client's service was closed. Create a new ServiceClient.")
        return self._parts

    def close(self) -> None:
        """Frees the weights, the gradients and the optimizer after all queued requests have run.

        Pending futures complete as usual, with a result or an error. Sampling clients that were created by
        this one can still be used. A second call does nothing.
        """
        with self._lock:
            parts, self._parts = self._parts, None
            self._passes_to_step_on.clear()
        if parts is None:
            return
        engine = parts[0]
        engine.wait()
        del parts  # the finalizer makes the engine clean up
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
        """Returns the loss and log-probabilities, without computing gradients.

        Targets and weights of [T, K] score K tokens at each position, and so do the log-probabilities. The
        loss `stable_reinforce` takes the log-probabilities that were recorded when the tokens were sampled.

        `return_logprobs="trained"` skips positions of weight 0, which read 0.0. This saves their part of the
        projection to the vocabulary. With `return_argmax` the outputs also have `["is_argmax"]`, int64 [T],
        for the positions that have a log-probability: 1 if the target's logit is above that of every other
        entry of the vocabulary, else 0, also for a tie.

        Raises RequestError for data or a loss that cannot be run.
        """
        engine, trainer = self._open_parts()
        trained_only = return_logprobs == "trained"
        data = _completed(data, loss_fn)
        request = trainer.check(data, loss_fn, loss_fn_config, trained_only, with_argmax=return_argmax)
        return APIFuture(engine.submit(trainer.forward, request), PassResult.output)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        return_logprobs: Literal["all", "trained", "none"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Adds the gradient of the loss, a sum over tokens, to the gradients since the last `optim_step`.

        Returns the loss and log-probabilities like `forward`, and raises RequestError like it. With
        `return_logprobs="none"` only sums are copied from the device: `loss_fn_outputs` is empty, and
        `metrics` have the smallest and the largest log-probability of a trained target (`logprobs:min`,
        `logprobs:max`). A pass that fails while it runs adds nothing, and its future raises TrainingError.
        """
        engine, trainer = self._open_parts()
        data = _completed(data, loss_fn)
        request = trainer.check(
            data, loss_fn, loss_fn_config, return_logprobs != "all", loss_only=return_logprobs == "none"
        )
        with self._lock:
            future = APIFuture(engine.submit(trainer.forward_backward, request), PassResult.output)
            self._passes_to_step_on.append(future)
            return future

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
        return_logprobs: Literal["all", "trained"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Does `forward_backward` with a loss of the form `loss_fn(data, logprobs) -> (loss, metrics)`.

        `logprobs` has one float32 tensor [T] or [T, K] per datum, in nats, with one entry per target. The
        function runs on the engine's thread. `loss_type_input` can only be "logprobs".
        `return_logprobs="trained"` skips positions of weight 0, which read 0.0.
        """
        engine, trainer = self._open_parts()
        if loss_type_input not in (None, "logprobs"):
            raise RequestError(f"loss_type_input={loss_type_input!r} is not supported. It can be 'logprobs'.")
        data = [Datum.model_validate(datum) for datum in data]
        trained_only = return_logprobs == "trained"
        request = trainer.check(data, "cross_entropy", None, trained_only, allow_unknown_inputs=True)
        with self._lock:
            job = engine.submit(trainer.forward_backward_custom, list(data), request, loss_fn)
            future = APIFuture(job, PassResult.output)
            self._passes_to_step_on.append(future)
            return future

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Takes one AdamW step on the accumulated gradients and clears them.

        `adam_params` is another name of `optim_params`.

        Returns the gradient norm before clipping as `metrics["grad_norm"]`, and the memory in use
        (`memory_peak_gib` and others, see `OptimStepResponse`). If one of the passes since the
        last step failed and its error was not read, no step is taken on the incomplete batch: the gradients
        are dropped and TrainingError is raised. A step that fails itself changes neither weights nor
        optimizer, and its gradients are dropped too.
        """
        engine, trainer = self._open_parts()
        if (optim_params is None) == (adam_params is None):
            raise RequestError("optim_step takes one set of settings: AdamParams(learning_rate=...).")
        # A copy, because the caller may set its attributes while the step is queued.
        params = AdamParams.model_validate(adam_params if optim_params is None else optim_params).model_copy()
        with self._lock:
            passes = [future for future in self._passes_to_step_on if not future.failure_was_seen]
            job = engine.submit(_optim_step, trainer, passes, params)
            self._passes_to_step_on.clear()
            return APIFuture(job, _step_response)

    def note_failed_pass(self, error: BaseException) -> None:
        """Makes the next `optim_step` fail, as a pass that failed does: one was refused by a caller."""
        self._open_parts()
        refused: Future[ForwardBackwardOutput] = Future()
        refused.set_exception(error)
        with self._lock:
            self._passes_to_step_on.append(APIFuture(refused))

    # -- checkpoints ------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Saves weights and optimizer under `name`, in a folder that plain PEFT loads as well.

        Returns the folder's path. Raises CheckpointError for a name that is not a plain file name, or that is
        taken unless `overwrite` is set. The future raises TrainingError for weights or optimizer values that
        are not finite. After `ttl_seconds` the checkpoint has expired, and is removed by the next save of
        this client or the next service. `user_metadata` is added to that of the client.
        """
        path = checkpoint_root.place(self._checkpoint_dir, "training", name)
        job = self._submit_save(path, True, ttl_seconds, overwrite, user_metadata)
        return APIFuture(job, lambda _: SaveWeightsResponse(self._root.shown(path)))

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Saves only the weights, in the way of `save_state`, and returns the folder's path."""
        path = checkpoint_root.place(self._checkpoint_dir, "sampler", name)
        job = self._submit_save(path, False, ttl_seconds, overwrite, user_metadata)
        return APIFuture(job, lambda _: SaveWeightsForSamplerResponse(self._root.shown(path)))

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: Sequence[str] | None = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Saves the weights for other programs, in the way of `save_weights_for_sampler`.

        With recipients of age (X25519 public keys), each file is encrypted to them and has the ending `.age`.
        Raises ConfigError without the package pyrage.
        """
        path = checkpoint_root.place(self._checkpoint_dir, "external", name)
        job = self._submit_save(path, False, ttl_seconds, False)
        if age_encryption_recipients:
            extras.require("pyrage", "age_encryption_recipients", extra="tinker")
            job = self._engine.submit(_encrypt, job, path, tuple(age_encryption_recipients))
        return APIFuture(job, lambda _: SaveWeightsExternalResponse(self._root.shown(path)))

    def _submit_save(
        self,
        path: Path,
        with_optimizer: bool,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[None]:
        check_ttl(ttl_seconds)
        engine, trainer = self._open_parts()
        return engine.submit(
            _save, trainer, self._checkpoint_dir, path, with_optimizer, overwrite, ttl_seconds, user_metadata
        )

    def load_state(
        self, path: str | os.PathLike[str], weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Loads weights from a checkpoint or any PEFT LoRA folder, and resets the optimizer.

        Accumulated gradients are dropped. The future raises CheckpointError, before anything is changed, for
        a folder that is missing or damaged, or whose weights do not fit.
        """
        return self._load(path, with_optimizer=False, token=weights_access_token)

    def load_state_with_optimizer(
        self, path: str | os.PathLike[str], weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Loads weights, optimizer and random numbers from a checkpoint of `save_state`, to resume exactly.

        The errors are those of `load_state`.
        """
        return self._load(path, with_optimizer=True, token=weights_access_token)

    def _load(
        self, path: str | os.PathLike[str], with_optimizer: bool, token: str | None
    ) -> APIFuture[LoadWeightsResponse]:
        refuse_access_token(token)
        folder = self._root.folder(path)
        with self._lock:
            self._passes_to_step_on.clear()  # loading drops their gradients
            job = self._engine.submit(self._trainer.load, folder, with_optimizer)
        return APIFuture(job, lambda _: LoadWeightsResponse(os.fspath(path)))

    # -- sampling ---------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
        *,
        seed: int | None = None,
    ) -> SamplingClient:
        """Returns a sampler of the current weights, which later steps do not change.

        With a name the weights are also saved under it, as by `save_weights_for_sampler`. Unseeded samples
        are drawn from `seed`, or else from this client's random numbers, which are part of its state. With
        `record_stability_info` the log-probabilities of its samples are kept for the loss `stable_reinforce`.
        `kind="inflight"` promises at least these weights, and returns a snapshot too. Nothing is sent over a
        network here, so `retry_config` has nothing to set.
        """
        if name is not None:
            self.save_weights_for_sampler(name).result()
        return SamplingClient.of_snapshot(self._engine, self._trainer, seed, record_stability_info)

    def create_sampling_client(
        self,
        model_path: str | os.PathLike[str],
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Returns a sampler of saved weights, on this client's base model.

        Raises CheckpointError for a folder that is missing, damaged, or does not fit.
        """
        folder = self._root.folder(model_path)
        return SamplingClient.of_checkpoint(self._engine, folder, record_stability_info)

    @property
    def samples_together(self) -> bool:
        """Whether all processes of a run have to sample together, because the weights are sharded."""
        return self._engine.base.is_sharded

    # -- information ------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        """Returns the base model, the adapter's shape, and the metadata that this client was created with."""
        base, lora = self._engine.base, self._trainer.adapter.lora
        without_adapter = base.adapters.shares_without(self._trainer.adapter)
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
            tokenizer_id=models.model_location(base.name),
            adapted_share=1.0 - sum(without_adapter.values()),
            without_adapter=without_adapter,
        )
        metadata = dict(self._trainer.user_metadata)
        return GetInfoResponse(self.model_id, model_data, metadata, is_lora=lora.rank > 0)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the base model's tokenizer."""
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
        return_logprobs: Literal["all", "trained", "none"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(data, loss_fn, loss_fn_config, return_logprobs=return_logprobs)

    async def forward_backward_custom_async(
        self,
        data: Sequence[Datum],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
        return_logprobs: Literal["all", "trained"] = "all",
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(
            data, loss_fn, loss_type_input=loss_type_input, return_logprobs=return_logprobs
        )

    async def optim_step_async(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        return self.optim_step(optim_params, adam_params=adam_params)

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        return self.save_state(name, ttl_seconds, overwrite, user_metadata)

    async def save_weights_for_sampler_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(name, ttl_seconds, user_metadata, overwrite=overwrite)

    async def save_weights_external_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: Sequence[str] | None = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        return self.save_weights_external(name, ttl_seconds, age_encryption_recipients)

    async def load_state_async(
        self, path: str | os.PathLike[str], weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        return self.load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str | os.PathLike[str], weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(path, weights_access_token)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
        *,
        seed: int | None = None,
    ) -> SamplingClient:
        if name is not None:
            await self.save_weights_for_sampler(name)
        return self.save_weights_and_get_sampling_client(
            None, retry_config, record_stability_info, kind, seed=seed
        )

    async def create_sampling_client_async(
        self,
        model_path: str | os.PathLike[str],
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        return self.create_sampling_client(model_path, retry_config, record_stability_info)

    async def get_info_async(self) -> GetInfoResponse:
        return self.get_info()

    async def get_tokenizer_async(self) -> Any:
        return self.get_tokenizer()


def _optim_step(
    trainer: Trainer, passes: Sequence[APIFuture[ForwardBackwardOutput]], adam_params: AdamParams
) -> tuple[Readback, dict[str, float]]:
    """Takes a step on the gradients of `passes`, unless one of them failed.

    Returns the gradient norm and the memory in use.
    """
    for future in passes:
        if (error := future.exception()) is not None:
            trainer.discard_gradients()
            raise TrainingError(
                f"optim_step was not run: a forward_backward before it failed. {error}"
            ) from error
    return trainer.optim_step(adam_params), devices.memory_use(trainer.base.device)


def _step_response(step: tuple[Readback, dict[str, float]]) -> OptimStepResponse:
    norm, memory = step
    return OptimStepResponse(metrics={"grad_norm": float(norm.arrays()[0]), **memory})


def _save(
    trainer: Trainer,
    run: Path,
    path: Path,
    with_optimizer: bool,
    overwrite: bool,
    ttl_seconds: int | None,
    user_metadata: Mapping[str, str] | None,
) -> None:
    """Saves a checkpoint, then removes those of the run that have expired."""
    trainer.save(path, with_optimizer, overwrite, ttl_seconds, user_metadata)
    trainer.base.world.on_rank0(functools.partial(checkpoint_root.remove_expired, run))


def _encrypt(saved: Future[None], folder: Path, recipients: Sequence[str]) -> None:
    """Replaces the files of a checkpoint by encrypted ones. Raises the error of the save if it failed."""
    saved.result()
    import pyrage

    keys = [pyrage.x25519.Recipient.from_str(one) for one in recipients]
    plain = {file: files.read(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    with files.writing_folder(folder, replace=True, must_hold=[checkpoint.STATE_FILE]) as encrypted:
        for file, content in plain.items():
            name = file.relative_to(folder)
            if file.name == checkpoint.STATE_FILE:
                files.create(encrypted / name, content)
            else:
                files.create(encrypted / f"{name}.age", pyrage.encrypt(content, keys))


def _completed(data: Sequence[Datum], loss_fn: str) -> list[Datum]:
    """Returns the datums, also from mappings, with what this process recorded if the loss needs it."""
    checked = [Datum.model_validate(datum) for datum in data]
    return [RECORDED.complete(datum) for datum in checked] if loss_fn == "stable_reinforce" else checked


def refuse_access_token(token: str | None) -> None:
    """Raises RequestError for a token of the hosted service: checkpoints here are folders on this machine."""
    if token is not None:
        raise RequestError(
            "weights_access_token is for checkpoints of other accounts of a hosted service. Checkpoints here "
            "are folders: omit it."
        )
