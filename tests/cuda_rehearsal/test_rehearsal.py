"""The engine's CUDA branches run on a fake device: nothing is refused, and no step waits for the device.

Torch's fake kernels find tensors on different devices, `benchmarks.fake_cuda` what they do not check:
products of mixed dtypes, copies and conditions that make the host wait, and float64.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from programs import Programs
from waits import DOUBLES, WAITS, WAITS_OF_MODELS, reason

from benchmarks.fake_cuda import library
from benchmarks.roofline import GOLDEN

ROOT = Path(__file__).parents[2]
QUICK = ("qwen3",)
NUM_ACTIVITIES = 14
DEVICE = "benchmarks.fake_cuda.library:load"

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason=library.why_unavailable() or "")

Found = dict[tuple[str, str], dict[str, Any]]


def rehearse(programs: Programs, folder: Path, *argv: str) -> Found:
    """Returns what `rehearse.py` prints, by family and activity."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    script = str(Path(__file__).with_name("rehearse.py"))
    ended = programs.run(
        *(script, str(folder), *argv), cwd=ROOT, environment={"PYTHONPATH": path}, before_torch=DEVICE
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return {(line["family"], line["activity"]): line for line in lines}


@pytest.fixture(scope="module")
def found(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return rehearse(programs, tmp_path_factory.mktemp("rehearsal"), *QUICK, "--planted")


def of(found: Found, family: str) -> dict[str, dict[str, Any]]:
    """Returns what was found in a family's activities, without planted defects."""
    return {
        activity: line
        for (name, activity), line in found.items()
        if name == family and not activity.startswith("planted")
    }


def assert_refused_nothing(activities: dict[str, dict[str, Any]]) -> None:
    assert len(activities) == NUM_ACTIVITIES
    assert {activity: line["error"] for activity, line in activities.items() if line["error"]} == {}
    launches = {activity: line["launches"] for activity, line in activities.items() if "launches" in line}
    assert len(launches) >= NUM_ACTIVITIES - 4  # without the two that load, and 8 bits where they are refused
    assert min(launches.values()) > 50


def assert_waits_are_known(activities: dict[str, dict[str, Any]]) -> None:
    """Asserts that a training step neither waits nor computes in float64, and other work only as listed."""
    for activity, line in activities.items():
        waits = {place for place, *_ in line.get("waits", [])}
        doubles = {place for place, *_ in line.get("doubles", [])}
        if activity.startswith("train"):
            assert {place for place in waits if reason(WAITS_OF_MODELS, place) is None} == set(), activity
            assert {place for place in doubles if reason(WAITS_OF_MODELS, place) is None} == set(), activity
        else:
            tables = {**WAITS, **WAITS_OF_MODELS}
            assert {place for place in waits if reason(tables, place) is None} == set(), activity
            assert {place for place in doubles if reason(DOUBLES, place) is None} == set(), activity


@pytest.mark.parametrize("family", QUICK)
def test_a_cuda_device_refuses_nothing(found: Found, family: str) -> None:
    assert_refused_nothing(of(found, family))


@pytest.mark.parametrize("family", QUICK)
def test_a_step_neither_waits_nor_computes_in_float64_and_other_work_has_a_reason(
    found: Found, family: str
) -> None:
    assert_waits_are_known(of(found, family))


def test_inputs_of_layers_are_copied_to_the_host_and_back(found: Found) -> None:
    """The tiny model has two layers. The last one's input is still on the device when it is used."""
    copies = [
        found["qwen3", f"train with {what}"]["operators"].get("memcpy", 0)
        for what in ("checkpointed layers", "inputs in host memory")
    ]
    assert copies[1] - copies[0] == 2 + 1


def test_weights_in_8_bits_are_multiplied_in_8_bits_forward_and_dequantised_backward(found: Found) -> None:
    """Each of the 7 linear layers of the 2 layers has one product of each pass. No kernel refuses a size."""
    in_8_bits = found["qwen3", "train over weights in 8 bits"]["operators"]
    plain = found["qwen3", "train"]["operators"]
    assert in_8_bits["_scaled_mm"] == 2 * 7
    assert in_8_bits["mm"] == plain["mm"] - 2 * 7
    assert found["qwen3", "sample with weights in 8 bits"]["operators"]["_scaled_mm"] % (2 * 7) == 0


def test_kernels_are_used_where_they_are_installed(found: Found) -> None:
    counts = found["qwen3", "train"]["operators"]
    assert {"rotate", "gated_product", "gated_product_backward", "softmax_block"} <= counts.keys()
    without = found["qwen3", "train without kernels of Triton"]
    assert not {"rotate", "gated_product", "softmax_block"} & without["operators"].keys()
    assert without["launches"] > found["qwen3", "train"]["launches"]


def test_moments_in_8_bits_are_stepped_on_by_the_kernel_of_bitsandbytes(found: Found) -> None:
    counts = found["qwen3", "train all weights with moments in 8 bits"]["operators"]
    assert counts.get("optimizer_update_8bit_blockwise", 0) > 1
    assert "optimizer_update_8bit_blockwise" not in found["qwen3", "train all weights"]["operators"]


GATED = ("gemma2", "glm4", "phi3", "qwen3_moe")
"""Families with GELU, with gate and up of one linear layer, and with experts."""


_NAMES = [*families.FAMILIES]
TOGETHER = [_NAMES[first : first + 6] for first in range(0, len(_NAMES), 6)]
"""The families that are rehearsed in one go, because what they import takes as long as one of them."""


@pytest.fixture(scope="module")
def rehearse_together(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """Returns what is found in the families of `TOGETHER`, given their number there."""
    return functools.cache(
        lambda number: rehearse(programs, tmp_path_factory.mktemp("families"), *TOGETHER[number])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "family"),
    [
        pytest.param(number, family, id=family, marks=pytest.mark.xdist_group(f"rehearsal-{number}"))
        for number, together in enumerate(TOGETHER)
        for family in together
    ],
)
def test_every_family_runs_on_a_cuda_device_and_waits_only_where_there_is_a_reason(
    rehearse_together: Callable[[int], Found], number: int, family: str
) -> None:
    activities = of(rehearse_together(number), family)
    assert_refused_nothing(activities)
    assert_waits_are_known(activities)
    if family in GATED:
        assert {"gated_product", "gated_product_backward"} <= activities["train"]["operators"].keys()


@pytest.mark.parametrize(
    ("defect", "error"),
    [
        ("tensor of the host", "same device"),
        ("mixed dtypes", "mm of torch.bfloat16 and torch.float32"),
        ("mixed dtypes in backward", "mm of torch.bfloat16 and torch.float32"),
    ],
)
def test_an_operator_that_a_device_refuses_is_found(found: Found, defect: str, error: str) -> None:
    assert error in found["qwen3", f"planted: {defect}"]["error"]


@pytest.mark.parametrize(
    ("defect", "how"),
    [
        ("item", "_local_scalar_dense"),
        ("condition", "_local_scalar_dense"),
        ("blocking copy", "copy to the device"),
        ("copy from pageable memory", "copy to the device from memory that is not pinned"),
        ("mask as index", "index with a mask"),
        ("synchronize", "torch.cuda.synchronize"),
    ],
)
def test_a_wait_for_the_device_is_found_with_its_function(found: Found, defect: str, how: str) -> None:
    line = found["qwen3", f"planted: {defect}"]
    function = "tests/cuda_rehearsal/planted.py:_" + defect.replace(" ", "_")
    assert [function, how, 1] in line["waits"]


def test_float64_on_the_device_is_found(found: Found) -> None:
    functions = {function for function, *_ in found["qwen3", "planted: fp64"]["doubles"]}
    assert "tests/cuda_rehearsal/planted.py:_fp64" in functions


def test_costs_of_a_step_and_of_a_token_are_those_of_the_golden_text(programs: Programs) -> None:
    """A change that adds launches, bytes, operations or waits shows up as a diff of the text.

    The times that are derived from them are in `docs/rehearsal.md`.
    """
    ended = programs.run(
        *("benchmarks.roofline", "--classes", "--model", "qwen3-0.6b"), cwd=ROOT, before_torch=DEVICE
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout == GOLDEN.read_text(encoding="utf-8"), (
        "costs have changed: `make roofline` writes them"
    )
