"""The values that are passed through the training API. None of them needs torch.

Shape suffixes: T tokens of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from cookbook.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]
StopReason: TypeAlias = Literal["stop", "length"]
LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]

IGNORED_TARGET = -100
"""A target token that is neither scored nor trained."""


# -- sequences of tokens ----------------------------------------------------------------------


class EncodedTextChunk:
    """A run of token ids, copied from a list, an array or a tensor.

    Raises RequestError unless they are one row of whole numbers.
    """

    __slots__ = ("_tokens_T", "type")

    def __init__(
        self, tokens: Sequence[int] | np.ndarray, type: Literal["encoded_text"] = "encoded_text"
    ) -> None:
        self._tokens_T = TensorData(tokens, "int64")._array
        self._tokens_T.setflags(write=False)
        self.type = type
        if self._tokens_T.ndim != 1:
            raise RequestError(f"Invalid tokens of shape {[*self._tokens_T.shape]}: must be one row of ids.")

    @property
    def tokens(self) -> list[int]:
        """The token ids as a new list."""
        return self._tokens_T.tolist()

    @property
    def length(self) -> int:
        return len(self._tokens_T)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedTextChunk) and np.array_equal(self._tokens_T, other._tokens_T)

    def __repr__(self) -> str:
        return f"EncodedTextChunk(tokens={self.tokens})"


ModelInputChunk: TypeAlias = EncodedTextChunk


@dataclass(frozen=True)
class ModelInput:
    """The input of a model: chunks of token ids, in order. The list of chunks is copied."""

    chunks: Sequence[ModelInputChunk] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", [*self.chunks])

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | np.ndarray) -> ModelInput:
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    def to_ints(self) -> list[int]:
        """Returns the token ids of all chunks as a new list."""
        return self.to_numpy().tolist()

    def to_numpy(self) -> np.ndarray:
        """Returns the token ids of all chunks as an int64 array [T], which may be read-only."""
        if len(self.chunks) == 1:
            return self.chunks[0]._tokens_T
        return np.concatenate([np.empty(0, np.int64), *(chunk._tokens_T for chunk in self.chunks)])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk([int(token)]))

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def __len__(self) -> int:
        return self.length


# -- tensors ----------------------------------------------------------------------------------


class TensorData:
    """An int64 or float32 array that is sent with a request, copied from the given data.

    `data` is a list, a numpy array, a torch tensor, a `ModelInput` or another `TensorData`. Without `dtype`
    whole numbers become int64 and others float32. Raises RequestError for anything but numbers, and for
    fractions if int64 is requested.
    """

    __slots__ = ("_array",)

    def __init__(
        self,
        data: LossFnInput,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if dtype not in (None, "int64", "float32"):
            raise RequestError(f"TensorData of dtype {dtype!r} is not supported. Use 'int64' or 'float32'.")
        values: Any = data
        if isinstance(values, (TensorData, ModelInput)):
            values = values.to_numpy()
        elif hasattr(values, "detach"):  # a torch tensor: numpy has no bfloat16
            values = values.detach().cpu()
            values = (values.float() if values.is_floating_point() else values).numpy()
        try:
            # Copied, because the caller may refill its buffer while the request is queued.
            array = np.array(values)
            if array.dtype.kind not in "iubf":
                raise ValueError("it is not an array of numbers")
            if dtype is None:
                dtype = "float32" if array.dtype.kind == "f" else "int64"
            if dtype == "int64" and array.dtype.kind == "f" and not (np.trunc(array) == array).all():
                raise ValueError("not all of them are whole numbers")
            array = array.astype(dtype, copy=False)
            self._array = array if shape is None else array.reshape(tuple(shape))
        except (TypeError, ValueError) as error:
            as_shape = "" if shape is None else f" of shape {list(shape)}"
            raise RequestError(
                f"TensorData cannot hold this data as {dtype or 'numbers'}{as_shape}: {error}."
            ) from error

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape)

    @property
    def data(self) -> list[int] | list[float]:
        """The values as one flat list."""
        return self._array.ravel().tolist()

    def tolist(self) -> list[Any]:
        return self._array.tolist()

    def to_numpy(self) -> np.ndarray:
        return self._array

    def to_torch(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(self._array))

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._array.tolist())

    def __getitem__(self, index: int | slice) -> Any:
        return self._array[index].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and np.array_equal(self._array, other._array)

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={self._array.tolist()})"


LossFnInput: TypeAlias = (
    "TensorData | ModelInput | np.ndarray | torch.Tensor | Sequence[int] | Sequence[float]"
)
LossFnOutput: TypeAlias = Mapping[str, TensorData]

_DTYPE_OF_INPUT: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
}


# -- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Datum:
    """One sequence to train on: the model's input, and the targets that its positions are scored against.

    `loss_fn_inputs["target_tokens"][t]` is the token that position t of `model_input` should predict, so
    inputs and targets have the same length and the caller has already shifted them. Values become
    `TensorData`, and everything is copied, so the caller may change its data afterwards. A target of -100 is
    ignored. Without `weights`, every other target has weight 1.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, LossFnInput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = {}
        for name, value in self.loss_fn_inputs.items():
            try:
                inputs[name] = TensorData(value, _DTYPE_OF_INPUT.get(name))
            except RequestError as error:
                error.add_note(f"in loss_fn_inputs[{name!r}]")
                raise
        object.__setattr__(self, "model_input", ModelInput(self.model_input.chunks))
        object.__setattr__(self, "loss_fn_inputs", inputs)


MAX_RANK = 16_384
"""No published model has a weight whose smaller side is larger, so a larger rank adds nothing."""


@dataclass(frozen=True)
class PeftSettings:
    """The settings of a saved adapter: its `adapter_config.json`, and the layers that its tensors are of.

    `explicit` are arguments of PEFT's LoraConfig in which every layer is named in full.
    """

    written: Mapping[str, Any]
    explicit: Mapping[str, Any]


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter. It is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`."""

    rank: int = 32
    alpha: float = 32.0
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    targets: Sequence[str] = ()
    """The layers to adapt, by names or regular expressions, instead of those that `train_...` choose."""
    dropout: float = 0.0
    """The share of the adapter's inputs that is dropped in training."""
    use_rslora: bool = False
    add_tokens: Sequence[str] = ()
    """Tokens to add to the tokenizer, whose rows of the embeddings and the projection are trained."""
    peft: PeftSettings | None = field(default=None, compare=False, repr=False)
    """The settings of a saved adapter, which take the place of the others. None for a new adapter."""

    def as_json(self) -> dict[str, Any]:
        """Returns the values as JSON, without those that the adapter's own file holds or that are unset."""
        unset = {
            name for name in ("targets", "dropout", "use_rslora", "add_tokens") if not getattr(self, name)
        }
        return {name: value for name, value in vars(self).items() if name != "peft" and name not in unset}


LORA_KEYS = {
    "rank": "lora_rank", "alpha": "lora_alpha", "targets": "lora_targets", "dropout": "lora_dropout",
}  # fmt: skip
"""The keys of a run for those settings of an adapter that have other names there."""


def check_lora(lora: LoraConfig) -> None:
    """Raises ConfigError for settings that exclude each other, whatever the model."""
    check_tokens(lora.add_tokens)
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"Invalid lora_dropout={lora.dropout}: must be >= 0 and < 1.")
    of_lora = ("targets", "dropout", "use_rslora")
    if not lora.rank and (given := [name for name in of_lora if getattr(lora, name)]):
        raise ConfigError(
            f"{LORA_KEYS.get(given[0], given[0])} is a setting of a LoRA, and a rank of 0 trains the model's "
            f"own weights. Remove it, or set a rank of at least 1."
        )
    if lora.targets and not (lora.train_attn and lora.train_mlp and lora.train_unembed):
        raise ConfigError(
            "lora_targets names the layers to adapt, and so do train_attn, train_mlp and train_unembed. "
            "Remove one or the other."
        )
    for number, target in enumerate(lora.targets):
        if not isinstance(target, str) or not target.strip():
            raise ConfigError(f"lora_targets has {target!r} as number {number + 1}, which names no layer.")


def check_tokens(add_tokens: Sequence[str]) -> None:
    """Raises ConfigError unless these are different texts that a tokenizer can have as tokens."""
    for number, token in enumerate(add_tokens):
        if not isinstance(token, str) or token != token.strip() or not token:
            raise ConfigError(
                f"Invalid token {token!r} in add_tokens: must be text without white space around it."
            )
        if token in add_tokens[:number]:
            raise ConfigError(f"add_tokens names {token!r} twice. Remove one of the two.")


@dataclass(frozen=True)
class AdamParams:
    """The settings of one AdamW step. `weight_decay` is decoupled. `grad_clip_norm` of 0 disables clipping.

    Raises RequestError for a value that is not a number of 0 or more, and for a beta of 1 or more.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            try:
                number = float(value + 0.0)  # refuses a string, and copies an array of one number
            except (TypeError, ValueError) as error:
                raise RequestError(f"Invalid {name}={value!r}: must be a number.") from error
            below = 1 if name.startswith("beta") else math.inf
            if not 0 <= number < below:
                must = "at least 0 and below 1" if below == 1 else "finite and at least 0"
                raise RequestError(f"Invalid {name}={value!r}: must be {must}.")
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """The result of a forward pass or a forward and backward pass.

    `loss_fn_outputs[i]["logprobs"]` is float32 [T]: the log-probability in nats of each target of datum i.
    With `return_argmax`, `["is_argmax"]` is int64 [T]: 1 for each target that is the most likely token.
    `metrics` are sums over the batch (`loss:sum`, `weights:sum`). `loss` is the weighted mean negative
    log-likelihood in nats per trained token; for a custom loss, it is the value of that loss.
    """

    loss: float
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)
    loss_fn_output_type: str = "TensorData"


@dataclass(frozen=True)
class OptimStepResponse:
    """The result of a step. `metrics["grad_norm"]` is the global gradient norm before clipping."""

    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveWeightsResponse:
    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    path: str


# -- sampling ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """The settings for continuing a prompt.

    `stop` (strings or token ids) and `stop_token_ids` both apply. Without them, the model's own
    end-of-sequence tokens stop it. An empty `stop` of `[]` differs from None: nothing stops a continuation
    before `max_tokens`, as in Tinker. If `max_tokens` is None, the limit is the model's context length.
    `top_k` of -1 keeps the whole vocabulary. `temperature` of 0 takes the most likely token.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (str, tuple))):
                object.__setattr__(self, name, [*(value.tolist() if hasattr(value, "tolist") else value)])


@dataclass(frozen=True)
class SampledSequence:
    """One continuation. `tokens` include the token that stopped it, if one did.

    `logprobs[t]` is the model's own log-probability of `tokens[t]`, before temperature, top-k and top-p.
    """

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: StopReason


@dataclass(frozen=True)
class SampleResponse:
    """The sampled sequences. `prompt_logprobs[0]` is None, because nothing precedes the first token."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    prompt_cache_hit_tokens: int = field(default=0, compare=False)
    """How many tokens of the prompt were not computed, because an earlier text of this snapshot, or another
    prompt of the same pass, begins with them. The prompt counts once, however many samples it has. It is 0 if
    a server sampled. Responses compare equal whatever was reused."""


@dataclass(frozen=True)
class PromptScores:
    """A model's scores of given tokens. The first entries are None: nothing precedes the first token."""

    logprobs: list[float | None]
    is_argmax: list[bool | None]
    """Whether every other token has a lower probability at that position. Tokens that tie are not argmax."""


# -- information ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelData:
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
    adapted_share: float = 1.0
    """The share of the model's weights that carry an adapter, or are trained themselves."""
    without_adapter: Mapping[str, float] = field(default_factory=dict)
    """For each kind of other weights (embeddings, routers, ...), their share of the model's weights."""


@dataclass(frozen=True)
class GetInfoResponse:
    model_id: str
    model_data: ModelData
    user_metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        return self.model_data.model_name

    @property
    def lora_rank(self) -> int:
        return self.model_data.lora_rank


@dataclass(frozen=True)
class SupportedModel:
    model_name: str


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """`supported_models` lists the models on this machine. Any hub id or local path is supported as well."""

    supported_models: list[SupportedModel]
    devices: list[str]
