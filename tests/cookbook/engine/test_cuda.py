"""Tests that need a CUDA device. They are skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cookbook.clients.service import ServiceClient
from cookbook.engine.device_clock import DeviceClock
from cookbook.engine.model import fp8
from cookbook.engine.model.attention import AttentionLayout, packed_attention
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling import decode_graphs
from cookbook.engine.sampling.requests import sample_request
from cookbook.engine.sampling.sampler import Sampler
from cookbook.engine.training.trainer import Trainer
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_trainer(model_name: str, device: str, dtype: str) -> Trainer:
    return Trainer(
        BaseModel(model_name, EngineOptions(device=device, dtype=dtype)), LoraConfig(rank=4, seed=0)
    )


def make_data() -> list[Datum]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 300, length) for length in (40, 3, 17, 90)]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


@contextmanager
def waiting_for_the_device_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_never_waits_for_the_device(tiny_qwen3: str) -> None:
    trainer = make_trainer(tiny_qwen3, "cuda", "bfloat16")
    request = trainer.check(make_data(), "cross_entropy", None, trained_only=True)
    for _ in range(2):  # the first step creates the optimizer's state and loads kernels
        trainer.forward_backward(request)
        trainer.optim_step(AdamParams())
    with waiting_for_the_device_is_an_error():
        result = trainer.forward_backward(request)
        step = trainer.optim_step(AdamParams(grad_clip_norm=1.0))
    assert np.isfinite(result.output().loss)
    assert np.isfinite(step.output().metrics["grad_norm"])


def test_marks_measure_when_the_device_reached_them_without_waiting() -> None:
    clock = DeviceClock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with waiting_for_the_device_is_an_error():
        marks = [clock.mark()]
        for _ in range(3):
            for _ in range(20):
                matrix @ matrix
            marks.append(clock.mark())
    queued = time.perf_counter()
    torch.cuda.synchronize()
    ended = time.perf_counter()
    times = [mark() for mark in marks]
    assert times == sorted(times)
    assert began - 1e-3 <= times[0] <= times[-1] <= ended + 1e-3
    assert times[-1] > queued, "the host continued while the device worked"


def test_fp32_gradients_equal_those_of_the_cpu(tiny_qwen3: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        trainer = make_trainer(tiny_qwen3, device, "float32")
        trainer.forward_backward(trainer.check(make_data(), "cross_entropy", None))
        found[device] = [w.grad.cpu() for w in trainer.adapter.weights.values() if w.grad is not None]
    assert found["cpu"]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_the_variable_length_kernel_equals_one_sequence_at_a_time(sliding_window: int | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    segments = [(0, 6), (6, 7), (7, 20)]
    layout = AttentionLayout(
        segments, torch.tensor([0, 6, 7, 20], dtype=torch.int32, device="cuda"), longest=13
    )
    query, key, value = (
        torch.randn(1, heads, 20, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        for heads in (4, 2, 2)
    )
    found, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, layout=layout, sliding_window=sliding_window
    )
    for start, stop in segments:
        part = (tensor[:, :, start:stop].float() for tensor in (query, key, value))
        expected, _ = packed_attention(torch.nn.Module(), *part, None, sliding_window=sliding_window)
        torch.testing.assert_close(found[:, start:stop].float(), expected, rtol=0.02, atol=0.02)


def losses_of(trainer: Trainer, num_steps: int) -> list[float]:
    request = trainer.check(make_data(), "cross_entropy", None, trained_only=True)
    losses = []
    for _ in range(num_steps):
        losses.append(trainer.forward_backward(request).output().loss)
        trainer.optim_step(AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)).arrays()
    return losses


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
def test_packed_sequences_have_the_losses_and_gradients_of_one_at_a_time(tiny_qwen3: str, rank: int) -> None:
    found = []
    for limit in (None, 1):
        options = EngineOptions(device="cuda", dtype="float32", max_tokens_per_microbatch=limit)
        trainer = Trainer(BaseModel(tiny_qwen3, options, rank == 0), LoraConfig(rank=rank, seed=0))
        request = trainer.check(make_data(), "cross_entropy", None)
        loss = trainer.forward_backward(request).output().loss
        weights = trainer.adapter.weights.values()
        found.append((loss, [w.grad.cpu() for w in weights if w.grad is not None]))
    (packed, gradients), (alone, expected) = found
    assert packed == pytest.approx(alone, rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("quantization", [None, "nf4", "fp8"])
def test_a_model_in_bfloat16_and_in_4_and_8_bits_learns_its_data(tiny_qwen3: str, quantization: Any) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    options = EngineOptions(device="cuda:0", quantization=quantization)
    losses = losses_of(Trainer(BaseModel(tiny_qwen3, options), LoraConfig(rank=4, seed=0)), 20)
    assert losses[-1] < 0.9 * losses[0]


def test_sampled_logprobs_are_those_of_a_forward_pass(tiny_qwen3: str, tmp_path: Path) -> None:
    service = ServiceClient(device="cuda", dtype="float32", checkpoint_dir=tmp_path)
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    sampler = client.save_weights_and_get_sampling_client()
    prompt = list(range(20, 40))
    params = SamplingParams(max_tokens=12, seed=0, top_p=0.9, stop=[])
    for sequence in sampler.sample(ModelInput.from_ints(prompt), 4, params).result().sequences:
        text = [*prompt, *sequence.tokens]
        expected = sampler.compute_logprobs(ModelInput.from_ints(text)).result()[len(prompt) :]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)
    service.close()


def test_passes_captured_as_graphs_sample_what_kernels_one_by_one_do(
    tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(switch: str) -> tuple[list[Any], BaseModel]:
        monkeypatch.setenv(decode_graphs.SWITCH, switch)
        base, answers = BaseModel(tiny_qwen3, EngineOptions(device="cuda", dtype="float32")), []
        for _ in range(2):
            params = SamplingParams(max_tokens=40, temperature=0.0, stop=[])
            requests = [sample_request(base, [*range(20, 20 + length)], 2, params) for length in (5, 40, 60)]
            prepared: Future[Any] = Future()
            prepared.set_result((None, 0))
            waiting = [requests[1:]]
            Sampler(base, prepared).run(requests[0], lambda waiting=waiting: waiting.pop() if waiting else [])
            answers += [each for request in requests for each in request.future.result(0).sequences]
        return answers, base

    (captured, base), (plain, other) = sampled("1"), sampled("0")
    assert base.decode_graphs.num_replays > 50
    assert other.decode_graphs is None
    for one, another in zip(captured, plain, strict=True):
        assert one.tokens == another.tokens
        np.testing.assert_allclose(one.logprobs, another.logprobs, atol=1e-4)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs products in 8 bits",
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 1000])
def test_products_in_8_bits_are_those_of_the_rounded_rows(num_rows: int, has_bias: bool) -> None:
    layer = fp8.Fp8Linear(512, 256, bias=has_bias, device="cuda", dtype=torch.bfloat16)
    bytes_OI, scale_O1 = fp8.quantize(torch.randn(256, 512, device="cuda") * 0.05)
    layer.weight = torch.nn.Parameter(bytes_OI, requires_grad=False)
    layer.register_buffer("weight_scale", scale_O1)
    x_NI = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
    x_NI[0] = 0
    assert fp8.has_fp8_products(x_NI, layer)
    rows8_NI, scale_N1 = fp8.rows_in_fp8(x_NI)
    bias = None if layer.bias is None else layer.bias.float()
    expected = torch.nn.functional.linear(rows8_NI.float() * scale_N1, layer.weight_in(torch.float32), bias)
    torch.testing.assert_close(layer(x_NI).float(), expected, rtol=2**-7, atol=2**-7)


_RESUMED = """
import sys
from test_cuda import BaseModel, EngineOptions, LoraConfig, Path, Trainer, losses_of
model, folder, stops = sys.argv[1:]
base = BaseModel(model, EngineOptions(device="cuda", deterministic=True))
trainer = Trainer(base, LoraConfig(rank=4, seed=0))
if stops == "resumes":
    trainer.load(f"{folder}/half", with_optimizer=True)
losses = losses_of(trainer, 6 if stops == "never" else 3)
name = "half" if stops == "stops" else stops
trainer.save(Path(folder, name), with_optimizer=True)
print(*[loss.hex() for loss in losses])
"""


def test_a_resumed_run_is_bit_identical_with_deterministic_kernels(tiny_qwen3: str, tmp_path: Path) -> None:
    """Each run is a process of its own: a workspace of cuBLAS is chosen before CUDA is first used."""
    printed = {}
    for stops in ("never", "stops", "resumes"):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)]),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        printed[stops] = subprocess.run(
            [sys.executable, "-c", _RESUMED, tiny_qwen3, str(tmp_path), stops],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout.split()
    assert printed["never"] == printed["stops"] + printed["resumes"]
    for file in sorted((tmp_path / "never").glob("*.safetensors")):
        resumed = load_file(tmp_path / "resumes" / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, resumed[name]), name


def test_memory_in_use_and_at_its_peak_is_a_metric_of_a_step(tiny_qwen3: str) -> None:
    service = ServiceClient(device="cuda")
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    client.forward_backward(make_data(), "cross_entropy").result()
    metrics = client.optim_step(AdamParams()).result().metrics
    memory = {name: value for name, value in metrics.items() if name.startswith("memory_")}
    assert len(memory) >= 3
    assert all(value > 0 for value in memory.values())
    service.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-fine-tuning"])
def test_two_devices_compute_the_results_of_one(
    ranks: Any, tiny_qwen3: str, tmp_path: Path, shard: str, rank: int
) -> None:
    """The processes communicate by NCCL, and each has its own device."""
    arguments = {"model": tiny_qwen3, "rank": rank, "device": "cuda"}
    (one,) = ranks.results("training:steps", 1, folder=str(tmp_path / "one"), **arguments)
    two = ranks.results("training:steps", 2, folder=str(tmp_path / "two"), shard=shard, **arguments)
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(two[0]["weights"][name], weight, atol=1e-4 * np.abs(weight).max())
        np.testing.assert_array_equal(two[0]["weights"][name], two[1]["weights"][name])
    assert two[0]["norms"] == pytest.approx(one["norms"], rel=1e-4)
