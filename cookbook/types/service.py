"""What clients say about models, runs and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Self, TypeAlias

from cookbook.errors import RequestError
from cookbook.types.optimizer import AdamOptimizerConfig
from cookbook.types.values import Value

ModelID: TypeAlias = str
CheckpointType: TypeAlias = Literal["training", "sampler", "external"]


@dataclass(frozen=True)
class ModelData(Value):
    model_id: str
    model_name: str
    lora_rank: int
    lora_alpha: float
    num_trained_parameters: int
    arch: str
    device: str
    dtype: str
    num_logits: int
    """The number of vocabulary entries for which the model has logits, including padding entries."""
    tokenizer_id: str | None = None
    """From where transformers loads the tokenizer."""
    adapted_share: float = 1.0
    """The share of the model's weights that carry an adapter, or are trained themselves."""
    without_adapter: Mapping[str, float] = field(default_factory=dict)
    """For each kind of other weights (embeddings, routers, ...), their share of the model's weights."""


@dataclass(frozen=True)
class GetInfoResponse(Value):
    model_id: str
    model_data: ModelData
    user_metadata: Mapping[str, str] = field(default_factory=dict)

    is_lora: bool = True
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)
    type: Literal["get_info"] = "get_info"

    @property
    def model_name(self) -> str:
        return self.model_data.model_name

    @property
    def lora_rank(self) -> int:
        return self.model_data.lora_rank


@dataclass(frozen=True)
class SupportedModel(Value):
    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True)
class GetServerCapabilitiesResponse(Value):
    """`supported_models` lists the models on this machine. Any hub id or local path is supported as well."""

    supported_models: list[SupportedModel]
    devices: list[str]


# -- runs and checkpoints ---------------------------------------------------------------------

TINKER_SCHEME = "tinker://"
FOLDER_OF_TYPE: dict[CheckpointType, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
"""The second part of a path `tinker://<run>/<part>/<name>`."""


_MAX_TTL_SECONDS = 10 * 365 * 24 * 3600


def check_ttl(ttl_seconds: object) -> None:
    """Raises RequestError unless it is how long a checkpoint may be kept in seconds, or None for ever."""
    is_number = isinstance(ttl_seconds, int) and not isinstance(ttl_seconds, bool)
    if ttl_seconds is not None and not (is_number and 1 <= ttl_seconds <= _MAX_TTL_SECONDS):  # type: ignore[operator]
        hint = " Pass overwrite= by name." if isinstance(ttl_seconds, bool) else ""
        raise RequestError(
            f"Invalid ttl_seconds={ttl_seconds!r}: must be a whole number from 1 to {_MAX_TTL_SECONDS} (ten "
            f"years), or None to keep the checkpoint.{hint}"
        )


@dataclass(frozen=True)
class Checkpoint(Value):
    """A checkpoint of a training run. `checkpoint_id` is "weights/<name>" or "sampler_weights/<name>"."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Mapping[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class ParsedCheckpointTinkerPath(Value):
    """The parts of a path `tinker://<run>/<weights or sampler_weights>/<name>`."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> Self:
        """Raises RequestError for a path of another form."""
        parts = tinker_path.removeprefix(TINKER_SCHEME).split("/")
        types = {folder: kind for kind, folder in FOLDER_OF_TYPE.items()}
        if not tinker_path.startswith(TINKER_SCHEME) or len(parts) != 3 or parts[1] not in types:
            raise RequestError(
                f"Invalid tinker path {tinker_path!r}: must be tinker://<run>/weights/<name> or "
                f"tinker://<run>/sampler_weights/<name>."
            )
        return cls(tinker_path, parts[0], types[parts[1]], "/".join(parts[1:]))


@dataclass(frozen=True)
class TrainingRun(Value):
    """A folder of checkpoints that one training client wrote."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Cursor(Value):
    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True)
class TrainingRunsResponse(Value):
    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True)
class CheckpointsListResponse(Value):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True)
class WeightsInfoResponse(Value):
    """What is needed to create a training client for a checkpoint."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)


@dataclass(frozen=True)
class ExternalWeightsUrlsResponse(Value):
    """A URL for each file of a checkpoint, by its path in the checkpoint."""

    urls: Mapping[str, str]
    expires: datetime
