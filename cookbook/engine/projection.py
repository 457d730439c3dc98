"""From hidden states to the log-probabilities of given tokens, a chunk of positions at a time.

With a vocabulary of 151,936 the logits of a whole batch are the largest tensor of a run, so
they never exist at once: each chunk is projected, reduced to one number per position, and
projected again in the backward pass.

Shape suffixes: S scored positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_CHUNK_ELEMENTS = 2**25
"""Logits alive at once: 128 MiB in fp32."""


def token_logprobs(
    hidden_SD: Tensor, targets_S: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """log p(targets_S | hidden_SD) in fp32, where `project` maps [C, D] to logits [C, V]."""

    def chunk_logprobs(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return -F.cross_entropy(project(hidden_CD).float(), targets_C, reduction="none")

    chunk_size = max(1, MAX_CHUNK_ELEMENTS // vocab_size)
    if hidden_SD.shape[0] <= chunk_size:
        return chunk_logprobs(hidden_SD, targets_S)
    chunks = zip(hidden_SD.split(chunk_size), targets_S.split(chunk_size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk_logprobs(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks])
