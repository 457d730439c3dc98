"""Trainers on quantised weights, and the gradients that plain transformers and PEFT compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.requests import Request
from cookbook.engine.sampling.sampler import Sampler
from cookbook.engine.training.trainer import Trainer
from cookbook.types import Datum, LoraConfig, ModelInput

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
"""Every linear layer has blocks of 64 weights, and no activation has the shape of a weight."""


def make_data(lengths: list[int]) -> list[Datum]:
    rng = np.random.default_rng(0)
    data = []
    for length in lengths:
        tokens = rng.integers(3, 300, length + 1)
        weights = rng.choice([0.0, 0.5, 2.0], length).astype(np.float32)
        data.append(
            Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


DATA = make_data([5, 30, 1, 17, 12])


def make_trainer(folder: str, options: EngineOptions, **lora: Any) -> Trainer:
    """Returns a trainer whose B matrices are not zero, so that no gradient is zero."""
    trainer = Trainer(BaseModel(folder, options), LoraConfig(rank=4, seed=0, **lora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.adapter.weights.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return trainer


def gradients_after_a_pass(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.discard_gradients()
    trainer.forward_backward(trainer.check(DATA, "cross_entropy", None))
    return {name: weight.grad.clone() for name, weight in trainer.adapter.weights.items()}  # type: ignore[union-attr]


def plain_gradients(model: Any, adapter_folder: Path) -> dict[str, torch.Tensor]:
    """Runs one sequence at a time in training mode, in which bitsandbytes computes in fp32 throughout."""
    peft_model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True).train()
    for datum in DATA:
        logits = peft_model(input_ids=torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
        nll = F.cross_entropy(logits, datum.loss_fn_inputs["target_tokens"].to_torch(), reduction="none")
        (datum.loss_fn_inputs["weights"].to_torch() * nll).sum().backward()
    return {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if parameter.grad is not None
    }


@torch.no_grad()
def rounded_model(folder: str, rounded: Callable[[Tensor], Tensor]) -> Any:
    """Returns the plain model, all of whose experts and linear layers but the routers are rounded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            module.weight.copy_(rounded(module.weight))
        if name.endswith("experts"):
            for stacked in (module.gate_up_proj, module.down_proj):
                for matrix in stacked:
                    matrix.copy_(rounded(matrix))
    return model


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def answer(base: BaseModel, adapter: Adapter | None, request: Request) -> Any:
    prepared: Future[tuple[Adapter | None, int | None]] = Future()
    prepared.set_result((adapter, 0))
    Sampler(base, prepared).run(request, list)
    return request.future.result(timeout=0)
