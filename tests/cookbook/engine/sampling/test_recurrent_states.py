"""Tests of sampling from models with recurrent layers, shared keys, or layers of different sizes.

The truths are transformers' own `generate` and a forward pass over the whole text.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from sampled import assert_same
from torch import Tensor

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.recurrent_states import RecurrentStates
from cookbook.engine.sampling.requests import SampleRequest, sample_request
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits
from cookbook.types import SamplingParams

FAST = ["qwen3_5", "nemotron_h", "jamba", "lfm2_moe", "minimax"]
SLOW = [
    *("qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_linear", "falcon_h1", "granitemoehybrid", "bamba"),
    *("falcon_mamba", "lfm2", "lfm3", "gemma3n_text", "gemma4", "gemma4_e2b", "gemma4_moe"),
]


def sample(
    base: BaseModel, prompts: list[list[int]], num_tokens: list[int], limits: SamplingLimits | None = None
) -> list[Any]:
    """Returns two greedy samples of each prompt. They start one after another, and run together."""
    requests = []
    for prompt, count in zip(prompts, num_tokens, strict=True):
        settings = SamplingParams(max_tokens=count, temperature=0, stop_token_ids=[10**6])
        requests.append(sample_request(base, prompt, 2, settings, include_prompt_logprobs=True))
    waiting = requests[1:]

    def take_waiting() -> list[SampleRequest]:
        return [waiting.pop(0)] if waiting else []

    prepared: Future[Any] = Future()
    prepared.set_result((None, 0))
    Sampler(base, prepared, limits).run(requests[0], take_waiting)
    return [request.future.result(timeout=0) for request in requests]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_samples_equal_generate_and_a_forward_pass_however_they_are_batched(
    name: str, tmp_path: Path
) -> None:
    """Prompts shorter than a convolution, and beyond the sliding window of 8 and the padding of prompts."""
    folder = families.save(name, tmp_path / name)
    model = families.load(folder)
    base = BaseModel(str(folder), EngineOptions(dtype="float32"))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 373, length).tolist() for length in (12, 1, 40, 3, 40)]
    num_tokens = [14, 3, 10, 8, 5]
    found = sample(base, prompts, num_tokens)
    assert base.decodes_packed
    for prompt, count, response in zip(prompts, num_tokens, found, strict=True):
        assert response.sequences[1].tokens == response.sequences[0].tokens
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
            )[0]
            # A published class reads a placeholder of pictures as padding, so the comparison ends there.
            places = [place for place, token in enumerate(whole.tolist()) if token >= families.AUDIO]
            whole = whole[: (places or [len(whole)])[0]]
            logprobs_TV = model(whole[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        compared = len(whole) - len(prompt)
        assert response.sequences[0].tokens[:compared] == whole[len(prompt) :].tolist()
        expected = logprobs_TV.gather(1, whole[1:, None])[:, 0].tolist()
        reported = [*(response.prompt_logprobs[1:] or []), *response.sequences[0].logprobs[:compared]]
        assert reported == pytest.approx(expected, abs=5e-4)


@pytest.mark.slow
def test_the_memory_of_states_limits_how_many_sequences_run(tmp_path: Path) -> None:
    base = BaseModel(str(families.save("qwen3_5", tmp_path / "qwen3_5")), EngineOptions(dtype="float32"))
    limits = SamplingLimits.on(base)
    # One layer has keys and values of 2 heads of 8. Three have a convolution that sees 4 inputs of 64, and 4
    # heads with a state of 8 by 8. All numbers are of 4 bytes.
    assert base.cache_bytes == (2 * 2 * 8 * 4, 3 * 4 * (4 * 64 + 4 * 8 * 8))
    assert limits.state_positions == 48
    limits = SamplingLimits(64, 1024, 2 * (64 + 48), 48)
    prompts = [[5, 6, 7], [8, 9], [10]]
    expected = sample(base, prompts, [6, 6, 6])
    for found, other in zip(sample(base, prompts, [6, 6, 6], limits), expected, strict=True):
        assert_same(found, other)  # to rounding, because passes have other numbers of rows


def states_with(rows: Tensor) -> RecurrentStates:
    states = RecurrentStates()
    states.update_recurrent_state(rows, 3)
    states.update_conv_state(rows[:, :, None] * torch.arange(1, 7), 3, conv_kernel_size=4)
    return states


def test_gathered_states_have_the_rows_of_each_sequence_in_order_then_zeros() -> None:
    sources = [
        (states_with(torch.tensor([[1.0], [2.0], [3.0]])), {"a": 0, "c": 2}),
        (states_with(torch.tensor([[4.0]])), {"d": 0, "e": 0}),
    ]
    gathered = RecurrentStates.gathered(sources, ["e", "c", "d", "a"], 5)
    state = gathered.get_recurrent_state(3)
    assert state is not None
    assert state[:, 0].tolist() == [4, 3, 4, 1, 0]
    conv_state = gathered.get_conv_state(3)
    assert conv_state is not None
    assert conv_state[1, 0].tolist() == [9, 12, 15, 18]


def test_a_convolution_sees_what_is_kept_and_what_is_new_and_short_prompts_begin_with_zeros() -> None:
    states = RecurrentStates()
    seen = states.update_conv_state(torch.tensor([[[1.0, 2.0]]]), 0, conv_kernel_size=3)
    assert seen.tolist() == [[[0, 1, 2]]]
    seen = states.update_conv_state(torch.tensor([[[3.0]]]), 0, conv_kernel_size=3)
    assert seen.tolist() == [[[0, 1, 2, 3]]]
    kept = states.get_conv_state(0)
    assert kept is not None
    assert kept.tolist() == [[[1, 2, 3]]]
