"""Sampling against transformers' own generate, and against a plain forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cookbook.engine.adapters import Adapter
from cookbook.engine.base_model import BaseModel
from cookbook.engine.sampler import compute_logprobs, sample
from cookbook.errors import RequestError
from cookbook.types import LoraConfig, SampleResponse, SamplingParams

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    # Cannot be packed: runs with its own attention.
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
}
PROMPT = [5, 17, 200, 31, 8]
NO_STOP = SamplingParams(max_tokens=12, stop_token_ids=[10**6])


@pytest.fixture(scope="module")
def base(tiny_qwen3: str) -> BaseModel:
    return BaseModel(tiny_qwen3)


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> Adapter:
    """One that moves the model: its B matrices are not zero."""
    return moved(base)


def moved(base: BaseModel) -> Adapter:
    made = base.adapters.add(LoraConfig(rank=4, seed=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.weights.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def run(
    base: BaseModel,
    adapter: Adapter | None = None,
    num_samples: int = 1,
    seed: int = 0,
    prompt: list[int] | None = None,
    include_prompt_logprobs: bool = False,
    **params: Any,
) -> SampleResponse:
    params = {"max_tokens": 12, "stop_token_ids": [10**6], **params}
    return sample(
        base, adapter, prompt or PROMPT, num_samples, SamplingParams(**params), seed, include_prompt_logprobs
    )


@torch.no_grad()
def plain_logprobs(base: BaseModel, adapter: Adapter | None, tokens: list[int]) -> torch.Tensor:
    """[T, V]: what the model says after each token, by its own forward without a cache."""
    with base.adapters.using(adapter):
        return base.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_of_transformers(family: str, make_model_folder: Any, tmp_path: Path) -> None:
    """Past the sliding window of 8 too."""
    folder = str(make_model_folder(tmp_path / family, family, **FAMILIES[family]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = BaseModel(folder)
    for prompt in ([7], PROMPT, list(range(20, 40))):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )
        (sequence,) = run(base, prompt=prompt, max_tokens=20, temperature=0).sequences
        assert sequence.tokens == expected[0, len(prompt) :].tolist()
        assert sequence.stop_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_reported_logprobs_equal_a_forward_pass_over_the_same_tokens(
    family: str, make_model_folder: Any, tmp_path: Path
) -> None:
    base = BaseModel(str(make_model_folder(tmp_path / family, family, **FAMILIES[family])))
    adapter = moved(base)
    response = run(base, adapter, num_samples=3, max_tokens=20, temperature=1.7, top_k=50, top_p=0.9)
    for sequence in response.sequences:
        assert sequence.logprobs is not None
        whole = PROMPT + sequence.tokens
        plain = plain_logprobs(base, adapter, whole)
        expected = [plain[t - 1, whole[t]].item() for t in range(len(PROMPT), len(whole))]
        assert sequence.logprobs == pytest.approx(expected, abs=2e-4)
        assert compute_logprobs(base, adapter, whole)[len(PROMPT) :] == pytest.approx(expected, abs=2e-4)


def test_an_adapter_changes_what_is_sampled_and_the_base_stays_as_it_was(
    base: BaseModel, adapter: Adapter
) -> None:
    before = run(base, None)
    assert run(base, adapter) != before
    assert run(base, None) == before


def test_a_seed_gives_the_same_samples_again(base: BaseModel, adapter: Adapter) -> None:
    torch.manual_seed(1)
    first = run(base, adapter, num_samples=3, seed=11)
    torch.manual_seed(2)
    assert run(base, adapter, num_samples=3, seed=11) == first
    assert run(base, adapter, num_samples=3, seed=12).sequences[0].tokens != first.sequences[0].tokens


def test_sampling_leaves_the_random_state_of_torch_alone(base: BaseModel, adapter: Adapter) -> None:
    before = torch.get_rng_state()
    run(base, adapter, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_continuation_does_not_depend_on_its_neighbours(base: BaseModel, adapter: Adapter) -> None:
    """Continuation i of many is the one that seed + i draws alone, also once others have stopped."""
    stop = list(range(0, base.vocab_size, 9))
    together = run(base, adapter, num_samples=8, seed=3, stop_token_ids=stop, max_tokens=30).sequences
    assert len({len(sequence.tokens) for sequence in together}) > 2
    for i, sequence in enumerate(together):
        (alone,) = run(base, adapter, seed=3 + i, stop_token_ids=stop, max_tokens=30).sequences
        assert alone.tokens == sequence.tokens
        assert alone.stop_reason == sequence.stop_reason
        assert alone.logprobs == pytest.approx(sequence.logprobs, abs=1e-4)


def test_top_k_of_one_is_greedy(base: BaseModel, adapter: Adapter) -> None:
    greedy = run(base, adapter, temperature=0).sequences[0].tokens
    assert run(base, adapter, top_k=1, temperature=2.0).sequences[0].tokens == greedy
    assert run(base, adapter, top_p=1e-6, temperature=2.0).sequences[0].tokens == greedy
    assert run(base, adapter, temperature=1e-4).sequences[0].tokens == greedy


def kept_after(base: BaseModel, temperature: float, top_k: int, top_p: float) -> set[int]:
    """The tokens that may follow PROMPT, by a loop over the sorted probabilities."""
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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (1.0, -1, 0.3), (0.7, 20, 0.6), (2.0, 3, 0.99)]
)
def test_only_the_likeliest_tokens_are_drawn_and_each_of_them_is(
    base: BaseModel, temperature: float, top_k: int, top_p: float
) -> None:
    expected = kept_after(base, temperature, top_k, top_p)
    response = run(base, num_samples=1500, max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = {sequence.tokens[0] for sequence in response.sequences}
    assert drawn <= expected
    assert len(drawn) >= 0.8 * len(expected)


def test_tokens_are_drawn_as_often_as_their_probability_says(base: BaseModel) -> None:
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
def test_a_stop_token_ends_a_continuation_and_is_part_of_it(
    base: BaseModel, adapter: Adapter, given: str
) -> None:
    greedy = run(base, adapter, temperature=0).sequences[0].tokens
    end = greedy[3]
    stop = {"stop_token_ids": None, given: [end]}
    (sequence,) = run(base, adapter, temperature=0, **stop).sequences
    first = greedy.index(end)
    assert sequence.tokens == greedy[: first + 1]
    assert sequence.stop_reason == "stop"


def test_a_stop_string_ends_a_continuation_wherever_its_pieces_fall(
    base: BaseModel, adapter: Adapter
) -> None:
    """The string lies across two tokens; the first token with which the text holds it is the last."""
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


def test_stop_strings_and_stop_tokens_add_up(base: BaseModel, adapter: Adapter) -> None:
    tokens = run(base, adapter, temperature=0).sequences[0].tokens
    early, late = tokens[1], base.tokenizer.decode(tokens[6:7])
    (sequence,) = run(base, adapter, temperature=0, stop=[late], stop_token_ids=[early]).sequences
    assert sequence.tokens == tokens[: tokens.index(early) + 1]


def test_without_stops_the_end_of_sequence_of_the_model_stops(
    base: BaseModel, make_model_folder: Any, tmp_path: Path
) -> None:
    greedy = run(base, temperature=0).sequences[0].tokens
    folder = make_model_folder(tmp_path / "model", eos_token_id=[0, greedy[2]])
    (sequence,) = run(BaseModel(str(folder)), temperature=0, stop_token_ids=None).sequences
    assert sequence.tokens == greedy[: greedy.index(greedy[2]) + 1]
    assert sequence.stop_reason == "stop"


def test_without_a_length_a_continuation_fills_the_context(base: BaseModel) -> None:
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
def test_what_cannot_be_sampled_is_refused(base: BaseModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(base, **given)


def test_an_empty_prompt_is_refused(base: BaseModel) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        sample(base, None, [], 1, NO_STOP, 0)
    with pytest.raises(RequestError, match="The prompt is empty"):
        compute_logprobs(base, None, [])
