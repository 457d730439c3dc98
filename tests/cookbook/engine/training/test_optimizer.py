"""Tests that a step is taken completely or not at all, and that its memory is reserved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cookbook.engine.training import optimizer as optimizer_module
from cookbook.engine.training.optimizer import Optimizer, bytes_to_train, bytes_to_undo
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import TrainingError
from cookbook.types import AdamParams

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def make_weights(dtype: torch.dtype, number: int = 3) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"w{index}": nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype)) for index in range(number)
    }


def pass_over(optimizer: Optimizer, seed: int) -> None:
    """Leaves gradients like a backward pass that does not reach the last weight."""
    generator = torch.Generator().manual_seed(seed)
    for weight in list(optimizer._weights.values())[:-1]:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    optimizer.collect_gradients()


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    everything = {name: weight.detach() for name, weight in optimizer._weights.items()} | optimizer.tensors()
    return {name: tensor.clone() for name, tensor in everything.items()} | {
        "num": torch.tensor(optimizer.num_steps)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


class Failing(TorchDispatchMode):
    """Makes one torch operation fail once, after it changed the first of its tensors.

    This stands for a device that runs out of memory, or a process that is killed, during a step.
    """

    def __init__(self, operation: Any, error: BaseException = OUT_OF_MEMORY) -> None:
        super().__init__()
        self._operation, self._error = operation, error
        self.has_failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.has_failed or func is not self._operation:
            return func(*args, **(kwargs or {}))
        self.has_failed = True
        func(*(part[:1] if isinstance(part, list) else part for part in args), **(kwargs or {}))
        raise self._error


NORM = torch.ops.aten._foreach_norm.Scalar
CLIPPING = torch.ops.aten._foreach_mul_.Tensor
ADAMW = torch.ops.aten._fused_adamw_.default
COPYING = torch.ops.aten.copy_.default
"""The operations of a step in their order. The last one copies a master to a weight of lower precision."""


@pytest.mark.parametrize("num_steps_before", [0, 2])
@pytest.mark.parametrize(
    ("operation", "error", "dtype"),
    [
        *(
            (operation, OUT_OF_MEMORY, dtype)
            for operation in (NORM, CLIPPING, ADAMW)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (ADAMW, SystemExit(), torch.float32),
        (COPYING, SystemExit(), torch.bfloat16),
    ],
    ids=str,
)
def test_a_failed_step_changes_nothing(
    operation: Any, error: BaseException, dtype: torch.dtype, num_steps_before: int
) -> None:
    optimizer, reference = (Optimizer(make_weights(dtype)) for _ in range(2))
    for seed in range(num_steps_before):
        for each in (optimizer, reference):
            pass_over(each, seed)
            each.step(ADAM)
            each.discard_gradients()
    before = state_of(optimizer)
    pass_over(optimizer, 7)
    with Failing(operation, error), pytest.raises(type(error)):
        optimizer.step(ADAM)
    assert_same(state_of(optimizer), before)
    assert not optimizer.is_half_stepped
    optimizer.discard_gradients()
    for each in (optimizer, reference):
        pass_over(each, 8)
        each.step(ADAM)
    assert_same(state_of(optimizer), state_of(reference))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
def test_a_client_continues_after_a_failed_step(
    rank: int, tiny_qwen3: str, make_trainer: Any, make_data: Any
) -> None:
    """The next step uses its own batch alone, because the gradients of the failed step are dropped."""
    trainer, reference = (_trainer(tiny_qwen3, rank) for _ in range(2))
    batches = [make_data(trainer.base.vocab_size, [9, 5], seed=seed) for seed in range(2)]
    before = {name: weight.detach().clone() for name, weight in trainer.adapter.weights.items()}
    trainer.forward_backward(trainer.check(batches[0], "cross_entropy", None))
    with (
        Failing(ADAMW),
        pytest.raises(TrainingError, match="optim_step failed: OutOfMemoryError.*unchanged"),
    ):
        trainer.optim_step(ADAM)
    for name, weight in trainer.adapter.weights.items():
        assert torch.equal(weight, before[name])
    with pytest.raises(TrainingError, match="nothing to step on"):
        trainer.optim_step(ADAM)
    for each in (trainer, reference):
        each.forward_backward(each.check(batches[1], "cross_entropy", None))
        each.optim_step(ADAM)
    assert_same(state_of(trainer._optimizer), state_of(reference._optimizer))


def _trainer(model: str, rank: int) -> Trainer:
    from cookbook.engine.model.base_model import BaseModel
    from cookbook.types import LoraConfig

    return Trainer(BaseModel(model), LoraConfig(rank=rank, seed=0))


def test_after_a_failed_step_that_cannot_be_undone_a_state_must_be_loaded(
    tiny_qwen3: str, make_data: Any, tmp_path: Any
) -> None:
    trainer = _trainer(tiny_qwen3, 4)
    trainer.save(tmp_path / "good", with_optimizer=True)
    request = trainer.check(make_data(trainer.base.vocab_size, [9]), "cross_entropy", None)
    trainer.forward_backward(request)
    trainer._optimizer._can_undo = False
    with Failing(ADAMW), pytest.raises(TrainingError, match="half-way.*load_state_with_optimizer"):
        trainer.optim_step(ADAM)
    for call in (
        lambda: trainer.forward(request),
        lambda: trainer.forward_backward(request),
        lambda: trainer.optim_step(ADAM),
        lambda: trainer.save(tmp_path / "bad", with_optimizer=True),
    ):
        with pytest.raises(TrainingError, match="half-way"):
            call()
    trainer.load(str(tmp_path / "good"), with_optimizer=True)
    trainer.forward_backward(request)
    trainer.optim_step(ADAM)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [NORM, CLIPPING], ids=str)
def test_a_step_that_fails_before_any_change_needs_no_undo(
    operation: Any, tiny_qwen3: str, make_data: Any
) -> None:
    trainer, reference = (_trainer(tiny_qwen3, 4) for _ in range(2))
    trainer._optimizer._can_undo = False
    request = trainer.check(make_data(trainer.base.vocab_size, [9]), "cross_entropy", None)
    trainer.forward_backward(request)
    with (
        Failing(operation),
        pytest.raises(TrainingError, match="optim_step failed: OutOfMemoryError.*unchanged"),
    ):
        trainer.optim_step(ADAM)
    for each in (trainer, reference):
        each.forward_backward(request)
        each.optim_step(ADAM)
    assert_same(state_of(trainer._optimizer), state_of(reference._optimizer))


def test_a_step_is_taken_without_copies_if_they_do_not_fit() -> None:
    optimizer = Optimizer(make_weights(torch.float32))
    pass_over(optimizer, 0)
    with Failing(torch.ops.aten.empty_like.default) as torch_of_little_memory:
        optimizer.step(ADAM)
    assert torch_of_little_memory.has_failed
    assert optimizer.num_steps == 1


def test_moments_are_allocated_at_creation_and_saved_once_used() -> None:
    optimizer = Optimizer(make_weights(torch.float32))
    assert optimizer.tensors() == {}
    moments = {id(value) for state in optimizer._moments.values() for value in state.values()}
    assert len(moments) == 9
    pass_over(optimizer, 0)
    optimizer.step(ADAM)
    assert {id(value) for state in optimizer._moments.values() for value in state.values()} == moments
    assert {name.split(".")[0] for name in optimizer.tensors()} == {"w0", "w1"}, "the third had no gradient"


def test_weights_whose_gradients_start_late_step_as_in_plain_adamw() -> None:
    weights = make_weights(torch.float32)
    plain = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    optimizer = Optimizer(weights)
    adamw = torch.optim.AdamW(plain.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1)
    for seed in range(3):
        pass_over(optimizer, seed)
        if seed == 2:
            weights["w2"].grad = torch.ones_like(weights["w2"])
        for name, weight in weights.items():
            plain[name].grad = None if weight.grad is None else weight.grad.clone()
        optimizer.step(AdamParams(learning_rate=1e-2, weight_decay=0.1))
        adamw.step()
        optimizer.discard_gradients()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_to_train_equals_the_allocated_memory(dtype: torch.dtype) -> None:
    """The model has large weights, so that other memory is negligible."""
    weights = {name: nn.Parameter(torch.zeros(256, 1024, dtype=dtype)) for name in "abcd"}
    optimizer = Optimizer(weights)
    optimizer.collect_gradients()
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.collect_gradients()
    earlier = optimizer.take_gradients()
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (
            *(weight.grad for weight in weights.values()),
            *earlier.values(),
            *(value for state in optimizer._moments.values() for value in state.values()),
            *(master.detach() for name, master in optimizer.masters.items() if master is not weights[name]),
        )
        if tensor is not None
    }
    of_masters = 0 if dtype == torch.float32 else 4 * 4 * 256 * 1024  # accumulated gradients on the masters
    assert bytes_to_train(weights.values()) == pytest.approx(sum(held.values()) + of_masters, rel=1e-3)
    per_weight = dtype.itemsize + bytes_to_train(weights.values()) / (4 * 256 * 1024)
    assert per_weight == (20 if dtype == torch.float32 else 24)
    assert bytes_to_undo(weights.values()) == 12 * 4 * 256 * 1024
    assert optimizer_module.bytes_to_train([]) == 0
