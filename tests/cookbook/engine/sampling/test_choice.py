"""Compares the choice of tokens with a loop over the sorted vocabulary in Python's arithmetic."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import pytest
import torch
from slow import slow_after
from torch.utils._python_dispatch import TorchDispatchMode

from cookbook.engine.sampling import choice as choice_module
from cookbook.engine.sampling.choice import choose
from cookbook.types import SamplingParams

VOCAB_SIZE = 3000
UNIFORMS = [0.0, 1e-9, 0.1, 0.25, 0.5, 0.73, 0.9, 0.999, 1 - 2**-53]


def kept_terms(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Returns the tokens that may be sampled, by id, with their terms of the softmax."""
    highest = max(logits)
    terms = [math.exp((logit - highest) / params.temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k > 0:
        kth = logits[ranked[min(params.top_k, len(ranked)) - 1]]
        ranked = [token for token in ranked if logits[token] >= kth]
    total, mass, kept = sum(terms[token] for token in ranked), 0.0, {}
    for token in ranked:
        if params.top_p < 1 and mass >= params.top_p * total:
            break
        kept[token] = terms[token]
        mass += terms[token]
    return dict(sorted(kept.items()))


def drawn(terms: dict[int, float], uniform: float) -> set[int]:
    """Returns the token that the number selects, or two tokens if the number is between them to rounding."""
    total, end, found = sum(terms.values()), 0.0, set()
    for token, term in terms.items():
        begin, end = end, end + term
        if begin - 1e-5 * total <= uniform * total <= end + 1e-5 * total:
            found.add(token)
    return found


@pytest.mark.cases(40)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.6, 1e-6])
@pytest.mark.parametrize("top_k", [-1, 1, 40, 2999, 10**6])
def test_the_sampled_tokens_are_those_of_a_loop(
    spread: float, step: float | None, top_p: float, top_k: int
) -> None:
    """With steps of a quarter nearly every logit has equals, as in bfloat16."""
    logits_V = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * spread
    if step is not None:
        logits_V = (logits_V / step).round() * step
    temperatures = [0.6, 1.0, 1.7]
    params = [SamplingParams(temperature=t, top_p=top_p, top_k=top_k) for t in temperatures for _ in UNIFORMS]
    tokens, found, _ = choose(logits_V.expand(len(params), -1), params, UNIFORMS * len(temperatures)).tolist()
    logprobs = logits_V.double().log_softmax(-1)
    terms = {each: kept_terms(logits_V.tolist(), each) for each in set(params)}
    for each, uniform, token, logprob in zip(params, UNIFORMS * 3, tokens, found, strict=True):
        assert token in drawn(terms[each], uniform)
        assert logprob == pytest.approx(logprobs[int(token)].item(), abs=1e-5)


class NoWaits(TorchDispatchMode):
    """Refuses operations for whose result or shape the host waits on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("nonzero", "_local_scalar_dense", "masked_select"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", [None, 0.25, 100.0])
@pytest.mark.parametrize("top_p", slow_after(1, [0.6, 0.999, 1e-6]))
def test_terms_of_top_p_are_counted_without_a_wait_and_are_those_that_sorting_finds(
    step: float | None, top_p: float
) -> None:
    """What runs on CUDA, on a CPU. With steps there are thousands of equal terms at the threshold."""
    logits_RV = torch.randn(20, VOCAB_SIZE, generator=torch.Generator().manual_seed(2)) * 3
    if step is not None:
        logits_RV = (logits_RV / step).round() * step
    terms_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp()
    bucket_RV = (terms_RV.view(torch.int32) >> 16).long()
    sums_R = terms_RV.double().sum(-1)
    kept = {}
    for find in (choice_module._keep_largest_by_sorting, choice_module._keep_largest_by_counting):
        border_R1 = torch.empty(20, 1, dtype=torch.int64)
        missing_R1 = torch.empty(20, 1, dtype=torch.float64)
        for row in range(20):  # the bucket that holds the threshold, by a loop
            above = 0.0
            for bucket in sorted(set(bucket_RV[row].tolist()), reverse=True):
                inside = float(terms_RV[row][bucket_RV[row] == bucket].double().sum())
                border_R1[row], missing_R1[row] = bucket, top_p * sums_R[row] - above
                above += inside
                if above >= top_p * sums_R[row]:
                    break
        kept[find] = bucket_RV > border_R1
        waits = NoWaits() if find is choice_module._keep_largest_by_counting else contextlib.nullcontext()
        with waits:
            find(kept[find], terms_RV, bucket_RV == border_R1, border_R1, missing_R1)
    one, other = kept.values()
    assert torch.equal(one, other)
    for row in range(20):
        params = SamplingParams(top_p=top_p)
        assert set(kept_terms(logits_RV[row].tolist(), params)) == set(one[row].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("num_terms", [1, 255, 256, 257, 16_257])
def test_running_sums_by_products_are_those_of_cumsum(num_terms: int) -> None:
    terms_RB = torch.rand(3, num_terms, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = choice_module._sums_by_products(terms_RB)
    torch.testing.assert_close(found, terms_RB.cumsum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_each_row_has_its_own_settings() -> None:
    """All kinds run in one call, with more rows than are processed at a time. Each equals the row alone."""
    rng = random.Random(0)
    logits_RV = torch.randn(900, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    params = [
        SamplingParams(
            temperature=rng.choice([0, 0.5, 1, 2]),
            top_k=rng.choice([-1, 5, 100]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
        )
        for _ in range(len(logits_RV))
    ]
    uniforms = [rng.random() for _ in params]
    together = choose(logits_RV, params, uniforms)
    for row in range(0, len(params), 7):
        alone = choose(logits_RV[row : row + 1], params[row : row + 1], uniforms[row : row + 1])
        assert torch.equal(together[:, row], alone[:, 0])


def test_a_masked_token_is_never_sampled() -> None:
    logits_RV = torch.full((3, 2048), -torch.inf)
    logits_RV[:, 1500] = 0.0
    uniforms = [0.0, 0.5, 1 - 2**-53]
    choice = choose(logits_RV, [SamplingParams(top_p=p) for p in (1.0, 0.5, 1.0)], uniforms)
    assert choice.tolist() == [[1500] * 3, [0.0] * 3, [False] * 3]


BAD_LOGITS = [(place, value) for value in (math.nan, math.inf) for place in (0, 1500, VOCAB_SIZE - 1)]
TEMPERATURES = [0, 1e-320, 1e-46, 1e-30, 1.0, 1e30, 1e39, math.inf]


@pytest.mark.cases(24)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
@pytest.mark.parametrize("top_k", [-1, 1, 40])
def test_a_row_without_a_distribution_is_marked_and_does_not_affect_others(
    top_k: int, top_p: float, temperature: float
) -> None:
    """Its token is within the vocabulary: outside of it, CUDA would end the process."""
    logits_V = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    rows = [logits_V, torch.full_like(logits_V, -torch.inf), torch.full_like(logits_V, torch.nan)]
    for place, value in BAD_LOGITS:
        rows.append(logits_V.clone())
        rows[-1][place] = value
    rows.append(logits_V)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for uniform in (0.0, 0.4, 1 - 2**-53):
        found = choose(torch.stack(rows), [params] * len(rows), [uniform] * len(rows))
        alone = choose(logits_V[None], [params], [uniform])
        tokens_R, _, is_undefined_R = found
        assert is_undefined_R.tolist() == [False, *[True] * (len(rows) - 2), False]
        assert ((tokens_R >= 0) & (tokens_R < VOCAB_SIZE)).all()
        for row in (0, -1):
            assert torch.equal(found[:, row], alone[:, 0])
        assert not alone[2, 0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_temperature_samples_masked_tokens_and_the_smallest_are_greedy(temperature: float) -> None:
    logits_V = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    logits_V[::2] = -torch.inf
    params = [SamplingParams(temperature=temperature)] * len(UNIFORMS)
    tokens_R, logprobs_R, _ = choose(logits_V.expand(len(UNIFORMS), -1), params, UNIFORMS)
    assert (tokens_R % 2 == 1).all()
    assert logprobs_R.isfinite().all()
    if temperature < 1e-20:
        assert set(tokens_R.tolist()) == {int(logits_V.argmax())}
    if temperature > 1e20:
        assert len(set(tokens_R.tolist())) == len(UNIFORMS) - 1  # 0 and 1e-9 select the first token
