"""The unmodified SDK trains and samples over HTTP, with the results of the clients in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tinker

import cookbook
from cookbook.clients.service import ServiceClient

Connect = Callable[[str], tinker.ServiceClient]


def data(package: Any) -> list[Any]:
    """Returns two sequences of random tokens in the types of the SDK or of this project."""
    found = []
    for seed, length in enumerate((12, 7)):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, 300, length + 1).tolist()
        weights = rng.random(length).astype(np.float32)
        found.append(
            package.Datum(
                model_input=package.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
            )
        )
    return found


def test_a_step_over_http_has_the_results_of_one_in_this_process(
    server: str, service: ServiceClient, connect: Connect, tiny_qwen3: str
) -> None:
    theirs = connect(server).create_lora_training_client(tiny_qwen3, rank=4, seed=3).result()
    ours = service.create_lora_training_client(tiny_qwen3, rank=4, seed=3)
    for learning_rate in (1e-2, 1e-3):
        passes = [theirs.forward_backward(data(tinker), "cross_entropy").result()]
        passes.append(ours.forward_backward(data(cookbook), "cross_entropy").result())
        assert passes[0].metrics == passes[1].metrics
        for one, other in zip(passes[0].loss_fn_outputs, passes[1].loss_fn_outputs, strict=True):
            assert one["logprobs"].shape == [*np.shape(other["logprobs"].to_numpy())]
            np.testing.assert_array_equal(one["logprobs"].to_numpy(), other["logprobs"].to_numpy())
        adam = {"learning_rate": learning_rate, "weight_decay": 0.1, "grad_clip_norm": 0.5}
        step = theirs.optim_step(tinker.AdamParams(**adam)).result()
        own_step = ours.optim_step(cookbook.AdamParams(**adam)).result()
        assert step.metrics["grad_norm"] == own_step.metrics["grad_norm"]

    prompt = [5, 6, 7, 8]
    params = {"max_tokens": 6, "seed": 1, "temperature": 0.7, "stop": []}
    sampler = theirs.save_weights_and_get_sampling_client().result()
    own = ours.save_weights_and_get_sampling_client()
    response = sampler.sample(
        tinker.ModelInput.from_ints(prompt), 2, tinker.SamplingParams(**params), True
    ).result()
    expected = own.sample(
        cookbook.ModelInput.from_ints(prompt), 2, cookbook.SamplingParams(**params), True
    ).result()
    assert [one.tokens for one in response.sequences] == [one.tokens for one in expected.sequences]
    assert [one.logprobs for one in response.sequences] == [
        pytest.approx(one.logprobs, abs=1e-4) for one in expected.sequences
    ]
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-4)
    assert len({one.sequence_id for one in response.sequences}) == 2


def test_a_saved_state_continues_in_another_client(server: str, connect: Connect, tiny_qwen3: str) -> None:
    client = connect(server)
    first = client.create_lora_training_client(tiny_qwen3, rank=4, seed=3).result()
    first.forward_backward(data(tinker), "cross_entropy")
    first.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    path = first.save_state("one").result().path
    assert path == f"tinker://{first.model_id}/weights/one"
    second = client.create_training_client_from_state_with_optimizer(path).result()
    for one in (first, second):
        one.forward_backward(data(tinker), "cross_entropy")
        one.optim_step(tinker.AdamParams(learning_rate=1e-2))
    outputs = [one.forward(data(tinker), "cross_entropy").result() for one in (first, second)]
    assert outputs[0].metrics == outputs[1].metrics

    saved = first.save_weights_for_sampler("two").result().path
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    scores = client.create_sampling_client(saved).result().compute_logprobs(prompt).result()
    sampler = first.save_weights_and_get_sampling_client().result()
    assert scores == sampler.compute_logprobs(prompt).result()


@pytest.mark.slow
def test_a_step_that_is_refused_before_it_has_a_turn_does_not_hold_up_the_later_ones(
    server: str, connect: Connect, tiny_qwen3: str
) -> None:
    client = connect(server).create_lora_training_client(tiny_qwen3, rank=4).result()
    client.forward_backward(data(tinker), "cross_entropy")
    with pytest.raises(tinker.UnprocessableEntityError, match="learning_rate"):
        client.optim_step(tinker.AdamParams(learning_rate=float("nan"))).result()
    client.optim_step(tinker.AdamParams()).result(timeout=60)


@pytest.mark.slow
def test_a_pass_that_is_refused_makes_the_step_fail_that_was_sent_behind_it(
    server: str, connect: Connect, tiny_qwen3: str
) -> None:
    client = connect(server).create_lora_training_client(tiny_qwen3, rank=4).result()
    wrong = tinker.Datum(tinker.ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7, 8]})
    client.forward_backward(data(tinker), "cross_entropy")
    refused = client.forward_backward([wrong], "cross_entropy")
    step = client.optim_step(tinker.AdamParams())
    with pytest.raises(tinker.RequestFailedError, match=r"target_tokens has shape \[3\]"):
        refused.result()
    with pytest.raises(tinker.RequestFailedError, match="optim_step was not run: .*target_tokens"):
        step.result()
    client.forward_backward(data(tinker), "cross_entropy")
    client.optim_step(tinker.AdamParams()).result()
