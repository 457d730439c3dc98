"""Turns the SDK's requests into this project's types. What is not supported is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from tinker import types as wire_types

from cookbook.clients.as_tinker import SDK_VERSION
from cookbook.errors import RequestError
from cookbook.server.promises import Refusal
from cookbook.types import AdamParams, EncodedTextChunk, LoraConfig, ModelInput, SamplingParams, TensorData

TESTED_SDK = SDK_VERSION
"""The version of the SDK that the tests run with."""


def tested() -> str:
    return f"tested with tinker {TESTED_SDK}"


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_sdk(version: str) -> None:
    """Raises Refusal for an SDK of another major version than the tested one."""
    major = TESTED_SDK.partition(".")[0]
    if version.partition(".")[0] != major:
        raise Refusal(
            400,
            f"This server was {tested()}, and does not know the protocol of tinker {version}. "
            f"Run: pip install 'tinker>={TESTED_SDK},<{int(major) + 1}'",
        )


def problems(kind: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """Returns what is wrong with a body, field by field."""
    found = []
    for one in error.errors(include_url=False, include_context=False):
        place = ".".join(map(str, one["loc"]))
        if one["type"] == "extra_forbidden":
            found.append(f"{place} is not a field that this server knows (it was {tested()})")
        else:
            found.append(f"{place}: {one['msg']}" if place else str(one["msg"]))
    return f"Invalid {kind.__name__}: {'; '.join(found[:8])}."


def lora_of(config: wire_types.LoraConfig | None) -> LoraConfig:
    if config is None:
        raise RequestError("create_model has no lora_config, and this server trains LoRA adapters only.")
    if config.rank < 1:
        raise RequestError(f"Invalid rank={config.rank}: must be at least 1 on a server.")
    return LoraConfig(**config.model_dump())


def metadata_of(given: Mapping[str, Any] | None) -> dict[str, str]:
    """Raises RequestError for a value that is not a string."""
    for name, value in (given or {}).items():
        if not isinstance(value, str):
            raise RequestError(f"user_metadata[{name!r}] is {value!r}. Use a string.")
    return dict(given or {})


def adam_params(given: Any) -> AdamParams:
    """Raises RequestError for the settings of another optimizer."""
    if not isinstance(given, wire_types.AdamParams):
        raise RequestError(f"Optimizer {given.type!r} is not supported. Use AdamParams.")
    return AdamParams(**given.model_dump())


def sampling_params(given: Any) -> SamplingParams:
    values = given.model_dump() if isinstance(given, pydantic.BaseModel) else dict(vars(given))
    return SamplingParams(**values)


def prompt_of(given: Any) -> ModelInput:
    """Raises RequestError for a chunk that is not text."""
    for chunk in given.chunks:
        if chunk.type != "encoded_text":
            raise RequestError(
                f"The prompt has a chunk of type {chunk.type!r}, and this server's models read text only."
            )
    return ModelInput([EncodedTextChunk(chunk.tokens) for chunk in given.chunks])


def sample_arguments(body: wire_types.SampleRequest) -> dict[str, Any]:
    """Returns the arguments of `SamplingClient.sample`. Raises RequestError for what is not read here."""
    for name, is_given in (("base_model", body.base_model), ("model_path", body.model_path)):
        if is_given is not None:
            raise RequestError(f"{name} is not read with a sampling_session_id. Omit it.")
    targets = body.target_prompt_logprobs
    return {
        "prompt": prompt_of(body.prompt),
        "num_samples": body.num_samples,
        "sampling_params": sampling_params(body.sampling_params),
        "include_prompt_logprobs": bool(body.prompt_logprobs),
        "topk_prompt_logprobs": body.topk_prompt_logprobs,
        "topk_sample_logprobs": body.topk_sample_logprobs,
        "target_prompt_logprobs": None if targets is None else TensorData(**targets.model_dump()),
        "prompt_alt_tokens_k": body.prompt_alt_tokens_k,
        "prompt_logprobs_last_n": body.prompt_logprobs_last_n,
    }
