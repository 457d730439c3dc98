"""Several processes come to what one comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM


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


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": "on"}, {"max_tokens": None}, {"max_tokens": 1}], ids=str
)
def test_ways_of_running_a_batch_change_nothing_where_weights_are_dealt_out(
    ranks: Any,
    tiny_qwen3: str,
    tmp_path: Path,
    of_one: Callable[[int], Any],
    options: dict[str, Any],
    rank: int,
) -> None:
    found = ranks.results(
        "training:steps", 2, model=tiny_qwen3, folder=str(tmp_path), rank=rank, shard="full", **options
    )
    assert_same(of_one(rank), found[0])


def test_activations_cost_the_same_where_weights_are_dealt_out(
    ranks: Any, tiny_qwen3: str, tmp_path: Path
) -> None:
    arguments = {"model": tiny_qwen3, "folder": str(tmp_path)}
    (one,) = ranks.results("training:limits", 1, shard="none", **arguments)
    assert ranks.results("training:limits", 2, shard="full", **arguments) == [one, one]


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(
    ranks: Any,
    tiny_qwen3: str,
    tmp_path: Path,
    of_one: Callable[[int], Any],
    shard: str,
    rank: int,
) -> None:
    saved = ranks.results(
        "training:steps", 2, model=tiny_qwen3, folder=str(tmp_path), rank=rank, shard=shard
    )[0]
    (one,) = ranks.results("training:goes_on", 1, path=saved["saved"], folder=str(tmp_path))
    for name, weight in saved["weights"].items():
        np.testing.assert_array_equal(one["weights"][name], weight)
    for other_shard in ("none", "full"):
        four = ranks.results(
            "training:goes_on", 4, path=saved["saved"], folder=str(tmp_path), shard=other_shard
        )
        for name in ("weights", "optimizer"):
            assert_same(one[name], four[0][name], tolerance=0)
        assert_same(one, four[0])
        for others in four[1:]:
            assert_same(four[0], others, tolerance=0)


def test_a_checkpoint_of_one_process_goes_on_where_weights_are_dealt_out(
    ranks: Any, tmp_path: Path, of_one: Callable[[int], Any]
) -> None:
    path = of_one(0)["saved"]
    (one,) = ranks.results("training:goes_on", 1, path=path, folder=str(tmp_path))
    assert_same(one, ranks.results("training:goes_on", 2, path=path, folder=str(tmp_path), shard="full")[0])


def test_a_model_saved_in_parts_is_a_model_folder(ranks: Any, tiny_qwen3: str, tmp_path: Path) -> None:
    saved = ranks.results("training:steps", 2, model=tiny_qwen3, folder=str(tmp_path), rank=0, shard="full")[
        0
    ]
    model = AutoModelForCausalLM.from_pretrained(saved["saved"])
    assert type(model).__name__ == "Qwen3ForCausalLM"
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), saved["weights"][name])


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
def test_samples_are_those_of_one_process_where_weights_are_dealt_out(
    ranks: Any, tiny_qwen3: str, tmp_path: Path, rank: int
) -> None:
    arguments = {"model": tiny_qwen3, "folder": str(tmp_path), "rank": rank}
    (one,) = ranks.results("training:samples", 1, shard="none", **arguments)
    assert one["tokens"] == one["tokens of the snapshot afterwards"]
    for shard in ("none", "full"):
        for found in ranks.results("training:samples", 2, shard=shard, **arguments):
            assert found["tokens"] == one["tokens"] == found["tokens of the snapshot afterwards"]
            assert_same([np.asarray(row) for row in one["logprobs"]], [*map(np.asarray, found["logprobs"])])
            assert_same(np.asarray(one["scored"]), np.asarray(found["scored"]))
            assert found["trained"] == pytest.approx(one["trained"], rel=1e-5)
