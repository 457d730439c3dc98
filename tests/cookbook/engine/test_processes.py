"""Tests that several processes compute the same results as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from slow import slow_after
from transformers import AutoModelForCausalLM


def assert_same(one: Any, several: Any, tolerance: float = 1e-5) -> None:
    """Asserts equality to rounding, relative to the largest number of each array."""
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


Steps = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def steps(ranks: Any, tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Returns the result of `training:steps` in several processes, with an adapter of the given rank."""

    @functools.cache
    def found(size: int, rank: int, shard: str = "none") -> list[Any]:
        folder = str(tmp_path_factory.mktemp("steps"))
        arguments = {"model": tiny_qwen3, "folder": folder, "rank": rank, "shard": shard}
        results: list[Any] = ranks.results("training:steps", size, **arguments)
        return results

    return found


@pytest.mark.cases(2)
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("size", slow_after(1, [2, 4]))
def test_several_processes_compute_the_results_of_one(steps: Steps, size: int, shard: str, rank: int) -> None:
    found = steps(size, rank, shard)
    for others in found[1:]:
        assert_same(found[0], others, tolerance=0)
    assert_same(steps(1, rank)[0], found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shard"),
    [
        ("mixtral", "full"),
        pytest.param("llama4", "none", marks=pytest.mark.slow),  # in padded batches
        *(
            pytest.param(family, shard, marks=pytest.mark.slow)
            for family in ("gpt_oss", "inkling_text", "jetmoe", "longcat_flash")
            for shard in ("none", "full")
        ),
    ],
)
def test_adapters_on_experts_are_those_of_one_process(
    ranks: Any, tmp_path: Path, family: str, shard: str
) -> None:
    arguments = {"model": str(families.save(family, tmp_path / "model")), "rank": 4}
    (one,) = ranks.results("training:steps", 1, folder=str(tmp_path / "one"), **arguments)
    assert any("experts" in name for name in one["weights"])
    for found in ranks.results("training:steps", 2, folder=str(tmp_path / "two"), shard=shard, **arguments):
        assert_same(one, found, tolerance=5e-5)  # a router turns rounding into other weights of experts


@pytest.mark.slow
@pytest.mark.parametrize("rank", slow_after(1, [4, 0]))
@pytest.mark.parametrize(
    "options",
    slow_after(1, [{"gradient_checkpointing": "on"}, {"max_tokens": None}, {"max_tokens": 1}]),
    ids=str,
)
def test_packing_and_micro_batching_change_nothing_with_sharded_weights(
    ranks: Any,
    tiny_qwen3: str,
    tmp_path: Path,
    steps: Steps,
    options: dict[str, Any],
    rank: int,
) -> None:
    found = ranks.results(
        "training:steps", 2, model=tiny_qwen3, folder=str(tmp_path), rank=rank, shard="full", **options
    )
    assert_same(steps(1, rank)[0], found[0])


@pytest.mark.slow
def test_activations_cost_the_same_with_sharded_weights(ranks: Any, tiny_qwen3: str, tmp_path: Path) -> None:
    arguments = {"model": tiny_qwen3, "folder": str(tmp_path)}
    (one,) = ranks.results("training:limits", 1, shard="none", **arguments)
    for found in ranks.results("training:limits", 2, shard="full", **arguments):
        assert found == pytest.approx(one, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "shard", "other_shard"),
    slow_after(1, [(4, "none", "full"), (0, "none", "full"), (0, "full", "none"), (0, "full", "full")]),
)
def test_a_checkpoint_of_two_processes_is_resumed_in_one_and_in_four(
    ranks: Any, tmp_path: Path, steps: Steps, rank: int, shard: str, other_shard: str
) -> None:
    saved = steps(2, rank, shard)[0]
    arguments = {"path": saved["saved"], "folder": str(tmp_path)}
    (one,) = ranks.results("training:resumed", 1, **arguments)
    for name, weight in saved["weights"].items():
        np.testing.assert_array_equal(one["weights"][name], weight)
    four = ranks.results("training:resumed", 4, shard=other_shard, **arguments)
    for name in ("weights", "optimizer"):
        assert_same(one[name], four[0][name], tolerance=0)
    assert_same(one, four[0])
    for others in four[1:]:
        assert_same(four[0], others, tolerance=0)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_resumed_with_sharded_weights(
    ranks: Any, tmp_path: Path, steps: Steps
) -> None:
    arguments = {"path": steps(1, 0)[0]["saved"], "folder": str(tmp_path)}
    (one,) = ranks.results("training:resumed", 1, **arguments)
    assert_same(one, ranks.results("training:resumed", 2, shard="full", **arguments)[0])


@pytest.mark.slow
def test_a_model_saved_in_parts_is_a_model_folder(steps: Steps) -> None:
    saved = steps(2, 0, "full")[0]
    model = AutoModelForCausalLM.from_pretrained(saved["saved"])
    assert type(model).__name__ == "Qwen3ForCausalLM"
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), saved["weights"][name])
    assert not list(Path(saved["saved"]).parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", slow_after(1, [0, 4]))
def test_samples_with_sharded_weights_equal_those_of_one_process(
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


def test_the_methods_of_a_world(ranks: Any) -> None:
    found = ranks.results("training:exchanged", 3)
    for rank, result in enumerate(found):
        assert result["all_gather_object"] == [0, 10, 20]
        assert result["broadcast"] == "from 0"
        assert result["agree_min"] == (0, -2)
        assert result["agree_max"] == (2, 0)
        assert result["on_rank0"] == "done by 0"
        assert result["sums"] == [[3.0] * 3, [[3.0] * 2] * 2, [3.0]]
        for who in (0, 1):
            other = f"TrainingError: Process {who} of 3 failed: ValueError: no"
            assert result["failures"][who] == ("ValueError: no" if rank == who else other)
        assert result["main's failure"].endswith("CheckpointError: full disk on 0")


def test_processes_of_one_machine_listen_only_on_loopback(ranks: Any) -> None:
    main, other = ranks.results("training:addresses", 2)
    assert ("127.0.0.1", main["store"]) in main["listens"]
    assert other["listens"]
    assert {ip for ip, _ in (*main["listens"], *other["listens"])} == {"127.0.0.1"}
    assert {main[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")} == {"lo"}


def test_processes_of_several_machines_are_reachable_and_use_a_named_interface(
    ranks: Any,
) -> None:
    ended = ranks.run("training:addresses", 2, environment={"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    main = ended.results[0]
    assert ("::", main["store"]) in main["listens"]
    assert main["GLOO_SOCKET_IFNAME"] is None
    ended = ranks.run("training:addresses", 2, environment={"NCCL_SOCKET_IFNAME": "eth0"})
    assert ended.results[0]["NCCL_SOCKET_IFNAME"] == "eth0"


@pytest.mark.slow
def test_a_process_without_memory_halves_its_batches_and_all_keep_the_limit(
    ranks: Any, tiny_qwen3: str, tmp_path: Path
) -> None:
    arguments = {"model": tiny_qwen3, "shard": "none"}
    (plenty,) = ranks.results(
        "training:scarce", 1, most_tokens={}, folder=str(tmp_path / "plenty"), **arguments
    )
    found = ranks.results(
        "training:scarce", 2, most_tokens={"1": 50}, folder=str(tmp_path / "scarce"), **arguments
    )
    assert found[0]["limit"] == found[1]["limit"] == found[0]["saved"]["max_tokens"] < plenty["limit"]
    for result in found:
        assert_same(plenty["losses"], result["losses"])
        assert_same(plenty["weights"], result["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_process_that_cannot_continue_ends_all_with_its_error(
    ranks: Any, tiny_qwen3: str, tmp_path: Path, shard: str
) -> None:
    ended = ranks.run(
        "training:scarce",
        2,
        model=tiny_qwen3,
        folder=str(tmp_path),
        shard=shard,
        most_tokens={"1": 1},
    )
    assert ended.codes == [1, 1]
    for printed in ended.printed:
        last_line = printed.strip().splitlines()[-1]
        assert "TrainingError" in last_line
        assert "does not fit in the memory of cpu" in last_line
    if shard == "full":
        assert "process 1" in ended.printed[0].strip().splitlines()[-1]
        assert "max_tokens_per_microbatch=" in ended.printed[0]


@pytest.mark.slow
def test_weights_are_sharded_if_they_do_not_fit_in_the_memory_of_rank_0(
    ranks: Any, tiny_qwen3: str, tmp_path: Path
) -> None:
    size = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_qwen3).parameters())
    arguments = {"model": tiny_qwen3, "folder": str(tmp_path)}
    # The bytes per weight in bfloat16: the weight, and with rank 0 also a gradient, an fp32 master, its
    # gradient and moments.
    for rank, bytes_per_weight in ((4, 2), (0, 20)):
        need = bytes_per_weight * size / 0.7
        for share, is_sharded in ((0.99, True), (1.01, False)):
            memory = {"0": share * need, "1": 0.0}
            found = ranks.results("training:decided", 2, memory=memory, rank=rank, **arguments)
            assert found == [is_sharded, is_sharded]


@pytest.mark.slow
def test_sharded_weights_of_lower_precision_have_masters_too(
    ranks: Any, tiny_qwen3: str, tmp_path: Path
) -> None:
    work, folders = "training:in_bfloat16", [str(tmp_path / name) for name in ("one", "two")]
    (one,) = ranks.results(work, 1, model=tiny_qwen3, shard="none", folder=folders[0])
    found = ranks.results(work, 2, model=tiny_qwen3, shard="full", folder=folders[1])
    assert_same(found[0], found[1], tolerance=0)
    assert {array.dtype for array in found[0]["optimizer"].values()} == {np.dtype(np.float32)}
    for size, shard in ((1, "none"), (2, "full")):
        arguments = {"path": found[0]["saved"], "folder": folders[0], "dtype": "bfloat16"}
        on = ranks.results("training:resumed", size, shard=shard, **arguments)
        assert_same(found[0]["optimizer"], on[0]["optimizer"], tolerance=0)
    assert found[0]["losses"] == pytest.approx(one["losses"], rel=0.01)
    model = AutoModelForCausalLM.from_pretrained(found[0]["saved"])
    assert model.dtype == torch.bfloat16


def test_the_first_failure_is_reported_even_after_rank_0_exited(ranks: Any) -> None:
    ended = ranks.run("training:says_it_after_the_main_process_is_gone", 2)
    assert ended.codes == [1, 0], ended.printed
    assert ended.results[1] is True
