"""Adapters of many kinds that PEFT makes, and models for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

IDS = [5, 9, 11, 42, 7, 3, 9, 60]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "one module by its full name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "a regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp.*"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks and alphas by pattern": {
        "target_modules": [*ATTENTION, "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"v_proj": 3, r"model.layers.0.self_attn.o_proj": 20},
    },
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "DoRA": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True},
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "a LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a saved head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "saved embeddings and head": {
        "target_modules": ATTENTION,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "a saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 60]},
    "trained tokens by module": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 11], "lm_head": [9, 11]},
    },
}


def make_adapter(folder: Path, base: str, **settings: Any) -> Path:
    """Saves an adapter with PEFT none of whose weights is as it was initialised."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.2
    model.save_pretrained(folder)
    return folder


def load_with_peft(base: str, folder: Path, is_trainable: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable).eval()


def make_base(tiny_qwen3: str, folder: Path, is_tied: bool) -> str:
    """Saves a model whose head is tied to its embeddings, or has weights of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    model.config.tie_word_embeddings = is_tied
    if is_tied:
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.save_pretrained(folder)
    for file in Path(tiny_qwen3).glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)
