"""The model and the adapter on which a training step is measured: random, and the same for every side.

A small Qwen3 with its real vocabulary of 151,936 rows, so that the logits weigh as much as they do in a
real one, and a LoRA of rank 32 on all linear layers of its decoder (not on the output head, as PEFT's
"all-linear" means it, unless that is asked for), drawn from a seed. The adapter's B is not zero, so that
every weight takes part in the loss from the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.step_data import SEED, TOKENIZER, VOCAB_SIZE
from cookbook.utils import pretrained

LORA_RANK = 32
LORA_ALPHA = 32
LINEAR_LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

# What every side trains with. The schedule is constant, without warm-up.
LEARNING_RATE = 1e-4
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.95
ADAM_EPS = 1e-8
GRAD_CLIP_NORM = 1.0


def make_folders(folder: Path, adapts_head: bool = False) -> tuple[Path, Path]:
    """The folders of model and adapter within `folder`, created where they are absent."""
    model_folder = make_model_folder(folder / "model")
    adapter_folder = folder / ("adapter-with-head" if adapts_head else "adapter")
    return model_folder, make_adapter_folder(adapter_folder, model_folder, adapts_head)


def make_model_folder(folder: Path) -> Path:
    """Writes model and tokenizer to `folder`, unless they are there; the tokenizer of the embedded model
    replaces an absent one (the examples are tokens already)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from cookbook import embedded
    from cookbook.models import get_tokenizer

    if (folder / "config.json").is_file():
        return folder
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config)
    real = TOKENIZER.is_dir()
    tokenizer = pretrained.load_tokenizer(TOKENIZER) if real else get_tokenizer(embedded.MODEL_NAME)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make_adapter_folder(folder: Path, model_folder: Path, adapts_head: bool = False) -> Path:
    """Writes the adapter with which training begins to `folder`, as PEFT does, unless it is there."""
    from peft import LoraConfig, PeftModel, TaskType

    if (folder / "adapter_config.json").is_file():
        return folder
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=[*LINEAR_LAYERS, *(["lm_head"] if adapts_head else [])],
        base_model_name_or_path=str(model_folder),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = PeftModel(load_model(model_folder), config)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_model(model_folder: Path, **options: Any) -> Any:
    return pretrained.load_causal_lm(model_folder, dtype=torch.float32, **options)


def load_adapted_model(folder: Path, adapts_head: bool = False, **options: Any) -> Any:
    """The model of `folder`/model with its adapter, to be trained; makes what is absent."""
    model_folder, adapter_folder = make_folders(folder, adapts_head)
    return pretrained.load_adapter(load_model(model_folder, **options), adapter_folder, is_trainable=True)


def load_tokenizer(folder: Path) -> Any:
    return pretrained.load_tokenizer(make_folders(folder)[0])
