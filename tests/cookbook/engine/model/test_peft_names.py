"""Adapters of families whose names PEFT changes while it loads them, against plain transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import family_checks
import pytest
from safetensors.torch import load_file

from cookbook import types
from cookbook.engine.model import peft_names
from cookbook.errors import ConfigError


@pytest.fixture(scope="module")
def laguna(tmp_path_factory: pytest.TempPathFactory) -> family_checks.Subject:
    return family_checks.Subject("laguna", tmp_path_factory.mktemp("laguna"))


def test_peft_loads_every_tensor_of_an_adapter_whose_names_it_changes(laguna: family_checks.Subject) -> None:
    keys = load_file(Path(laguna.checkpoint) / "adapter_model.safetensors")
    assert any(".mlp.shared_expert.gate_proj." in key for key in keys)
    assert not any(".mlp.shared_experts." in key for key in keys)
    family_checks.assert_same_logprobs(laguna.client, laguna.adapted)


def test_such_an_adapter_is_merged(laguna: family_checks.Subject) -> None:
    assert family_checks.merged(laguna) == "yes"


@pytest.mark.slow
def test_such_an_adapter_is_resumed_and_sampled_from_as_it_was(laguna: family_checks.Subject) -> None:
    assert family_checks.resumes(laguna) == "yes"
    service = laguna.service()
    sampler = service.create_sampling_client(model_path=laguna.checkpoint)
    prompt = family_checks.SHORT[0].model_input
    found = sampler.compute_logprobs(prompt).result()
    own = laguna.client.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    assert found[1:] == pytest.approx(own[1:], abs=1e-5)


def test_names_that_peft_leaves_as_they_are_are_saved_as_they_are(laguna: family_checks.Subject) -> None:
    model = laguna.client._trainer.base.model
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert peft_names.keys_to_save(model, [name]) == {name: name}
    assert peft_names.by_own_names(model, {name: 1}) == {name: 1}


@pytest.fixture(scope="module")
def mistral_large4(tmp_path_factory: pytest.TempPathFactory) -> family_checks.Subject:
    return family_checks.Subject("mistral_large4", tmp_path_factory.mktemp("mistral_large4"))


@pytest.mark.slow
def test_experts_whose_names_peft_changes_carry_an_adapter_that_is_read(
    mistral_large4: family_checks.Subject,
) -> None:
    """PEFT reads `mlp.experts` as `mlp.mlp.experts`, and layers that the settings name in full likewise."""
    weights = mistral_large4.client._trainer.adapter.weights
    assert [name for name in weights if ".mlp.experts." in name]
    keys = load_file(Path(mistral_large4.checkpoint) / "adapter_model.safetensors")
    assert len(keys) == len(weights)
    assert not [key for key in keys if ".mlp.experts." in key]
    text = (Path(mistral_large4.checkpoint) / "adapter_config.json").read_text(encoding="utf-8")
    named = json.loads(text)["target_parameters"]
    assert "model.language_model.layers.1.mlp.experts.down_proj" in named
    assert "model.language_model.layers.1.experts.down_proj" in named
    assert family_checks.resumes(mistral_large4) == "yes"
    assert family_checks.merged(mistral_large4) == "yes"


@pytest.mark.slow
def test_layers_on_which_peft_reads_an_adapter_from_no_file_are_found(
    mistral_large4: family_checks.Subject,
) -> None:
    """PEFT reads `layers.1.gate` as `layers.1.mlp.gate`, and no other name as it."""
    model = mistral_large4.client._trainer.base.model
    layers = [f"model.language_model.layers.1.{name}" for name in ("gate", "self_attn.o_proj")]
    assert peft_names.unreadable(model, layers, layers) == layers[:1]


def test_such_layers_are_refused_if_they_are_asked_for(mistral_large4: family_checks.Subject) -> None:
    table = mistral_large4.client._trainer.base.adapters.targets
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    table = table.without([name], "layers PEFT refuses")
    with pytest.raises(ConfigError, match="PEFT supports no adapter on them in this architecture"):
        table.chosen(types.LoraConfig(rank=4, targets=[name]), "tiny")
