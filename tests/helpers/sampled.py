"""What tests of sampling share: model families, requests, and comparisons of responses."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling.requests import Request, sample_request
from cookbook.engine.sampling.sampler import Prepared
from cookbook.types import LoraConfig, SamplingParams

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
NO_MLP = {"train_mlp": False}
PACKED: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, {}),
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}, {}),
    "mistral": ("mistral", {"sliding_window": 8}, {}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 8}, {}),
    "gemma2": (
        "gemma2",
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {},
    ),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5}, {}),
    "cohere": ("cohere", {"logit_scale": 0.25}, {}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, NO_MLP),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, {}),
    "qwen3_next": (
        "qwen3_next",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        NO_MLP,
    ),
}
UNPACKED: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "stablelm": ("stablelm", {}, {}),
    "llama-window": ("llama", {"sliding_window": 8}, {}),
}
FAMILIES = PACKED | UNPACKED
PROMPT = [5, 17, 200, 31, 8]


def moved(base: BaseModel, **lora: Any) -> Adapter:
    adapter = base.adapters.add(LoraConfig(rank=4, seed=0, **lora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.weights.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def prepared_with(adapter: Adapter | None) -> Prepared:
    prepared: Prepared = Future()
    prepared.set_result((adapter, 0))
    return prepared


def make_request(
    base: BaseModel,
    num_samples: int = 1,
    prompt: list[int] | None = None,
    include_prompt_logprobs: bool = False,
    **params: Any,
) -> Request:
    params = {"max_tokens": 12, "stop_token_ids": [10**6], "seed": 0, **params}
    return sample_request(
        base,
        PROMPT if prompt is None else prompt,
        num_samples,
        SamplingParams(**params),
        include_prompt_logprobs,
    )


@torch.no_grad()
def plain_logprobs(base: BaseModel, adapter: Adapter | None, tokens: list[int]) -> torch.Tensor:
    """Returns the log-probabilities after each token, from the model's forward without a cache: [T, V]."""
    with base.adapters.using(adapter):
        return base.model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)


def related_prompts(
    rng: random.Random, num: int, longest: int = 40, length: int | None = None
) -> list[list[int]]:
    """Returns prompts that continue, shorten or repeat beginnings of each other.

    The one they all come from has `length` tokens, or a random number up to `longest`.
    """
    prompts = [[rng.randrange(3, 100) for _ in range(length or rng.randint(1, longest))]]
    while len(prompts) < num:
        begin = rng.choice(prompts)
        begin = begin[: rng.randint(0, len(begin))]
        prompts.append((begin + [rng.randrange(3, 100) for _ in range(rng.randint(0, 9))]) or [7])
    rng.shuffle(prompts)
    return prompts


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert [each.tokens for each in found.sequences] == [each.tokens for each in expected.sequences]
    assert [each.stop_reason for each in found.sequences] == [each.stop_reason for each in expected.sequences]
    for each, other in zip(found.sequences, expected.sequences, strict=True):
        assert each.logprobs == pytest.approx(other.logprobs, abs=tolerance)
    if expected.prompt_logprobs is not None:
        assert found.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=tolerance)


def outcome(request: Request) -> Any:
    error = request.future.exception(timeout=0)
    return request.future.result() if error is None else error
