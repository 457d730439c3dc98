"""Compares sampling that reuses what prompts share with sampling that does not, and with a forward pass."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_decoders import decoding_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outside_world import run_varlen_attention_on_the_cpu
from sampled import (
    FAMILIES,
    PACKED,
    assert_same,
    make_request,
    moved,
    outcome,
    plain_logprobs,
    prepared_with,
    related_prompts,
)
from slow import slow_except

from cookbook import Datum, ModelInput, SamplingParams, ServiceClient
from cookbook.engine.model import attention
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.attention import packed_attention
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling.packed_decoder import PackedDecoder
from cookbook.engine.sampling.prefill_row import plan_row
from cookbook.engine.sampling.prompt_tree import PromptTree
from cookbook.engine.sampling.requests import Request, score_request
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits
from cookbook.types import AdamParams, SampleResponse

MIN_SHARED = 2


@pytest.fixture(scope="module")
def base(tiny_qwen3: str) -> BaseModel:
    return reusing(BaseModel(tiny_qwen3))


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> Adapter:
    return moved(base)


def reusing(base: BaseModel) -> BaseModel:
    """Makes even the shortest beginnings count, where the model shares any."""
    if base.min_shared_tokens is not None:
        base.min_shared_tokens = MIN_SHARED
    return base


def ask(sampler: Sampler, requests: list[Request]) -> list[Any]:
    """All requests are queued at the same time."""
    waiting = list(requests[1:])

    def take_waiting() -> list[Request]:
        taken = waiting[:]
        waiting.clear()
        return taken

    sampler.run(requests[0], take_waiting)
    return [request.future.result(timeout=0) for request in requests]


def without_reuse(base: BaseModel, adapter: Adapter | None, requests: list[Request]) -> list[Any]:
    """Each request runs alone, in a sampler of its own."""
    before, base.reuses_prompts = base.reuses_prompts, False
    try:
        return [ask(Sampler(base, prepared_with(adapter)), [request])[0] for request in requests]
    finally:
        base.reuses_prompts = before


@pytest.mark.cases(1)
@pytest.mark.parametrize("family", slow_except(["gpt_oss"], ["qwen3", "gemma2", "gpt_oss", "stablelm"]))
def test_what_prompts_share_is_reused_and_changes_nothing(
    family: str, make_model_folder: Any, tmp_path: Path
) -> None:
    """Rounds of related prompts, the second of which continues replies of the first, beyond the window."""
    model_type, config, lora = FAMILIES[family]
    base = reusing(BaseModel(str(make_model_folder(tmp_path / family, model_type, **config))))
    adapter = moved(base, **lora)
    rng = random.Random(0)
    sampler = Sampler(base, prepared_with(adapter))
    prompts = related_prompts(rng, 8)
    total = 0
    for number in range(3):
        texts = [
            make_request(base, prompt=prompt, seed=at, num_samples=1 + at % 2, max_tokens=8)
            for at, prompt in enumerate(prompts)
        ]
        again = [
            make_request(base, prompt=prompt, seed=at, num_samples=1 + at % 2, max_tokens=8)
            for at, prompt in enumerate(prompts)
        ]
        found = ask(sampler, texts)
        for prompt, response, expected in zip(
            prompts, found, without_reuse(base, adapter, again), strict=True
        ):
            assert_same(response, expected)
            assert expected.prompt_cache_hit_tokens == 0
            assert 0 <= response.prompt_cache_hit_tokens <= len(prompt)
            total += response.prompt_cache_hit_tokens
            whole = prompt + response.sequences[0].tokens
            plain = plain_logprobs(base, adapter, whole)
            logprobs = [plain[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))]
            assert response.sequences[0].logprobs == pytest.approx(logprobs, abs=2e-4)
        if number:
            continue
        replies = [prompt + each.sequences[0].tokens for prompt, each in zip(prompts, found, strict=True)]
        prompts = related_prompts(rng, 4) + [[*reply, 9, 11, rng.randrange(3, 100)] for reply in replies]
    assert base.reuses_prompts == (family in PACKED)
    assert (total > 300) == base.reuses_prompts


@pytest.mark.slow
@given(st.integers(0, 2**31), st.sampled_from([7, 40, 1024]), st.sampled_from([0, 30, 10_000]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_prompts_sample_the_same_with_any_limits(
    base: BaseModel, adapter: Adapter, seed: int, max_prefill_tokens: int, max_kept_tokens: int
) -> None:
    rng = random.Random(seed)
    limits = replace(
        SamplingLimits.on(base),
        max_sequences=rng.choice([1, 3, 64]),
        max_prefill_tokens=max_prefill_tokens,
        max_kept_tokens=max_kept_tokens,
        max_cached_tokens=rng.choice([200, 10_000]),
    )
    sampler = Sampler(base, prepared_with(adapter), limits)
    for _ in range(2):
        prompts = related_prompts(rng, rng.randint(1, 7), 20)
        params = [
            {"seed": at, "max_tokens": rng.randint(1, 5), "num_samples": rng.choice([1, 3]),
             "include_prompt_logprobs": rng.random() < 0.3}
            for at, _ in enumerate(prompts)
        ]  # fmt: skip
        asked = [
            make_request(base, prompt=prompt, **each) for prompt, each in zip(prompts, params, strict=True)
        ]
        again = [
            make_request(base, prompt=prompt, **each) for prompt, each in zip(prompts, params, strict=True)
        ]
        for found, expected in zip(ask(sampler, asked), without_reuse(base, adapter, again), strict=True):
            assert_same(found, expected)
            assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    assert sum(tree.num_tokens for tree in base.prompt_trees) <= max_kept_tokens


@pytest.mark.slow
def test_a_response_says_how_many_tokens_of_its_prompt_were_not_computed(
    base: BaseModel, adapter: Adapter
) -> None:
    sampler = Sampler(base, prepared_with(adapter))
    prompt = list(range(10, 50))

    def hits(prompt: list[int], **params: Any) -> int:
        (response,) = ask(sampler, [make_request(base, prompt=prompt, temperature=0, **params)])
        replies.append([each.tokens for each in response.sequences])
        return response.prompt_cache_hit_tokens

    replies: list[list[list[int]]] = []
    assert hits(prompt, num_samples=16) == 0
    assert hits(prompt) == 39, "the last token is computed for its logits"
    assert hits([*prompt[:30], 7, 8]) == 30
    assert hits([*prompt, *replies[0][0], 9]) == 51, "the last token of a reply was never read"
    assert hits([*prompt[:1], 7, 8]) == 0, f"it shares less than {MIN_SHARED} tokens"
    assert hits(prompt, include_prompt_logprobs=True) == 0, "they need the hidden states of the prompt"
    together = [[*prompt[:20], 99, 98, token] for token in (1, 2, 3)] + [
        [*range(60, 90), token] for token in (1, 2)
    ]
    found = ask(sampler, [make_request(base, prompt=each) for each in together])
    assert sorted(each.prompt_cache_hit_tokens for each in found) == [0, 20, 22, 22, 30]


def test_a_second_pass_computes_only_the_tokens_that_are_new(base: BaseModel, adapter: Adapter) -> None:
    """The tokens of every pass are counted where the embeddings read them."""
    # The first sample of a model tries how it can be sampled.
    ask(Sampler(base, prepared_with(adapter)), [make_request(base, prompt=[5, 6], max_tokens=1)])
    sizes: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[-1])
    )
    sampler = Sampler(base, prepared_with(adapter))
    system = list(range(3, 103))
    try:
        for first in (0, 4):
            prompts = [[*system, *range(110 + 5 * at, 115 + 5 * at)] for at in range(first, first + 4)]
            ask(sampler, [make_request(base, prompt=prompt, max_tokens=1) for prompt in prompts])
    finally:
        hook.remove()
    assert base.row_multiple in (4, 8)
    assert sizes == [100 + 4 * 5, 4 * 5 + -4 * 5 % base.row_multiple]


@pytest.mark.slow
def test_snapshots_never_reuse_each_other_s_keys(base: BaseModel, adapter: Adapter) -> None:
    other = base.adapters.clone(adapter)
    with torch.no_grad():
        for weight in other.weights.values():
            weight.mul_(-1)
    samplers = {
        name: Sampler(base, prepared_with(each)) for name, each in (("a", adapter), ("b", other), ("c", None))
    }
    adapters = {"a": adapter, "b": other, "c": None}
    prompt = list(range(10, 60))
    seen = set()
    for name in "abcabcca":
        (found,) = ask(samplers[name], [make_request(base, prompt=prompt, seed=3)])
        (expected,) = without_reuse(base, adapters[name], [make_request(base, prompt=prompt, seed=3)])
        assert_same(found, expected)
        assert found.prompt_cache_hit_tokens == (49 if name in seen else 0)
        seen.add(name)
    base.adapters.remove(other)


@pytest.mark.slow
def test_running_sequences_take_the_memory_of_kept_prompts(base: BaseModel, adapter: Adapter) -> None:
    limits = replace(SamplingLimits.on(base), max_cached_tokens=4 * 64, max_kept_tokens=200, max_sequences=8)
    held: list[tuple[int, int]] = []

    class WatchedDecoder(PackedDecoder):
        def watch(self) -> None:
            assert self.prompts is not None
            positions = sum(
                bucket.capacity * len(bucket.sequences) for bucket in self._cache._buckets.values()
            )
            held.append((self.prompts.num_tokens, positions))

        def decode(self, sequences: Any) -> torch.Tensor:
            logits_RV = super().decode(sequences)
            self.watch()
            return logits_RV

    sampler = Sampler(base, prepared_with(adapter), limits)
    with decoding_with(base, WatchedDecoder):
        rng = random.Random(1)
        for round_ in range(3):
            prompts = [[rng.randrange(3, 100) for _ in range(30)] for _ in range(4 if round_ == 2 else 1)]
            ask(sampler, [make_request(base, prompt=prompt, max_tokens=30) for prompt in prompts])
    assert max(kept for kept, _ in held) > 50
    assert max(positions for _, positions in held) == 4 * 64, "all four run at the same time"
    assert all(kept + positions <= 4 * 64 for kept, positions in held)


def test_out_of_memory_frees_kept_prompts(base: BaseModel, adapter: Adapter) -> None:
    class FullDecoder(PackedDecoder):
        """Has no room while prompts are kept."""

        def decode(self, sequences: Any) -> torch.Tensor:
            assert self.prompts is not None
            if self.prompts.num_tokens > 60:
                raise torch.OutOfMemoryError("no room")
            return super().decode(sequences)

    sampler = Sampler(base, prepared_with(adapter))
    prompts = [list(range(10, 40)), list(range(40, 75))]
    with decoding_with(base, FullDecoder):
        found = ask(sampler, [make_request(base, prompt=prompt) for prompt in prompts])
    again = [make_request(base, prompt=prompt) for prompt in prompts]
    for response, expected in zip(found, without_reuse(base, adapter, again), strict=True):
        assert_same(response, expected)


@pytest.mark.slow
def test_a_prompt_that_leads_to_nan_spoils_no_prompt_that_shares_its_beginning(
    make_model_folder: Any, tmp_path: Path
) -> None:
    base = reusing(BaseModel(str(make_model_folder(tmp_path / "model"))))
    sampler = Sampler(base, prepared_with(None))
    ask(sampler, [make_request(base)])
    broken = 200
    with torch.no_grad():
        base.model.get_input_embeddings().weight[broken] = torch.nan
    begin = list(range(10, 30))
    prompts = [[*begin, broken, 5], [*begin, 6], [*begin, broken, 5, 7], [*begin, 5, 6]]
    for _ in range(2):
        requests = [make_request(base, prompt=prompt, top_k=3, temperature=0) for prompt in prompts]
        waiting = requests[1:]
        sampler.run(requests[0], lambda: [waiting.pop(0) for _ in requests[1:] if waiting])  # noqa: B023
        for prompt, request in zip(prompts, requests, strict=True):
            if broken in prompt:
                assert "nan or infinite" in str(outcome(request))
            else:
                (expected,) = without_reuse(base, None, [make_request(base, prompt=prompt, temperature=0)])
                assert_same(outcome(request), expected)


@pytest.mark.slow
def test_a_model_that_cannot_reuse_prompts_says_so_once(
    make_model_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_type, config, _ = FAMILIES["stablelm"]
    base = BaseModel(str(make_model_folder(tmp_path / "model", model_type, **config)))
    with caplog.at_level(logging.INFO, logger="cookbook"):
        for _ in range(2):
            (found,) = ask(Sampler(base, prepared_with(None)), [make_request(base, prompt=[5] * 40)])
            assert found.prompt_cache_hit_tokens == 0
    said = [record.message for record in caplog.records if "computes every prompt" in record.message]
    assert len(said) == 1
    assert "its prompts do not share rows" in said[0]


@pytest.mark.slow
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 40, 1024]))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_that_are_scored_together_share_beginnings_and_get_the_scores_of_a_forward_pass(
    base: BaseModel, adapter: Adapter, seed: int, max_prefill_tokens: int
) -> None:
    limits = replace(SamplingLimits.on(base), max_prefill_tokens=max_prefill_tokens)
    texts = related_prompts(random.Random(seed), 9)
    requests: list[Request] = [score_request(base, text) for text in texts]
    for text, found in zip(texts, ask(Sampler(base, prepared_with(adapter), limits), requests), strict=True):
        plain = plain_logprobs(base, adapter, text)
        assert found[0] is None
        assert found[1:] == pytest.approx(
            [plain[t - 1, text[t]].item() for t in range(1, len(text))], abs=2e-4
        )


def test_a_text_with_nan_scores_spoils_no_text_that_shares_its_beginning(
    make_model_folder: Any, tmp_path: Path
) -> None:
    base = reusing(BaseModel(str(make_model_folder(tmp_path / "model"))))
    begin, broken = list(range(10, 30)), 200
    texts = [[*begin, broken, 5, 6], [*begin, 6, 7], [*begin, 8]]
    with torch.no_grad():
        base.model.get_input_embeddings().weight[broken] = torch.nan
    requests: list[Request] = [score_request(base, text) for text in texts]
    waiting = requests[1:]
    Sampler(base, prepared_with(None)).run(
        requests[0], lambda: [waiting.pop(0) for _ in requests[1:] if waiting]
    )
    assert "nan or infinite" in str(outcome(requests[0]))
    for text, request in zip(texts[1:], requests[1:], strict=True):
        plain = plain_logprobs(base, None, text)
        expected = [plain[t - 1, text[t]].item() for t in range(1, len(text))]
        assert outcome(request)[1:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_every_kernel_sees_the_known_keys_and_the_row_s_as_one_text(
    base: BaseModel, sliding_window: int | None
) -> None:
    """The kernel of CUDA is replaced by a softmax. Keys depend on the token and its position."""
    rng = random.Random(0)
    tables = [torch.randn(heads, 100, 60, 8) for heads in (4, 2, 2)]  # queries, keys and values of tokens

    def of(tokens: list[int], positions: list[int]) -> list[torch.Tensor]:
        return [table[:, tokens, positions][None] for table in tables]

    decoder, layer = PackedDecoder(base), torch.nn.Module()
    for _ in range(5):
        tree = PromptTree(weakref.WeakSet())
        tree.limit(1000)
        texts = [np.array(prompt) for prompt in related_prompts(rng, 6)]
        for text_T in texts[:2]:
            _, key, value = of(text_T.tolist(), list(range(len(text_T))))
            tree.add(text_T, {layer: key[0]}, {layer: value[0]})
        row = plan_row(texts[1:], [tree.find(text_T[:-1]) for text_T in texts[1:]], MIN_SHARED)
        tokens_2N, layout = decoder._as_tensors(row)
        layout = replace(layout, cache=None)
        query, *own = of(tokens_2N[0].tolist(), tokens_2N[1].tolist())
        known = [
            [tensors[layer][None, :, :length] for tensors in (node.keys, node.values)]
            for node, length in row.known
        ]
        key, value = (torch.cat(parts, dim=2) for parts in zip(*known, own, strict=True))
        found = [packed_attention(layer, query, key, value, None, None, layout, sliding_window)[0]]
        with run_varlen_attention_on_the_cpu():
            found.append(attention._varlen(query, key, value, layout, None, sliding_window))
        for number, text_T in enumerate(texts[1:]):
            whole = of(text_T.tolist(), list(range(len(text_T))))
            expected, _ = packed_attention(layer, *whole, None, sliding_window=sliding_window)
            places_T = row.places(number)
            for out in found:
                torch.testing.assert_close(
                    out[0, places_T], expected[0, -len(places_T) :], rtol=1e-4, atol=1e-5
                )


# -- clients ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_a_training_step_a_new_snapshot_computes_its_prompts_with_the_new_weights(
    tiny_qwen3: str,
) -> None:
    service = ServiceClient(device="cpu")
    trained = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    base_client = service.create_sampling_client(base_model=tiny_qwen3)
    tokens = list(range(10, 60))
    prompt, params = (
        ModelInput.from_ints(tokens),
        SamplingParams(max_tokens=4, temperature=0, stop_token_ids=[-1]),
    )
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    of_base = base_client.sample(prompt, 1, params).result()
    assert base_client.sample(prompt, 1, params).result().prompt_cache_hit_tokens == 49
    seen = []
    for _ in range(3):
        trained.forward_backward([datum], "cross_entropy")
        trained.optim_step(AdamParams(learning_rate=0.05)).result()
        client = trained.save_weights_and_get_sampling_client()
        first, second = (client.sample(prompt, 1, params).result() for _ in range(2))
        assert (first.prompt_cache_hit_tokens, second.prompt_cache_hit_tokens) == (0, 49)
        assert second == first or second.sequences[0].tokens == first.sequences[0].tokens
        for response in (first, second):
            whole = tokens + response.sequences[0].tokens
            expected = client.compute_logprobs(ModelInput.from_ints(whole)).result()[50:]
            assert response.sequences[0].logprobs == pytest.approx(expected, abs=2e-4)
        seen.append(first.sequences[0].logprobs)
    assert len({round(logprobs[0], 4) for logprobs in seen}) == 3
    engine = base_client._engine
    assert sum(tree.num_tokens for tree in engine.base.prompt_trees) > 0
    again = base_client.sample(prompt, 1, params).result()
    assert again.sequences[0].tokens == of_base.sequences[0].tokens
    assert again.prompt_cache_hit_tokens == 0, "a pass of training frees what was kept"
    service.close()


@pytest.mark.slow
def test_clients_that_sample_at_the_same_time_get_what_each_gets_alone(tiny_qwen3: str) -> None:
    service = ServiceClient(device="cpu")
    trained = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    tokens = list(range(10, 60))
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    trained.forward_backward([datum], "cross_entropy")
    trained.optim_step(AdamParams(learning_rate=0.05))
    clients = [
        service.create_sampling_client(base_model=tiny_qwen3),
        trained.save_weights_and_get_sampling_client(),
    ]
    prompts = related_prompts(random.Random(3), 12)
    params = SamplingParams(max_tokens=6, seed=5, stop_token_ids=[-1])
    alone = [
        [client.sample(ModelInput.from_ints(each), 2, params).result() for each in prompts]
        for client in clients
    ]
    found: dict[tuple[int, int], SampleResponse] = {}

    def work(number: int, order: list[int]) -> None:
        futures = [(at, clients[number].sample(ModelInput.from_ints(prompts[at]), 2, params)) for at in order]
        for at, future in futures:
            found[number, at] = future.result()

    orders = [random.Random(seed).sample(range(12), 12) for seed in range(4)]
    threads = [threading.Thread(target=work, args=(number % 2, order)) for number, order in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (number, at), response in found.items():
        assert_same(response, alone[number][at])
    assert len(found) == 24
    service.close()


def test_a_closed_client_frees_what_it_kept(tiny_qwen3: str) -> None:
    service = ServiceClient(device="cpu")
    client = service.create_sampling_client(base_model=tiny_qwen3)
    client.sample(ModelInput.from_ints(list(range(10, 60))), 1, SamplingParams(max_tokens=2)).result()
    trees = client._engine.base.prompt_trees
    assert [tree.num_tokens for tree in trees] == [51]
    client.close()
    assert not list(trees)
    service.close()
