"""Tests of lora_targets: the layers that names and regular expressions choose, and what names none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cookbook import LoraConfig, ServiceClient
from cookbook.engine import checkpoint
from cookbook.errors import ConfigError


@pytest.fixture(scope="module")
def service() -> Any:
    service = ServiceClient(device="cpu")
    yield service
    service.close()


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("targets", "as_in_peft"),
    [
        (["q_proj"], ["q_proj"]),
        (["self_attn.v_proj", "down_proj"], ["self_attn.v_proj", "down_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ([r".*layers\.0\.(self_attn|mlp)\.[gv]\w+_proj"], r".*layers\.0\.(self_attn|mlp)\.[gv]\w+_proj"),
        (["all-linear"], "all-linear"),
        (["lm_head", "o_proj"], ["lm_head", "o_proj"]),
    ],
    ids=["a leaf", "two ends of names", "a full name", "a regex", "all-linear", "the head"],
)
def test_targets_choose_the_layers_that_peft_chooses_by_them(
    service: ServiceClient, tiny_qwen3: str, targets: list[str], as_in_peft: Any, tmp_path: Path
) -> None:
    client = service.create_training_client(tiny_qwen3, LoraConfig(4, seed=0, targets=targets))
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen3), peft.LoraConfig(r=4, target_modules=as_in_peft)
    )
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    path = Path(client.save_state(f"a{len(expected)}", overwrite=True).result().path)
    assert load_file(path / checkpoint.ADAPTER_FILE).keys() == expected
    state = json.loads((path / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
    assert state["lora"]["targets"] == targets
    again = service.create_training_client_from_state(path)
    assert again.get_info().model_data.num_trained_parameters == sum(
        weight.numel() for weight in load_file(path / checkpoint.ADAPTER_FILE).values()
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"names 'q_prj', and no layer of .* has that name\. Did you mean '?`?q_proj"),
        (["model.layers.9.mlp.up_proj"], "no layer of .* has that name"),
        (["q_proj", r".*experts.*"], r"names '\.\*experts\.\*', and no layer .*Layers end in: down_proj,"),
        (["embed_tokens"], "embed_tokens of .* carries no adapter: they are looked up, not multiplied"),
        (["(q_proj"], r"'\(q_proj', which is neither a name nor a regular expression"),
        ([""], "names no layer"),
    ],
    ids=["a typo", "a layer that is not there", "a regex", "embeddings", "a broken regex", "nothing"],
)
def test_a_target_that_names_no_layer_is_refused(
    service: ServiceClient, tiny_qwen3: str, targets: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        service.create_training_client(tiny_qwen3, LoraConfig(4, targets=targets))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(4, targets=["q_proj"], train_mlp=False), "Remove one or the other"),
        (LoraConfig(0, targets=["q_proj"]), "lora_targets is a setting of a LoRA, and a rank of 0 trains"),
        (LoraConfig(0, use_rslora=True), "use_rslora is a setting of a LoRA"),
        (LoraConfig(4, targets=["lm_head"], add_tokens=("<a>",)), "lm_head .* trained for add_tokens"),
    ],
    ids=["kinds too", "no adapter", "no scale", "added tokens"],
)
def test_settings_that_exclude_each_other_are_refused(
    service: ServiceClient, tiny_qwen3: str, lora: LoraConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        service.create_training_client(tiny_qwen3, lora)


def test_an_rslora_is_scaled_by_the_root_of_its_rank(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path
) -> None:
    client = service.create_training_client(tiny_qwen3, LoraConfig(16, alpha=8, seed=0, use_rslora=True))
    path = client.save_state("rslora", overwrite=True).result().path
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3), path)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0
    adapter = client._trainer.adapter
    layers = client._trainer.base.model.model.layers
    assert layers[0].self_attn.q_proj.scaling[adapter.name] == 2.0
