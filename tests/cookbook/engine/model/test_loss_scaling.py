"""Tests that training in float16 has the gradients of float32, whatever the size of the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cookbook.engine.model import loss_scaling
from cookbook.types import AdamParams, Datum


def scaled(data: list[Datum], factor: float) -> list[Datum]:
    """Returns the data with all weights multiplied by `factor`, and so the loss."""
    return [
        replace(
            datum,
            loss_fn_inputs={
                **datum.loss_fn_inputs,
                "weights": datum.loss_fn_inputs["weights"].to_numpy() * np.float32(factor),
            },
        )
        for datum in data
    ]


@pytest.mark.cases(2)
@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_gradients_neither_vanish_nor_overflow(
    factor: float, checkpointing: str, tiny_qwen3: str, make_trainer: Any, make_data: Any, gradients_of: Any
) -> None:
    found = {}
    for dtype in ("float32", "float16"):
        options = {"device": "cpu", "dtype": dtype, "gradient_checkpointing": checkpointing}
        trainer = make_trainer(tiny_qwen3, options=options)
        data = scaled(make_data(trainer.base.vocab_size, [30, 9, 17]), factor)
        trainer.forward_backward(trainer.check(data, "cross_entropy", None, trained_only=True))
        found[dtype] = gradients_of(trainer)
    assert found["float32"]
    for name, expected in found["float32"].items():
        largest = float(expected.abs().max())
        torch.testing.assert_close(found["float16"][name], expected, rtol=0, atol=0.05 * largest, msg=name)


@pytest.mark.slow
def test_passes_add_up_and_full_fine_tuning_steps(tiny_qwen3: str, make_trainer: Any, make_data: Any) -> None:
    from cookbook.engine.model.base_model import BaseModel
    from cookbook.engine.options import EngineOptions
    from cookbook.engine.training.trainer import Trainer
    from cookbook.types import LoraConfig

    norms = {}
    for dtype in ("float32", "float16"):
        base = BaseModel(tiny_qwen3, EngineOptions(device="cpu", dtype=dtype), is_trained=True)
        trainer = Trainer(base, LoraConfig(rank=0, seed=0))
        for seed in range(2):
            data = scaled(make_data(base.vocab_size, [30, 9], seed=seed), 1e-7)
            trainer.forward_backward(trainer.check(data, "cross_entropy", None))
        (norm,) = trainer.optim_step(AdamParams(learning_rate=1e-3)).arrays()
        norms[dtype] = float(norm)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)
    assert norms["float32"] < 1e-4, "without scaling most of it would vanish"


def test_a_pass_that_overflows_is_repeated_with_a_smaller_scale() -> None:
    """The weight's gradient is 3,000 times the gradient that enters, which float16 cannot hold at first."""
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float16))
    weight.grad_dtype = torch.float32
    weight.grad = torch.full((), 0.5)
    output = weight.expand(3000) * torch.ones(3000, dtype=torch.float16)
    loss_scaling.backpropagate(output, torch.full((3000,), 1e-3), [weight])
    assert float(weight.grad) == pytest.approx(0.5 + 3.0, rel=1e-3)


def test_what_is_not_finite_stays_so() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    loss_scaling.backpropagate(weight * 1.0, torch.tensor([1.0, torch.nan, 1.0]), [weight])
    assert weight.grad is not None
    assert weight.grad.isnan().any()
