"""Adapters that PEFT makes of a mixture of experts from the names of linear layers that it does not have.

PEFT turns `gate_proj`, `up_proj` and `down_proj` into the experts' stacked weights, with twice the rank on
the first, and `all-linear` into the router as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import families
import family_checks
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cookbook import ServiceClient
from cookbook.export import export
from cookbook.export.config import ExportConfig

BY_LEAF = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    pytest.param("qwen3_moe", "all-linear", id="qwen3_moe-all-linear"),
    pytest.param("qwen3_moe", BY_LEAF, id="qwen3_moe-by-leaf", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", BY_LEAF, id="deepseek_v3-by-leaf"),
    pytest.param("mixtral", ["q_proj", "w1", "w2", "w3"], id="mixtral-by-leaf", marks=pytest.mark.slow),
]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(published: Path, folder: Path, targets: Any) -> Path:
    """Saves an adapter with PEFT none of whose weights is as it was initialised."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(plain(published), config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_an_adapter_on_experts_by_the_names_of_linear_layers_is_continued_and_merged(
    name: str, targets: Any, tmp_path: Path
) -> None:
    published = families.save(name, tmp_path / "published")
    adapter = make_adapter(published, tmp_path / "adapter", targets)
    stacked = [key for key in load_file(adapter / "adapter_model.safetensors") if ".experts." in key]
    assert stacked, "PEFT puts nothing on the experts, so this shows nothing"

    client = ServiceClient(checkpoint_dir=tmp_path / "checkpoints").create_training_client_from_state(adapter)
    truth = peft.PeftModel.from_pretrained(plain(published), str(adapter), is_trainable=True).eval()
    family_checks.assert_same_logprobs(client, truth)
    expected, sizes = family_checks.plain_gradients(truth, family_checks.SHORT)
    found = family_checks.gradients_of(client, family_checks.SHORT)
    expected, sizes = (
        {key.replace(".default.", "."): value for key, value in each.items()} for each in (expected, sizes)
    )
    assert found.keys() == expected.keys()
    family_checks.assert_gradients(found, expected, sizes)

    merged = ExportConfig(checkpoint=str(adapter), to=str(tmp_path / "merged"), format="merged")
    with contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(export.main(merged))
    family_checks.assert_same_logprobs(client, plain(tmp_path / "merged"))

    client.forward_backward(family_checks.SHORT, "cross_entropy")
    client.optim_step(family_checks.ADAM).result()
    saved = Path(client.save_state("continued").result().path)
    again = peft.PeftModel.from_pretrained(plain(published), str(saved)).eval()
    family_checks.assert_same_logprobs(client, again)
    was, now = (
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for folder in (adapter, saved)
    )
    for key in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r"):
        assert now[key] == was[key], key
    client.close()
