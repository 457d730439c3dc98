"""Small models with adapters on them, made by PEFT itself, and a run of the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cookbook.supervised import train
from cookbook.supervised.data import NamedChatDatasetBuilder
from cookbook.supervised.types import ChatDatasetBuilderCommonConfig

SYSTEM_PROMPT = 'You are a "pirate" {{ of }}\nfew words \\ 🦜.'
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _adapted(base: Path, folder: Path, targets: list[str] | None = None) -> Any:
    """A PEFT model on the base with a LoRA that changes it a lot, which is saved in the folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets or [*LINEAR, "lm_head"]
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.fixture(scope="session")
def make_adapted() -> Callable[..., Any]:
    """(base, folder, targets): a PEFT model, saved as PEFT saves it."""
    return _adapted


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of the embedded model, with a system prompt."""
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    model = "cookbook/tiny-chat"
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, batch_size=4, system_prompt=SYSTEM_PROMPT
    )
    config = train.Config(
        log_path=str(folder),
        model_name=model,
        dataset_builder=NamedChatDatasetBuilder(dataset="pirate", common_config=common, test_size=8),
        system_prompt=SYSTEM_PROMPT,
        lora_rank=4,
        max_steps=4,
        save_every=2,
        eval_every=2,
    )
    asyncio.run(train.main(config))
    return folder
