"""Tests of moments in 8 bits against bitsandbytes' own optimizer, AdamW in float32 and a loop in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from outside_world import remove_package
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cookbook.engine.model import estimate
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.training import memory_needs
from cookbook.engine.training.optimizer import Optimizer, bytes_to_train, bytes_to_undo
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import CheckpointError, ConfigError, TrainingError
from cookbook.types import AdamParams, LoraConfig

ADAM = AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SHAPES = {"large": (2049, 2049), "uneven": (77, 93), "transposed": (64, 128), "small": (9, 7)}
"""The first takes two calls of the kernel, the second ends within a block, the last stays in 32 bits."""
KERNEL = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default
EIGHT = EngineOptions(device="cpu", optimizer_bits=8)


def make_weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    values["transposed"] = values["transposed"].T
    return {name: nn.Parameter(value) for name, value in values.items()}


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}


def stepped(optimizer: Optimizer, num_steps: int) -> None:
    for seed in range(num_steps):
        for name, gradient in gradients(seed).items():
            if (weight := optimizer.masters.get(name)) is not None:
                weight.grad = gradient.T if name == "transposed" else gradient
        optimizer.step(ADAM)
        optimizer.discard_gradients()


def test_steps_have_the_bits_of_bitsandbytes() -> None:
    weights, plain = make_weights(), make_weights()
    stepped(Optimizer(weights, bits=8), 2)
    large = {name: weight for name, weight in plain.items() if name != "small"}
    large["transposed"] = nn.Parameter(large["transposed"].detach().contiguous())
    adamw = bitsandbytes.optim.AdamW8bit(
        large.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for seed in range(2):
        for name, gradient in gradients(seed).items():
            if name in large:
                large[name].grad = (gradient.T if name == "transposed" else gradient).contiguous()
        adamw.step()
    for name, weight in large.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.slow
def test_steps_follow_adamw_in_float32_and_small_weights_take_its_very_steps() -> None:
    found, exact = make_weights(), make_weights()
    del found["large"], exact["large"]
    start = {name: weight.detach().clone() for name, weight in exact.items()}
    stepped(Optimizer(found, bits=8), 5)
    stepped(Optimizer(exact, bits=32), 5)
    assert torch.equal(found["small"], exact["small"])
    for name in ("uneven", "transposed"):
        moved, wanted = found[name].detach() - start[name], exact[name].detach() - start[name]
        error = float((moved - wanted).norm() / wanted.norm())
        assert 1e-4 < error < 0.05, name


def test_moments_are_entries_of_a_table_times_the_largest_of_their_block() -> None:
    """A loop over the blocks in numpy, with the nearest entry of the table of bitsandbytes."""
    optimizer = Optimizer({"w": nn.Parameter(torch.zeros(70, 66))}, bits=8)
    gradient = torch.randn(70, 66, generator=torch.Generator().manual_seed(0))
    optimizer.masters["w"].grad = gradient.clone()
    optimizer.step(ADAM)
    saved = optimizer.tensors()
    assert float(saved["w.step"]) == 1
    for name, values, signed in (
        ("exp_avg", 0.1 * gradient, True),
        ("exp_avg_sq", 0.05 * gradient**2, False),
    ):
        table = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
        codes, scales = saved[f"w.{name}"].numpy().reshape(-1), saved[f"w.{name}_scale"].numpy()
        flat = values.numpy().reshape(-1)
        for block in range(len(scales)):
            part = slice(256 * block, 256 * (block + 1))
            np.testing.assert_allclose(scales[block], np.abs(flat[part]).max(), rtol=1e-5)
            nearest = np.abs(table[None] - (flat[part] / scales[block])[:, None]).min(axis=1)
            found = np.abs(table[codes[part]] - flat[part] / scales[block])
            assert (found - nearest).max() < 1e-4  # values are at most 1; the library searches roughly


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    state = {
        **trainer.adapter.weights,
        **{f"{k} (state)": v for k, v in trainer._optimizer.tensors().items()},
    }
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def train(trainer: Trainer, make_data: Any, steps: range) -> None:
    for seed in steps:
        data = make_data(trainer.base.vocab_size, [12, 7], seed=seed)
        trainer.forward_backward(trainer.check(data, "cross_entropy", None))
        trainer.optim_step(ADAM)


@pytest.fixture(scope="module", params=[("float32", 0), ("bfloat16", 0), ("float32", 64)], ids=str)
def base_and_rank(request: Any, tiny_qwen3: str) -> tuple[BaseModel, int]:
    dtype, rank = request.param
    return BaseModel(tiny_qwen3, EngineOptions(device="cpu", dtype=dtype, optimizer_bits=8)), rank


@pytest.mark.cases(1)
def test_a_state_that_is_saved_and_loaded_continues_to_the_same_bits(
    base_and_rank: tuple[BaseModel, int], tiny_qwen3: str, make_data: Any, tmp_path: Path
) -> None:
    base, rank = base_and_rank

    def new() -> Trainer:
        return Trainer(BaseModel(tiny_qwen3, base.options), LoraConfig(rank=rank, seed=0))

    whole, first, second = new(), new(), new()
    train(whole, make_data, range(4))
    train(first, make_data, range(2))
    assert any(tensor.dtype == torch.uint8 for tensor in first._optimizer.tensors().values())
    first.save(tmp_path / "state", with_optimizer=True)
    second.load(str(tmp_path / "state"), with_optimizer=True)
    train(second, make_data, range(2, 4))
    assert_same(state_of(second), state_of(whole))


class FailingAfter(TorchDispatchMode):
    """Makes the kernel fail after it has changed its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is KERNEL:
            raise RuntimeError("no such kernel\nand more")
        return result


def test_a_failed_step_changes_nothing(tiny_qwen3: str, make_data: Any) -> None:
    trainer, reference = (Trainer(BaseModel(tiny_qwen3, EIGHT), LoraConfig(rank=0)) for _ in range(2))
    for each in (trainer, reference):
        train(each, make_data, range(1))
    before = state_of(trainer)
    with FailingAfter(), pytest.raises(TrainingError, match=r"(?s)optim_step failed.*unchanged"):
        train(trainer, make_data, range(5, 6))
    assert_same(state_of(trainer), before)
    for each in (trainer, reference):
        train(each, make_data, range(1, 2))
    assert_same(state_of(trainer), state_of(reference))


@pytest.mark.parametrize("saved", [8, 32])
def test_a_state_of_other_bits_is_refused_with_the_key_and_its_weights_load(
    saved: Any, tiny_qwen3: str, make_data: Any, tmp_path: Path
) -> None:
    def new(bits: Any) -> Trainer:
        options = EngineOptions(device="cpu", optimizer_bits=bits)
        return Trainer(BaseModel(tiny_qwen3, options), LoraConfig(rank=64, seed=0))

    trainer, other = new(saved), new(40 - saved)
    train(trainer, make_data, range(1))
    trainer.save(tmp_path / "state", with_optimizer=True)
    with pytest.raises(
        CheckpointError, match=f"has moments of {saved} bits .*optimizer_bits={40 - saved}. Use"
    ):
        other.load(str(tmp_path / "state"), with_optimizer=True)
    other.load(str(tmp_path / "state"), with_optimizer=False)
    assert_same(other.adapter.weights, trainer.adapter.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_memory_model_are_those_allocated(dtype: torch.dtype) -> None:
    weights = {name: nn.Parameter(torch.zeros(256, 1000, dtype=dtype)) for name in "ab"}
    weights["small"] = nn.Parameter(torch.zeros(8, dtype=dtype))
    optimizer = Optimizer(weights, bits=8)
    held = sum(value.nbytes for state in optimizer._moments.values() for value in state.values())
    held += sum(m.nbytes for name, m in optimizer.masters.items() if m is not weights[name])
    gradients = sum(weight.numel() for weight in weights.values()) * (8 if dtype == torch.float32 else 10)
    assert bytes_to_train(weights.values(), 8) == pytest.approx(held + gradients, rel=1e-4)
    assert bytes_to_train(weights.values(), 8) < bytes_to_train(weights.values()) - 5.9 * 2 * 256 * 1000
    copies = sum(m.nbytes for m in optimizer.masters.values())
    copies += sum(value.nbytes for state in optimizer._moments.values() for value in state.values())
    assert bytes_to_undo(weights.values(), 8) == pytest.approx(copies, rel=1e-4)


def test_the_estimate_counts_what_a_loaded_model_holds(tiny_qwen3: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_qwen3)
    found, in_32 = (
        estimate.footprint(config, tiny_qwen3, LoraConfig(rank=0), EngineOptions(optimizer_bits=bits), "cpu")
        for bits in (8, 32)
    )
    base = BaseModel(tiny_qwen3, EIGHT, is_trained=True)
    trainer = Trainer(base, LoraConfig(rank=0))
    assert found.fixed == memory_needs.reserved_bytes(base, trainer.adapter)
    large = [weight.numel() for weight in trainer.adapter.weights.values() if weight.numel() >= 4096]
    assert in_32.training - found.training == 2 * sum(3 * size - 4 * -(-size // 256) for size in large) > 1e5


def test_a_device_without_a_kernel_is_refused_with_the_library_s_reason() -> None:
    with (
        FailingAfter(),
        pytest.raises(
            ConfigError, match=r"optimizer_bits=8 is not supported on cpu: bitsandbytes .*\(no such kernel\)"
        ),
    ):
        Optimizer({"w": nn.Parameter(torch.zeros(64, 64))}, bits=8)


def test_options_that_cannot_be_honoured_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="optimizer_bits=16 is not supported. Use 32 or 8"):
        EngineOptions(optimizer_bits=16)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="optimizer_bits=8 is not supported with shard=full"):
        EngineOptions(optimizer_bits=8, shard="full")
    remove_package(monkeypatch, "bitsandbytes")
    with pytest.raises(ConfigError, match=r"optimizer_bits=8 needs the package bitsandbytes"):
        EngineOptions(optimizer_bits=8)


def test_an_adapter_too_small_for_8_bits_is_told(tiny_qwen3: str, caplog: Any) -> None:
    Trainer(BaseModel(tiny_qwen3, EIGHT), LoraConfig(rank=1))
    assert "optimizer_bits=8 has no effect" in caplog.text
