"""Tests of the choice of device, dtype and determinism, with a stand-in for CUDA where one is needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import outside_world
import pytest
import torch

from cookbook.clients.service import ServiceClient
from cookbook.engine import devices
from cookbook.engine.device_clock import DeviceClock
from cookbook.engine.model.architecture_probe import warn_if_slow
from cookbook.engine.options import EngineOptions, check_device, check_torch
from cookbook.engine.training.results import Readback
from cookbook.errors import ConfigError
from cookbook.types import AdamParams, Datum, ModelInput, SamplingParams

SECOND = torch.device("cuda", 1)


@pytest.fixture
def deterministic_again() -> Iterator[None]:
    """Restores the state of the process that `deterministic` sets."""
    workspace = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


# -- the device -------------------------------------------------------------------------------


def test_the_engines_thread_makes_its_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = outside_world.install_cuda_runtime(monkeypatch)
    assert devices.resolve_device("cuda:1") == SECOND
    assert calls == [("set_device", SECOND)]


def test_a_cuda_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    outside_world.install_cuda_runtime(monkeypatch)
    assert devices.resolve_device("auto") == devices.resolve_device("cuda") == torch.device("cuda", 0)


def test_results_are_read_after_an_event_on_the_stream_of_their_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = outside_world.install_cuda_runtime(monkeypatch)
    with outside_world.fake_cuda_tensors(monkeypatch):
        Readback([torch.zeros(3, device=SECOND)])
    assert calls == [("record", SECOND)], "the current device is another one"


def test_the_clock_marks_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = outside_world.install_cuda_runtime(monkeypatch)
    DeviceClock(SECOND).mark()
    assert calls == [("record", SECOND)] * 2


# -- what a device can compute ----------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.11.0", "1.13"])
def test_an_older_torch_is_refused_on_cuda(version: str) -> None:
    with pytest.raises(ConfigError, match=r"CUDA needs torch 2.12 or newer, and found .*device=cpu"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.12.0", "2.13.0+cu130", "3.0.0a0"])
def test_a_torch_with_all_arguments_of_its_attention_is_accepted(version: str) -> None:
    check_torch(version)


def test_an_older_torch_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    outside_world.install_cuda_runtime(monkeypatch, torch_version="2.10.0")
    for refuse in (lambda: check_device("cuda"), lambda: devices.resolve_device("auto")):
        with pytest.raises(ConfigError, match=r"torch 2\.12"):
            refuse()


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_the_automatic_dtype_is_one_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    outside_world.install_cuda_runtime(monkeypatch, capability=capability)
    assert devices.resolve_dtype("auto", SECOND) == expected
    assert devices.resolve_dtype("float32", SECOND) == torch.float32
    assert devices.has_varlen_attention(SECOND) == (expected == torch.bfloat16)
    assert devices.resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_the_choice_for_a_device_without_bfloat16_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outside_world.install_cuda_runtime(monkeypatch, capability=(7, 5))
    devices.resolve_dtype("auto", SECOND)
    assert "a device (compute capability 7.5) has no bfloat16" in caplog.text
    assert "dtype=float16 with loss scaling" in caplog.text


def test_bfloat16_is_refused_on_a_device_that_would_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outside_world.install_cuda_runtime(monkeypatch, capability=(7, 0))
    with pytest.raises(ConfigError, match=r"dtype=bfloat16 needs .* 8\.0; found .*7\.0.*dtype=auto"):
        devices.resolve_dtype("bfloat16", SECOND)


@pytest.mark.parametrize(("is_padded", "how"), [(True, "padded to the longest"), (False, "one at a time")])
def test_a_model_that_is_not_packed_on_cuda_is_a_warning(
    is_padded: bool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_slow("org/model", torch.device("cpu"), is_padded, "a reason")
    assert not caplog.records
    warn_if_slow("org/model", SECOND, is_padded, "a reason")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert how in record.getMessage()
    assert "a reason" in record.getMessage()


@pytest.mark.parametrize(
    ("capability", "is_installed", "expected"),
    [((9, 0), True, "Attention runs on FlashAttention 3."), ((8, 0), True, ""), ((9, 0), False, "")],
)
def test_flash_attention_3_is_used_where_it_is_installed_for_the_device(
    capability: tuple[int, int],
    is_installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    outside_world.install_cuda_runtime(monkeypatch, capability=capability)
    activated = outside_world.install_flash_attention_3(monkeypatch) if is_installed else []
    caplog.set_level(logging.INFO, "cookbook")
    devices.use_flash_attention_3(SECOND)
    assert caplog.text.strip().endswith(expected)
    assert activated == (["FA3"] if expected else [])


def test_flash_attention_3_that_cannot_be_used_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stand-in has none of the kernels that torch looks for."""
    outside_world.install_cuda_runtime(monkeypatch)
    outside_world.install_flash_attention_3(monkeypatch, activates=False)
    devices.use_flash_attention_3(SECOND)
    assert "FlashAttention 3 is installed and cannot be used" in caplog.text


def test_settings_of_the_allocator_that_a_user_made_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    devices.use_growing_segments()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    devices.use_growing_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")


# -- memory -----------------------------------------------------------------------------------


def test_the_memory_of_a_cpu_is_that_of_the_process() -> None:
    before = devices.memory_use(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    during = devices.memory_use(torch.device("cpu"))
    del held
    after = devices.memory_use(torch.device("cpu"))
    assert during["memory_in_use_gib"] - before["memory_in_use_gib"] == pytest.approx(0.25, abs=0.05)
    assert after["memory_in_use_gib"] < during["memory_in_use_gib"] - 0.2
    assert after["memory_peak_gib"] > during["memory_in_use_gib"] - 0.02  # the two are not counted at once


def test_the_memory_of_a_cuda_device_is_that_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = outside_world.install_cuda_runtime(monkeypatch)
    found = devices.memory_use(SECOND)
    assert found == {"memory_in_use_gib": 1.0, "memory_reserved_gib": 3.0, "memory_peak_gib": 2.0}
    assert calls == [("reset_peak_memory_stats", SECOND)], "each peak is that of one step"


# -- determinism ------------------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic_again")
def test_deterministic_sets_torch_and_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    outside_world.install_cuda_runtime(monkeypatch)
    devices.resolve(EngineOptions(device="cuda", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "flash-attention would keep its atomics"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("deterministic_again")
def test_a_workspace_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    outside_world.install_cuda_runtime(monkeypatch)
    devices.make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("deterministic_again")
@pytest.mark.parametrize(("workspace", "found"), [(None, "not set"), (":0:0", ":0:0")])
def test_deterministic_is_refused_where_cublas_has_another_workspace(
    monkeypatch: pytest.MonkeyPatch, workspace: str | None, found: str
) -> None:
    outside_world.install_cuda_runtime(monkeypatch, is_initialized=True)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    with pytest.raises(ConfigError, match=f"CUBLAS_WORKSPACE_CONFIG=:4096:8 before .* it is {found}"):
        devices.make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic_again")
def test_training_and_sampling_use_no_operation_without_a_deterministic_form(
    tiny_qwen3: str, tmp_path: Path
) -> None:
    found = []
    for deterministic in (False, True):
        service = ServiceClient(checkpoint_dir=tmp_path / str(deterministic), deterministic=deterministic)
        client = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
        datum = Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})
        client.forward_backward([datum], "cross_entropy").result()
        norm = client.optim_step(AdamParams(learning_rate=0.1)).result().metrics["grad_norm"]
        sampler = client.save_weights_and_get_sampling_client()
        params = SamplingParams(max_tokens=8, seed=0, top_p=0.9, top_k=50)
        found.append((norm, sampler.sample(ModelInput.from_ints([5]), 3, params).sequences))
        service.close()
    assert found[0] == found[1]
