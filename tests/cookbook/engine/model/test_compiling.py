"""Tests that compiled layers compute the same as the original layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from cookbook import AdamParams, SamplingParams, ServiceClient
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.compiling import compile_layers
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import Datum, LoraConfig, ModelInput


def make_data() -> list[Datum]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 300, length) for length in (30, 4, 17)]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", ["off", "on"])
def test_compiled_layers_compute_the_same_losses_and_gradients(
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


@pytest.mark.slow
def test_snapshots_evaluations_and_other_clients_do_not_recompile(tiny_qwen3: str, tmp_path: Path) -> None:
    """Twelve of each run in turn, which is more than the eight variants of a layer that torch keeps."""
    service = ServiceClient(device="cpu", compile=True, checkpoint_dir=tmp_path)
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    prompt, params = ModelInput.from_ints([5, 17, 31]), SamplingParams(max_tokens=4, seed=0)
    snapshots, compiled, clients = [], [], [client]
    counters.clear()
    for number in range(12):
        for each in clients:
            each.forward_backward(make_data()).result()
            each.optim_step(AdamParams()).result()
        client.forward(make_data()[: 1 + number % 3]).result()
        path = client.save_weights_for_sampler(f"step-{number}").result().path
        for snapshot in (
            client.save_weights_and_get_sampling_client(),
            service.create_sampling_client(path),
            service.create_sampling_client(base_model=tiny_qwen3),
        ):
            snapshot.sample(prompt, 2, params).result()
            snapshot.compute_logprobs(prompt).result()
            snapshots.append(snapshot)
        compiled.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
        if number:
            clients.append(service.create_lora_training_client(tiny_qwen3, rank=4, seed=number))
    assert compiled[0][0] > 0
    assert set(compiled) == {compiled[0]}
    service.close()


@pytest.mark.slow
def test_a_warning_is_logged_when_torch_reaches_its_recompile_limit(caplog: pytest.LogCaptureFixture) -> None:
    compile_layers([])

    @torch.compile(backend="eager")
    def add_length(x: torch.Tensor, name: str) -> torch.Tensor:
        return x + len(name)  # compiled again for every name, as layers once were for every adapter's name

    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.WARNING, "cookbook"):
        for number, is_warned in ((1, False), (2, False), (3, True)):
            assert add_length(torch.zeros(2), "a" * number).tolist() == [number, number]
            assert ("compile=True" in caplog.text) == is_warned
    assert "compile=True: torch has reached its recompile limit for a part of a layer" in caplog.text
    assert "run without compilation from now on" in caplog.text


@pytest.mark.parametrize("options", [{"compile": True}, {"gradient_checkpointing": "on"}])
def test_a_model_whose_layers_cannot_be_checkpointed_or_compiled_is_refused(
    make_model_folder: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = str(make_model_folder(tmp_path / "model", "gpt_neox_japanese", intermediate_multiple_size=2))
    with pytest.raises(ConfigError, match="no layers that transformers can checkpoint or compile"):
        BaseModel(folder, EngineOptions(**options))
    assert BaseModel(folder)
