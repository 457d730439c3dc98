"""Merged weights equal those of plain PEFT and of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from cookbook import ModelInput, ServiceClient
from cookbook.errors import CheckpointError, ModelError
from cookbook.export.chat_format import find_chat_format
from cookbook.export.merged_folder import Merged, write_merged
from cookbook.runs.find import find_trained_model

TOKENS = torch.arange(3, 60)[None]
END = torch.tensor([2])
"""<|im_end|>"""
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(TOKENS).logits
    return logits


def merge(checkpoint: Path | str, folder: Path, dtype: Any = "auto", size: str = "4GB") -> Merged:
    source = find_trained_model(str(checkpoint))
    folder.mkdir()
    return write_merged(source, find_chat_format(source), folder, dtype, size)


@pytest.fixture(params=FAMILIES, scope="session")
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model_folder: Callable[..., Path],
    make_adapted: Callable[..., Any],
) -> tuple[Path, Path, Any]:
    """A base model, the folder of an adapter on all its layers, and a PEFT model of both."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_model_folder(folder / "base", **FAMILIES[request.param])
    return base, folder / "adapter", make_adapted(base, folder / "adapter")


@pytest.mark.cases(3)
def test_merged_weights_in_plain_transformers_give_the_logits_of_the_adapter(
    family: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    _, adapter, adapted = family
    merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits_of(merged) - logits_of(adapted)).abs().max() > 0.1


def test_a_tied_head_with_an_adapter_becomes_separate_and_the_embeddings_do_not_change(
    family: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    base, adapter, _ = family
    merge(adapter, tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_a_head_without_an_adapter_stays_tied(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base", tie_word_embeddings=True)
    adapted = make_adapted(base, tmp_path / "adapter", ["q_proj", "down_proj"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["the first block", "a later block", "a block and the head"])
def test_an_adapter_on_one_of_several_tied_blocks_changes_that_block_alone(
    targets: str, make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = families.save("zamba2", tmp_path / "base")
    block = "model.layers.{}.shared_transformer.self_attn.q_proj"
    modules = {
        "the first block": [block.format(1)],
        "a later block": [block.format(3)],
        "a block and the head": [block.format(3), "lm_head"],
    }[targets]
    adapted = make_adapted(base, tmp_path / "adapter", modules)
    merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(one / "model.safetensors") for one in (base, tmp_path / "merged"))
    assert before.keys() < after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == ({f"{block.format(1)}.weight"} if targets == "the first block" else set())
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (logits_of(merged) - logits_of(adapted)).abs().max() > 0.1


def test_files_with_other_weight_names_are_merged_under_those_names(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base", tie_word_embeddings=True)
    body = AutoModel.from_pretrained(base)  # saved without the prefix `model.`
    (base / "model.safetensors").unlink()
    body.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "model.safetensors").rename(base / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in load_file(base / "model.safetensors")
    adapted = make_adapted(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == {*load_file(base / "model.safetensors"), "lm_head.weight"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, body.get_input_embeddings().weight)


@pytest.mark.cases(2)
def test_shards_equal_one_file_and_only_one_shard_is_in_memory(
    family: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    _, adapter, _ = family
    whole = merge(adapter, tmp_path / "whole")
    sharded = merge(adapter, tmp_path / "sharded", size="20KB")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) == sharded.num_files > 3
    assert whole.num_files == 1
    assert sharded.held_bytes < whole.num_bytes == sharded.num_bytes
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == weights.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "sharded" / file)[name], weights[name])
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "sharded"))
    assert torch.equal(logits_of(one), logits_of(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_once_to_the_requested_type(
    tiny_qwen3: str, make_adapted: Callable[..., Any], tmp_path: Path, dtype: str
) -> None:
    adapted = make_adapted(Path(tiny_qwen3), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", dtype)
    truth = adapted.merge_and_unload().state_dict()
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    for name, weight in weights.items():
        step = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight.float(), truth[name].float(), rtol=step, atol=1e-6)


def test_a_merged_run_has_the_log_probabilities_of_its_engine(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged", "float32")
    tokens = list(range(3, 90))
    service = ServiceClient()
    sampling = service.create_sampling_client(model_path=run / "checkpoints" / "final")
    expected = sampling.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:]
    service.close()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        scores = merged(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    found = scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_by_default_every_weight_keeps_the_type_of_the_base(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_full_fine_tune_is_exported_unchanged(tiny_qwen3: str, tmp_path: Path) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path)
    training = service.create_lora_training_client(tiny_qwen3, rank=0)
    path = Path(training.save_state("full").result().path)
    service.close()
    merge(path, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "merged" / "optimizer.safetensors").exists()


def test_plain_generate_stops_at_the_stop_sequences_of_the_renderer(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base", eos_token_id=0)
    GenerationConfig(eos_token_id=[0], temperature=0.6, do_sample=True).save_pretrained(base)
    make_adapted(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    config = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert config.eos_token_id == [
        2,
        0,
    ]  # <|im_end|>, with which the template ends a reply, and that of the base
    assert config.temperature == 0.6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, END, 1e4))
    assert merged.generate(TOKENS, max_new_tokens=5)[0, TOKENS.shape[1] :].tolist() == [2]


def test_stop_strings_of_a_format_are_in_the_generation_config(tiny_qwen3: str, tmp_path: Path) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path)
    metadata = {"renderer_name": "role_colon"}
    training = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0, user_metadata=metadata)
    path = training.save_weights_for_sampler("tuned").result().path
    service.close()
    merge(path, tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").stop_strings == ["\n\nUser:"]


def test_quantized_base_weights_are_refused(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base")
    make_adapted(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r"stored quantized \(bitsandbytes\).*base_model="):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    make_adapted(make_model_folder(tmp_path / "base"), tmp_path / "adapter")
    other = make_model_folder(tmp_path / "other", hidden_size=48, head_dim=12)
    source = find_trained_model(str(tmp_path / "adapter"), base_model=str(other))
    (tmp_path / "merged").mkdir()
    with pytest.raises(CheckpointError, match="does not fit its base model"):
        write_merged(source, find_chat_format(source), tmp_path / "merged", "auto", "4GB")


def test_tensors_other_than_lora_on_linear_layers_are_refused(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    make_adapted(make_model_folder(tmp_path / "base"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="neither a LoRA nor named in modules_to_save"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("are_names_others", [False, True])
def test_a_changed_copy_of_a_frozen_weight_beside_an_adapter_is_refused(
    make_model_folder: Callable[..., Path],
    make_adapted: Callable[..., Any],
    tmp_path: Path,
    are_names_others: bool,
) -> None:
    base = make_model_folder(tmp_path / "base", tie_word_embeddings=False)
    make_adapted(base, tmp_path / "adapter", ["q_proj", "lm_head"])
    weights = load_file(base / "model.safetensors")
    if are_names_others:
        renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
        save_file(renamed, base / "model.safetensors")
    file, name = (
        tmp_path / "adapter" / "adapter_model.safetensors",
        "base_model.model.lm_head.base_layer.weight",
    )
    tensors = load_file(file)
    save_file(tensors | {name: weights["lm_head.weight"].clone()}, file)
    merge(tmp_path / "adapter", tmp_path / "merged")  # an equal copy, as PEFT saves it, is accepted
    save_file(tensors | {name: weights["lm_head.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="another weight than the base model has"):
        merge(tmp_path / "adapter", tmp_path / "again")


def test_an_adapter_on_transposed_weights_is_merged(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """The shape does not show it for a square weight (`attn.c_proj`)."""
    base = make_model_folder(tmp_path / "base", model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    adapted = make_adapted(base, tmp_path / "adapter", ["attn.c_proj", "attn.c_attn"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    config["fan_in_fan_out"] = False  # PEFT corrects it on loading
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=1e-5, rtol=1e-4)
