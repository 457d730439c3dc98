"""Reads properties of a config that decide about packing and that short test sequences do not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATTENTION = {"full_attention", "sliding_attention", "attention"}
_RECURRENCE = {"linear_attention", "conv", "mamba", "recurrent"}
_BOTH = {"hybrid", "hybrid_sliding"}
_NEITHER = {"mlp", "moe", "sparse", "dense"}
"""The kinds of layers, as transformers names them in `layer_types`, by what mixes their tokens."""


def why_not_packed(config: Any, windows: Sequence[int | None], num_recurrent: int = 0) -> str | None:
    """Returns the reason why a model must not see packed sequences, or None if packing is safe.

    `windows` lists the sliding window of each call of the packed attention in a forward pass. A model with
    sliding-window attention has to pass its window in each such layer. `num_recurrent` counts the calls of
    recurrent mixers. longrope selects its frequencies by the longest position of a row.
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
    if _longrope_parameters(config):
        return "its RoPE (longrope) depends on the longest sequence of a row"
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
    caps = [value for name, value in values.items() if "cap" in name and "att" not in name and value]
    numbers = [1.0, *(float(value) for value in values.values() if value)]
    for softcap in (None, *caps):
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


def longrope_threshold(config: Any) -> int | None:
    """Returns the length beyond which longrope re-encodes all positions, or None without longrope."""
    lengths = [
        kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for kind in _longrope_parameters(config)
    ]
    return min(lengths, default=None)


def _longrope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return [kind for kind in by_kind if kind.get("rope_type") == "longrope"]
