"""Small models and tokenizers, built in this process without any download.

The process that only distributes tests reads this file too, so functions import torch and transformers.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from programs import Programs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# `make test` tries fewer examples of a property than `make test-slow`, which tries them for minutes.
# How long examples take depends on what else the machine does.
ON_ANY_MACHINE = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.register_profile("quick", ON_ANY_MACHINE, max_examples=24)
settings.register_profile("thorough", ON_ANY_MACHINE, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def _make_model_folder(folder: Path, model_type: str = "qwen3", **overrides: object) -> Path:
    """Writes a random model of a few thousand parameters with the vocabulary of `make_tokenizer`."""
    import torch
    from tiny_tokenizer import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "initializer_range": 0.2,
            **overrides,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LONGEST_FILES = (
    "cuda_rehearsal/test_rehearsal.py",
    "cookbook/supervised/test_resume.py",
    "cookbook/engine/test_exactness.py",
    "cookbook/engine/test_checkpoint.py",
    "renderers/test_chat_template.py",
    "cookbook/engine/sampling/test_sampler.py",
    "cookbook/export/test_chat_format.py",
    "cookbook/engine/model/test_recurrence.py",
    "golden/test_texts.py",
    "recipes/test_sft.py",
    "cookbook/engine/model/test_peft_settings.py",
    "cookbook/engine/sampling/test_prompt_reuse.py",
    "recipes/test_environments.py",
    "cookbook/supervised/test_train.py",
    "cookbook/supervised/test_runs_of_several.py",
)


def pytest_collection() -> None:
    gc.disable()  # until the tests are collected: importing creates many objects and discards few


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks further cases as slow, and sorts the longest files first, so that processes end together."""
    _mark_further_cases(items)
    folder = Path(__file__).parent
    order = {folder / name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def _mark_further_cases(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cases") is not None and item.get_closest_marker("slow") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one in cases.values():
        marker = of_one[0].get_closest_marker("cases")
        assert marker is not None
        (number,) = marker.args
        chosen = {len(of_one) * index // number for index in range(number)}
        for index, item in enumerate(of_one):
            if index not in chosen:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Collects garbage from now on, without what was imported for the tests, which stays."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOKBOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Runs `python -m ...` without importing torch for each command."""
    started = Programs(tmp_path_factory.mktemp("programs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def make_model_folder() -> Callable[..., Path]:
    return _make_model_folder


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tiny_tokenizer import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(_make_model_folder(tmp_path_factory.mktemp("models") / "tiny-qwen3"))


@pytest.fixture(scope="session")
def chats() -> list[list[dict[str, str]]]:
    """Conversations of different lengths in the vocabulary of the tiny tokenizer."""
    from tiny_tokenizer import TEXT

    rng = np.random.default_rng(0)
    words = " ".join(TEXT).split()
    conversations = []
    for i in range(24):
        messages: list[dict[str, str]] = []
        for _ in range(1 + i % 3):
            for role in ("user", "assistant"):
                messages.append(
                    {"role": role, "content": " ".join(rng.choice(words, size=rng.integers(1, 9)))}
                )
        conversations.append(messages)
    return conversations
