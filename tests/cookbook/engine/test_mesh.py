"""Several processes come to what one comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def assert_same(one: Any, several: Any, tolerance: float = 1e-5) -> None:
    """To rounding, against the largest number of each array."""
    if isinstance(one, dict):
        assert one.keys() == several.keys()
        for key in one:
            assert_same(one[key], several[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(several)
        for a, b in zip(one, several, strict=True):
            assert_same(a, b, tolerance)
    elif not isinstance(one, str):
        scale = max(float(np.abs(one).max(initial=0)), 1e-6)
        np.testing.assert_allclose(several, one, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def of_one(ranks: Any, tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """What one process comes to, with an adapter of a rank."""
    found: dict[int, Any] = {}

    def of_rank(rank: int) -> Any:
        if rank not in found:
            folder = tmp_path_factory.mktemp("one")
            (found[rank],) = ranks.results(
                "training:steps", 1, model=tiny_qwen3, folder=str(folder), rank=rank
            )
        return found[rank]

    return of_rank


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_come_to_what_one_comes_to(
    ranks: Any,
    tiny_qwen3: str,
    tmp_path: Path,
    of_one: Callable[[int], Any],
    size: int,
    shard: str,
    rank: int,
) -> None:
    found = ranks.results(
        "training:steps", size, model=tiny_qwen3, folder=str(tmp_path), rank=rank, shard=shard
    )
    for others in found[1:]:
        assert_same(found[0], others, tolerance=0)
    assert_same(of_one(rank), found[0])
