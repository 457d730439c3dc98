"""The losses of the training API. Each is a SUM over tokens, so that neither packing nor micro-batching
changes a gradient and the caller picks the normaliser.

Every function takes the log-probabilities of S scored tokens, in nats, and the inputs of the Datum for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from cookbook.errors import RequestError
from cookbook.types import LossFnType
from cookbook.utils.nearest import unknown_name

LossFn = Callable[[Tensor, Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]


def cross_entropy(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the weighted negative log-likelihood in nats: -sum(w * logp)."""
    return -(weights_S * logprobs_S).sum()


def importance_sampling(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns -sum(w * p/q * advantage), where q is the probability that the token was sampled with."""
    ratio_S = torch.exp(logprobs_S - extras["logprobs"])
    return -(weights_S * ratio_S * extras["advantages"]).sum()


def _clip(ratio_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Returns the ratios within the thresholds of their tokens, or those of the loss if no token has any."""
    low, high = _CLIP
    if low in extras:
        return ratio_S.clamp(extras[low], extras[high])
    return ratio_S.clamp(config[low], config[high])


def ppo(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the clipped surrogate loss of PPO (Schulman et al. 2017)."""
    return _clipped_surrogate(torch.exp(logprobs_S - extras["logprobs"]), weights_S, extras, config)


def _clipped_surrogate(
    ratio_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    clipped_S = _clip(ratio_S, extras, config)
    advantages_S = extras["advantages"]
    return -(weights_S * torch.minimum(ratio_S * advantages_S, clipped_S * advantages_S)).sum()


def cispo(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the policy-gradient loss with a clipped, detached importance ratio (MiniMax-M1, 2025)."""
    ratio_S = torch.exp(logprobs_S - extras["logprobs"])
    clipped_S = _clip(ratio_S, extras, config).detach()
    return -(weights_S * clipped_S * logprobs_S * extras["advantages"]).sum()


def dro(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the policy-gradient loss with a quadratic penalty (DRO, Richemond et al. 2024)."""
    drift_S = logprobs_S - extras["logprobs"]
    objective_S = logprobs_S * extras["advantages"] - 0.5 * config["beta"] * drift_S.square()
    return -(weights_S * objective_S).sum()


def gspo(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the clipped surrogate loss of GSPO-token (Zheng et al. 2025).

    The ratio of every token has the value of its sequence's: the geometric mean of the ratios of the tokens
    that `sequence_ratio_mask` marks. Its gradient is that of the token's own log-probability.
    """
    ratio_S = torch.exp(extras["sequence_log_ratio"] + logprobs_S - logprobs_S.detach())
    return _clipped_surrogate(ratio_S, weights_S, extras, config)


def sequence_log_ratios(
    logprobs_P: Tensor, extras: Mapping[str, Tensor], sequence_P: Tensor
) -> dict[str, Tensor]:
    """Returns the mean log-ratio of the marked tokens of each position's sequence; 0 without a marked one."""
    is_marked_P = (extras["sequence_ratio_mask"] != 0).to(logprobs_P.dtype)
    num_sequences = int(sequence_P.max()) + 1 if len(sequence_P) else 0
    sums = logprobs_P.new_zeros(2, num_sequences)
    sums[0].index_add_(0, sequence_P, is_marked_P * (logprobs_P - extras["logprobs"]))
    sums[1].index_add_(0, sequence_P, is_marked_P)
    return {"sequence_log_ratio": (sums[0] / sums[1].clamp(min=1))[sequence_P]}


def stable_reinforce(
    logprobs_S: Tensor, weights_S: Tensor, extras: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Returns the loss of REINFORCE with a quadratic penalty on the drift from the policy that sampled.

    This is `dro` with the log-probabilities that were recorded when the tokens were sampled, and `kl_coeff`
    as its beta. The hosted service has a loss of this name whose formula is not published: this is not that
    formula.
    """
    return dro(logprobs_S, weights_S, extras, {"beta": config["kl_coeff"]})


OfSequences = Callable[[Tensor, Mapping[str, Tensor], Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Loss:
    fn: LossFn
    required_inputs: tuple[str, ...]
    defaults: Mapping[str, float]
    per_token: tuple[str, ...] = ()
    """The settings that a Datum may give for each of its tokens. All of them are inputs if one is given."""
    of_sequences: OfSequences | None = None
    """Returns further inputs, which couple the trained tokens of a sequence: from their log-probabilities
    without gradient [P], their inputs, and the number of the sequence of each."""


_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("target_tokens",), {}),
    "importance_sampling": Loss(importance_sampling, _POLICY_INPUTS, {}),
    "ppo": Loss(ppo, _POLICY_INPUTS, _CLIP, tuple(_CLIP)),
    "cispo": Loss(cispo, _POLICY_INPUTS, _CLIP, tuple(_CLIP)),
    "dro": Loss(dro, _POLICY_INPUTS, {"beta": 0.05}),
    "gspo": Loss(gspo, (*_POLICY_INPUTS, "sequence_ratio_mask"), _CLIP, tuple(_CLIP), sequence_log_ratios),
    "stable_reinforce": Loss(stable_reinforce, _POLICY_INPUTS, {"kl_coeff": 0.05}),
}
assert set(LOSSES) == set(get_args(LossFnType))


def get_loss(name: str, config: Mapping[str, float] | None) -> tuple[Loss, dict[str, float]]:
    """Returns the loss of that name and its settings, which are its defaults overridden by `config`.

    Raises RequestError for an unknown name or setting.
    """
    if name not in LOSSES:
        raise RequestError(unknown_name("loss", name, LOSSES))
    loss = LOSSES[name]
    unknown = set(config or {}) - set(loss.defaults)
    if unknown:
        known = ", ".join(loss.defaults) or "none"
        raise RequestError(f"Loss {name!r} does not take {sorted(unknown)[0]!r}. It takes: {known}.")
    return loss, {**loss.defaults, **(config or {})}
