"""Compares sampling with `generate` of transformers, and with a plain forward pass."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from fake_decoders import TightDecoder, decoding_with
from sampled import (
    FAMILIES,
    PACKED,
    PROMPT,
    assert_same,
    make_request,
    moved,
    outcome,
    plain_logprobs,
    prepared_with,
)
from slow import slow_after, slow_except
from transformers import AutoModelForCausalLM

from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling import decoder_probe, decoders
from cookbook.engine.sampling.packed_decoder import PackedDecoder
from cookbook.engine.sampling.requests import Request, ScoreRequest, score_request
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits
from cookbook.errors import RequestError, TrainingError
from cookbook.types import SampleResponse

QUICK = ("qwen3", "gemma2", "gpt_oss", "qwen3_next", "stablelm")
"""One family of each kind."""


@pytest.fixture(scope="module")
def base(tiny_qwen3: str) -> BaseModel:
    return BaseModel(tiny_qwen3)


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> Adapter:
    """Returns an adapter that changes the model, because its B matrices are not zero."""
    return moved(base)


def answer(
    base: BaseModel,
    adapter: Adapter | None,
    requests: Sequence[Request],
    limits: SamplingLimits | None = None,
) -> list[Any]:
    """All requests are queued at the same time."""
    waiting = list(requests[1:])

    def take_waiting() -> list[Request]:
        taken = waiting[:]
        waiting.clear()
        return taken

    Sampler(base, prepared_with(adapter), limits).run(requests[0], take_waiting)
    return [request.future.result(timeout=0) for request in requests]


def run(base: BaseModel, adapter: Adapter | None = None, **request: Any) -> SampleResponse:
    return answer(base, adapter, [make_request(base, **request)])[0]


def compute_logprobs(base: BaseModel, adapter: Adapter | None, tokens: list[int]) -> list[float | None]:
    return answer(base, adapter, [score_request(base, tokens)])[0]


# `generate` of transformers applies a window that its Llama does not have.
@pytest.mark.cases(3)
@pytest.mark.parametrize("family", slow_except(QUICK, [name for name in FAMILIES if name != "llama-window"]))
def test_greedy_equals_generate_of_transformers(family: str, make_model_folder: Any, tmp_path: Path) -> None:
    """Also beyond the sliding window of 8."""
    model_type, config, _ = FAMILIES[family]
    folder = str(make_model_folder(tmp_path / family, model_type, **config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = BaseModel(folder)
    for prompt in ([7], PROMPT, list(range(20, 40))):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )
        (sequence,) = run(base, prompt=prompt, max_tokens=20, temperature=0).sequences
        assert sequence.tokens == expected[0, len(prompt) :].tolist()
        assert sequence.stop_reason == "length"


@pytest.mark.cases(2)
@pytest.mark.parametrize("family", slow_except(QUICK, FAMILIES))
def test_reported_logprobs_equal_a_forward_pass_over_the_same_tokens(
    family: str, make_model_folder: Any, tmp_path: Path
) -> None:
    """Several prompts run at once, beyond the sliding window."""
    model_type, config, lora = FAMILIES[family]
    base = BaseModel(str(make_model_folder(tmp_path / family, model_type, **config)))
    adapter = moved(base, **lora)
    prompts = [PROMPT, [7], list(range(20, 40))]
    settings = {"num_samples": 3, "max_tokens": 20, "temperature": 1.7, "top_k": 50, "top_p": 0.9}
    requests = [make_request(base, prompt=prompt, **settings) for prompt in prompts]
    for prompt, response in zip(prompts, answer(base, adapter, requests), strict=True):
        for sequence in response.sequences:
            whole = prompt + sequence.tokens
            plain = plain_logprobs(base, adapter, whole)
            expected = [plain[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))]
            assert sequence.logprobs == pytest.approx(expected, abs=2e-4)
            assert compute_logprobs(base, adapter, whole)[len(prompt) :] == pytest.approx(expected, abs=2e-4)
    assert base.decodes_packed == (family in PACKED)


@pytest.mark.slow
def test_an_adapter_changes_the_samples_but_not_those_of_the_base(base: BaseModel, adapter: Adapter) -> None:
    before = run(base, None)
    assert run(base, adapter) != before
    assert run(base, None) == before


def test_a_seed_reproduces_the_samples(base: BaseModel, adapter: Adapter) -> None:
    torch.manual_seed(1)
    first = run(base, adapter, num_samples=3, seed=11)
    torch.manual_seed(2)
    assert run(base, adapter, num_samples=3, seed=11) == first
    assert run(base, adapter, num_samples=3, seed=12).sequences[0].tokens != first.sequences[0].tokens


def test_sampling_does_not_change_the_random_state_of_torch(base: BaseModel, adapter: Adapter) -> None:
    before = torch.get_rng_state()
    run(base, adapter, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)


def mixed_requests(base: BaseModel) -> list[Request]:
    """The requests have many lengths and settings, and some stop early."""
    rng = random.Random(0)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.8}, {"temperature": 0}, {"top_k": 7}, {"top_p": 0.5, "temperature": 1.4}, {},
    ]  # fmt: skip
    return [
        make_request(
            base,
            num_samples=rng.choice([1, 1, 2, 3]),
            prompt=[rng.randrange(base.vocab_size) for _ in range(length)],
            max_tokens=rng.choice([1, 5, 30, 80]),
            seed=index,
            stop_token_ids=list(range(0, base.vocab_size, 60)),
            include_prompt_logprobs=rng.random() < 0.5,
            **settings[index % len(settings)],
        )
        for index, length in enumerate([1, 2, 60, 64, 65, 100, 3, 7, 8, 9, 30, 150, 20, 5])
    ]


def test_samples_do_not_depend_on_the_rest_of_the_batch(base: BaseModel, adapter: Adapter) -> None:
    alone = [run_request(base, adapter, request) for request in mixed_requests(base)]
    together = answer(base, adapter, mixed_requests(base))
    backwards = answer(base, adapter, mixed_requests(base)[::-1])[::-1]
    assert len({len(each.tokens) for response in alone for each in response.sequences}) > 4
    for one, other, third in zip(alone, together, backwards, strict=True):
        assert_same(other, one)
        assert_same(third, one)


def run_request(base: BaseModel, adapter: Adapter | None, request: Request) -> Any:
    return answer(base, adapter, [request])[0]


@pytest.mark.slow
def test_requests_that_arrive_during_sampling_join_the_batch(base: BaseModel, adapter: Adapter) -> None:
    """A request arrives at every other token. Each result equals that of the request alone."""
    expected = [run_request(base, adapter, request) for request in mixed_requests(base)]
    requests = mixed_requests(base)
    waiting = requests[1:]
    asked = 0

    def take_waiting() -> list[Request]:
        nonlocal asked
        asked += 1
        return [waiting.pop(0)] if waiting and asked % 2 else []

    Sampler(base, prepared_with(adapter)).run(requests[0], take_waiting)
    while waiting:  # requests that arrived after a pause
        Sampler(base, prepared_with(adapter)).run(waiting.pop(0), list)
    for request, response in zip(requests, expected, strict=True):
        assert_same(request.future.result(timeout=0), response)


def test_scores_and_samples_that_run_together_equal_those_that_run_alone(
    base: BaseModel, adapter: Adapter
) -> None:
    texts = [list(range(3, 3 + length)) for length in (1, 2, 30, 5, 100, 1)]
    requests: list[Request] = []
    for text, sampled in zip(texts, mixed_requests(base), strict=False):
        requests += [score_request(base, text), sampled]
    found = answer(base, adapter, requests)
    for text, scores, sampled, response in zip(
        texts, found[::2], mixed_requests(base), found[1::2], strict=False
    ):
        assert scores[0] is None
        assert scores[1:] == pytest.approx(compute_logprobs(base, adapter, text)[1:], abs=1e-4)
        assert_same(response, run_request(base, adapter, sampled))


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [
        {"max_sequences": 3},
        {"max_cached_tokens": 400},
        {"max_prefill_tokens": 20},
        {"max_cached_tokens": 1},
    ],
)
def test_a_small_cache_changes_only_the_order(
    base: BaseModel, adapter: Adapter, limits: dict[str, int]
) -> None:
    """Sequences wait, and those that no longer fit are preempted and prefilled again later."""
    expected = answer(base, adapter, mixed_requests(base))
    found = answer(base, adapter, mixed_requests(base), replace(SamplingLimits.on(base), **limits))
    for one, response in zip(found, expected, strict=True):
        assert_same(one, response)


@pytest.mark.slow
@pytest.mark.parametrize("max_sequences", [5, 1])
def test_after_out_of_memory_fewer_sequences_run_at_a_time(
    base: BaseModel, adapter: Adapter, max_sequences: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer(base, adapter, mixed_requests(base))
    with decoding_with(base, partial(TightDecoder, max_sequences=max_sequences)):
        found = answer(base, adapter, mixed_requests(base))
    for one, response in zip(found, expected, strict=True):
        assert_same(one, response)
    assert "Sampling does not fit in memory" in caplog.text


def test_only_a_request_that_does_not_fit_alone_fails(base: BaseModel, adapter: Adapter) -> None:
    requests = [make_request(base, prompt=[5] * length, max_tokens=4) for length in (10, 120, 20)]
    waiting = requests[1:]
    with decoding_with(base, partial(TightDecoder, max_prefill_tokens=50)):
        Sampler(base, prepared_with(adapter)).run(requests[0], lambda: [waiting.pop(0)] if waiting else [])
    with pytest.raises(TrainingError, match="120 tokens do not fit in the memory of cpu even alone"):
        requests[1].future.result(timeout=0)
    for request in (requests[0], requests[2]):
        assert len(request.future.result(timeout=0).sequences[0].tokens) == 4


def test_top_k_of_one_is_greedy(base: BaseModel, adapter: Adapter) -> None:
    greedy = run(base, adapter, temperature=0).sequences[0].tokens
    assert run(base, adapter, top_k=1, temperature=2.0).sequences[0].tokens == greedy
    assert run(base, adapter, top_p=1e-6, temperature=2.0).sequences[0].tokens == greedy
    assert run(base, adapter, temperature=1e-4).sequences[0].tokens == greedy


def kept_after(base: BaseModel, temperature: float, top_k: int, top_p: float) -> set[int]:
    """Returns the tokens that may follow PROMPT, by a loop over the sorted probabilities."""
    probs = (plain_logprobs(base, None, PROMPT)[-1] / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if top_k > 0:
        ranked = ranked[:top_k]
    total = sum(probs[token] for token in ranked)
    kept, mass = set(), 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.add(token)
        mass += probs[token] / total
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (1.0, -1, 0.3), (0.7, 20, 0.6), (2.0, 3, 0.99)]
)
def test_exactly_the_tokens_within_top_k_and_top_p_are_sampled(
    base: BaseModel, temperature: float, top_k: int, top_p: float
) -> None:
    expected = kept_after(base, temperature, top_k, top_p)
    response = run(base, num_samples=1500, max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = {sequence.tokens[0] for sequence in response.sequences}
    assert drawn <= expected
    assert len(drawn) >= 0.8 * len(expected)


def test_tokens_are_sampled_with_their_probability(base: BaseModel) -> None:
    num_samples = 4000
    response = run(base, num_samples=num_samples, max_tokens=1, temperature=1.5)
    counts = torch.zeros(base.vocab_size)
    for sequence in response.sequences:
        counts[sequence.tokens[0]] += 1
    probs = (plain_logprobs(base, None, PROMPT)[-1] / 1.5).softmax(-1)
    for token in probs.topk(10).indices.tolist():
        spread = math.sqrt(num_samples * probs[token] * (1 - probs[token]))
        assert abs(counts[token] - num_samples * probs[token]) < 4.5 * spread


@pytest.mark.parametrize("given", ["stop_token_ids", "stop"])
def test_a_stop_token_ends_a_sequence_and_is_part_of_it(
    base: BaseModel, adapter: Adapter, given: str
) -> None:
    greedy = run(base, adapter, temperature=0).sequences[0].tokens
    end = greedy[3]
    stop = {"stop_token_ids": None, given: [end]}
    (sequence,) = run(base, adapter, temperature=0, **stop).sequences
    first = greedy.index(end)
    assert sequence.tokens == greedy[: first + 1]
    assert sequence.stop_reason == "stop"


def test_a_stop_string_ends_a_sequence_however_it_is_tokenized(base: BaseModel, adapter: Adapter) -> None:
    """The string spans two tokens. The first token with which the text contains it is the last."""
    decode = base.tokenizer.decode
    for seed in range(20):
        tokens = run(base, adapter, seed=seed).sequences[0].tokens
        one, other = decode(tokens[4:5]), decode(tokens[5:6])
        if decode(tokens[4:6]) == one + other and "\ufffd" not in one + other:
            break
    string = one[-1] + other[0]
    length = next(n for n in range(1, len(tokens) + 1) if string in decode(tokens[:n]))
    for stop in (string, [string], ["never this", string]):
        (sequence,) = run(base, adapter, seed=seed, stop=stop, stop_token_ids=None).sequences
        assert sequence.tokens == tokens[:length]
        assert sequence.stop_reason == "stop"


def test_stop_strings_and_stop_tokens_both_apply(base: BaseModel, adapter: Adapter) -> None:
    tokens = run(base, adapter, temperature=0).sequences[0].tokens
    early, late = tokens[1], base.tokenizer.decode(tokens[6:7])
    (sequence,) = run(base, adapter, temperature=0, stop=[late], stop_token_ids=[early]).sequences
    assert sequence.tokens == tokens[: tokens.index(early) + 1]


def test_without_stops_the_model_s_end_of_sequence_stops(
    base: BaseModel, make_model_folder: Any, tmp_path: Path
) -> None:
    greedy = run(base, temperature=0).sequences[0].tokens
    folder = make_model_folder(tmp_path / "model", eos_token_id=[0, greedy[2]])
    (sequence,) = run(BaseModel(str(folder)), temperature=0, stop_token_ids=None).sequences
    assert sequence.tokens == greedy[: greedy.index(greedy[2]) + 1]
    assert sequence.stop_reason == "stop"


def test_without_max_tokens_a_sequence_fills_the_context(base: BaseModel) -> None:
    (sequence,) = run(base, prompt=list(range(3, 253)), max_tokens=None).sequences
    assert base.context_length == 256
    assert len(sequence.tokens) == 6
    assert sequence.stop_reason == "length"


def test_prompt_logprobs_are_those_of_a_plain_forward(base: BaseModel, adapter: Adapter) -> None:
    response = run(base, adapter, num_samples=2, include_prompt_logprobs=True)
    plain = plain_logprobs(base, adapter, PROMPT)
    expected = [plain[t - 1, PROMPT[t]].item() for t in range(1, len(PROMPT))]
    for found in (response.prompt_logprobs, compute_logprobs(base, adapter, PROMPT)):
        assert found is not None
        assert found[0] is None
        assert found[1:] == pytest.approx(expected, abs=1e-4)
    assert compute_logprobs(base, adapter, [7]) == [None]
    assert run(base, adapter).prompt_logprobs is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_tokens": 0}, r"max_tokens=0 .* Use 1 to 251"),
        ({"max_tokens": 252}, r"max_tokens=252 after a prompt of 5 tokens .* context length of 256"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"stop": ""}, "empty stop string"),
        ({"stop": ["x", ""]}, "empty stop string"),
        ({"prompt": [10**6]}, "token 1000000, outside the vocabulary of"),
        ({"prompt": [-1]}, "token -1, outside"),
        ({"prompt": [1] * 257}, "257 tokens, more than the context length of 256"),
        ({"prompt": [1] * 256}, "does not fit"),
    ],
)
def test_requests_that_cannot_be_sampled_are_refused(
    base: BaseModel, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        run(base, **given)


def test_an_empty_prompt_is_refused(base: BaseModel) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        run(base, prompt=[])
    with pytest.raises(RequestError, match="The prompt is empty"):
        compute_logprobs(base, None, [])


# -- logits that are not finite -------------------------------------------------------------------

BROKEN = 200
"""A token whose embedding is nan in `broken_base`. After it a sequence has no distribution."""
SOUND_PROMPTS = [[5, 17, 31, 8], [7], list(range(20, 40)), [9] * 70]


@pytest.fixture(scope="module", params=["packed", "whole", "rereading"])
def broken_base(request: pytest.FixtureRequest, make_model_folder: Any, tmp_path_factory: Any) -> BaseModel:
    folder = tmp_path_factory.mktemp("models") / request.param
    family = {"packed": "qwen3", "whole": "stablelm", "rereading": "qwen3"}[request.param]
    base = BaseModel(str(make_model_folder(folder, family)))
    with torch.no_grad():
        base.model.get_input_embeddings().weight[BROKEN] = torch.nan
        if request.param == "rereading":
            base.make_decoder = decoders.UncachedDecoder
        else:
            decoder_probe.make_decoder(base)
    assert base.decodes_packed == (
        True if request.param == "packed" else None if base.packs_all_lengths else False
    )
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    slow_except(
        [{"temperature": 1e38, "top_p": 0.5, "top_k": 3}],
        [
            {"temperature": 0},
            {},
            {"top_k": 5},
            {"top_p": 0.8},
            {"temperature": 1e-30},
            {"temperature": 1e38, "top_p": 0.5, "top_k": 3},
            {"include_prompt_logprobs": True, "num_samples": 3},
        ],
    ),
)
def test_a_request_whose_prompt_leads_to_nan_fails_alone(
    broken_base: BaseModel, settings: dict[str, Any]
) -> None:
    """Other requests wait or join later. A request that samples the broken token itself fails too."""
    prompts = [SOUND_PROMPTS[0], [5, BROKEN, 3], SOUND_PROMPTS[1], [BROKEN] * 70, *SOUND_PROMPTS[2:]]
    expected = []
    for prompt in prompts:
        request = make_request(broken_base, prompt=prompt, **settings)
        Sampler(broken_base, prepared_with(None)).run(request, list)
        expected.append(outcome(request))
        assert isinstance(expected[-1], TrainingError) or BROKEN not in prompt
    assert sum(isinstance(each, SampleResponse) for each in expected) > 1
    requests = [make_request(broken_base, prompt=prompt, **settings) for prompt in prompts]
    together, later = requests[:3], requests[3:]
    asked = 0

    def take_waiting() -> list[Request]:
        nonlocal asked
        asked += 1
        if asked == 1:
            return together[1:]
        return [later.pop(0)] if later and asked % 2 else []

    Sampler(broken_base, prepared_with(None)).run(together[0], take_waiting)
    for request, response in zip(requests, expected, strict=True):
        found = outcome(request)
        if isinstance(response, TrainingError):
            assert isinstance(found, TrainingError)
            assert "nan or infinite" in str(found)
            assert str(found) == str(response)
        else:
            assert_same(found, response)


@pytest.mark.slow
def test_a_request_whose_sample_leads_to_nan_fails_alone(base: BaseModel, adapter: Adapter) -> None:
    """One of its samples reads the token, and the other samples of that request end with it."""
    prompts = [[5, 17, 31, 8], *([7 + number, 40 - number] for number in range(6))]
    settings = {"num_samples": 3, "max_tokens": 30, "temperature": 1.3}
    expected = [run(base, adapter, prompt=prompt, **settings) for prompt in prompts]
    counts = [
        {token for sequence in response.sequences for token in sequence.tokens[:-1]} for response in expected
    ]
    chosen = next(
        token
        for token in expected[0].sequences[1].tokens[3:]
        if 0 < sum(token in others for others in counts) < len(prompts)
        and not any(token in prompt for prompt in prompts)
    )
    weight = base.model.get_input_embeddings().weight
    before = weight[chosen].clone()
    requests = [make_request(base, prompt=prompt, **settings) for prompt in prompts]
    waiting = requests[1:]
    with torch.no_grad():
        weight[chosen] = torch.nan
        try:
            Sampler(base, prepared_with(adapter)).run(
                requests[0], lambda: [waiting.pop(0)] if waiting else []
            )
        finally:
            weight[chosen] = before
    for request, response, tokens in zip(requests, expected, counts, strict=True):
        if chosen in tokens:
            assert isinstance(outcome(request), TrainingError)
        else:
            assert_same(outcome(request), response)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_nan_fail_alone(broken_base: BaseModel, value: float) -> None:
    texts = [[5, 17, 31, 8], [5, BROKEN, 3, 4], [7], [3, 4, BROKEN], [9] * 70]
    requests: list[Request] = [score_request(broken_base, text) for text in texts]
    weight = broken_base.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[BROKEN] = value
        waiting = requests[1:]
        Sampler(broken_base, prepared_with(None)).run(
            requests[0], lambda: [waiting.pop() for _ in requests[1:] if waiting]
        )
        weight[BROKEN] = torch.nan
    assert isinstance(outcome(requests[1]), TrainingError)
    for index in (0, 2, 3, 4):  # nothing after the last token is requested
        assert outcome(requests[index])[1:] == pytest.approx(
            compute_logprobs(broken_base, None, texts[index])[1:], abs=1e-4
        )


@pytest.mark.slow
def test_weights_of_nan_fail_every_request_and_no_other_model(base: BaseModel, adapter: Adapter) -> None:
    """Also before anything was sampled from the model, when its decoders have not been compared."""
    other = BaseModel(base.name)
    diverged = moved(other)
    with torch.no_grad():
        next(iter(diverged.weights.values())).fill_(torch.nan)
    for _ in range(2):
        request = make_request(other, prompt=PROMPT)
        Sampler(other, prepared_with(diverged)).run(request, list)
        assert isinstance(outcome(request), TrainingError)
    assert_same(run(other), run(base))
    assert other.decodes_packed


@pytest.mark.slow
def test_a_request_whose_listener_raises_fails_alone(base: BaseModel, adapter: Adapter) -> None:
    def refuse(index: int, token: int, logprob: float) -> None:
        raise RuntimeError("no listener")

    requests = [make_request(base, prompt=prompt, seed=1) for prompt in SOUND_PROMPTS]
    assert not isinstance(requests[1], ScoreRequest)
    requests[1].on_token = refuse
    waiting = requests[1:]
    Sampler(base, prepared_with(adapter)).run(requests[0], lambda: [waiting.pop(0)] if waiting else [])
    assert "no listener" in str(outcome(requests[1]))
    for index in (0, 2, 3):
        assert_same(outcome(requests[index]), run(base, adapter, prompt=SOUND_PROMPTS[index], seed=1))


# -- stop conditions and numeric settings -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stop", [[], ()])
def test_an_empty_stop_never_stops(
    base: BaseModel, make_model_folder: Any, tmp_path: Path, stop: Any
) -> None:
    greedy = run(base, temperature=0).sequences[0].tokens
    stopping = BaseModel(str(make_model_folder(tmp_path / "model", eos_token_id=[0, greedy[2]])))
    settings = {"temperature": 0, "stop_token_ids": None}
    assert run(stopping, **settings).sequences[0].stop_reason == "stop"
    (sequence,) = run(stopping, stop=stop, **settings).sequences
    assert (sequence.tokens, sequence.stop_reason) == (greedy, "length")
    (sequence,) = run(stopping, stop=stop, temperature=0, stop_token_ids=[greedy[4]]).sequences
    assert sequence.tokens == greedy[: greedy.index(greedy[4]) + 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": "5"}, "top_k='5'"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"top_p": None}, "top_p=None"),
    ],
)
def test_settings_that_are_not_numbers_are_refused_before_they_are_batched(
    base: BaseModel, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make_request(base, **given)


# -- decoders ------------------------------------------------------------------------------------

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 12,
}
DECODED: dict[str, tuple[str, dict[str, Any], type[decoders.Decoder]]] = {
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}, PackedDecoder),
    "mamba": ("mamba", {}, PackedDecoder),
    "mamba2": (
        "mamba2",
        {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
        PackedDecoder,
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        PackedDecoder,
    ),
    "zamba2": (
        "zamba2",
        {
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "num_hidden_layers": 4,
            "hybrid_layer_ids": [1, 3],
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
        PackedDecoder,
    ),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}, PackedDecoder),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
            "conv1d_width": 4,
        },
        decoders.UncachedDecoder,
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
            "position_embedding_type": "rope",
        },
        PackedDecoder,
    ),
    "minimax": (
        "minimax",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
        PackedDecoder,
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 256}, decoders.UncachedDecoder),
    "mpt": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256},
        decoders.WholeModelDecoder,
    ),
    "longrope": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12},
        decoders.WholeModelDecoder,
    ),
}


def greedy_without_a_cache(base: BaseModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(base.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.cases(2)
@pytest.mark.parametrize("family", slow_except(["bamba", "mpt", "rwkv", "longrope"], DECODED))
def test_every_family_samples_as_its_forward_pass_without_a_cache(
    family: str, make_model_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two copies each of prompts of different lengths, sampled together beyond the threshold of longrope."""
    model_type, config, decoder = DECODED[family]
    base = BaseModel(str(make_model_folder(tmp_path / family, model_type, **config)))
    prompts = [[7], PROMPT, list(range(20, 31))]
    settings = {"temperature": 0, "max_tokens": 8, "num_samples": 2}
    found = answer(base, None, [make_request(base, prompt=prompt, **settings) for prompt in prompts])
    for prompt, response in zip(prompts, found, strict=True):
        expected = greedy_without_a_cache(base, prompt, 8)
        assert [sequence.tokens for sequence in response.sequences] == [expected, expected]
        if family == "longrope" and len(prompt) < 12 <= len(prompt) + 8:
            continue  # a pass over the whole sequence would rotate the first positions differently
        plain = plain_logprobs(base, None, prompt + expected)
        reported = [plain[len(prompt) - 1 + t, token].item() for t, token in enumerate(expected)]
        assert response.sequences[0].logprobs == pytest.approx(reported, abs=1e-4)
    assert base.make_decoder is decoder
    assert ("falls back to UncachedDecoder" in caplog.text) == (decoder is decoders.UncachedDecoder)


@pytest.mark.parametrize(
    ("family", "is_warned"), slow_after(1, [("unlimited_ocr", True), ("deepseek_v4", False)])
)
def test_a_model_whose_own_cache_reaches_less_than_a_forward_pass_is_sampled_as_by_generate_with_a_warning(
    family: str, is_warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = BaseModel(str(families.save(family, tmp_path)))
    (response,) = answer(base, None, [make_request(base, prompt=PROMPT, temperature=0, max_tokens=14)])
    assert ("long replies reach fewer tokens" in caplog.text) == is_warned
    generated = families.load(tmp_path).generate(
        input_ids=torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=14,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    (sequence,) = response.sequences
    assert sequence.tokens == generated.sequences[0, len(PROMPT) :].tolist()
    steps_TV = torch.cat(generated.logits).log_softmax(-1)
    reported = [step_V[token].item() for step_V, token in zip(steps_TV, sequence.tokens, strict=True)]
    assert sequence.logprobs == pytest.approx(reported, abs=1e-4)


class WithoutPositions(decoders.WholeModelDecoder):
    """Wrong for a model that does not count what is in its cache."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base)
        self._takes_positions = False


class AlwaysAtPositionZero(PackedDecoder):
    """Wrong for any model that uses positions."""

    def decode(self, sequences: Any) -> Any:
        hidden_of = self._base.hidden_of
        try:
            self._base.hidden_of = lambda ids, positions, layout: hidden_of(ids, 0 * positions, layout)  # type: ignore[method-assign]
            return super().decode(sequences)
        finally:
            del self._base.hidden_of


class MixesSequences(PackedDecoder):
    """Wrong for more than one sequence."""

    def decode(self, sequences: Any) -> Any:
        return super().decode(sequences).flip(0)


class Raises(PackedDecoder):
    def prefill(self, groups: Any) -> Any:
        raise IndexError("no such position")


@pytest.mark.parametrize(
    ("model_type", "config", "wrong"),
    [
        ("bamba", DECODED["bamba"][1], WithoutPositions),
        ("qwen3", {}, AlwaysAtPositionZero),
        ("qwen3", {}, MixesSequences),
        ("qwen3", {}, Raises),
    ],
)
def test_a_decoder_that_is_wrong_for_a_model_is_rejected_with_a_warning(
    model_type: str,
    config: dict[str, Any],
    wrong: type[decoders.Decoder],
    make_model_folder: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = BaseModel(str(make_model_folder(tmp_path / "model", model_type, **config)))
    decoder_probe.make_decoder(base, (wrong, wrong, decoders.UncachedDecoder))
    (sequence,) = run(base, temperature=0, max_tokens=6).sequences
    assert sequence.tokens == greedy_without_a_cache(base, PROMPT, 6)
    assert base.make_decoder is decoders.UncachedDecoder
    assert f"is not sampled from with {wrong.__name__}" in caplog.text
    run(base, temperature=0, max_tokens=2)
    warnings = [record for record in caplog.records if "falls back" in record.getMessage()]
    assert len(warnings) == (2 if base.packs_all_lengths else 1), "a model is probed once"
