"""One sequence to train on, and the sampled sequences that its tokens come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import numpy as np

from cookbook.errors import RequestError
from cookbook.types.model_input import ModelInput
from cookbook.types.tensor_data import TensorData, TensorDtype
from cookbook.types.values import Value

if TYPE_CHECKING:
    import torch

LossFnType: TypeAlias = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"
]
LossFnInput: TypeAlias = (
    "TensorData | ModelInput | np.ndarray | torch.Tensor | Sequence[int] | Sequence[float]"
)
LossFnInputs: TypeAlias = Mapping[str, LossFnInput]
LossFnOutput: TypeAlias = Mapping[str, TensorData]

IGNORED_TARGET = -100
"""A target token that is neither scored nor trained."""

_DTYPE_OF_INPUT: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
    "sequence_ratio_mask": "float32",
}


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan(Value):
    """A run of tokens that are `[offset, offset + length)` of the prompt of the named sampled sequence."""

    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        _check_span(self)


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan(Value):
    """A run of tokens that are `[offset, offset + length)` of the tokens of the named sampled sequence."""

    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        _check_span(self)


ProvenanceSpan: TypeAlias = PromptProvenanceSpan | SampledProvenanceSpan
ProvenanceSpans: TypeAlias = Sequence[ProvenanceSpan]


def _check_span(span: ProvenanceSpan) -> None:
    if not span.sequence_id or span.offset < 0 or span.length < 0:
        raise RequestError(f"Invalid {span!r}: must have a sequence_id, and offset and length of 0 or more.")


@dataclass(frozen=True)
class Datum(Value):
    """One sequence to train on: the model's input, and the targets that its positions are scored against.

    `loss_fn_inputs["target_tokens"][t]` is the token that position t of `model_input` should predict, so
    inputs and targets have the same length and the caller has already shifted them. Values become
    `TensorData`, and everything is copied, so the caller may change its data afterwards. A target of -100 is
    ignored. Without `weights`, every other target has weight 1. Targets and weights of [T, K] score K tokens
    at each position.

    Provenance names, for every position of the input and of the targets, the sampled sequence that it was
    taken from: `with_provenance`. Both lists are given, or neither.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, LossFnInput] = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __post_init__(self) -> None:
        inputs = {}
        for name, value in self.loss_fn_inputs.items():
            try:
                inputs[name] = TensorData(value, _DTYPE_OF_INPUT.get(name))
            except RequestError as error:
                error.add_note(f"in loss_fn_inputs[{name!r}]")
                raise
        model_input = ModelInput.model_validate(self.model_input)
        object.__setattr__(self, "model_input", ModelInput(model_input.chunks))
        object.__setattr__(self, "loss_fn_inputs", inputs)
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise RequestError(
                "Give both model_input_spans and loss_fn_input_spans, or neither: use with_provenance."
            )
        for span in (*(self.model_input_spans or ()), *(self.loss_fn_input_spans or ())):
            if not isinstance(span, (PromptProvenanceSpan, SampledProvenanceSpan)):
                raise RequestError(
                    f"Invalid provenance {span!r}: must be PromptProvenanceSpan or SampledProvenanceSpan."
                )

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> Self:
        """Returns a copy whose positions name the sampled sequences that they were taken from.

        Raises RequestError unless the runs cover the input and the targets exactly.
        """
        _check_cover("model_input", model_input, self.model_input.length)
        if (targets := self.loss_fn_inputs.get("target_tokens")) is not None:
            assert isinstance(targets, TensorData)
            _check_cover("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        return replace(self, model_input_spans=[*model_input], loss_fn_input_spans=[*loss_fn_inputs])


def _check_cover(name: str, spans: ProvenanceSpans, length: int) -> None:
    if (covered := sum(span.length for span in spans)) != length:
        raise RequestError(
            f"The runs for {name} cover {covered} positions, and it has {length}. They must cover it exactly."
        )
