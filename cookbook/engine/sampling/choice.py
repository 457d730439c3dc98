"""From logits to the next token of every continuation.

Each row has its own temperature, top-k, top-p and uniform number, and what is chosen for it depends on
nothing else, so that a continuation is the same whatever it shares a batch with.

Shape suffixes: R rows, V vocabulary, B blocks of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cookbook.types import SamplingParams

_BLOCK = 1024
"""A draw from the whole vocabulary goes by blocks first, then within one."""
_FIRST_CANDIDATES = 512
"""Of a truncated distribution, before it is known how many tokens it has."""


@dataclass(frozen=True)
class Choice:
    """What was chosen: token ids [R], and the model's own log-probability of each, before temperature."""

    tokens_R: Tensor
    logprobs_R: Tensor


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Choice:
    """One token for each row of fp32 logits. `uniforms`: a number in [0, 1) for each row.

    Top-k keeps every token as likely as the k-th; top-p keeps, of those, the likeliest until their
    share reaches p. Equal logits rank by token id.
    """
    tokens_R = torch.empty(len(params), dtype=torch.long, device=logits_RV.device)
    uniforms_R = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)
    for rows, kind in _by_kind(params):
        index_R = torch.tensor(rows, device=logits_RV.device)
        part_RV = logits_RV if len(rows) == len(params) else logits_RV[index_R]
        if kind == "greedy":
            chosen_R = part_RV.argmax(-1)
        else:
            temperature_R1 = torch.tensor([[params[row].temperature] for row in rows])
            scaled_RV = part_RV
            if not bool((temperature_R1 == 1).all()):
                scaled_RV = part_RV / temperature_R1.to(logits_RV.device)
            if kind == "whole":
                chosen_R = _draw(scaled_RV, uniforms_R[index_R])
            else:
                chosen_R = _draw_truncated(scaled_RV, [params[row] for row in rows], uniforms_R[index_R])
        tokens_R[index_R] = chosen_R
    logits_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
    return Choice(tokens_R, logits_R - logits_RV.logsumexp(-1))


def _by_kind(params: Sequence[SamplingParams]) -> list[tuple[list[int], str]]:
    """Rows that are treated alike."""
    kinds: dict[str, list[int]] = {}
    for row, each in enumerate(params):
        is_truncated = each.top_k > 0 or each.top_p < 1
        kind = "greedy" if each.temperature == 0 else "truncated" if is_truncated else "whole"
        kinds.setdefault(kind, []).append(row)
    return [(rows, kind) for kind, rows in kinds.items()]


def _draw(scaled_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """By the softmax of each row: the token at which the running sum passes the uniform number."""
    num_rows, vocab_size = scaled_RV.shape
    terms_RV = (scaled_RV - scaled_RV.amax(-1, keepdim=True)).exp_()
    padding = -vocab_size % _BLOCK
    if padding:
        terms_RV = torch.nn.functional.pad(terms_RV, (0, padding))
    terms_RBK = terms_RV.view(num_rows, -1, _BLOCK)
    sums_RB = terms_RBK.sum(-1, dtype=torch.float32).double()
    block_R, left_R = _find(sums_RB, uniforms_R * sums_RB.sum(-1))
    within_RK = terms_RBK[torch.arange(num_rows, device=scaled_RV.device), block_R].double()
    # Rounding may leave a little more than the block holds: then its last token with any share is meant.
    within_R, _ = _find(within_RK, torch.minimum(left_R, within_RK.sum(-1)))
    return block_R * _BLOCK + within_R


def _find(shares_RK: Tensor, wanted_R: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of the shares passes `wanted`, and what is wanted behind that place's begin."""
    ends_RK = shares_RK.cumsum(-1)
    is_passed_RK = (ends_RK > wanted_R[:, None]) & (shares_RK > 0)
    last_R = shares_RK.shape[-1] - 1 - (shares_RK > 0).flip(-1).int().argmax(-1)
    place_R = torch.where(is_passed_RK.any(-1), is_passed_RK.int().argmax(-1), last_R)
    begin_R = (ends_RK - shares_RK).gather(1, place_R[:, None])[:, 0]
    return place_R, (wanted_R - begin_R).clamp_min(0)


def _draw_truncated(scaled_RV: Tensor, params: Sequence[SamplingParams], uniforms_R: Tensor) -> Tensor:
    """As `_draw`, among the tokens that top-k and top-p keep."""
    device, vocab_size = scaled_RV.device, scaled_RV.shape[-1]
    top_p_R1 = torch.tensor([[each.top_p] for each in params], dtype=torch.float64, device=device)
    top_k = [each.top_k if 0 < each.top_k < vocab_size else vocab_size for each in params]
    kth_R1 = torch.tensor([[k - 1] for k in top_k], device=device)
    has_top_k_R1 = kth_R1 < vocab_size - 1
    log_total_R1 = scaled_RV.logsumexp(-1, keepdim=True).double()
    num_candidates = min(vocab_size, max(_FIRST_CANDIDATES, *(k + 1 for k in top_k if k < vocab_size), 1))
    while True:
        logits_RK, ids_RK = _ranked(scaled_RV, num_candidates)
        kth_logit_R1 = logits_RK.gather(1, kth_R1.clamp_max(num_candidates - 1))
        in_top_k_RK = ~has_top_k_R1 | (logits_RK >= kth_logit_R1)
        shares_RK = (logits_RK.double() - log_total_R1).exp()
        # Of the top k their own sum is the whole; without them it is 1.
        top_k_sum_R1 = (shares_RK * in_top_k_RK).sum(-1, keepdim=True)
        shares_RK = shares_RK / torch.where(has_top_k_R1, top_k_sum_R1, torch.ones_like(top_k_sum_R1))
        kept_RK = in_top_k_RK & (shares_RK.cumsum(-1) - shares_RK < top_p_R1)
        # All that are kept were ranked if every one is likelier than the last that was.
        if num_candidates == vocab_size or not bool((kept_RK & (logits_RK == logits_RK[:, -1:])).any()):
            break
        num_candidates = min(vocab_size, 8 * num_candidates)
    shares_RK = shares_RK * kept_RK
    place_R, _ = _find(shares_RK, uniforms_R * shares_RK.sum(-1))
    return ids_RK.gather(1, place_R[:, None])[:, 0]


def _ranked(scaled_RV: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, likeliest first, equal ones by id: logits [R, K] and ids [R, K]."""
    if num_candidates == scaled_RV.shape[-1]:
        logits_RK, ids_RK = scaled_RV.sort(dim=-1, descending=True, stable=True)
        return logits_RK, ids_RK
    logits_RK, ids_RK = scaled_RV.topk(num_candidates, sorted=False)
    ids_RK, order_RK = ids_RK.sort(-1)
    logits_RK, order_RK = logits_RK.gather(1, order_RK).sort(dim=-1, descending=True, stable=True)
    return logits_RK, ids_RK.gather(1, order_RK)
