"""What a model's architecture allows: sequences packed into one row, and logits made by blocks.

Architectures differ in more than a config tells (sinks, recurrent layers, scaled logits), so it is tried,
not guessed, whether short sequences come out as from the model itself. What short sequences do not tell is
read from the config.

Shape suffixes: N tokens of a packed row, S scored positions, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.engine.model import attention
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack

if TYPE_CHECKING:
    from cookbook.engine.model.base_model import BaseModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def find_what_is_safe(base: BaseModel) -> None:
    """Sets `base.has_plain_head` and `base.is_packed`, and the attention that goes with it."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (7, 5):
        ids_T = torch.randint(base.vocab_size, (length,), generator=generator).numpy()
        sequences.append(TokenSequence(ids_T, ids_T, np.ones(length, np.float32), {}))
    alone = [pack([sequence], base.device, trained_only=False) for sequence in sequences]
    expected_S = torch.cat([base.logprobs_of_whole_model(batch) for batch in alone])

    def why_not(compute: Callable[[], Tensor]) -> str | None:
        try:
            found_S = compute()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            base.give_pass_up()
            return f"{type(error).__name__}: {error}"
        difference = ((found_S - expected_S).abs() / expected_S.abs()).max().item()
        tolerance = 1e-4 if base.dtype == torch.float32 else 0.05
        return None if difference <= tolerance else f"its log-probabilities would move by {difference:.1%}"

    base.has_plain_head = True
    reason = why_not(lambda: torch.cat([base.logprobs(batch) for batch in alone]))
    if reason is not None:
        base.has_plain_head = False
        logger.info(
            "%s runs one sequence at a time, with all its logits: they are more than a projection (%s).",
            base.name,
            reason,
        )
        return
    own_attention = base.model.config._attn_implementation
    base.is_packed = True
    reason = why_not(lambda: _packed_logprobs(base, sequences))
    if reason is not None:
        base.is_packed = False
        base.model.set_attn_implementation(own_attention)
        logger.info("%s runs one sequence at a time: it cannot be packed (%s).", base.name, reason)


def _packed_logprobs(base: BaseModel, sequences: list[TokenSequence]) -> Tensor:
    base.model.set_attn_implementation(attention.NAME)
    batch = pack(sequences, base.device, trained_only=False)
    windows: list[int | None] = []
    found_S = base.logprobs(replace(batch, attention=replace(batch.attention, windows_seen=windows)))
    config = base.model.config.get_text_config()
    if (reason := _window_not_passed(config, windows) or _row_in_rotation(config)) is not None:
        raise ValueError(reason)
    if _reaches_beyond(base, batch, len(sequences[0])):
        raise ValueError("what one sequence holds may reach another")
    return found_S


def _reaches_beyond(base: BaseModel, batch: PackedBatch, length: int) -> bool:
    """Whether nan in the first sequence, of that length, shows in the others: they may see it faintly."""

    def spoil(module: nn.Module, inputs: Any, embeddings_1ND: Tensor) -> Tensor:
        spoilt_1ND = embeddings_1ND.clone()
        spoilt_1ND[:, :length] = torch.nan
        return spoilt_1ND

    hook = base.model.get_input_embeddings().register_forward_hook(spoil)
    try:
        return bool(base.logprobs(batch)[length:].isnan().any())
    finally:
        hook.remove()


def _window_not_passed(config: Any, windows: list[int | None]) -> str | None:
    """Why a model whose attention is local would see too much when packed; None if it would not.

    Such a model has to hand its window to the attention of each local layer.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        is_local = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if is_local else "full_attention"] * len(windows)
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if len(kinds) != len(windows):
        return f"{len(windows)} of its {len(kinds)} layers have attention"
    if any(
        kind == "sliding_attention" and window is None for kind, window in zip(kinds, windows, strict=True)
    ):
        return "its sliding window is not handed to the attention"
    return None


def _row_in_rotation(config: Any) -> str | None:
    """Why positions are encoded by more than themselves; None if they are not.

    longrope changes its frequencies with the longest position of a row.
    """
    if _long_rotations(config):
        return "its rotation of positions (longrope) depends on the longest sequence of a row"
    return None


def last_length_of_short_rotation(config: Any) -> int | None:
    """The length beyond which longrope rotates all positions of a sequence anew; None without longrope."""
    lengths = [
        kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for kind in _long_rotations(config)
    ]
    return min(lengths, default=None)


def _long_rotations(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return [kind for kind in by_kind if kind.get("rope_type") == "longrope"]
