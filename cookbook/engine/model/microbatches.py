"""Plans the micro-batches of a model, by which of its sequences may share a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.prefix_tree import Family
from cookbook.engine.model.recurrence import batches_by_length
from cookbook.engine.training.partition import plan_families


def rope_kinds(base: BaseModel, lengths: Sequence[int]) -> list[int]:
    """Returns a number for the frequencies of RoPE that a sequence of each length has alone.

    With longrope, a row has the frequencies of its longest sequence, so others may not be in it.
    """
    return [sum(length > threshold for threshold in base.longrope_thresholds) for length in lengths]


def plan(
    base: BaseModel,
    families: Sequence[Family],
    max_tokens: int,
    size: Callable[[int], int] = int,
    memory: Callable[[int], int] = int,
    max_in_memory: int = 2**62,
) -> list[list[Family]]:
    """Returns the families of each micro-batch, as `partition.plan_families` does."""
    by_kind: dict[int, list[Family]] = {}
    kinds = rope_kinds(base, [family.lengths[0] for family in families])
    for family, kind in zip(families, kinds, strict=True):
        by_kind.setdefault(kind, []).append(family)
    plan = []
    for found in by_kind.values():
        if base.is_padded:
            parts = batches_by_length([size(family.lengths[0]) for family in found], max_tokens)
            plan += [[found[place] for place in sorted(part)] for part in parts]
        else:
            limit = max_tokens if base.is_packed else 1
            plan += plan_families(found, size, limit, memory, max_in_memory)
    return plan


def size_of(base: BaseModel, microbatch: Sequence[Family], size: Callable[[int], int]) -> int:
    """Returns the size of a micro-batch with its padding; `size` maps the length of a sequence to its own."""
    if base.is_padded and microbatch:
        return len(microbatch) * size(max(family.lengths[0] for family in microbatch))
    return sum(family.size(size) for family in microbatch)
