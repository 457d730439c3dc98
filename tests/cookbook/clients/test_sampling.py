"""Tests of SamplingClient, an immutable snapshot that frees its memory."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from fake_decoders import CountingDecoder, FailingDecoder, decoding_with

from cookbook import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from cookbook.engine.sampling.kv_cache import KVCache, LengthBucket
from cookbook.errors import RequestError

PROMPT = ModelInput.from_ints([5, 17, 31, 8])
PARAMS = SamplingParams(max_tokens=8, stop_token_ids=[0])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))
    yield service
    service.close()


@pytest.fixture
def client(service: ServiceClient, tiny_qwen3: str) -> TrainingClient:
    return service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)


def step(client: TrainingClient, seed: int = 0) -> None:
    tokens = np.random.default_rng(seed).integers(3, 300, 12)
    client.forward_backward([Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})])
    client.optim_step(AdamParams(learning_rate=1e-2))


def adapters(client: TrainingClient) -> set[str]:
    return client._engine.submit(lambda: set(client._engine.base.adapters._peft.peft_config)).result()


@pytest.mark.slow
def test_sequences_are_read_directly_from_the_future(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client(name="straight")
    params = SamplingParams(max_tokens=5, temperature=0.7, stop_token_ids=[0, 1])
    tokens = sampling_client.sample(prompt=PROMPT, num_samples=1, sampling_params=params).sequences[0].tokens
    assert 1 <= len(tokens) <= 5
    future = sampling_client.sample(PROMPT, 2, PARAMS, include_prompt_logprobs=True)
    response = future.result(timeout=60)
    assert future.sequences == response.sequences
    assert len(response.sequences) == 2
    logprobs = sampling_client.compute_logprobs(PROMPT).result()
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[1:] == pytest.approx(logprobs[1:], rel=1e-5)


def test_stops_may_be_strings_or_tokens(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    (whole,) = sampling_client.sample(
        PROMPT, 1, SamplingParams(max_tokens=8, seed=0, stop_token_ids=[0])
    ).sequences
    end = whole.tokens[2]
    text = sampling_client.get_tokenizer().decode([end])
    for stop in (
        SamplingParams(max_tokens=8, seed=0, stop_token_ids=[end]),
        SamplingParams(max_tokens=8, seed=0, stop=[end]),
        SamplingParams(max_tokens=8, seed=0, stop=[text]),
        SamplingParams(max_tokens=8, seed=0, stop=text),
    ):
        (sequence,) = sampling_client.sample(PROMPT, 1, stop).sequences
        assert sequence.tokens == whole.tokens[: len(sequence.tokens)]
        assert len(sequence.tokens) <= 3
        assert sequence.stop_reason == "stop"


def test_scores_mark_the_tokens_that_are_argmax(client: TrainingClient) -> None:
    step(client)
    sampling_client = client.save_weights_and_get_sampling_client()
    greedy = SamplingParams(max_tokens=6, temperature=0, stop_token_ids=[0])
    chosen = sampling_client.sample(PROMPT, 1, greedy).sequences[0].tokens
    other = [token + 1 for token in chosen]
    texts = [ModelInput.from_ints([*PROMPT.to_ints(), *chosen]), ModelInput.from_ints(other)]
    futures = [sampling_client.score(text) for text in (*texts, ModelInput.from_ints([7]))]
    first, second, single = [future.result() for future in futures]
    assert first.is_argmax[len(PROMPT) :] == [True] * len(chosen)
    assert first.is_argmax[0] is None
    assert not all(second.is_argmax[1:])
    assert first.logprobs[1:] == pytest.approx(
        sampling_client.compute_logprobs(texts[0]).result()[1:], rel=1e-5
    )
    assert (single.logprobs, single.is_argmax) == ([None], [None])


def test_awaiting_and_async_twins_return_the_same(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=6, seed=4, stop_token_ids=[0])

    async def main() -> list[object]:
        awaited = await sampling_client.sample(PROMPT, 1, params)
        twin, logprobs = await asyncio.gather(
            sampling_client.sample_async(PROMPT, 1, params), sampling_client.compute_logprobs_async(PROMPT)
        )
        return [awaited, twin, logprobs]

    awaited, twin, logprobs = asyncio.run(main())
    assert awaited == twin == sampling_client.sample(PROMPT, 1, params).result()
    assert logprobs == sampling_client.compute_logprobs(PROMPT).result()


def test_a_snapshot_does_not_change_while_training_continues(client: TrainingClient) -> None:
    step(client)
    snapshot = client.save_weights_and_get_sampling_client()
    before = snapshot.compute_logprobs(PROMPT).result()
    sampled = snapshot.sample(PROMPT, 2, SamplingParams(max_tokens=8, seed=1, stop_token_ids=[0])).result()
    for seed in range(3):
        step(client, seed)
        assert snapshot.compute_logprobs(PROMPT).result() == before
    assert (
        snapshot.sample(PROMPT, 2, SamplingParams(max_tokens=8, seed=1, stop_token_ids=[0])).result()
        == sampled
    )
    assert client.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result() != before


def test_a_snapshot_has_the_weights_at_its_place_in_the_queue(
    client: TrainingClient, service: ServiceClient, tiny_qwen3: str
) -> None:
    """It is requested between two steps that are both still queued."""
    step(client, 0)
    snapshot = client.save_weights_and_get_sampling_client()
    step(client, 1)
    twin = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    step(twin, 0)
    expected = twin.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result()
    assert snapshot.compute_logprobs(PROMPT).result() == expected


@pytest.mark.slow
def test_unseeded_samples_differ_between_calls_and_repeat_between_runs(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    def drawn() -> list[list[int]]:
        client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=6)
        tokens = []
        for _ in range(2):
            snapshot = client.save_weights_and_get_sampling_client()
            futures = [snapshot.sample(PROMPT, 1, PARAMS) for _ in range(3)]
            tokens += [future.sequences[0].tokens for future in futures]
        return tokens

    first = drawn()
    assert len({tuple(tokens) for tokens in first}) == 6
    assert drawn() == first


@pytest.mark.slow
def test_a_deleted_client_frees_its_adapter_once_its_work_is_done(client: TrainingClient) -> None:
    gc.collect()
    before = adapters(client)
    snapshot = client.save_weights_and_get_sampling_client()
    assert len(adapters(client)) == len(before) + 1
    future = snapshot.sample(PROMPT, 1, PARAMS)
    del snapshot
    assert len(future.sequences[0].tokens) >= 1
    del future
    gc.collect()
    assert adapters(client) == before


@pytest.mark.slow
def test_snapshots_in_turn_hold_one_adapter_at_a_time(client: TrainingClient) -> None:
    gc.collect()
    before = adapters(client)
    for seed in range(4):
        step(client, seed)
        snapshot: SamplingClient = client.save_weights_and_get_sampling_client()
        snapshot.compute_logprobs(PROMPT).result()
        assert len(adapters(client)) <= len(before) + 2
    del snapshot
    gc.collect()
    assert adapters(client) == before


@pytest.mark.slow
def test_freeing_a_snapshot_does_not_affect_gradients_and_training(
    client: TrainingClient, service: ServiceClient, tiny_qwen3: str
) -> None:
    twin = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    data = [Datum(PROMPT, {"target_tokens": [17, 31, 8, 9]})]
    for each in (client, twin):
        each.forward_backward(data)
        if each is client:
            client.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result()
            gc.collect()
        each.forward_backward(data)
        each.optim_step(AdamParams(learning_rate=1e-2)).result()
    found, expected = (
        each.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result()
        for each in (client, twin)
    )
    assert found == expected


def test_a_stream_yields_each_token_as_it_is_sampled(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=8, seed=3, stop_token_ids=[10**6])
    (expected,) = sampling_client.sample(PROMPT, 1, params).sequences
    stream = sampling_client.stream(PROMPT, params)
    assert list(stream) == stream.result().tokens == expected.tokens

    async def read() -> list[int]:
        return [token async for token in sampling_client.stream(PROMPT, params)]

    assert asyncio.run(read()) == expected.tokens


@pytest.mark.slow
def test_a_stream_without_a_reader_ends(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    stream = sampling_client.stream(PROMPT, SamplingParams(max_tokens=250, stop_token_ids=[10**6]))
    tokens = iter(stream)
    next(tokens)
    stream.close()
    assert 1 <= len(stream.result(timeout=60).tokens) < 250


def test_an_error_while_sampling_is_raised_by_the_stream(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    with decoding_with(client._engine.base, FailingDecoder):
        stream = iter(sampling_client.stream(PROMPT, PARAMS))
        next(stream)
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            list(stream)
    assert list(sampling_client.stream(PROMPT, PARAMS))


def test_requests_that_wait_together_share_the_passes_of_the_model(client: TrainingClient) -> None:
    """Sixteen requests of eight tokens take one prefill and seven decode passes."""
    sampling_client = client.save_weights_and_get_sampling_client()
    steps: list[int] = []
    params = [SamplingParams(max_tokens=8, seed=seed, stop_token_ids=[10**6]) for seed in range(16)]
    go = threading.Event()
    with decoding_with(client._engine.base, partial(CountingDecoder, counts=steps)):
        client._engine.submit(go.wait, 60)
        futures = [sampling_client.sample(PROMPT, 1, each) for each in params]
        go.set()
        assert all(len(future.sequences[0].tokens) == 8 for future in futures)
    assert steps == [16] * 7


@pytest.mark.slow
def test_sampling_leaves_no_memory_allocated(client: TrainingClient) -> None:
    """No keys and values are left, and the weights it samples with are the trainer's own."""
    snapshot = client.save_weights_and_get_sampling_client()
    futures = [snapshot.sample(PROMPT, 2, SamplingParams(max_tokens=length)) for length in (3, 30, 200)]
    assert all(future.sequences for future in futures)
    client._engine.submit(gc.collect).result()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, (KVCache, LengthBucket))]
    assert snapshot._engine.base is client._engine.base


def test_samples_and_steps_run_in_the_order_of_the_queue(client: TrainingClient) -> None:
    """A request behind a training step does not run before the step, though it could share a batch."""
    snapshot = client.save_weights_and_get_sampling_client()
    done: list[str] = []

    def note(name: str, future: Any) -> None:
        future._job.add_done_callback(lambda _: done.append(name))

    go = threading.Event()
    client._engine.submit(go.wait, 60)
    note("first", snapshot.sample(PROMPT, 1, PARAMS))
    note("step", client.forward_backward([Datum(PROMPT, {"target_tokens": [17, 31, 8, 9]})]))
    last = snapshot.sample(PROMPT, 1, PARAMS)
    note("last", last)
    go.set()
    last.result()
    client.optim_step(AdamParams(learning_rate=1e-3)).result()
    assert done == ["first", "step", "last"]


def test_requests_that_cannot_be_sampled_are_refused_by_the_call_itself(client: TrainingClient) -> None:
    sampling_client = client.save_weights_and_get_sampling_client()
    with pytest.raises(RequestError, match="The prompt is empty"):
        sampling_client.sample(ModelInput.empty(), 1, PARAMS)
    with pytest.raises(RequestError, match="num_samples=0"):
        sampling_client.sample(PROMPT, 0, PARAMS)
    with pytest.raises(RequestError, match="max_tokens=1000"):
        sampling_client.sample(PROMPT, 1, SamplingParams(max_tokens=1000))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        sampling_client.compute_logprobs(ModelInput.from_ints([10**6]))
    assert sampling_client.sample(PROMPT, 1, PARAMS).sequences
