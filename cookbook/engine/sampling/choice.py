"""From logits to the next token of every continuation.

Each row has its own temperature, top-k, top-p and uniform number, and what is chosen for it depends on
nothing else, so that a continuation is the same whatever it shares a batch with. The vocabulary is never
sorted.

Shape suffixes: R rows, V vocabulary, B blocks of the vocabulary, K tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cookbook.types import SamplingParams

_BLOCK = 1024
"""A draw goes by blocks of the vocabulary first, then within one."""
_NUM_BUCKETS = (0x3F80_0000 >> 16) + 1
"""Of floats in [0, 1] by their first 16 bits: 1.0 is alone in the last."""
_ELEMENTS_AT_A_TIME = {"cpu": 2**20, "cuda": 2**27}
"""Of logits: on a CPU what stays in the cache."""


@dataclass(frozen=True)
class Choice:
    """What was chosen: token ids [R], and the model's own log-probability of each, before temperature.

    Where a row has no distribution (`has_none_R`: a logit of nan or +inf, or none above -inf), its token is a
    token of the vocabulary and means nothing.
    """

    tokens_R: Tensor
    logprobs_R: Tensor
    has_none_R: Tensor


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Choice:
    """One token for each row of fp32 logits. `uniforms`: a number in [0, 1) for each row.

    Top-k keeps every token as likely as the k-th; top-p keeps, of those, the likeliest until their
    share reaches p. Equal logits rank by token id.
    """
    kind = "cuda" if logits_RV.is_cuda else "cpu"
    num_rows = max(1, _ELEMENTS_AT_A_TIME[kind] // logits_RV.shape[1])
    parts = [
        _choose(logits_RV[first : first + num_rows], params[first:][:num_rows], uniforms[first:][:num_rows])
        for first in range(0, len(params), num_rows)
    ]
    return Choice(
        torch.cat([part.tokens_R for part in parts]),
        torch.cat([part.logprobs_R for part in parts]),
        torch.cat([part.has_none_R for part in parts]),
    )


def _choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Choice:
    def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_RV.device)[:, None]

    highest_R1, tokens_R1 = logits_RV.max(-1, keepdim=True)
    has_none_R1 = ~highest_R1.isfinite()  # the maximum of anything and nan is nan
    if has_none_R1.any():  # nan indexes outside the vocabulary below, so these rows become a plain one
        logits_RV = logits_RV.masked_fill(has_none_R1, 0.0)
        highest_R1, tokens_R1 = logits_RV.max(-1, keepdim=True)
    terms_RV = (logits_RV - highest_R1).exp_()
    log_total_R1 = terms_RV.sum(-1, keepdim=True).log_() + highest_R1
    drawn = [row for row, each in enumerate(params) if each.temperature > 0]
    if drawn:
        rows_R = torch.tensor(drawn, device=logits_RV.device)
        if len(drawn) < len(params):
            terms_RV = terms_RV[rows_R]
        temperature_R1 = column([_temperature(params[row]) for row in drawn], torch.float32)
        if any(params[row].temperature != 1 for row in drawn):
            terms_RV = ((logits_RV[rows_R] - highest_R1[rows_R]) / temperature_R1).exp_()
        terms_RV = _keep_top_k(terms_RV, [params[row].top_k for row in drawn])
        if any(params[row].top_p < 1 for row in drawn):
            terms_RV = _keep_top_p(terms_RV, column([params[row].top_p for row in drawn]))
        tokens_R1[rows_R] = _draw(terms_RV, column([uniforms[row] for row in drawn]))
    logprobs_R1 = logits_RV.gather(1, tokens_R1) - log_total_R1
    return Choice(tokens_R1[:, 0], logprobs_R1[:, 0], has_none_R1[:, 0])


def _temperature(params: SamplingParams) -> float:
    """In the range of fp32: 0 would divide 0 by 0, and infinity divides -inf to nan."""
    limits = torch.finfo(torch.float32)
    return min(max(params.temperature, limits.tiny), limits.max)


def _keep_top_k(terms_RV: Tensor, top_k: Sequence[int]) -> Tensor:
    """Zeros where a term is smaller than the k-th of its row; terms are exp(logit), up to a factor."""
    vocab_size = terms_RV.shape[1]
    k = [each if 0 < each < vocab_size else vocab_size for each in top_k]
    if min(k) == vocab_size:
        return terms_RV
    most = max(each for each in k if each < vocab_size)
    ranked_RK = terms_RV.topk(most).values
    kth_R = ranked_RK.gather(1, torch.tensor([[min(each, most) - 1] for each in k], device=terms_RV.device))
    unlimited_R1 = torch.tensor([[each == vocab_size] for each in k], device=terms_RV.device)
    return terms_RV * ((terms_RV >= kth_R) | unlimited_R1)


def _keep_top_p(terms_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Zeros behind the likeliest terms whose sum reaches a share of p of their row's.

    Terms lie in (0, 1], where floats are in the order of their bits. So their first 16 bits put them into
    buckets, the bucket at the border is found by the buckets' sums, and only what is in it is sorted.
    """
    bucket_RV = (terms_RV.view(torch.int32) >> 16).long()
    sums_RB = terms_RV.new_zeros(len(terms_RV), _NUM_BUCKETS).scatter_add_(1, bucket_RV, terms_RV).double()
    above_RB = sums_RB.flip(-1).cumsum(-1).flip(-1) - sums_RB  # of the buckets above each
    wanted_R1 = top_p_R1 * sums_RB.sum(-1, keepdim=True)
    # The lowest bucket with less than is wanted above it, of those that hold anything.
    border_R1 = ((above_RB < wanted_R1) & (sums_RB > 0)).int().argmax(-1, keepdim=True)
    kept_RV = bucket_RV > border_R1
    missing_R1 = wanted_R1 - above_RB.gather(1, border_R1)
    for row, at_border_V in enumerate(bucket_RV == border_R1):
        ids_K = at_border_V.nonzero()[:, 0]
        ranked_K, order_K = terms_RV[row, ids_K].sort(descending=True, stable=True)
        before_K = ranked_K.double().cumsum(0) - ranked_K.double()
        num_kept = (before_K < missing_R1[row]).sum().clamp_min(1)
        kept_RV[row, ids_K[order_K[:num_kept]]] = True
    return terms_RV * kept_RV


def _draw(terms_RV: Tensor, uniforms_R1: Tensor) -> Tensor:
    """[R, 1]: the token of each row at which the running sum of its terms passes a share of the whole."""
    terms_RBK = F.pad(terms_RV, (0, -terms_RV.shape[1] % _BLOCK)).view(len(terms_RV), -1, _BLOCK)
    sums_RB = terms_RBK.sum(-1).double()
    block_R1, left_R1 = _find(sums_RB, uniforms_R1 * sums_RB.sum(-1, keepdim=True))
    terms_RK = terms_RBK.take_along_dim(block_R1[:, :, None], dim=1)[:, 0].double()
    place_R1, _ = _find(terms_RK, left_R1)
    return block_R1 * _BLOCK + place_R1


def _find(terms_RK: Tensor, wanted_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of a row passes `wanted`, and what of it is behind that place's begin.

    Where rounding leaves more to find than there is, the last place that has anything is meant.
    """
    ends_RK = terms_RK.cumsum(-1)
    has_term_RK = terms_RK > 0
    is_passed_RK = (ends_RK > wanted_R1) & has_term_RK
    last_R1 = terms_RK.shape[1] - 1 - has_term_RK.flip(-1).int().argmax(-1, keepdim=True)
    first_R1 = is_passed_RK.int().argmax(-1, keepdim=True)
    place_R1 = torch.where(is_passed_RK.any(-1, keepdim=True), first_R1, last_R1)
    return place_R1, (wanted_R1 - (ends_RK - terms_RK).gather(1, place_R1)).clamp_min_(0)
