"""Compiled layers compute what the layers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cookbook.engine.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import Datum, LoraConfig, ModelInput


def make_data() -> list[Datum]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 300, length) for length in (30, 4, 17)]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", ["off", "on"])
def test_compiled_layers_give_the_same_losses_and_gradients(
    tiny_qwen3: str, gradient_checkpointing: Any
) -> None:
    losses, gradients = [], []
    for is_compiled in (False, True):
        options = EngineOptions(compile=is_compiled, gradient_checkpointing=gradient_checkpointing)
        trainer = Trainer(BaseModel(tiny_qwen3, options), LoraConfig(rank=4, seed=0))
        for data in (make_data(), make_data()[:2]):  # the second row has another layout
            losses.append(trainer.forward_backward(trainer.check(data, "cross_entropy", None)).output().loss)
        gradients.append([w.grad for w in trainer.adapter.weights.values() if w.grad is not None])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("options", [{"compile": True}, {"gradient_checkpointing": "on"}])
def test_a_model_whose_layers_transformers_does_not_know_is_refused(
    make_model_folder: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = str(make_model_folder(tmp_path / "model", "gpt_neox_japanese", intermediate_multiple_size=2))
    with pytest.raises(ConfigError, match="no layers that transformers knows how to run again or compile"):
        BaseModel(folder, EngineOptions(**options))
    assert BaseModel(folder)
