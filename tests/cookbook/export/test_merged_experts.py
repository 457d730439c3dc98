"""Merges adapters on experts, and compares with PEFT and with a client that loads them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import PeftModel

from cookbook.clients.service import ServiceClient
from cookbook.engine.options import EngineOptions
from cookbook.export.updates import StackedLowRank, read_updates
from cookbook.runs.find import find_trained_model
from cookbook.types import AdamParams, Datum, ModelInput


def trained_checkpoint(name: str, folder: Path) -> tuple[str, ServiceClient, float]:
    """Returns a checkpoint of a trained adapter, its service, and the adapter's loss."""
    base = families.save(name, folder / "base")
    service = ServiceClient(options=EngineOptions(device="cpu"))
    client = service.create_lora_training_client(str(base), rank=4, seed=0)
    data = [datum()]
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.05))
    loss = client.forward(data, "cross_entropy").result().loss
    return client.save_state("trained").result().path, service, loss


def datum() -> Datum:
    tokens = torch.randint(3, 300, (31,), generator=torch.Generator().manual_seed(0))
    return Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_merged_expert_has_the_weights_that_peft_merges(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, service, loss = trained_checkpoint(name, tmp_path)
    again = service.create_training_client_from_state(path)
    assert again.forward([datum()], "cross_entropy").result().loss == loss

    updates = read_updates(find_trained_model(path))
    model = families.make(name)
    base = {key: weight.clone() for key, weight in model.state_dict().items()}
    merged: Any = PeftModel.from_pretrained(model, path).merge_and_unload()
    truth = merged.state_dict()
    stacked = {key: update for key, update in updates.items() if isinstance(update, StackedLowRank)}
    assert len(stacked) == 4
    for key, update in stacked.items():
        is_transposed = name == "gpt_oss"
        update = StackedLowRank(update.a_RI, update.b_OR, update.scaling, is_transposed)
        assert update.shape_on(tuple(base[key].shape)) == tuple(base[key].shape)
        assert not torch.allclose(truth[key], base[key], atol=1e-3)
        torch.testing.assert_close(update.added_to(base[key]), truth[key], rtol=1e-5, atol=1e-5)
