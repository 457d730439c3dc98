"""Tests of the size of micro-batches, of layer checkpointing, and of running out of memory."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import outside_world
import pytest
import torch
from slow import slow_after, slow_except
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cookbook.engine.model import memory
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import (
    FIRST_PATIENCE,
    ActivationCost,
    MicrobatchLimits,
    Recovery,
    addresses,
    checkpointed_layers,
    is_out_of_memory,
    limits_for,
    measure_activations,
    usable_memory,
)
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.options import EngineOptions
from cookbook.engine.training import memory_needs
from cookbook.engine.training.memory_needs import activation_cost, reserved_bytes
from cookbook.engine.training.partition import plan_microbatches
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ModelError, TrainingError
from cookbook.types import AdamParams, LoraConfig

CPU = torch.device("cpu")
NEVER = 2**62
LOGGER = "cookbook.engine.training.adaptive_limits"

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": MemoryError("Unable to allocate 8.00 GiB for an array"),
}


class TightModel(BaseModel):
    """A model that runs out of memory at the end of a pass over too many tokens."""

    room = room_checkpointed = NEVER
    error: Exception = OUT_OF_MEMORY["cuda"]

    def __init__(self, *arguments: Any) -> None:
        self.passes: list[tuple[int, bool]] = []
        self.held_when_tried_again = False
        self._ballast: Callable[[], object] = lambda: None
        super().__init__(*arguments)
        self.passes.clear()  # those of the trial at the load

    def _use(self, batch: PackedBatch, is_checkpointed: bool) -> Tensor:
        num_tokens = batch.tokens_1N.shape[1]
        self.passes.append((num_tokens, is_checkpointed))
        self.held_when_tried_again |= self._ballast() is not None
        ballast = torch.zeros(1)
        self._ballast = weakref.ref(ballast)
        if num_tokens > (self.room_checkpointed if is_checkpointed else self.room):
            raise type(self.error)(
                *self.error.args
            )  # a new error for each pass, because an exception holds the frames it went through
        return ballast

    def backpropagate(
        self, batch: PackedBatch, token_loss: Any, checkpoint_layers: bool, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        # The gradient of a failed pass is partly computed.
        result = super().backpropagate(batch, token_loss, checkpoint_layers, *rest)
        ballast = self._use(batch, checkpoint_layers)
        del ballast
        return result

    def logprobs(self, batch: PackedBatch) -> Tensor:
        if self.room < NEVER:
            self._use(batch, False)
        return super().logprobs(batch)


@pytest.fixture
def make_tight(tiny_qwen3: str, make_trainer: Any) -> Callable[..., Trainer]:
    def make(
        checkpointing: str = "auto",
        max_tokens: int = 1000,
        first_patience: int = FIRST_PATIENCE,
        **attributes: Any,
    ) -> Trainer:
        options = EngineOptions(gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        base = TightModel(tiny_qwen3, options)
        trainer: Trainer = make_trainer(base, first_patience=first_patience)
        trainer.limits.current = MicrobatchLimits(max_tokens, 0 if checkpointing == "on" else NEVER)
        for name, value in attributes.items():
            setattr(base, name, value)
        return trainer

    return make


@pytest.fixture
def reference_run(tiny_qwen3: str, make_trainer: Any, gradients_of: Any) -> Callable[..., Any]:
    """Returns the log-probabilities and gradients of a run without failures."""

    def run(*requests: list[Any]) -> tuple[list[np.ndarray], dict[str, Tensor]]:
        trainer = make_trainer(tiny_qwen3)
        for data in requests:
            result = trainer.forward_backward(trainer.check(data, "cross_entropy", None))
        return result.logprobs(), gradients_of(trainer)

    return run


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        yield lambda: [record.message for record in caplog.records if record.name == LOGGER]


# -- running out of memory ----------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("device", OUT_OF_MEMORY)
def test_a_microbatch_that_does_not_fit_is_halved_and_the_pass_is_repeated(
    device: str,
    make_tight: Any,
    make_data: Any,
    gradients_of: Any,
    assert_close: Any,
    reference_run: Any,
    warnings: Any,
) -> None:
    trainer = make_tight(room=70, error=OUT_OF_MEMORY[device])
    data = make_data(trainer.base.vocab_size, [30] * 8)
    expected_logprobs, expected_gradients = reference_run(data)
    result = trainer.forward_backward(trainer.check(data, "cross_entropy", None))

    assert trainer.base.passes == [(240, False), (120, False), *[(60, False)] * 4]
    assert warnings() == [
        "A micro-batch of 240 tokens does not fit in memory: continuing with 120 at most.",
        "A micro-batch of 120 tokens does not fit in memory: continuing with 60 at most.",
    ]
    for found, expected in zip(result.logprobs(), expected_logprobs, strict=True):
        assert_close(found, expected)
    assert gradients_of(trainer).keys() == expected_gradients.keys()
    for name, gradient in gradients_of(trainer).items():
        assert_close(gradient, expected_gradients[name])

    trainer.base.passes.clear()
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    assert trainer.base.passes == [(60, False)] * 4, "the lowered limit is kept"


def test_a_pass_that_did_not_fit_is_freed_before_it_is_repeated(make_tight: Any, make_data: Any) -> None:
    trainer = make_tight(room=70)
    trainer.forward_backward(
        trainer.check(make_data(trainer.base.vocab_size, [30] * 4), "cross_entropy", None)
    )
    assert [tokens for tokens, _ in trainer.base.passes] == [120, 60, 60]
    assert not trainer.base.held_when_tried_again


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
def test_a_pass_that_did_not_fit_keeps_the_gradients_of_earlier_calls(
    backward: bool, make_tight: Any, make_data: Any, gradients_of: Any, assert_close: Any, reference_run: Any
) -> None:
    trainer = make_tight(room=70)
    first, second = (make_data(trainer.base.vocab_size, [30] * n, seed=n) for n in (2, 4))
    _, expected = reference_run(first, second) if backward else reference_run(first)
    trainer.forward_backward(trainer.check(first, "cross_entropy", None))
    run = trainer.forward_backward if backward else trainer.forward
    run(trainer.check(second, "cross_entropy", None))
    assert (120, False) in trainer.base.passes
    assert gradients_of(trainer).keys() == expected.keys()
    for name, gradient in gradients_of(trainer).items():
        assert_close(gradient, expected[name])


def test_the_layers_of_a_single_sequence_that_does_not_fit_are_checkpointed(
    make_tight: Any, make_data: Any, gradients_of: Any, assert_close: Any, reference_run: Any, warnings: Any
) -> None:
    trainer = make_tight(max_tokens=1, room=45, first_patience=3)
    data = make_data(trainer.base.vocab_size, [40, 60, 50])
    _, expected = reference_run(data)
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    assert trainer.base.passes[-3:] == [(40, False), (60, True), (50, True)]
    assert warnings() == [
        f"A sequence of {tokens} tokens does not fit in memory: its layers are checkpointed from now on."
        for tokens in (60, 50)
    ]
    for name, gradient in gradients_of(trainer).items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize(
    ("checkpointing", "advice"),
    [
        ("auto", "Use a smaller max_length"),
        ("on", "Use a smaller max_length"),
        ("off", "Use gradient_checkpointing=auto, a smaller max_length"),
    ],
)
def test_a_single_sequence_that_never_fits_raises_an_error_with_advice(
    checkpointing: str, advice: str, make_tight: Any, make_data: Any, gradients_of: Any
) -> None:
    trainer = make_tight(checkpointing, room=30, room_checkpointed=45)
    short, long = (make_data(trainer.base.vocab_size, [length]) for length in (20, 60))
    trainer.forward_backward(trainer.check(short, "cross_entropy", None))
    before = gradients_of(trainer)

    with pytest.raises(
        TrainingError, match=f"A sequence of 60 tokens does not fit.*even alone. {advice}"
    ) as raised:
        trainer.forward_backward(trainer.check([*short, *long], "cross_entropy", None))

    assert "may be used: weights " in str(raised.value)
    for holder in ("adapter", "gradients and optimizer"):
        assert f", {holder} " in str(raised.value)
    after = gradients_of(trainer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    trainer.forward_backward(trainer.check(short, "cross_entropy", None))
    trainer.optim_step(AdamParams(learning_rate=1e-3))


def test_what_holds_the_memory_is_told_in_bytes(tiny_qwen3: str, make_trainer: Any) -> None:
    trainer = make_trainer(tiny_qwen3)
    told = memory_needs.describe(trainer.base, trainer.adapter, 100)
    found = {name: float(gib) * 2**30 for name, gib in re.findall(r"([a-z ]+) ([\d.e-]+) GiB", told)}
    frozen = sum(w.nbytes for w in trainer.base.model.parameters() if not w.requires_grad)
    trained = sum(w.nbytes for w in trainer.adapter.weights.values())
    assert found[" weights"] == pytest.approx(frozen, rel=0.01)
    assert found[" adapter"] == pytest.approx(trained, rel=0.01)
    assert found[" gradients and optimizer"] == pytest.approx(4 * trained, rel=0.01)
    cost = memory_needs.activation_cost(trainer.base, trainer.adapter)
    assert found[" tokens an estimated"] == pytest.approx(cost.bytes_of(100), rel=0.01)


def test_a_model_without_room_for_its_weights_is_an_error_with_their_size(
    tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside_world.fail_to_load(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(ModelError, match=r"GiB are needed for its weights in float32.*quantization=nf4"):
        BaseModel(tiny_qwen3, EngineOptions(device="cpu"))


def test_a_forward_pass_that_does_not_fit_is_halved_and_never_checkpointed(
    make_tight: Any, make_data: Any, warnings: Any
) -> None:
    trainer = make_tight(room=70)
    data = make_data(trainer.base.vocab_size, [30] * 4)
    assert len(trainer.forward(trainer.check(data, "cross_entropy", None)).logprobs()) == 4
    assert trainer.base.passes == [(120, False), (60, False), (60, False)]
    assert len(warnings()) == 1
    with pytest.raises(TrainingError, match="even alone. Use a smaller max_length"):
        trainer.forward(trainer.check(make_data(trainer.base.vocab_size, [80]), "cross_entropy", None))


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_plans_the_same_micro_batches_when_resumed(
    make_tight: Any, make_data: Any, tmp_path: Path
) -> None:
    trainer, ample = make_tight(room=70), make_tight()
    request = trainer.check(make_data(trainer.base.vocab_size, [30] * 8), "cross_entropy", None)
    trainer.forward_backward(request)
    ample.forward_backward(request)
    trainer.save(tmp_path / "tight", with_optimizer=True)
    ample.save(tmp_path / "ample", with_optimizer=True)
    ample.load(str(tmp_path / "ample"), with_optimizer=True)
    assert ample.limits.current.max_tokens == 1000
    ample.load(str(tmp_path / "tight"), with_optimizer=True)
    assert ample.limits.current == trainer.limits.current
    assert ample.limits.current.max_tokens == 60


def test_a_pass_is_not_repeated_after_other_errors(make_tight: Any, make_data: Any, warnings: Any) -> None:
    trainer = make_tight(room=70, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(TrainingError, match="shapes cannot be multiplied"):
        trainer.forward_backward(
            trainer.check(make_data(trainer.base.vocab_size, [90]), "cross_entropy", None)
        )
    assert len(trainer.base.passes) == 1
    assert not warnings()
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# -- recognising out-of-memory errors -----------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        *map(
            RuntimeError,
            [
                "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.93 GiB total capacity)",
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
                "cudaErrorMemoryAllocation",
                "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
                "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM(...)`",
                "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
                "cuFFT error: CUFFT_ALLOC_FAILED",
                "HIP out of memory. Tried to allocate 2.00 GiB.",
                "HIP error: out of memory",
                "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
                "rocblas_status_memory_error",
                "MPS backend out of memory (MPS allocated: 17.94 GB, other allocations: 160.02 MB)",
                "XPU out of memory. Tried to allocate 2.00 GiB",
                "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error, NCCL version 2.21.5\n"
                "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                "Cuda failure 2 'out of memory'",
                "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                "Cuda failure 'out of memory'",
                "ncclSystemError: System call failed. NCCL version 2.27.3\n"
                "Failed to CUDA calloc async 608 bytes",
                "ncclUnhandledCudaError\nLast error:\nFailed to CUDA malloc 4194304 bytes",
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
                "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried "
                "to allocate 8589934592 bytes.",
                "std::bad_alloc",
                "unable to mmap 17179869184 bytes from file </tmp/x>: Cannot allocate memory (12)",
            ],
        ),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_every_out_of_memory_error_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory"),
        KeyError("out of memory"),
        OSError(28, "No space left on device"),
        *map(
            RuntimeError,
            [
                "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
                "CUDA error: device-side assert triggered",
                "CUDA error: an illegal memory access was encountered",
                "CUDA error: misaligned address",
                "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
                "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(...)`",
                "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
                "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
                "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error. Connection refused",
                "Cuda failure 719 'unspecified launch failure'",
                "Expected all tensors to be on the same device, but found at least two devices",
                "out of resource: shared memory, Required: 131072, Hardware limit: 101376",
                "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
                "index out of range in self",
                "one of the variables needed for gradient computation has been modified by an inplace op",
            ],
        ),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not_taken_for_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# -- limits that recover ----------------------------------------------------------------------


def run_passes(trainer: Trainer, request: Any, number: int) -> list[int]:
    """Returns the limit after each pass."""
    found = []
    for _ in range(number):
        found.append(trainer.limits.current.max_tokens)
        trainer.forward_backward(request)
        trainer.discard_gradients()
    return found


@pytest.mark.slow
def test_limits_recover_after_passes_without_a_failure(make_tight: Any, make_data: Any) -> None:
    trainer = make_tight(room=70, first_patience=3)
    trainer.limits.full = trainer.limits.current
    request = trainer.check(make_data(trainer.base.vocab_size, [30] * 8), "cross_entropy", None)
    assert run_passes(trainer, request, 1) == [1000]
    trainer.base.room = NEVER  # there is enough memory again
    assert run_passes(trainer, request, 16) == [60] * 3 + [120] * 3 + [240] * 3 + [480] * 3 + [960] * 3 + [
        1000
    ]
    run_passes(trainer, request, 3)
    assert not trainer.limits.recovery.is_needed, "the recovery is complete"


@pytest.mark.slow
def test_limits_that_are_too_large_are_tried_less_and_less_often(make_tight: Any, make_data: Any) -> None:
    trainer = make_tight(room=70, first_patience=3)
    trainer.limits.full = trainer.limits.current
    request = trainer.check(make_data(trainer.base.vocab_size, [30] * 8), "cross_entropy", None)
    found = run_passes(trainer, request, 40)
    tried = [number for number, limit in enumerate(found) if limit > 60]
    assert tried == [0, 4, 11, 24], "3, then 6, then 12 passes apart"
    assert Recovery(patience=memory._MAX_PATIENCE).after_failure(3).patience == memory._MAX_PATIENCE


@pytest.mark.slow
def test_a_sequence_that_was_checkpointed_is_tried_again_without_checkpointing(
    make_tight: Any, make_data: Any
) -> None:
    trainer = make_tight(max_tokens=1, room=45, first_patience=3)
    request = trainer.check(make_data(trainer.base.vocab_size, [60]), "cross_entropy", None)
    trainer.forward_backward(request)
    assert trainer.limits.current.max_tokens_without_checkpointing == 59
    trainer.base.room = NEVER
    run_passes(trainer, request, 3)
    trainer.base.passes.clear()
    run_passes(trainer, request, 1)
    assert trainer.base.passes == [(60, False)]


@pytest.mark.slow
def test_forward_passes_do_not_raise_limits(make_tight: Any, make_data: Any) -> None:
    """A resumed run may make another number of forward passes."""
    trainer = make_tight(room=70, first_patience=3)
    request = trainer.check(make_data(trainer.base.vocab_size, [30] * 8), "cross_entropy", None)
    trainer.forward_backward(request)
    for _ in range(5):
        trainer.forward(request)
    assert trainer.limits.current.max_tokens == 60


@pytest.mark.slow
@pytest.mark.parametrize("saved_after", slow_after(1, [4, 1, 5, 8]))
def test_a_resumed_run_raises_its_limits_at_the_same_passes(
    saved_after: int, make_tight: Any, make_data: Any, tmp_path: Path
) -> None:
    trainer, resumed = (make_tight(room=70, first_patience=3) for _ in range(2))
    for each in (trainer, resumed):
        each.limits.full = each.limits.current
    request = trainer.check(make_data(trainer.base.vocab_size, [30] * 8), "cross_entropy", None)
    run_passes(trainer, request, saved_after)
    trainer.save(tmp_path / "state", with_optimizer=True)
    resumed.load(str(tmp_path / "state"), with_optimizer=True)
    assert run_passes(resumed, request, 20) == run_passes(trainer, request, 20)
    assert resumed.limits.recovery == trainer.limits.recovery


REAL = """
import resource, sys
import numpy as np
import torch
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import MicrobatchLimits
from cookbook.engine.training.partition import plan_microbatches
from cookbook.engine.training.trainer import Trainer
from cookbook.types import Datum, LoraConfig, ModelInput

trainer = Trainer(BaseModel(sys.argv[1]), LoraConfig(rank=4, seed=0))
tokens = np.random.default_rng(0).integers(0, 300, (40, 101))
data = [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in tokens]

def run(max_tokens):
    trainer.limits.current = MicrobatchLimits(max_tokens, 2**62)
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    gradients = {name: p.grad.clone() for name, p in trainer.adapter.weights.items()}
    trainer.discard_gradients()
    return gradients

expected = run(100)
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20, hard))
found = run(4000)
assert trainer.limits.current.max_tokens in (2000, 1000, 500), trainer.limits.current
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from /proc")
def test_a_process_that_runs_out_of_real_memory_computes_the_right_gradients(
    make_model_folder: Any, tmp_path: Path
) -> None:
    """4,000 tokens at 110 kB each do not fit in 100 MB."""
    folder = make_model_folder(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64
    )
    ran = subprocess.run(
        [sys.executable, "-c", REAL, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if "does not fit in memory" in line]
    assert 1 <= len(lines) <= 3
    assert lines[0] == "A micro-batch of 4000 tokens does not fit in memory: continuing with 2000 at most."


# -- limits -----------------------------------------------------------------------------------


def test_a_cpu_shares_its_memory_with_other_programs() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < usable_memory(CPU) <= total / 2


@pytest.mark.parametrize(
    ("device", "free_bytes", "checkpointing", "wanted", "expected"),
    [
        # A token takes 1000 bytes, or 100 if checkpointed, and a fourth of that as workspace.
        ("cpu", 5_000_000, "auto", None, (4000, 4000)),
        ("cpu", 5_000_000, "off", None, (4000, NEVER)),
        ("cpu", 50_000_000, "auto", None, (4096, 40000)),
        ("cpu", 50_000_000, "on", None, (4096, 0)),
        ("cuda", 50_000_000, "auto", None, (16384, 40000)),
        ("cuda", 1_500_000, "auto", None, (1200, 1200)),
        ("cuda", 1_000_000, "auto", None, (8000, 800)),
        ("cuda", 200_000, "auto", None, (1600, 160)),
        ("cpu", 1_000_000, "off", None, (800, NEVER)),
        ("cpu", 100_000, "on", None, (800, 0)),
        ("cpu", 5_000_000, "auto", 500, (500, 4000)),
        ("cpu", 1_000_000, "auto", 3000, (3000, 800)),
        ("cpu", 500, "on", 500, (500, 0)),
        ("cpu", 500, "off", 500, (500, NEVER)),
        ("cpu", -100_000, "auto", None, (1, 0)),
        ("cpu", -100_000, "off", None, (1, NEVER)),
    ],
)
def test_limits_that_the_options_do_not_set_follow_from_the_memory(
    device: str,
    free_bytes: float,
    checkpointing: Any,
    wanted: int | None,
    expected: tuple[int, int],
) -> None:
    options = EngineOptions(max_tokens_per_microbatch=wanted, gradient_checkpointing=checkpointing)
    cost = ActivationCost(full=1000, checkpointed=100)
    if wanted and checkpointing != "auto":
        limits = limits_for(options, torch.device(device), pytest.fail, free_bytes)  # nothing is measured
    else:
        limits = limits_for(options, torch.device(device), lambda: cost, free_bytes)
    assert (limits.max_tokens, limits.max_tokens_without_checkpointing) == expected


def test_activations_without_cost_set_no_limit() -> None:
    limits = limits_for(EngineOptions(), CPU, lambda: ActivationCost(0, 0), 5_000_000)
    assert limits.max_tokens == 4096


@pytest.mark.parametrize(("bytes_per_token", "expected"), [(100_000, 1024), (40_000, 2048), (20_000, 4096)])
def test_micro_batches_on_a_cpu_are_larger_in_small_models(bytes_per_token: int, expected: int) -> None:
    cost = ActivationCost(full=bytes_per_token, checkpointed=100)
    assert limits_for(EngineOptions(), CPU, lambda: cost, 1e12).max_tokens == expected


def test_kept_activations_are_counted_once_and_without_weights() -> None:
    """Kept are x for the first weight, and the sigmoid's result for the second weight and for itself."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    cost = measure_activations(
        lambda: model(torch.zeros(10, 8)), addresses(model.parameters()), 10, num_layers=2, layer_bytes=32
    )
    assert cost == ActivationCost(full=4 * (8 + 16), checkpointed=2 * 32 + 4 * (8 + 16) / 2)
    frozen = model.requires_grad_(False)
    x = torch.zeros(10, 8, requires_grad=True)
    cost = measure_activations(lambda: frozen(x), addresses(frozen.parameters()), 10, 2, 32)
    assert cost.full == 4 * 16


def kept_bytes(trainer: Trainer, num_tokens: int, is_checkpointed: bool) -> float:
    """Returns the bytes per token that a forward pass allocated and kept, according to the profiler."""
    ids_T = np.zeros(num_tokens, np.int64)
    batch = pack([TokenSequence(ids_T, ids_T, np.ones(num_tokens, np.float32), {})], CPU, trained_only=True)
    with (
        trainer.base.adapters.using(trainer.adapter),
        torch.enable_grad(),
        checkpointed_layers(trainer.base.model, is_checkpointed),
    ):
        trainer.base.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            hidden_ND = trainer.base.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        assert hidden_ND.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages()) / num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("train_mlp", slow_after(1, [True, False]))
@pytest.mark.parametrize("model_type", slow_after(1, ["qwen3", "gemma3_text"]))
def test_the_measured_cost_equals_that_of_the_allocator(
    model_type: str, train_mlp: bool, make_model_folder: Any, make_trainer: Any, tmp_path: Path
) -> None:
    folder = make_model_folder(
        tmp_path / "model", model_type, hidden_size=64, intermediate_size=128, num_hidden_layers=6
    )
    trainer = make_trainer(str(folder), train_mlp=train_mlp)
    cost = activation_cost(trainer.base, trainer.adapter)
    full, checkpointed = (kept_bytes(trainer, 200, is_checkpointed) for is_checkpointed in (False, True))
    assert cost.full == pytest.approx(full, rel=0.1)
    one_layer = full / 6
    assert checkpointed < 1.5 * one_layer
    assert cost.checkpointed == pytest.approx(checkpointed + one_layer, rel=0.25)


BY_HAND = {
    "gemma2": {"sliding_window": 4096},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    "llama": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", slow_except(["gpt_oss"], BY_HAND))
def test_the_estimate_holds_beyond_the_measured_lengths(
    model_type: str, make_model_folder: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """With attention that keeps its scores, memory grows quadratically with the length of a sequence."""
    folder = make_model_folder(
        tmp_path / "model", model_type, max_position_embeddings=4096, **BY_HAND[model_type]
    )
    trainer = make_trainer(str(folder), train_mlp=model_type != "gpt_oss")
    cost = activation_cost(trainer.base, trainer.adapter)
    assert (cost.full_squared > 1) == (model_type != "llama")
    for num_tokens in (256, 1024):
        for is_checkpointed in (False, True):
            kept = kept_bytes(trainer, num_tokens, is_checkpointed) * num_tokens
            found = cost.bytes_of(num_tokens, is_checkpointed)
            # checkpointing keeps the activations of one layer in the backward pass
            one_layer = cost.bytes_of(num_tokens) / 2
            assert found == pytest.approx(kept + one_layer * is_checkpointed, rel=0.25)


def test_micro_batches_are_planned_by_their_memory(
    make_model_folder: Any, make_trainer: Any, tmp_path: Path
) -> None:
    folder = make_model_folder(
        tmp_path / "model", "gemma2", max_position_embeddings=4096, **BY_HAND["gemma2"]
    )
    trainer = make_trainer(str(folder))
    cost = activation_cost(trainer.base, trainer.adapter)
    room = cost.bytes_of(1024) * 1.5
    free_bytes = room * memory.MARGIN
    limits = limits_for(EngineOptions(), CPU, lambda: cost, free_bytes)

    def is_checkpointed(*lengths: int) -> bool:
        size = sum(map(limits.size_without_checkpointing, lengths))
        return size > limits.max_tokens_without_checkpointing

    assert not is_checkpointed(1024)
    assert is_checkpointed(2048), "twice the tokens, four times the memory"
    assert is_checkpointed(1024, 1024)
    assert not is_checkpointed(*[128] * 16), "as many tokens, in short sequences"
    for lengths in ([1024] * 4, [300] * 12, [32] * 64, [700, 20, 20, 900, 33]):
        for indices in plan_microbatches([limits.size(length) for length in lengths], limits.max_tokens):
            here = [lengths[index] for index in indices]
            assert sum(map(cost.bytes_of, here)) <= room or len(here) == 1
            assert sum(here) <= 4096
    plain = limits_for(EngineOptions(), CPU, lambda: ActivationCost(1000, 100), free_bytes)
    assert [plain.size(length) for length in (1, 17, 4096)] == [1, 17, 4096]
    wanted = limits_for(EngineOptions(max_tokens_per_microbatch=500), CPU, lambda: cost, free_bytes)
    assert [wanted.size(length) for length in (1, 17, 4096)] == [1, 17, 4096], "tokens, as the option says"


@pytest.mark.parametrize(("dtype", "per_weight"), [("float32", 20), ("bfloat16", 24)])
def test_a_full_fine_tune_reserves_the_memory_it_needs(dtype: str, per_weight: int, tiny_qwen3: str) -> None:
    base = BaseModel(tiny_qwen3, EngineOptions(dtype=dtype), True)
    trainer = Trainer(base, LoraConfig(rank=0))
    num_weights = sum(weight.numel() for weight in trainer.adapter.weights.values())
    assert reserved_bytes(base, trainer.adapter) == per_weight * num_weights


# -- checkpointed layers ----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_checkpointed_layers_are_restored(fails: bool, tiny_qwen3: str) -> None:
    model = BaseModel(tiny_qwen3).model
    with pytest.raises(ZeroDivisionError) if fails else checkpointed_layers(model, False):  # noqa: SIM117
        with checkpointed_layers(model, True):
            assert sum(module.training for module in model.modules()) == 2, (
                "its two layers and nothing below them"
            )
            if fails:
                raise ZeroDivisionError
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("opt", {"dropout": 0.9, "attention_dropout": 0.9, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("phi", {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attention_dropout": 0.9}),
        ("qwen3", {"attention_dropout": 0.9}),
    ],
)
def test_a_checkpointed_layer_applies_no_dropout(
    model_type: str,
    config: dict[str, Any],
    make_model_folder: Any,
    make_trainer: Any,
    make_data: Any,
    gradients_of: Any,
    tmp_path: Path,
) -> None:
    trainer = make_trainer(str(make_model_folder(tmp_path / "model", model_type, **config)))
    request = trainer.check(make_data(trainer.base.vocab_size, [30, 20]), "cross_entropy", None)
    found = []
    for checkpoint_beyond in (NEVER, 0):
        trainer.limits.current = MicrobatchLimits(1000, checkpoint_beyond)
        logprobs = trainer.forward_backward(request).logprobs()
        found.append((logprobs, gradients_of(trainer)))
        trainer.discard_gradients()
    (logprobs, gradients), (logprobs_checkpointed, gradients_checkpointed) = found
    for one, other in zip(logprobs, logprobs_checkpointed, strict=True):
        np.testing.assert_array_equal(one, other)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_checkpointed[name], gradient)
