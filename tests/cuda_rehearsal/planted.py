"""Losses with a defect of each kind that the rehearsal has to find. On a CPU all of them run.

Shape suffix: S scored positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _tensor_of_the_host(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -(torch.ones(len(weights_S)) * logprobs_S).sum()


def _item(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -(weights_S * logprobs_S).sum() / max(1.0, weights_S.sum().item())


def _condition(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    if logprobs_S.isnan().any():
        logprobs_S = logprobs_S.nan_to_num()
    return -(weights_S * logprobs_S).sum()


def _blocking_copy(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -(weights_S * logprobs_S).sum() * torch.tensor([1.0], device=logprobs_S.device)[0]


def _copy_from_pageable_memory(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    ones_S = torch.ones(len(weights_S)).to(logprobs_S.device, non_blocking=True)
    return -(ones_S * logprobs_S).sum()


def _mask_as_index(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -logprobs_S[weights_S > 0].sum()


def _synchronize(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    loss = -(weights_S * logprobs_S).sum()
    torch.cuda.synchronize()
    return loss


def _mixed_dtypes(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -(weights_S.to(torch.bfloat16)[None] @ logprobs_S[:, None])[0, 0]


class _MixedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs_S: Tensor, weights_S: Tensor) -> Tensor:
        ctx.save_for_backward(weights_S)
        return -(weights_S * logprobs_S).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights_S,) = ctx.saved_tensors
        return torch.mm(-weights_S[:, None], grads[0].to(torch.bfloat16)[None, None])[:, 0], None


def _mixed_dtypes_in_backward(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    loss: Tensor = _MixedInBackward.apply(logprobs_S, weights_S)
    return loss


def _fp64(logprobs_S: Tensor, weights_S: Tensor, *_: Any) -> Tensor:
    return -(weights_S.double() * logprobs_S.double()).sum().float()


DEFECTS: Mapping[str, Any] = {
    "tensor of the host": _tensor_of_the_host,
    "item": _item,
    "condition": _condition,
    "blocking copy": _blocking_copy,
    "copy from pageable memory": _copy_from_pageable_memory,
    "mask as index": _mask_as_index,
    "synchronize": _synchronize,
    "mixed dtypes": _mixed_dtypes,
    "mixed dtypes in backward": _mixed_dtypes_in_backward,
    "fp64": _fp64,
}
