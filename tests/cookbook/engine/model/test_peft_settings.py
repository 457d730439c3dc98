"""Tests that PEFT settings that change what an adapter computes are applied or refused by name."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cookbook import ModelInput, ServiceClient
from cookbook.engine import checkpoint
from cookbook.engine.model import peft_settings
from cookbook.errors import CheckpointError, ConfigError
from cookbook.export.merge import base_model_folder, merged_weights
from cookbook.runs.find import find_trained_model
from cookbook.supervised import train
from cookbook.types import MAX_RANK

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = [5, 9, 11, 42, 7, 3]


def make_adapter(folder: Path, base: str, **settings: Any) -> Any:
    """Saves a random adapter with PEFT. Returns the model with the adapter on it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP, **settings}
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")


@pytest.fixture
def adapter(tmp_path: Path, tiny_qwen3: str) -> Path:
    make_adapter(tmp_path / "adapter", tiny_qwen3)
    return tmp_path / "adapter"


KNOWN = peft_settings._FREE | {"task_type"}


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(peft.LoraConfig) if field.name not in KNOWN]
)
def test_every_other_setting_of_the_installed_peft_is_refused_by_name(adapter: Path, name: str) -> None:
    for value in ("something", {"a": 1}, ["x"], 7):
        if name in ("revision", "auto_mapping", "peft_type"):
            value = {"revision": "v2", "auto_mapping": {"parent_library": "evil"}, "peft_type": "LOHA"}[name]
        change(adapter, **{name: value})
        with pytest.raises(CheckpointError, match=f"{name}=|LOHA adapter"):
            checkpoint.read_info(adapter)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"ensure_weight_tying": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"task_type": "SEQ_CLS"},
        {"a_setting_of_next_year": 0.5},
    ],
    ids=str,
)
def test_a_setting_that_changes_the_arithmetic_is_refused(adapter: Path, settings: dict[str, Any]) -> None:
    change(adapter, **settings)
    for read in (checkpoint.read_info, lambda folder: find_trained_model(str(folder))):
        with pytest.raises(CheckpointError, match=next(iter(settings))):
            read(adapter)


def test_an_unknown_setting_that_is_off_is_accepted(adapter: Path) -> None:
    change(adapter, a_setting_of_next_year=False, another=None, a_third=[])
    assert checkpoint.read_info(adapter).lora.rank == 4


def test_settings_are_checked_in_checkpoints_of_this_project_too(tiny_qwen3: str, tmp_path: Path) -> None:
    client = ServiceClient(device="cpu", checkpoint_dir=tmp_path).create_lora_training_client(
        tiny_qwen3, rank=4
    )
    folder = Path(client.save_state("a").result().path)
    change(folder, use_rslora=True)
    with pytest.raises(CheckpointError, match="state.json is damaged: .*use_rslora=true"):
        checkpoint.read_info(folder)
    change(folder, use_rslora=False, lora_alpha=64)
    with pytest.raises(
        CheckpointError, match=r"state.json is damaged: `lora` has rank 4 and alpha 32, .* 64"
    ):
        checkpoint.read_info(folder)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"},
        {"target_modules": [*ATTENTION, *MLP], "exclude_modules": ["lm_head"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
    ids=["all-linear", "a-regex", "exclude_modules", "gaussian"],
)
def test_a_supported_adapter_has_the_logits_of_peft(
    tmp_path: Path, tiny_qwen3: str, settings: dict[str, Any]
) -> None:
    make_adapter(tmp_path / "adapter", tiny_qwen3, **settings)
    truth = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_qwen3), str(tmp_path / "adapter")
    ).eval()
    with torch.no_grad():
        logprobs = truth(torch.tensor([IDS])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place, token]) for place, token in enumerate(IDS[1:])]
    service = ServiceClient(device="cpu")
    client = service.create_sampling_client(model_path=tmp_path / "adapter", base_model=tiny_qwen3)
    found = client.compute_logprobs(ModelInput.from_ints(IDS)).result()
    service.close()
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.1\.self_attn\.[qv]_proj"},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["one-layer", "a-pattern", "a-regex", "two-leaves"],
)
def test_an_adapter_on_some_layers_is_merged_only_into_those(
    tmp_path: Path, tiny_qwen3: str, settings: dict[str, Any]
) -> None:
    make_adapter(tmp_path / "adapter", tiny_qwen3, **settings)
    truth = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_qwen3), str(tmp_path / "adapter")
    ).merge_and_unload()
    source = find_trained_model(str(tmp_path / "adapter"), base_model=tiny_qwen3)
    merged = merged_weights(source, base_model_folder(source))
    assert merged is not None
    for name, weight in truth.state_dict().items():
        if name in merged.names:
            torch.testing.assert_close(merged.read(name), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["model.layers.0.mlp.up_proj"], r".*\.mlp\..*"]
)
@pytest.mark.parametrize("excluded", [None, ["mlp.up_proj"], r".*layers\.1.*"])
@pytest.mark.parametrize(
    ("layers", "pattern"), [(None, None), (1, None), ([0], "layers"), ([0, 1], ["h", "layers"])]
)
def test_targets_are_matched_as_in_peft(targets: Any, excluded: Any, layers: Any, pattern: Any) -> None:
    settings = {"target_modules": targets, "exclude_modules": excluded}
    settings |= {"layers_to_transform": layers, "layers_pattern": pattern}
    if isinstance(targets, str) and layers is not None:
        return  # PEFT refuses these settings
    config = peft.LoraConfig(**settings)
    names = [f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    for name in [*names, "q_proj", "layers.1.q_proj"]:
        if targets == "all-linear":
            # PEFT replaces this by a list of all matching layers
            config.target_modules = {name.rpartition(".")[2]}
        expected = bool(check_target_module_exists(config, name))
        assert peft_settings._is_target(name, settings, Path("a")) == expected, name


def test_tensors_that_peft_would_ignore_are_refused(adapter: Path) -> None:
    change(adapter, target_modules=ATTENTION)
    with pytest.raises(
        CheckpointError, match=r"a LoRA on model.layers.0.mlp.down_proj, which target_modules"
    ):
        checkpoint.read_info(adapter)
    change(adapter, target_modules=[*ATTENTION, *MLP], layers_to_transform=[0])
    with pytest.raises(CheckpointError, match=r"a LoRA on model.layers.1.mlp.down_proj"):
        checkpoint.read_info(adapter)


def test_a_pattern_that_takes_too_long_is_refused(adapter: Path) -> None:
    change(adapter, target_modules=r"(([a-z0-9._]+)+)+!")
    began = time.monotonic()
    with pytest.raises(
        CheckpointError, match="target_modules=.*regular expression that takes too long|target_mod"
    ):
        checkpoint.read_info(adapter)
    assert time.monotonic() - began < 20


@pytest.mark.cases(3)
@pytest.mark.parametrize("rank", [10**9, 10**30, 0, -4, "4", None, 4.5, True])
def test_an_unrealistic_rank_is_refused_before_memory_is_allocated(adapter: Path, rank: Any) -> None:
    change(adapter, r=rank)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged: .*`r`"):
        checkpoint.read_info(adapter)


def test_a_rank_beyond_the_limit_is_refused_in_a_config_and_by_a_client(tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match=f"Invalid lora_rank=1000000000: must be <= {MAX_RANK}"):
        train.Config(model_name=tiny_qwen3, log_path="x", dataset_builder=None, lora_rank=10**9)  # type: ignore[arg-type]
    service = ServiceClient(device="cpu")
    with pytest.raises(ConfigError, match="Invalid rank=1000000000: must be 1 to 16,384"):
        service.create_lora_training_client(tiny_qwen3, rank=10**9)
    service.close()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda tensor: tensor[:2], r"has shape \[2, \d+\], and `r` is 4"),
        (lambda tensor: tensor.to(torch.int32), "has dtype I32, expected F64"),
        (lambda tensor: tensor[None], "has shape"),
    ],
    ids=["rank", "dtype", "axes"],
)
def test_tensors_with_a_wrong_shape_or_dtype_are_named(adapter: Path, damage: Any, problem: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = damage(tensors[name]).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}` {problem}"):
        checkpoint.read_info(adapter)


def test_a_different_frozen_head_in_an_adapter_is_refused(tmp_path: Path, tiny_qwen3: str) -> None:
    folder = tmp_path / "adapter"
    make_adapter(folder, tiny_qwen3, target_modules=[*ATTENTION, *MLP, "lm_head"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "base_layer" in name and "lm_head" in name)
    service = ServiceClient(device="cpu")
    # PEFT's own copy of the frozen layer is accepted
    service.create_sampling_client(model_path=folder, base_model=tiny_qwen3)
    tensors[name] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="another weight than the base model has"):
        service.create_sampling_client(model_path=folder, base_model=tiny_qwen3)
    service.close()


def test_a_pickled_adapter_is_refused_with_instructions_to_convert_it(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"Pickle files are never loaded.*convert it once"):
        checkpoint.read_weights(adapter)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight` has shape \[4, \d+\], and `r` is 2"),
        ({"rank_pattern": {"q_proj": 10**9}}, "`q_proj` is 1,000,000,000"),
        ({"rank_pattern": {r"(\w|\.|[a-z])+0": 4}}, "rank_pattern.*regular expression that takes too long"),
        ({"use_dora": True}, "`use_dora` is true .* has no lora_magnitude_vector"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
    ids=["another rank", "a huge rank", "a slow pattern", "DoRA", "a negative row", "a string"],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(
    adapter: Path, settings: dict[str, Any], problem: str
) -> None:
    change(adapter, **settings)
    with pytest.raises(CheckpointError, match=problem):
        checkpoint.read_info(adapter)


def test_tensors_that_no_setting_names_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors, name = load_file(path), "base_model.model.model.embed_tokens"
    for added, rows in (
        ({f"{name}.weight": torch.zeros(4, 8)}, None),
        ({f"{name}.token_adapter.trainable_tokens_delta": torch.zeros(4, 8)}, [1, 2, 3]),
        ({f"{name}.token_adapter.trainable_tokens_delta": torch.zeros(4, 8)}, {"lm_head": [1, 2, 3, 4]}),
        ({f"{name}.token_adapter.trainable_tokens_delta": torch.zeros(2, 8)}, [1, 1]),
        ({"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": torch.zeros(8)}, None),
    ):
        save_file({**tensors, **added}, path)
        change(adapter, trainable_token_indices=rows)
        with pytest.raises(CheckpointError, match=r"embed_tokens|up_proj has a lora_magnitude_vector"):
            checkpoint.read_info(adapter)
