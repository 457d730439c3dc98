"""Compares every loss with a loop over its tokens, and its gradient with its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cookbook.engine.training.losses import LOSSES, get_loss
from cookbook.errors import RequestError

NUM_TOKENS = 60

# A token is (logp, weight, logp when sampled, advantage). Further arguments are settings of the loss.
Token = tuple[float, float, float, float]


def clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def cross_entropy(token: Token) -> float:
    logp, weight, _, _ = token
    return -weight * logp


def importance_sampling(token: Token) -> float:
    logp, weight, old, advantage = token
    return -weight * math.exp(logp - old) * advantage


def ppo(token: Token, low: float = 0.8, high: float = 1.2) -> float:
    logp, weight, old, advantage = token
    ratio = math.exp(logp - old)
    return -weight * min(ratio * advantage, clip(ratio, low, high) * advantage)


def cispo(token: Token, low: float = 0.8, high: float = 1.2) -> float:
    logp, weight, old, advantage = token
    return -weight * clip(math.exp(logp - old), low, high) * advantage * logp


def dro(token: Token, beta: float = 0.05) -> float:
    logp, weight, old, advantage = token
    return -weight * (logp * advantage - 0.5 * beta * (logp - old) ** 2)


CASES: dict[str, tuple[str, dict[str, float], Callable[[Token], float]]] = {
    "cross_entropy": ("cross_entropy", {}, cross_entropy),
    "importance_sampling": ("importance_sampling", {}, importance_sampling),
    "ppo": ("ppo", {}, ppo),
    "ppo-wide": (
        "ppo",
        {"clip_low_threshold": 0.3, "clip_high_threshold": 2.5},
        lambda token: ppo(token, 0.3, 2.5),
    ),
    "cispo": ("cispo", {}, cispo),
    "cispo-high": ("cispo", {"clip_high_threshold": 5.0}, lambda token: cispo(token, 0.8, 5.0)),
    "dro": ("dro", {}, dro),
    "dro-strict": ("dro", {"beta": 2.0}, lambda token: dro(token, 2.0)),
    "stable_reinforce": ("stable_reinforce", {}, dro),
    "stable_reinforce-strict": ("stable_reinforce", {"kl_coeff": 2.0}, lambda token: dro(token, 2.0)),
}


def make_tokens(seed: int = 0) -> list[Token]:
    """Returns tokens with ratios on both sides of the clip, advantages of both signs, and zero weights."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2.0, NUM_TOKENS)
    logp = np.minimum(old + rng.normal(0, 0.5, NUM_TOKENS), -1e-3)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], NUM_TOKENS)
    return list(
        zip(logp.tolist(), weights.tolist(), old.tolist(), rng.normal(size=NUM_TOKENS).tolist(), strict=True)
    )


def value_and_gradient(name: str, config: dict[str, float], tokens: list[Token]) -> tuple[float, list[float]]:
    loss, settings = get_loss(name, config)
    logprobs, weights, old, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    logprobs.requires_grad_()
    value = loss.fn(logprobs, weights, {"logprobs": old, "advantages": advantages}, settings)
    value.backward()
    assert logprobs.grad is not None
    return value.item(), logprobs.grad.tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_loss_is_the_sum_of_its_formula_over_the_tokens(case: str) -> None:
    name, config, formula = CASES[case]
    tokens = make_tokens()
    value, _ = value_and_gradient(name, config, tokens)
    assert value == pytest.approx(sum(formula(token) for token in tokens), rel=1e-12)


def test_every_loss_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} | {"gspo"} == set(LOSSES)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("cispo")])
def test_the_gradient_equals_the_slope_of_the_formula(case: str) -> None:
    name, config, formula = CASES[case]
    tokens = make_tokens(seed=1)
    _, gradient = value_and_gradient(name, config, tokens)
    step = 1e-6
    for (logp, *rest), found in zip(tokens, gradient, strict=True):
        slope = (formula((logp + step, *rest)) - formula((logp - step, *rest))) / (2 * step)
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_ppo_has_no_gradient_beyond_the_clip() -> None:
    """Beyond the clip a token contributes only if its advantage pulls it back."""
    far, near = math.log(1.5), math.log(1.1)
    tokens = [(far - 3, 1.0, -3.0, 1.0), (far - 3, 1.0, -3.0, -1.0), (near - 3, 1.0, -3.0, 1.0)]
    tokens += [(-far - 3, 1.0, -3.0, -1.0), (-far - 3, 1.0, -3.0, 1.0)]
    _, gradient = value_and_gradient("ppo", {}, tokens)
    assert gradient == pytest.approx([0.0, 1.5, -1.1, 0.0, -1 / 1.5])


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.8, 5.0)])
def test_the_gradient_of_cispo_treats_the_clipped_ratio_as_constant(low: float, high: float) -> None:
    """Clipped tokens keep their gradient, in contrast to PPO."""
    tokens = make_tokens(seed=2)
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    _, gradient = value_and_gradient("cispo", config, tokens)
    expected = [-w * clip(math.exp(logp - old), low, high) * advantage for logp, w, old, advantage in tokens]
    assert gradient == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"gspo"}))
def test_tokens_with_weight_zero_add_nothing(name: str) -> None:
    tokens = make_tokens(seed=3)
    heavy = [token for token in tokens if token[1] != 0]
    assert len(heavy) < len(tokens)
    value, gradient = value_and_gradient(name, {}, tokens)
    assert value == pytest.approx(value_and_gradient(name, {}, heavy)[0], rel=1e-12)
    assert all(slope == 0 for slope, token in zip(gradient, tokens, strict=True) if token[1] == 0)


@pytest.mark.parametrize("is_per_token", [False, True])
def test_gspo_has_the_ratio_of_the_sequence_and_the_gradient_of_each_token(is_per_token: bool) -> None:
    """Compares with a loop over sequences whose ratio is computed from the marked tokens alone."""
    rng = np.random.default_rng(5)
    lengths, low, high = [7, 4, 9], 0.999, 1.001
    low_P, high_P = np.full(sum(lengths), low), np.full(sum(lengths), high)
    sequence_P = rng.permutation(np.repeat(np.arange(3), lengths))
    logp_P, old_P = -rng.exponential(1.0, (2, sum(lengths)))
    old_P = logp_P + 0.05 * (old_P - old_P.mean())
    advantages_P, weights_P = rng.normal(size=sum(lengths)), rng.choice([0.5, 1.0], sum(lengths))
    mask_P = rng.choice([0.0, 1.0], sum(lengths))
    if is_per_token:
        low_P, high_P = rng.uniform(0.99, 1.0, sum(lengths)), rng.uniform(1.0, 1.01, sum(lengths))
    expected, slopes = 0.0, np.zeros(sum(lengths))
    for number in range(3):
        marked = [p for p in range(sum(lengths)) if sequence_P[p] == number and mask_P[p]]
        ratio = math.exp(sum(logp_P[p] - old_P[p] for p in marked) / max(1, len(marked)))
        for p in np.flatnonzero(sequence_P == number):
            plain, clipped = ratio * advantages_P[p], clip(ratio, low_P[p], high_P[p]) * advantages_P[p]
            expected -= weights_P[p] * min(plain, clipped)
            slopes[p] = -weights_P[p] * plain if plain <= clipped else 0.0
    loss, config = get_loss("gspo", {"clip_low_threshold": low, "clip_high_threshold": high})
    assert loss.of_sequences is not None
    logprobs = torch.tensor(logp_P, requires_grad=True)
    extras = {"logprobs": torch.tensor(old_P), "advantages": torch.tensor(advantages_P)}
    extras["sequence_ratio_mask"] = torch.tensor(mask_P)
    if is_per_token:
        extras |= {"clip_low_threshold": torch.tensor(low_P), "clip_high_threshold": torch.tensor(high_P)}
    extras |= loss.of_sequences(logprobs.detach(), extras, torch.tensor(sequence_P))
    value = loss.fn(logprobs, torch.tensor(weights_P), extras, config)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.numpy() == pytest.approx(slopes, rel=1e-12)
    assert 0 < (slopes == 0).sum() < len(slopes)


@pytest.mark.parametrize("case", ["ppo", "cispo"])
def test_thresholds_of_tokens_clip_each_ratio_by_its_own(case: str) -> None:
    rng = np.random.default_rng(4)
    tokens = make_tokens(seed=4)
    lows, highs = rng.uniform(0.2, 0.95, NUM_TOKENS), rng.uniform(1.05, 2.0, NUM_TOKENS)
    loss, settings = get_loss(case, {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01})
    logprobs, weights, old, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    extras = {"logprobs": old, "advantages": advantages}
    extras |= {"clip_low_threshold": torch.tensor(lows), "clip_high_threshold": torch.tensor(highs)}
    value = loss.fn(logprobs, weights, extras, settings).item()
    formula = {"ppo": ppo, "cispo": cispo}[case]
    expected = sum(formula(*one) for one in zip(tokens, lows, highs, strict=True))
    assert value == pytest.approx(expected, rel=1e-12)
    assert value != pytest.approx(sum(formula(token, 0.99, 1.01) for token in tokens), rel=1e-3)


def test_settings_override_the_defaults_one_by_one() -> None:
    assert get_loss("ppo", None)[1] == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert get_loss("ppo", {"clip_high_threshold": 2.0})[1] == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 2.0,
    }
    assert get_loss("dro", {})[1] == {"beta": 0.05}


def test_an_unknown_loss_is_refused_naming_the_nearest() -> None:
    with pytest.raises(RequestError) as caught:
        get_loss("cross-entropy", None)
    assert str(caught.value) == (
        "Unknown loss `cross-entropy`. Did you mean `cross_entropy`? "
        "Supported: cross_entropy, importance_sampling, ppo, cispo, dro, gspo, stable_reinforce."
    )
    with pytest.raises(RequestError, match=r"^Unknown loss `zzz`\. Supported: cross_entropy"):
        get_loss("zzz", None)


@pytest.mark.parametrize(
    ("name", "config", "known"),
    [
        ("ppo", {"clip_hi": 1.0}, "clip_low_threshold, clip_high_threshold"),
        ("cross_entropy", {"beta": 1.0}, "none"),
    ],
)
def test_an_unknown_setting_is_refused(name: str, config: dict[str, Any], known: str) -> None:
    with pytest.raises(RequestError, match=rf"does not take '{next(iter(config))}'\. It takes: {known}\."):
        get_loss(name, config)
