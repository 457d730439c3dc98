"""Tests which name is suggested for an unknown one, and which is not."""

from __future__ import annotations

import pytest

from cookbook import embedded
from cookbook.config import cli
from cookbook.supervised import train
from cookbook.utils.nearest import did_you_mean, nearest
from recipes.sft import DEFAULTS
from renderers import renderer_names

PARAMS = cli.make_resolver(train.Config, DEFAULTS, cli.Arguments()).params
KEYS = [*(key.rpartition(".")[2] for key in PARAMS), *PARAMS]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("batch_sise", "batch_size"),
        ("lora-rank", "lora_rank"),
        ("logPath", "log_path"),
        ("trainmlp", "train_mlp"),
        ("evl_every", "eval_every"),
        ("epochs", "num_epochs"),
        ("warmup", "warmup_steps"),
        ("load_path", "load_checkpoint_path"),
        ("dataset_builder.datset", "dataset_builder.dataset"),
    ],
)
def test_the_key_is_suggested_for_a_typo_and_a_short_form(typo: str, meant: str) -> None:
    assert nearest(typo, KEYS) == meant


@pytest.mark.parametrize(
    "name", ["base_model", "min_steps", "no_train_mlp", "eval_batch_size", "unfreeze_layers", "zzz", "", "_"]
)
def test_a_distant_or_opposite_key_is_not_suggested(name: str) -> None:
    assert nearest(name, KEYS) is None
    assert did_you_mean(name, KEYS) == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("qwen_3", "qwen3"),
        ("Qwen3", "qwen3"),
        ("qwen33", "qwen3"),
        ("gpt-oss", "gpt_oss"),
        ("gpt_oss_hihg", "gpt_oss_high"),
        ("deepseek_v3", "deepseekv3"),
        ("qwen3_instuct", "qwen3_instruct"),
        ("deepseekv3_disable_thinking", None),
        ("deepseekv3_nothinking", None),
        ("qwen3_7", None),
        ("qwen25_instruct", None),
        ("gemma2", None),
        ("phi4", None),
        ("llama4", None),
    ],
)
def test_neither_another_version_nor_the_opposite_of_a_renderer_is_suggested(
    name: str, meant: str | None
) -> None:
    assert nearest(name, renderer_names()) == meant


@pytest.mark.parametrize(
    ("name", "opposite"),
    [
        ("max_steps", "min_steps"),
        ("disable_shuffle", "enable_shuffle"),
        ("train_loss", "test_loss"),
        ("shuffle_off", "shuffle"),
        ("unfreeze", "freeze"),
        ("push_model", "pull_model"),
        ("low_memory", "high_memory"),
    ],
)
def test_an_opposite_is_not_near_in_either_direction(name: str, opposite: str) -> None:
    assert nearest(name, [opposite]) is None
    assert nearest(opposite, [name]) is None


def test_a_name_of_three_letters_may_have_one_wrong_letter() -> None:
    assert nearest("sfx", ["sft", "sft_loop", "preview"]) == "sft"
    assert nearest("rft", ["sft"]) is None


def test_no_key_is_near_the_name_of_the_embedded_model() -> None:
    assert nearest(embedded.MODEL_NAME, KEYS) is None
