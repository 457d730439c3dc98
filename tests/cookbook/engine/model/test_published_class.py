"""Multimodal checkpoints are trained and sampled on their text part, in the class they were published in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cookbook import ServiceClient
from cookbook.engine.model import fsdp, text_part
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import decoder_layers
from cookbook.engine.options import EngineOptions
from cookbook.errors import ModelError
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput

MULTIMODAL = [name for name, family in families.FAMILIES.items() if family.text is not None]
SOME = ["qwen3_vl", "smolvlm"]
TOKENS = list(range(3, 40))


def all_families(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in names]


def data() -> list[Datum]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 300, length) for length in (9, 20, 14)]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in sequences]


@torch.no_grad()
def logprobs_of(model: Any, tokens: list[int] = TOKENS) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def sampled_logprobs(service: ServiceClient, **source: Any) -> torch.Tensor:
    client = service.create_sampling_client(**source)
    return torch.tensor(client.compute_logprobs(ModelInput.from_ints(TOKENS)).result()[1:])


@pytest.mark.parametrize("name", all_families(MULTIMODAL))
def test_a_multimodal_checkpoint_is_its_published_class_and_only_its_text_part_is_trained(
    name: str, tmp_path: Path
) -> None:
    folder = families.save(name, tmp_path / "base")
    plain = families.load(folder)
    base = BaseModel(str(folder))
    assert type(base.model) is type(plain)
    assert base.context_length == plain.config.get_text_config().max_position_embeddings
    towers = text_part.towers(base.model)
    trained = base.adapters.add(LoraConfig(rank=0))
    of_towers = {name for name in trained.weights if name.startswith(tuple(f"{tower}." for tower in towers))}
    assert not of_towers
    hidden = {id(layer) for tower in towers.values() for layer in tower.modules()}
    assert not hidden & {id(layer) for layer in decoder_layers(base.model)}
    plain(input_ids=torch.tensor([TOKENS])).logits.sum().backward()
    with_gradient = {name for name, weight in plain.named_parameters() if weight.grad is not None}
    assert with_gradient <= trained.weights.keys()
    num_text = sum(weight.numel() for weight in trained.weights.values())
    assert fsdp.bytes_needed(str(folder), torch.float32, is_trained=False) == 4 * num_text


@pytest.mark.slow
def test_the_head_is_found_that_transformers_does_not_find(tmp_path: Path) -> None:
    folder = families.save("nemotron_h_omni", tmp_path / "base")
    assert families.load(folder).get_output_embeddings() is None
    base = BaseModel(str(folder))
    assert base.model.get_output_embeddings() is base.model.language_model.lm_head
    assert base.has_plain_head
    assert base.is_packed


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_head_of_the_name_decoder_is_not_taken_for_the_decoder(quantization: Any, tmp_path: Path) -> None:
    folder = families.save("modernbert_decoder", tmp_path / "base")
    assert not isinstance(families.load(folder).get_decoder(), transformers.PreTrainedModel)
    base = BaseModel(str(folder), EngineOptions(quantization=quantization))
    assert text_part.text_decoder(base.model) is base.model.model
    assert len(decoder_layers(base.model)) == 2


def test_towers_are_not_moved_with_the_model_and_follow_when_they_are_called(tmp_path: Path) -> None:
    model = families.load(families.save("qwen3_vl", tmp_path / "base"))
    modules = [name for name, _ in model.named_modules()]
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    towers = text_part.towers(model)
    text_part.move_to(model, torch.device("meta"))  # from which nothing can be moved back
    assert sorted(name for name, _ in model.named_modules()) == sorted(modules)
    of_towers = tuple(f"{name}." for name in towers)
    for name, weight in model.named_parameters():
        if name.startswith(of_towers):
            assert weight.device.type == "cpu"
            assert weight.data_ptr() == places[name]
        else:
            assert weight.device.type == "meta"
    with pytest.raises(TypeError):  # the tower gets no pictures
        next(iter(towers.values()))()
    assert any(weight.device.type == "meta" for tower in towers.values() for weight in tower.parameters())


def test_the_device_of_a_model_is_that_of_its_text_where_a_tower_comes_first() -> None:
    """Idefics 3 moves its embeddings there (`self.device`)."""
    model = families.make("idefics3").eval()
    assert next(iter(dict(model.model.named_children()))) in {
        name.rpartition(".")[2] for name in text_part.towers(model)
    }
    text_part.move_to(model, torch.device("meta"))
    assert [part.device.type for part in (model, model.model)] == ["meta", "meta"]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", all_families(MULTIMODAL))
def test_peft_loads_an_adapter_onto_the_published_class_with_equal_logprobs(
    name: str, tmp_path: Path
) -> None:
    folder = families.save(name, tmp_path / "base")
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_lora_training_client(str(folder), rank=4, seed=0)
    for _ in range(2):
        client.forward_backward(data())
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
    path = client.save_state("trained").result().path
    found = sampled_logprobs(service, model_path=path)
    service.close()
    plain = families.load(folder)
    before = logprobs_of(plain)
    expected = logprobs_of(peft.PeftModel.from_pretrained(plain, path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    assert not any(
        re.search("vision|visual", key) for key in load_file(Path(path) / "adapter_model.safetensors")
    )


@pytest.fixture
def text_class(tmp_path: Path) -> tuple[Path, Any]:
    """The folder of a multimodal model, and the class for text alone, loaded from it by transformers."""
    folder = families.save("qwen3_5", tmp_path / "base")
    return folder, transformers.Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
def test_an_adapter_of_the_class_for_text_alone_is_read_under_the_published_names(
    text_class: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = text_class
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        base_model_name_or_path=str(folder),
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    (key, *_) = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert key.startswith("base_model.model.model.layers.")
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    found = sampled_logprobs(service, model_path=tmp_path / "adapter")
    service.close()
    torch.testing.assert_close(found, logprobs_of(adapted), rtol=1e-4, atol=1e-5)
    assert (found - logprobs_of(families.load(folder))).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("keeps_config", [False, True])
def test_a_model_saved_in_the_class_for_text_alone_is_loaded_in_it(
    text_class: tuple[Path, Any], tmp_path: Path, keeps_config: bool
) -> None:
    folder, model = text_class
    model.save_pretrained(tmp_path / "text")
    for path in folder.glob("tokenizer*"):
        (tmp_path / "text" / path.name).write_bytes(path.read_bytes())
    if keeps_config:  # some programs leave the config of the multimodal model
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = ["Qwen3_5ForCausalLM"]
        (tmp_path / "text" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    base = BaseModel(str(tmp_path / "text"))
    assert type(base.model) is transformers.Qwen3_5ForCausalLM
    service = ServiceClient()
    found = sampled_logprobs(service, base_model=str(tmp_path / "text"))
    service.close()
    torch.testing.assert_close(found, logprobs_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_published_weights_without_their_towers_are_loaded_for_text_alone(tmp_path: Path) -> None:
    folder = families.save("qwen3_5", tmp_path / "base")
    expected = logprobs_of(families.load(folder))
    weights = load_file(folder / "model.safetensors")
    text = {name: weight for name, weight in weights.items() if "visual" not in name}
    assert len(text) < len(weights)
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    service = ServiceClient()
    found = sampled_logprobs(service, base_model=str(folder))
    service.close()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_class_that_transformers_lacks_is_named_and_the_folder_is_not_called_damaged(
    tmp_path: Path,
) -> None:
    folder = families.save("qwen3", tmp_path / "base")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    new = {"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"], "transformers_version": "9.1.0"}
    path.write_text(json.dumps({**config, **new}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        BaseModel(str(folder))
    message = str(caught.value)
    assert f"transformers {transformers.__version__} has no class for model_type 'qwen9'" in message
    assert "(architecture Qwen9ForCausalLM)" in message
    assert "was written by 9.1.0), update: pip install -U transformers" in message
    assert "damaged" not in message
    path.write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}), "utf-8"
    )
    with pytest.raises(ModelError, match="no class that continues a text for model_type 't5'") as caught:
        BaseModel(str(folder))
    assert "damaged" not in str(caught.value)


@pytest.mark.slow
def test_a_class_that_joins_models_names_the_part_that_writes_text_and_how_to_save_it(tmp_path: Path) -> None:
    folder = families.save("qwen2_5_omni", tmp_path / "omni")
    with pytest.raises(ModelError, match="has no forward pass of its own") as caught:
        BaseModel(str(folder))
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    assert f"{kind.__name__}.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained" in str(
        caught.value
    )
    part, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    expected = families.make("qwen2_5_omni").thinker
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])
