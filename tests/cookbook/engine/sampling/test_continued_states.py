"""Compares sampling that continues the states of recurrent layers with sampling that does not."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import assert_same, make_request, moved, outcome, plain_logprobs, prepared_with, related_prompts
from torch import nn

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.prefix_tree import MIN_SHARED_TOKENS
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.beginnings import plan_beginnings
from cookbook.engine.sampling.prompt_tree import PromptTree, TextEnd
from cookbook.engine.sampling.recurrent_states import RecurrentStates
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits

FAST = ["qwen3_5", "nemotron_h", "jamba", "lfm2_moe"]
SLOW = [
    *("qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_linear", "falcon_h1", "granitemoehybrid", "bamba"),
    *("falcon_mamba", "lfm2", "lfm3", "minimax", "zamba", "zamba2", "mamba", "mamba2"),
]


def load(name: str, folder: Path) -> BaseModel:
    return BaseModel(str(families.save(name, folder / name)), EngineOptions(dtype="float32"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The tokens that are computed are counted in its embeddings, so that it has been tried before."""
    base = load("qwen3_5", tmp_path_factory.mktemp("model"))
    ask(Sampler(base, prepared_with(None)), [[5, 6]])
    return base


def ask(sampler: Sampler, prompts: list[list[int]], **params: Any) -> list[Any]:
    """All prompts are queued at the same time."""
    requests = [make_request(sampler._base, prompt=prompt, **params) for prompt in prompts]
    waiting = [requests[1:]]
    sampler.run(requests[0], lambda: waiting.pop() if waiting else [])
    return [request.future.result(timeout=0) for request in requests]


def alone(base: BaseModel, adapter: Any, prompts: list[list[int]], **params: Any) -> list[Any]:
    """Each prompt runs in a sampler of its own, without anything that is kept."""
    before, base.reuses_prompts = base.reuses_prompts, False
    try:
        return [ask(Sampler(base, prepared_with(adapter)), [prompt], **params)[0] for prompt in prompts]
    finally:
        base.reuses_prompts = before


ROUNDING = 5e-4
"""Log-probabilities of tiny models with a delta rule differ by 3e-4 where products round differently."""


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_states_are_continued_and_that_changes_nothing(name: str, tmp_path: Path) -> None:
    """Prompts come together and one by one, and continue replies."""
    base = load(name, tmp_path)
    base.min_shared_tokens = 1
    adapter, rng = moved(base), random.Random(0)
    sampler, params = Sampler(base, prepared_with(adapter)), {"max_tokens": 6, "num_samples": 2}
    prompts, total = related_prompts(rng, 6, length=60), 0
    for number in range(3):
        asked = [[prompt] for prompt in prompts] if number == 1 else [prompts]
        found = [response for together in asked for response in ask(sampler, together, **params)]
        expected = alone(base, adapter, prompts, **params)
        for prompt, response, other in zip(prompts, found, expected, strict=True):
            assert_same(response, other, ROUNDING)
            assert other.prompt_cache_hit_tokens == 0
            assert 0 <= response.prompt_cache_hit_tokens <= len(prompt)
            total += response.prompt_cache_hit_tokens
            whole = prompt + response.sequences[0].tokens
            plain = plain_logprobs(base, adapter, whole)
            logprobs = [plain[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))]
            assert response.sequences[0].logprobs == pytest.approx(logprobs, abs=ROUNDING)
        replies = [prompt + each.sequences[0].tokens for prompt, each in zip(prompts, found, strict=True)]
        prompts = [[*reply, 9, 11, rng.randrange(3, 100)] for reply in replies[:3]]
        prompts += [[*prompt[:-2], 8] for prompt in prompts] + [replies[3][:-3]]
    assert base.reuses_prompts
    assert total > 300


# -- what is kept -----------------------------------------------------------------------------


def hits_of(sampler: Sampler, *prompts: list[int], **params: Any) -> list[int]:
    return [response.prompt_cache_hit_tokens for response in ask(sampler, list(prompts), **params)]


def test_a_response_says_how_many_tokens_of_its_prompt_were_not_computed(base: BaseModel) -> None:
    sampler, rng = Sampler(base, prepared_with(None)), random.Random(0)
    prompt, system = ([rng.randrange(3, 100) for _ in range(length)] for length in (100, 300))
    assert hits_of(sampler, prompt, num_samples=3) == [0]
    (response,) = ask(sampler, [prompt])
    assert response.prompt_cache_hit_tokens == 100, "the logits after it are kept too"
    reply = response.sequences[0].tokens
    assert hits_of(sampler, [*prompt, *reply, 9]) == [111], "the last token of a reply was never read"
    assert hits_of(sampler, [*prompt, 101, 9]) == [100]
    assert hits_of(sampler, prompt, include_prompt_logprobs=True) == [0], "they need its hidden states"
    # It leaves the earlier ones where no state is known, and one is kept.
    assert hits_of(sampler, [*prompt[:90], 1, 2]) == [0]
    assert hits_of(sampler, [*prompt[:90], 5, 6]) == [90]
    together = [[*system, 200 + number, *range(3, 3 + number)] for number in range(4)]
    assert sorted(hits_of(sampler, *together)) == [0, 300, 300, 300]
    assert hits_of(sampler, *together, together[2], together[2][:-1]) == [301, 302, 303, 304, 303, 300]
    assert hits_of(sampler, prompt[:20], prompt[:20]) == [0, 20], "the same text is computed once"
    short = [[*prompt[:90], 7, *prompt[:number]] for number in range(3)]
    assert hits_of(sampler, *short) == [0, 0, 0], "batches of texts of other lengths are cheaper"


@contextlib.contextmanager
def passes_of(base: BaseModel) -> Iterator[list[int]]:
    """Yields how many tokens the model reads in each pass in the body."""
    sizes: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[-1])
    )
    try:
        yield sizes
    finally:
        hook.remove()


def num_computed(base: BaseModel, sampler: Sampler, prompts: list[list[int]]) -> list[int]:
    """Returns how many tokens the model reads for each prompt, but for those of its reply."""
    counts = []
    for prompt in prompts:
        with passes_of(base) as sizes:
            ask(sampler, [prompt], max_tokens=1)
        counts.append(sum(sizes))
    return counts


def test_a_conversation_whose_history_is_rewritten_costs_what_is_new_in_each_turn(base: BaseModel) -> None:
    """As with a template that opens a thought behind each prompt, and keeps none of earlier turns."""
    rng, multiple, opening = random.Random(0), base.row_multiple, [7, 8, 9]
    text: list[int] = []
    prompts = []
    for _ in range(6):
        text = text + [rng.randrange(10, 100) for _ in range(75)]
        prompts.append([*text, *opening])
    counts = num_computed(base, Sampler(base, prepared_with(None)), prompts)
    assert counts[0] <= 78 + multiple
    assert counts[1] <= 153 + 3 * multiple, "no state is known where the first prompt leaves it"
    assert all(count <= 75 + MIN_SHARED_TOKENS + 2 * multiple for count in counts[2:])


def test_a_group_of_requests_for_the_same_prompt_computes_it_once(base: BaseModel) -> None:
    prompt = list(range(10, 70))
    sampler = Sampler(base, prepared_with(None))
    requests = [make_request(base, prompt=prompt, seed=number) for number in range(8)]
    waiting = [requests[4:], requests[1:4]]
    with passes_of(base) as sizes:
        sampler.run(requests[0], lambda: waiting.pop() if waiting else [])
    assert [size for size in sizes if size > 8] == [60 + -60 % base.row_multiple]
    found = [request.future.result(timeout=0) for request in requests]
    assert [each.prompt_cache_hit_tokens for each in found] == [0] + [60] * 7
    assert len({tuple(each.sequences[0].tokens) for each in found}) > 4
    for number, response in enumerate(found):
        assert_same(response, alone(base, None, [prompt], seed=number)[0])


@pytest.mark.slow
def test_random_prompts_sample_the_same_with_any_limits(base: BaseModel) -> None:
    shortest, base.min_shared_tokens = base.min_shared_tokens, 1
    try:
        for seed in range(12):
            rng = random.Random(seed)
            kept = rng.choice([0, 150, 400, 10_000])
            limits = replace(
                SamplingLimits.on(base),
                max_sequences=rng.choice([1, 3, 64]),
                max_prefill_tokens=rng.choice([7, 40, 1024]),
                max_kept_tokens=kept,
                max_cached_tokens=rng.choice([500, 10_000]),
            )
            sampler = Sampler(base, prepared_with(None), limits)
            for _ in range(2):
                prompts = related_prompts(rng, rng.randint(1, 7), length=40)
                params = {"max_tokens": rng.randint(1, 5), "num_samples": rng.choice([1, 3])}
                params["include_prompt_logprobs"] = rng.random() < 0.3
                for found, expected in zip(
                    ask(sampler, prompts, **params), alone(base, None, prompts, **params), strict=True
                ):
                    assert_same(found, expected)
                    assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
            assert sampler._prompts is not None
            assert sampler._prompts.num_positions <= kept
    finally:
        base.min_shared_tokens = shortest


@pytest.mark.slow
def test_a_prompt_that_leads_to_nan_leaves_no_states(tmp_path: Path) -> None:
    base = load("nemotron_h", tmp_path)
    base.min_shared_tokens = 1
    sampler = Sampler(base, prepared_with(None))
    ask(sampler, [[5, 6]])
    broken, begin = 99, list(range(10, 40))
    with torch.no_grad():
        base.model.get_input_embeddings().weight[broken] = torch.nan
    prompts = [[*begin, broken, 5], [*begin, 6], [*begin, broken, 5, 7], [*begin, 5, 6]]
    for _ in range(2):
        requests = [make_request(base, prompt=prompt, top_k=3, temperature=0) for prompt in prompts]
        waiting = [requests[1:]]
        sampler.run(requests[0], lambda: waiting.pop() if waiting else [])  # noqa: B023
        for prompt, request in zip(prompts, requests, strict=True):
            if broken in prompt:
                assert "nan or infinite" in str(outcome(request))
            else:
                assert_same(outcome(request), alone(base, None, [prompt], temperature=0)[0])


# -- the beginnings that are computed first ---------------------------------------------------

TEXTS = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9, unique_by=tuple
)


def begins(text: list[int], beginning: np.ndarray) -> bool:
    return text[: len(beginning)] == beginning.tolist()


@given(TEXTS, st.data())
@settings(max_examples=200, deadline=None)
def test_beginnings_are_followed_by_those_that_continue_them(texts: list[list[int]], data: Any) -> None:
    known = [data.draw(st.integers(0, len(text) - 1)) for text in texts]
    seen = [data.draw(st.integers(at, len(text))) for at, text in zip(known, texts, strict=True)]
    num_texts = len(texts) if data.draw(st.booleans()) else 1
    texts, known, seen = texts[:num_texts], known[:num_texts], seen[:num_texts]
    passes = plan_beginnings([np.array(text) for text in texts], known, seen, 1)
    for number, beginnings in enumerate(passes):
        for one in beginnings:
            assert one.texts == [at for at, text in enumerate(texts) if begins(text, one.tokens_T)]
            assert all(len(one.tokens_T) < len(texts[at]) for at in one.texts) or num_texts > 1
            earlier = [each for before in passes[:number] for each in before]
            continued = [each for each in earlier if begins(one.tokens_T.tolist(), each.tokens_T)]
            later = [each for after in passes[number:] for each in after if each is not one]
            assert not any(begins(one.tokens_T.tolist(), each.tokens_T) for each in later)
            assert bool(continued) == bool(number)
    if num_texts == 1:
        left_at, length = min(seen[0], len(texts[0]) - 1), len(texts[0])
        is_next_turn = left_at > known[0] and 3 * left_at >= length and length - 1 - known[0] >= 4
        assert bool(passes) == (is_next_turn or left_at - known[0] >= 4)


def test_nested_beginnings_are_each_computed_once() -> None:
    """Two groups of texts share 40 tokens, and the texts of each group 40 more."""
    texts = [[1] * 40 + [2 + group] * 40 + [5, number] for group in (0, 1) for number in (0, 1)]
    passes = plan_beginnings([np.array(text) for text in texts], [0] * 4, [0] * 4, 2)
    lengths = [[(len(each.tokens_T), each.texts) for each in beginnings] for beginnings in passes]
    assert lengths == [[(40, [0, 1, 2, 3])], [(81, [0, 1]), (81, [2, 3])]]


# -- the tree ---------------------------------------------------------------------------------

LAYER = nn.Module()


def end_of(text: list[int], has_logits: bool = False) -> TextEnd:
    """Returns an end with a state that depends on the whole text."""
    states = RecurrentStates()
    states.update_recurrent_state(torch.tensor([[float(hash(tuple(text)) % 10_007)]]), 0)
    return TextEnd(states, torch.zeros(3) if has_logits else None)


@given(TEXTS, st.sampled_from([0, 9, 20, 1000]), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_the_longest_beginning_with_a_kept_state_is_found(
    texts: list[list[int]], room: int, end_positions: int
) -> None:
    tree = PromptTree(weakref.WeakSet(), end_positions)
    tree.limit(room)
    for number, text in enumerate(texts):
        keys = {LAYER: torch.arange(len(text))[None, :, None]}
        has_end = number % 3 != 2
        tree.add(np.array(text), keys, keys, end_of(text, number % 2 == 0) if has_end else None)
        assert tree.num_positions <= room
        assert tree.num_positions == tree.num_tokens + end_positions * len(tree._ends)
        assert all(node.end is not None and node in tree._nodes for node in tree._ends)
        assert sum(node.end is not None for node in tree._nodes) == len(tree._ends)
    kept = {tuple(text): at % 2 == 0 for at, text in enumerate(texts) if at % 3 != 2} if room == 1000 else {}
    for text in texts:
        path = tree.find_end(np.array(text))
        length = sum(part for _, part in path)
        if room == 1000:
            usable = [
                size
                for size in range(1, len(text) + 1)
                if tuple(text[:size]) in kept and (size < len(text) or kept[tuple(text)])
            ]
            assert length == max(usable, default=0)
        if path:
            end = path[-1][0].end
            assert end is not None
            state = end.states.get_recurrent_state(0)
            assert state is not None
            assert state.item() == hash(tuple(text[:length])) % 10_007


def test_states_inside_a_conversation_are_evicted_before_its_end() -> None:
    tree = PromptTree(weakref.WeakSet(), end_positions=10)
    tree.limit(50)
    text = list(range(12))
    for length in (3, 6, 9, 12):
        tree.use(tree.find_end(np.array(text[:length])))
        keys = {LAYER: torch.zeros(1, length, 1)}
        tree.add(np.array(text[:length]), keys, keys, end_of(text[:length], has_logits=True))
    assert tree.num_tokens == 12, "no keys and values are evicted"
    found = [sum(part for _, part in tree.find_end(np.array(text[:length]))) for length in (3, 6, 9, 12)]
    assert found == [0, 6, 9, 12]
