"""Supervised fine-tuning of chat models on your own machine.

The names below are the training API. Code written for the Tinker API runs after `import cookbook as tinker`,
or unchanged after `cookbook.install_as_tinker()`. The names are imported on first use, so `import cookbook`
is fast and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cookbook.utils.shadowed import refuse_another_renderers

if TYPE_CHECKING:
    from cookbook import types as types
    from cookbook.clients.futures import APIFuture as APIFuture
    from cookbook.clients.rest import RestClient as RestClient
    from cookbook.clients.sampling import SamplingClient as SamplingClient
    from cookbook.clients.service import ServiceClient as ServiceClient
    from cookbook.clients.training import TrainingClient as TrainingClient
    from cookbook.errors import *  # noqa: F403
    from cookbook.types import *  # noqa: F403

__version__ = "0.1.0"

_TYPES = (
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointType",
    "CheckpointsListResponse",
    "Datum",
    "DmelChunk",
    "EncodedTextChunk",
    "ExternalWeightsUrlsResponse",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInput",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PromptProvenanceSpan",
    "PromptScores",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "SaveWeightsExternalResponse",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "TrainingRun",
    "TrainingRunsResponse",
    "WeightsInfoResponse",
)
_ERRORS = (
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "ConflictError",
    "CookbookError",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "TinkerError",
    "UnprocessableEntityError",
)
_HOME = {
    "APIFuture": "cookbook.clients.futures",
    "RestClient": "cookbook.clients.rest",
    "SamplingClient": "cookbook.clients.sampling",
    "ServiceClient": "cookbook.clients.service",
    "TrainingClient": "cookbook.clients.training",
    **dict.fromkeys(_ERRORS, "cookbook.errors"),
    **dict.fromkeys(_TYPES, "cookbook.types"),
}

__all__ = ["install_as_tinker", "types", *_HOME]


def install_as_tinker() -> None:
    """Makes `import tinker` import this package, for programs that were written for the Tinker SDK."""
    importlib.import_module("cookbook.clients.as_tinker").install_as_tinker()


refuse_another_renderers()


def __getattr__(name: str) -> Any:
    if name == "types":
        return importlib.import_module("cookbook.types")
    if name not in _HOME:
        raise AttributeError(f"module 'cookbook' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
