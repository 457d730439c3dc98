"""ServiceClient, which creates training and sampling clients."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cookbook import models
from cookbook.clients.futures import APIFuture
from cookbook.clients.rest import RestClient
from cookbook.clients.sampling import SamplingClient
from cookbook.clients.training import TrainingClient, refuse_access_token
from cookbook.engine import checkpoint, checkpoint_root, processes
from cookbook.engine.checkpoint_root import CheckpointRoot
from cookbook.engine.options import (
    EngineOptions,
    GradientCheckpointing,
    OptimizerBits,
    Quantization,
    Shard,
)
from cookbook.engine.worker import Engine
from cookbook.errors import ClosedError, ConfigError, RequestError
from cookbook.trace import Recorder
from cookbook.types import (
    MAX_RANK,
    AdamOptimizerConfig,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    LoraConfig,
    check_lora,
    check_optimizer,
)

logger = logging.getLogger(__name__)


class ServiceClient:
    """Runs models on this machine. Clients on one base model share one copy of its weights.

    `device` is "auto" (CUDA if there is one, else CPU), "cpu", "cuda" or "cuda:N". `dtype` is "auto"
    (bfloat16 on CUDA, or float16 where the device has none; float32 on CPU) or the name of a dtype.
    Checkpoints are saved in `checkpoint_dir`; by default each training client has a new folder under
    ~/.cookbook/checkpoints. Batches are split into micro-batches of at most `max_tokens_per_microbatch`
    tokens (None: what fits and is fast). `gradient_checkpointing` says when their layers are run again in the
    backward pass: "auto" (if their activations would not fit otherwise), "on", "off" or "offload" (on,
    with the inputs of layers in host memory).
    `quantization="nf4"` holds the frozen linear layers in 4 bits (QLoRA; `pip install
    'sft-cookbook[qlora]'`), and "fp8" in 8 bits. `compile` compiles the decoder's layers. `deterministic`
    makes this process compute the same bits each time on CUDA too. `optimizer_bits=8` holds the moments of
    AdamW in 8 bits.

    In several processes (`torchrun`), each runs the same program and makes the same calls in the same order
    with all of the data. Every call then computes a part on each process and returns the same result on all.
    `shard` says whether each process holds all base weights ("none"), a part ("full"), or what fits ("auto").

    `options` holds all of these in one object, instead of single arguments. A `recorder` collects the times
    of what the engine's thread and the device do.

    `user_metadata` and `project_id` are positional as in Tinker. Both are written into the metadata of every
    training client and its checkpoints, the latter under its name, as is `display_name`. All other options
    are keyword arguments. `base_url` is refused, because nothing is sent to a server; an `api_key` and
    headers are not needed.

    It may be used in a `with` block. After `close` every call raises ClosedError, and so does every call of a
    client created by this one.
    """

    _says_tinker_paths = False

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        checkpoint_dir: str | os.PathLike[str] | None = None,
        max_tokens_per_microbatch: int | None = None,
        gradient_checkpointing: GradientCheckpointing = "auto",
        quantization: Quantization | None = None,
        compile: bool = False,
        shard: Shard = "auto",
        deterministic: bool = False,
        optimizer_bits: OptimizerBits = 32,
        recorder: Recorder | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self._user_metadata = _checked_metadata(user_metadata)
        if project_id is not None:
            self._user_metadata["project_id"] = project_id
        if display_name is not None:
            self._user_metadata["display_name"] = display_name
        if base_url is not None:
            raise ConfigError(
                f"base_url={base_url!r} names a server, and this client runs models in its own process. Omit "
                f"it, or use the ServiceClient of the package tinker."
            )
        if api_key is not None or default_headers_overrides:
            logger.info("api_key and default_headers_overrides have no effect: nothing is sent to a server.")
        named = EngineOptions(
            device,
            dtype,
            max_tokens_per_microbatch,
            gradient_checkpointing,
            quantization,
            compile,
            shard,
            deterministic,
            optimizer_bits,
        )
        if options is not None and named != EngineOptions():
            raise ConfigError("Both options= and some of its parts by name were given. Use one of the two.")
        self._options = options or named
        self._recorder = recorder
        own = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
        self._root = CheckpointRoot(own, self._says_tinker_paths)
        self._engines: dict[tuple[str, tuple[str, ...]], Engine] = {}
        self._unshared_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        """The engines of full fine-tunes. Each trains a copy of its own, which is freed with its clients."""
        self._is_closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
        *,
        alpha: float = 32.0,
    ) -> TrainingClient:
        """Returns a client with a new adapter on `base_model` (a hub id, a folder, or the embedded model).

        A rank of 0 trains all of the model's own weights instead, on a copy that no other client shares.
        `seed` initialises the adapter; None draws a random seed. Raises ConfigError for a rank or layers that
        cannot be trained, and ModelError for a model that is missing or damaged.
        """
        check_optimizer(optimizer)
        lora = LoraConfig(
            rank=rank,
            alpha=alpha,
            seed=seed,
            train_unembed=train_unembed,
            train_mlp=train_mlp,
            train_attn=train_attn,
        )
        return self.create_training_client(base_model, lora, user_metadata)

    def create_training_client(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
        *,
        checkpoint_dir: Path | None = None,
    ) -> TrainingClient:
        """Does `create_lora_training_client` with all the settings that an adapter can have.

        `checkpoint_dir` is a folder for the checkpoints of this client alone.
        """
        self._check_open()
        if not 0 <= lora.rank <= MAX_RANK:
            raise ConfigError(
                f"Invalid rank={lora.rank}: must be 1 to {MAX_RANK:,} for a LoRA, or 0 to train the model's "
                f"own weights."
            )
        if lora.rank == 0 and not (lora.train_mlp and lora.train_attn and lora.train_unembed):
            raise ConfigError(
                "rank=0 trains every weight, but train_mlp, train_attn or train_unembed is False. These "
                "select the layers of a LoRA: set them to True, or use a rank of at least 1."
            )
        check_lora(lora)
        if lora.seed is None:
            lora = replace(lora, seed=processes.current().broadcast(secrets.randbelow(2**31)))
        return self._training_client(base_model, lora, user_metadata, checkpoint_dir)

    def create_training_client_from_state(
        self,
        path: str | os.PathLike[str],
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """Returns a client with a checkpoint's model, LoRA settings and weights, and a new optimizer.

        `base_model` replaces the model that the checkpoint names and must have its shapes. Raises
        CheckpointError for a folder that is missing or damaged, or does not fit.
        """
        check_optimizer(optimizer)
        client = self._client_like(path, base_model, user_metadata, weights_access_token)
        return _loaded(client, client.load_state(path))

    def create_training_client_from_state_with_optimizer(
        self,
        path: str | os.PathLike[str],
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Returns a client that resumes a checkpoint of `save_state` exactly, including the optimizer.

        The errors are those of `create_training_client_from_state`.
        """
        client = self._client_like(path, base_model, user_metadata, weights_access_token)
        return _loaded(client, client.load_state_with_optimizer(path))

    def create_sampling_client(
        self,
        model_path: str | os.PathLike[str] | None = None,
        base_model: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Returns a sampler of saved weights (`model_path`) or of the unmodified `base_model`.

        With `record_stability_info` the log-probabilities of its samples are kept for the loss
        `stable_reinforce`. Nothing is sent over a network here, so `retry_config` has nothing to set.

        Raises RequestError if neither is given, and CheckpointError or ModelError for files that are missing
        or damaged.
        """
        self._check_open()
        if model_path is not None:
            model_path = self._root.folder(model_path)
            info = checkpoint.read_info(model_path)
            if info.lora.rank == 0:
                return SamplingClient.of_base(self._unshared_engine(model_path), record_stability_info)
            engine = self._engine(base_model or info.base_model, info.lora.add_tokens)
            return SamplingClient.of_checkpoint(engine, model_path, record_stability_info)
        if base_model is None:
            raise RequestError("Give model_path (a saved checkpoint) or base_model (a model's name).")
        return SamplingClient.of_base(self._engine(base_model), record_stability_info)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Returns the models and devices of this machine. Other models can be named as well."""
        self._check_open()
        return self.create_rest_client().get_server_capabilities().result()

    def create_rest_client(self) -> RestClient:
        """Returns a client that lists and removes the checkpoints of this service."""
        self._check_open()
        return RestClient(root=self._root)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """Copies a checkpoint into a new run of this client's project (`RestClient.copy_weights`)."""
        return self.create_rest_client().copy_weights(
            path,
            self._user_metadata.get("project_id"),
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )

    def close(
        self,
        status: Literal["success", "errored", "interrupted"] = "success",
        detail: str | None = None,
    ) -> APIFuture[None]:
        """Ends the engines after their queued jobs have run, and closes every client.

        Pending futures complete as usual, with a result or an error. A second call does nothing. `status` and
        `detail` are logged. Returns a completed future.
        """
        if status != "success" or detail:
            logger.info("This service is closed: %s%s", status, f" ({detail})" if detail else "")
        with self._lock:
            self._is_closed = True
            engines = [*self._engines.values(), *self._unshared_engines]
            self._engines.clear()
        for engine in engines:
            engine.close()
        return APIFuture.completed(None)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("This ServiceClient was closed. Create a new one.")

    def _engine(self, base_model: str, add_tokens: Sequence[str] = ()) -> Engine:
        location, tokens = models.model_location(base_model), tuple(add_tokens)
        key = os.path.realpath(location) if os.path.isdir(location) else location, tokens
        with self._lock:
            self._check_open()
            if key not in self._engines:
                self._engines[key] = Engine(
                    base_model, self._options, recorder=self._recorder, add_tokens=tokens
                )
            return self._engines[key]

    def _training_client(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None,
        checkpoint_dir: Path | None = None,
    ) -> TrainingClient:
        world = processes.current()
        model_id = world.broadcast(self._root.new_run_id())
        folder = checkpoint_dir or self._root.new_run(model_id)
        world.on_rank0(self._remove_expired)
        if lora.rank == 0 and self._options.quantization is not None:
            raise ConfigError(
                f"quantization={self._options.quantization} is not supported with rank=0: it freezes the "
                f"weights that rank=0 trains. Use a rank of at least 1, or quantization=None."
            )
        metadata = self._user_metadata | _checked_metadata(user_metadata)
        create = self._unshared_engine if lora.rank == 0 else self._engine
        engine = create(base_model, lora.add_tokens)
        return TrainingClient(engine, lora, folder, metadata, model_id=model_id, root=self._root)

    def _remove_expired(self) -> None:
        for run in self._root.runs().values():
            checkpoint_root.remove_expired(run)

    def _unshared_engine(self, model: str, add_tokens: Sequence[str] = ()) -> Engine:
        self._check_open()
        engine = Engine(
            model, self._options, is_trained=True, recorder=self._recorder, add_tokens=tuple(add_tokens)
        )
        with self._lock:
            self._unshared_engines.add(engine)
            is_closed = self._is_closed  # the client may have been closed meanwhile
        if is_closed:
            engine.close()
        return engine

    def _client_like(
        self,
        path: str | os.PathLike[str],
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        weights_access_token: str | None,
    ) -> TrainingClient:
        self._check_open()
        refuse_access_token(weights_access_token)
        path = self._root.folder(path)
        if isinstance(base_model, Mapping):  # in an earlier version user_metadata was the second argument
            base_model, user_metadata = None, base_model
        info = checkpoint.read_info(path)
        if info.lora.rank == 0:
            if base_model is not None:
                raise RequestError(
                    f"base_model={base_model!r} was given for {os.fspath(path)}, which is a full fine-tune "
                    f"and has no base. Omit base_model."
                )
            base_model = os.fspath(path)
        base_model = base_model or info.base_model
        return self._training_client(base_model, info.lora, user_metadata or info.user_metadata)

    # -- async twins ------------------------------------------------------------------------

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
        *,
        alpha: float = 32.0,
    ) -> TrainingClient:
        return await asyncio.to_thread(
            self.create_lora_training_client,
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            user_metadata,
            optimizer,
            alpha=alpha,
        )

    async def create_training_client_async(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
        *,
        checkpoint_dir: Path | None = None,
    ) -> TrainingClient:
        return await asyncio.to_thread(
            self.create_training_client, base_model, lora, user_metadata, checkpoint_dir=checkpoint_dir
        )

    async def create_training_client_from_state_async(
        self,
        path: str | os.PathLike[str],
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        return await asyncio.to_thread(
            self.create_training_client_from_state,
            path,
            base_model,
            user_metadata,
            weights_access_token,
            optimizer,
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str | os.PathLike[str],
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        return await asyncio.to_thread(
            self.create_training_client_from_state_with_optimizer,
            path,
            base_model,
            user_metadata,
            weights_access_token,
        )

    async def create_sampling_client_async(
        self,
        model_path: str | os.PathLike[str] | None = None,
        base_model: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        return await asyncio.to_thread(
            self.create_sampling_client, model_path, base_model, retry_config, record_stability_info
        )

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return self.get_server_capabilities()


def _loaded(client: TrainingClient, loading: APIFuture[LoadWeightsResponse]) -> TrainingClient:
    """Returns the client after it has loaded, or closes it and raises the error."""
    try:
        loading.result()
    except BaseException:
        client.close()
        raise
    return client


def _checked_metadata(user_metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Returns a copy. Raises RequestError unless it is a mapping, such as for a positional device."""
    if user_metadata is not None and not isinstance(user_metadata, Mapping):
        raise RequestError(
            f"Invalid user_metadata={user_metadata!r}: must map names to strings. Pass options of the engine "
            f"by name: device=, dtype=, checkpoint_dir=."
        )
    return dict(user_metadata or {})
