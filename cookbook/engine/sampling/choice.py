"""Samples the next token of every sequence from its logits.

Each row has its own temperature, top-k, top-p and uniform number. Its token depends on nothing else, so a
sequence is the same whatever it is batched with. The vocabulary is never sorted, and on CUDA the host does
not wait for the device until it reads the tokens.

Shape suffixes: R rows, V vocabulary, B buckets of terms or blocks of the vocabulary, K tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cookbook.engine.model.packing import copy_to
from cookbook.types import SamplingParams

_BLOCK = 1024
"""A draw first finds the block of the vocabulary, then the token in the block."""
_NUM_BUCKETS = (0x3F80_0000 >> 16) + 1
"""The number of values of the first 16 bits of a float in [0, 1]. The last one occurs for 1.0 alone."""
_ELEMENTS_AT_A_TIME = {"cpu": 2**20, "cuda": 2**27}
"""How many logits are processed at a time. On a CPU these stay in the cache."""
_FP32 = torch.finfo(torch.float32)


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Samples one token for each row of fp32 logits, by that row's settings and its number in [0, 1).

    Returns one tensor, which is copied to the host at once, [3, R] fp64: the token ids, the log-probability
    of each before temperature, in nats, and 1 for rows without a distribution (a logit is nan or +inf, or
    none is above -inf), whose token is meaningless but within the vocabulary.

    Top-k keeps every token at least as likely as the k-th. Of those, top-p keeps the most likely ones until
    their share reaches p. Equal logits rank by token id.
    """
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    num_at_a_time = max(1, _ELEMENTS_AT_A_TIME["cuda" if logits_RV.is_cuda else "cpu"] // vocab_size)
    parts = []
    for first in range(0, len(params), num_at_a_time):
        rows = range(first, min(first + num_at_a_time, len(params)))
        part_RV = logits_RV[rows.start : rows.stop]
        highest_R1, tokens_R1 = part_RV.max(-1, keepdim=True)
        is_undefined_R1 = ~highest_R1.isfinite()  # the maximum is nan if any logit is
        # nan would index outside the vocabulary below, so these rows are set to 0
        if logits_RV.is_cuda or is_undefined_R1.any():
            part_RV = part_RV.masked_fill(is_undefined_R1, 0.0)
            highest_R1, tokens_R1 = part_RV.max(-1, keepdim=True)
        terms_RV = (part_RV - highest_R1).exp_()
        log_total_R1 = terms_RV.sum(-1, keepdim=True).log_() + highest_R1
        drawn = [row for row in rows if params[row].temperature > 0]
        if drawn:
            # A temperature of 0 would divide 0 by 0, and infinity would turn -inf into nan, so both are
            # bounded.
            divisors = [min(max(params[row].temperature, _FP32.tiny), _FP32.max) for row in drawn]
            ks = [k if 0 < (k := params[row].top_k) < vocab_size else vocab_size for row in drawn]
            settings = [divisors, ks, [params[row].top_p for row in drawn], [uniforms[row] for row in drawn]]
            drawn_R = copy_to(device, np.array(drawn) - first)
            settings_R4 = copy_to(device, np.ascontiguousarray(np.array(settings, np.float64).T))
            divisor_R1, k_R1, top_p_R1, uniform_R1 = settings_R4.split(1, dim=1)
            if any(params[row].temperature != 1 for row in drawn):
                terms_RV = ((part_RV[drawn_R] - highest_R1[drawn_R]) / divisor_R1.float()).exp_()
            elif len(drawn) < len(rows):
                terms_RV = terms_RV[drawn_R]
            if limits := [k for k in ks if k < vocab_size]:
                terms_RV = _keep_top_k(terms_RV, k_R1.long(), max(limits))
            if any(params[row].top_p < 1 for row in drawn):
                terms_RV = _keep_top_p(terms_RV, top_p_R1)
            tokens_R1[drawn_R] = _draw(terms_RV, uniform_R1)
        logprobs_R1 = part_RV.gather(1, tokens_R1) - log_total_R1
        parts.append(torch.cat([tokens_R1.double(), logprobs_R1.double(), is_undefined_R1.double()], dim=1))
    return torch.cat(parts).T


def _keep_top_k(terms_RV: Tensor, k_R1: Tensor, largest_k: int) -> Tensor:
    """Returns the terms, exp(logit) up to a factor, with 0 for those smaller than the k-th of their row.

    A `k` above `largest_k` keeps all.
    """
    kth_R1 = terms_RV.topk(largest_k).values.gather(1, k_R1.clamp(max=largest_k) - 1)
    return terms_RV * ((terms_RV >= kth_R1) | (k_R1 > largest_k))


def _keep_top_p(terms_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Returns the terms, with 0 for those after the largest ones whose share of their row's sum reaches p.

    Terms are in (0, 1], where floats are in the order of their bits. So their first 16 bits put them into
    buckets, the sums of the buckets show which bucket holds the threshold, and only its terms are ranked.
    """
    bucket_RV = (terms_RV.view(torch.int32) >> 16).long()
    sums_RB = terms_RV.new_zeros(len(terms_RV), _NUM_BUCKETS).scatter_add_(1, bucket_RV, terms_RV).double()
    above_RB = _sums_above(sums_RB)
    wanted_R1 = top_p_R1 * sums_RB.sum(-1, keepdim=True)
    # The lowest non-empty bucket above which the sum is smaller than wanted.
    border_R1 = ((above_RB < wanted_R1) & (sums_RB > 0)).int().argmax(-1, keepdim=True)
    missing_R1 = wanted_R1 - above_RB.gather(1, border_R1)
    kept_RV = bucket_RV > border_R1
    keep_largest = _keep_largest_by_counting if terms_RV.is_cuda else _keep_largest_by_sorting
    keep_largest(kept_RV, terms_RV, bucket_RV == border_R1, border_R1, missing_R1)
    return terms_RV * kept_RV


def _keep_largest_by_sorting(
    kept_RV: Tensor, terms_RV: Tensor, at_border_RV: Tensor, border_R1: Tensor, missing_R1: Tensor
) -> None:
    """Marks as kept the largest ones of the terms at the border, until their sum reaches `missing`.

    The terms at the border are few, and are sorted. On CUDA the host would wait to know how many.
    """
    row_K, token_K = at_border_RV.nonzero(as_tuple=True)
    counts_R = torch.bincount(row_K, minlength=len(terms_RV))
    place_K = torch.arange(len(row_K)) - (counts_R.cumsum(0) - counts_R)[row_K]
    terms_RK = terms_RV.new_zeros(len(terms_RV), int(counts_R.max()))
    tokens_RK = torch.zeros(terms_RK.shape, dtype=torch.int64)
    terms_RK[row_K, place_K] = terms_RV[row_K, token_K]
    tokens_RK[row_K, place_K] = token_K
    ranked_RK, order_RK = terms_RK.sort(descending=True, stable=True)
    before_RK = ranked_RK.double().cumsum(-1) - ranked_RK.double()
    row_K, rank_K = ((before_RK < missing_R1) & (ranked_RK > 0)).nonzero(as_tuple=True)
    kept_RV[row_K, tokens_RK[row_K, order_RK[row_K, rank_K]]] = True


def _keep_largest_by_counting(
    kept_RV: Tensor, terms_RV: Tensor, at_border_RV: Tensor, border_R1: Tensor, missing_R1: Tensor
) -> None:
    """Does `_keep_largest_by_sorting` without knowing how many terms there are.

    They share their first 16 bits, so they are counted by their last 16. Counts are exact in any order.
    """
    low_RV = (terms_RV.view(torch.int32) & 0xFFFF).long()
    counts_RB = torch.zeros(len(terms_RV), 1 << 16, dtype=torch.int32, device=terms_RV.device)
    counts_RB.scatter_add_(1, low_RV, at_border_RV.int())
    low_B = torch.arange(1 << 16, device=terms_RV.device)
    values_RB = ((border_R1 << 16) | low_B).int().view(torch.float32).double()
    sums_RB = counts_RB * values_RB
    above_RB = _sums_above(sums_RB)
    lowest_R1 = ((above_RB < missing_R1) & (sums_RB > 0)).int().argmax(-1, keepdim=True)
    left_R1, value_R1 = ((each.gather(1, lowest_R1)) for each in (missing_R1 - above_RB, values_RB))
    is_lowest_RV = at_border_RV & (low_RV == lowest_R1)  # of equal terms those with the first ids are kept
    is_first_RV = is_lowest_RV.cumsum(-1) <= (left_R1 / value_R1).ceil()
    kept_RV |= (at_border_RV & (low_RV > lowest_R1)) | (is_lowest_RV & is_first_RV)


def _sums_above(terms_RB: Tensor) -> Tensor:
    """Returns, for each term, the sum of those after it in its row."""
    return _running_sums(terms_RB.flip(-1)).flip(-1) - terms_RB


def _running_sums(terms_RB: Tensor) -> Tensor:
    """Returns `terms_RB.cumsum(-1)`, of which torch has no deterministic form for floats on CUDA."""
    if terms_RB.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _sums_by_products(terms_RB)
    return terms_RB.cumsum(-1)


def _sums_by_products(terms_RB: Tensor, size: int = 256) -> Tensor:
    """Returns running sums as products with triangles of ones, in blocks of `size`, whose order is fixed."""
    num_terms = terms_RB.shape[-1]
    terms_RBK = F.pad(terms_RB, (0, -num_terms % size)).unflatten(-1, (-1, size))
    sums_RBK = terms_RBK @ torch.ones(size, size, dtype=terms_RB.dtype, device=terms_RB.device).triu_()
    if num_terms > size:
        ends_RB = sums_RBK[..., -1]
        sums_RBK = sums_RBK + (_sums_by_products(ends_RB, size) - ends_RB)[..., None]
    return sums_RBK.flatten(-2)[..., :num_terms]


def _draw(terms_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """Returns the token of each row at which the running sum of terms passes the given share: [R, 1]."""
    terms_RBK = F.pad(terms_RV, (0, -terms_RV.shape[1] % _BLOCK)).view(len(terms_RV), -1, _BLOCK)
    sums_RB = terms_RBK.sum(-1).double()
    block_R1, left_R1 = _find(sums_RB, uniform_R1 * sums_RB.sum(-1, keepdim=True))
    terms_RK = terms_RBK.take_along_dim(block_R1[:, :, None], dim=1)[:, 0].double()
    place_R1, _ = _find(terms_RK, left_R1)
    return block_R1 * _BLOCK + place_R1


def _find(terms_RK: Tensor, wanted_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the running sum of each row passes `wanted`, and the remainder of `wanted` at that place.

    If rounding leaves `wanted` above the total, the place is the last one with a term above 0.
    """
    ends_RK = _running_sums(terms_RK)
    has_term_RK = terms_RK > 0
    is_passed_RK = (ends_RK > wanted_R1) & has_term_RK
    last_R1 = terms_RK.shape[1] - 1 - has_term_RK.flip(-1).int().argmax(-1, keepdim=True)
    first_R1 = is_passed_RK.int().argmax(-1, keepdim=True)
    place_R1 = torch.where(is_passed_RK.any(-1, keepdim=True), first_R1, last_R1)
    return place_R1, (wanted_R1 - (ends_RK - terms_RK).gather(1, place_R1)).clamp_min_(0)
