"""Tests that adapters of every kind are exported as PEFT computes with them, merged and as they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import IDS, SETTINGS, load_with_peft, make_adapter, make_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook import AdamParams, Datum, LoraConfig, ModelInput, ServiceClient
from cookbook.errors import CheckpointError
from cookbook.export import export
from cookbook.export.config import ExportConfig
from cookbook.export.merge import base_model_folder, merged_weights
from cookbook.runs.find import find_trained_model

QUICK = {
    "DoRA", "a LoRA on embeddings", "saved embeddings", "saved embeddings and head", "trained tokens",
    "trained tokens by module",
}  # fmt: skip
CASES = [
    pytest.param(
        kind, name, id=f"{name}-{kind}", marks=() if kind == "tied" and name in QUICK else pytest.mark.slow
    )
    for name in SETTINGS
    for kind in ("tied", "untied")
]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(torch.tensor([IDS])).logits[0]
    return logits


def written(checkpoint: Path, folder: Path, **more: Any) -> Path:
    asyncio.run(export.main(ExportConfig(checkpoint=str(checkpoint), to=str(folder), **more)))
    return folder


@pytest.mark.cases(2)
@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("are_names_others", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merged_adapter_of_peft_has_its_logits(
    tiny_qwen3: str, tmp_path: Path, kind: str, name: str, are_names_others: bool
) -> None:
    base = make_base(tiny_qwen3, tmp_path / "base", kind == "tied")
    adapter = make_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    expected = logits_of(load_with_peft(base, adapter))
    if are_names_others:  # than those of the parameters
        file = Path(base) / "model.safetensors"
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    folder = written(adapter, tmp_path / "merged", format="merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)
    is_tied = merged.config.tie_word_embeddings
    differs = name in ("a head", "a LoRA on embeddings") or name.startswith("saved") or "saved head" in name
    assert is_tied == (kind == "tied" and not differs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["trained tokens", "DoRA", "saved embeddings", "ranks and alphas by pattern"]
)
def test_an_exported_adapter_of_peft_is_that_adapter(tiny_qwen3: str, tmp_path: Path, name: str) -> None:
    base = make_base(tiny_qwen3, tmp_path / "base", is_tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    folder = written(adapter, tmp_path / "exported", format="adapter", base_model=base)
    expected = logits_of(load_with_peft(base, adapter))
    torch.testing.assert_close(logits_of(load_with_peft(base, folder)), expected)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def with_tokens(request: pytest.FixtureRequest, tiny_qwen3: str, tmp_path: Path) -> tuple[Path, list[float]]:
    """A checkpoint with added tokens, and the log-probabilities that its trainer has for a text with them."""
    base = make_base(tiny_qwen3, tmp_path / "base", request.param)
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=("<sku>", "<x>")))
    tokens = [*IDS, *client.get_tokenizer().convert_tokens_to_ids(["<sku>", "<x>"]), 5]
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    for _ in range(3):
        client.forward_backward([datum])
        client.optim_step(AdamParams(1e-2)).result()
    logprobs = client.forward([datum]).result().loss_fn_outputs[0]["logprobs"].tolist()
    path = Path(client.save_state("a").result().path)
    service.close()
    return path, logprobs


@torch.no_grad()
def logprobs_of_new(model: Any, tokenizer: Any) -> list[float]:
    tokens = [*IDS, *tokenizer.convert_tokens_to_ids(["<sku>", "<x>"]), 5]
    logprobs = model.eval()(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(tokens[1:])]


def test_added_tokens_are_in_merged_weights_and_in_the_tokenizer(
    with_tokens: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint, expected = with_tokens
    folder = written(checkpoint, tmp_path / "merged", format="merged")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert logprobs_of_new(model, tokenizer) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_added_tokens_are_in_an_exported_adapter(
    with_tokens: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint, expected = with_tokens
    folder = written(checkpoint, tmp_path / "exported", format="adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(model, str(folder))
    assert logprobs_of_new(model, tokenizer) == pytest.approx(expected, abs=1e-4)


def test_two_updates_of_one_weight_are_refused(tiny_qwen3: str, tmp_path: Path) -> None:
    base = make_base(tiny_qwen3, tmp_path / "base", is_tied=False)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    weight = load_file(Path(base) / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    save_file({**tensors, "base_model.model.model.layers.0.mlp.up_proj.weight": weight}, path)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["modules_to_save"] = ["layers.0.mlp.up_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    source = find_trained_model(str(adapter), base_model=base)
    with pytest.raises(CheckpointError, match=r"two updates of model.layers.0.mlp.up_proj.weight"):
        merged_weights(source, base_model_folder(source))


@pytest.mark.slow
def test_the_card_of_an_adapter_with_added_tokens_has_a_program_that_runs(
    with_tokens: tuple[Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = with_tokens
    folder = written(checkpoint, tmp_path / "exported", format="adapter")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "vLLM serves no adapter with trainable_token_indices" in card
    assert "vllm serve" not in card
    program = card.split("```python\n")[1].split("```")[0]
    program = program.replace("/path/to/base", str(tmp_path / "base")).replace(
        "max_new_tokens=200", "max_new_tokens=2"
    )
    monkeypatch.chdir(folder)
    exec(compile(program, "README.md", "exec"), {})
