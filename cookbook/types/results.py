"""What training calls return."""

from __future__ import annotations

from dataclasses import dataclass, field

from cookbook.types.datum import LossFnOutput
from cookbook.types.values import Value


@dataclass(frozen=True)
class ForwardBackwardOutput(Value):
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
class OptimStepResponse(Value):
    """The result of a step. `metrics["grad_norm"]` is the global gradient norm before clipping.

    `memory_in_use_gib`, `memory_reserved_gib` (CUDA only) and `memory_peak_gib` are the memory of the device,
    or that of the process on a CPU; the peak on CUDA is that since the last step.
    """

    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveWeightsResponse(Value):
    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse(Value):
    path: str


@dataclass(frozen=True)
class LoadWeightsResponse(Value):
    path: str


@dataclass(frozen=True)
class SaveWeightsExternalResponse(Value):
    """`path` is a folder that PEFT loads, or whose files are encrypted, each with the ending `.age`."""

    path: str
