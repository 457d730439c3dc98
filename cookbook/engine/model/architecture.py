"""Reads properties of a config that decide about packing and that short test sequences do not show."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION = {"full_attention", "sliding_attention", "attention"}
_RECURRENCE = {"linear_attention", "conv", "mamba", "recurrent"}
_BOTH = {"hybrid", "hybrid_sliding"}
_NEITHER = {"mlp", "moe", "sparse", "dense"}
"""The kinds of layers, as transformers names them in `layer_types`, by what mixes their tokens."""

_SPANS = {
    re.compile(r"window(_size)?$|^attention_chunk_size$|^index_topk$"): 4,
    re.compile(r"^(index_|indexer_)?(block_size|topk_blocks|kpool|compress_ratio)$"): 2,
}
"""The names of numbers of tokens beyond which a layer's attention does not reach or does not choose, or that
it compresses to one, and such numbers that matter in short sequences."""


@contextlib.contextmanager
def short_spans(decoder: nn.Module, config: Any) -> Iterator[None]:
    """Shrinks the windows of a model's layers meanwhile, so that they matter in short sequences too."""
    modules = list(decoder.modules())
    configs = (config, *(m.config for m in modules if hasattr(getattr(m, "config", None), "__dict__")))
    owners = {id(owner): owner for owner in configs}
    spans = [
        (owner, name, value, short)
        for owner in (*owners.values(), *modules)
        for name, value in vars(owner).items()
        for pattern, short in _SPANS.items()
        if type(value) is int and value > short and pattern.search(name)
    ]
    for owner, name, _, short in spans:
        setattr(owner, name, short)
    try:
        yield
    finally:
        for owner, name, value, _ in spans:
            setattr(owner, name, value)


def why_not_packed(config: Any, windows: Sequence[int | None], num_recurrent: int = 0) -> str | None:
    """Returns the reason why a model must not see packed sequences, or None if packing is safe.

    `windows` lists the sliding window of each call of the packed attention in a forward pass. A model with
    sliding-window attention has to pass its window in each such layer. `num_recurrent` counts the calls of
    recurrent mixers.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        has_window = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if has_window else "full_attention"] * len(windows)
    if unknown := set(kinds) - _ATTENTION - _RECURRENCE - _BOTH - _NEITHER:
        return f"it has layers of {', '.join(sorted(unknown))}"
    attentive = [kind for kind in kinds if kind in _ATTENTION | _BOTH]
    if not windows and (attentive or not num_recurrent):
        return "its attention is outside the AttentionInterface"
    if len(attentive) != len(windows):
        return f"{len(windows)} of its {len(kinds)} layers have attention, but {len(attentive)} should"
    if any(
        kind in ("sliding_attention", "hybrid_sliding") and window is None
        for kind, window in zip(attentive, windows, strict=True)
    ):
        return "its sliding window is not passed to the attention"
    expected = sum(kind in _RECURRENCE | _BOTH for kind in kinds)
    if num_recurrent < expected:
        return f"{expected} of its {len(kinds)} layers are recurrent, and {num_recurrent} can be split"
    return None


@dataclass(frozen=True)
class LogitScaling:
    """The logits are `softcap * tanh(scale * projection / softcap)`, or `scale * projection` without one."""

    scale: float = 1.0
    softcap: float | None = None


def logit_scaling(
    config: Any, projection_SV: Tensor, logits_SV: Tensor, dtype: torch.dtype
) -> LogitScaling | None:
    """Returns how a model's logits follow from the projection of its hidden states, or None if they do not.

    Configs name scales and caps differently, and one divides by what another multiplies by. So the scale is
    measured, and rounding is removed where it equals a number of the config or its inverse.
    """
    if not projection_SV.any() and not logits_SV.any():
        return LogitScaling()  # a projection of zeros, as some new models have, shows no scale
    values = {name: value for name, value in vars(config).items() if isinstance(value, int | float)}
    tolerance = 1e-4 if dtype == torch.float32 else 0.01
    caps = [
        value
        for name, value in values.items()
        if "cap" in name and "att" not in name and "capacity" not in name and value
    ]
    numbers = [1.0, *(float(value) for value in values.values() if value)]
    for softcap in (*caps, None):  # of small logits a cap changes little, but of a trained model's it does
        scaled_SV = logits_SV.double()
        if softcap is not None:
            scaled_SV = softcap * torch.atanh((scaled_SV / softcap).clamp(-1, 1))
        is_linear_SV = scaled_SV.abs() < (2 * softcap if softcap else torch.inf)  # atanh is inexact near 1
        projected, scaled = projection_SV.double()[is_linear_SV], scaled_SV[is_linear_SV]
        scale = ((projected * scaled).sum() / projected.square().sum().clamp_min(1e-30)).item()
        if not math.isfinite(scale) or (scaled - scale * projected).norm() > tolerance * scaled.norm():
            continue
        candidates = [each for number in numbers for each in (number, 1 / number)]
        nearest = min(candidates, key=lambda number: abs(number - scale))
        return LogitScaling(nearest if abs(nearest - scale) < tolerance * abs(scale) else scale, softcap)
    return None


def longrope_thresholds(config: Any) -> set[int]:
    """Returns the lengths beyond which longrope encodes all positions of a sequence differently."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {
        kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for kind in by_kind
        if kind.get("rope_type") == "longrope"
    }
