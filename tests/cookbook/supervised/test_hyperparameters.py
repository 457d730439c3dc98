"""Recommended learning rates and ranks equal the published numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from slow import slow_after

from cookbook import embedded
from cookbook.config import cli
from cookbook.errors import ModelError
from cookbook.supervised import train
from cookbook.supervised.hyperparameters import fitting_rank, recommend_learning_rate
from recipes import sft

MakeModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("model_type", "hidden_size", "published"),
    [  # the results of `get_lr` for models of these sizes: Qwen3-4B, Qwen3-8B, Llama-3.2-1B, Llama-3.1-8B
        ("qwen3", 2560, 4.91e-4),
        ("qwen2", 4096, 4.73e-4),
        ("llama", 2048, 4.91e-4),
        ("llama", 4096, 2.86e-4),
    ],
)
def test_the_rule_yields_the_published_rates(
    make_model_folder: MakeModel, tmp_path: Path, model_type: str, hidden_size: int, published: float
) -> None:
    # only the config is read, so the model may be as wide as the real one
    folder = make_model_folder(tmp_path, model_type)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        config.replace('"hidden_size": 32', f'"hidden_size": {hidden_size}'), encoding="utf-8"
    )
    rate = recommend_learning_rate(str(folder))
    assert rate.value == pytest.approx(published, rel=2e-3)
    assert f"2000 / {hidden_size}" in rate.reason
    assert recommend_learning_rate(str(folder), is_full=True).value == pytest.approx(published / 10, rel=5e-3)


def test_a_family_without_a_rule_gets_the_general_rate_and_the_reason_says_so(
    make_model_folder: MakeModel, tmp_path: Path
) -> None:
    rate = recommend_learning_rate(str(make_model_folder(tmp_path, "mistral")))
    assert rate.value == 2e-4
    assert "no rule was fitted to mistral models" in rate.reason


def test_the_embedded_model_gets_the_rate_that_was_tuned_on_it() -> None:
    assert recommend_learning_rate(embedded.MODEL_NAME).value == embedded.LEARNING_RATE
    assert recommend_learning_rate(embedded.MODEL_NAME, is_full=True).value == embedded.LEARNING_RATE / 10


def make(*argv: str) -> train.Config:
    return cli.make_config(train.Config, sft.DEFAULTS, argv)


def test_auto_is_the_default_and_the_resolved_value_is_recorded(tiny_qwen3: str) -> None:
    config = make(f"model_name={tiny_qwen3}")
    assert config == make(f"model_name={tiny_qwen3}", "learning_rate=auto")
    assert config.resolved().learning_rate == recommend_learning_rate(tiny_qwen3).value
    full = make(f"model_name={tiny_qwen3}", "lora_rank=0").resolved()
    assert full.learning_rate == recommend_learning_rate(tiny_qwen3, is_full=True).value


def test_a_missing_model_has_no_recommended_rate_but_accepts_a_given_one() -> None:
    with pytest.raises(ModelError, match="hf download Qwen/Qwen3-0.6B"):
        make("model_name=Qwen/Qwen3-0.6B").resolved()
    config = make("model_name=Qwen/Qwen3-0.6B", "learning_rate=1e-4")
    assert config.resolved() == config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "line"),
    slow_after(
        2,
        [
            ([], "Learning rate 0.004, tuned on cookbook/tiny-chat."),
            (["learning_rate=1e-3"], "Learning rate 0.001 (auto would be 0.004)."),
            (["lora_alpha=64"], "It suits lora_alpha=32, and this run has 64."),
            (["lora_rank=1"], "trained tokens. One parameter per token is a rough rule"),
        ],
    ),
)
def test_a_run_logs_the_source_of_its_learning_rate_and_a_note_on_a_small_rank(
    tmp_path: Path, argv: list[str], line: str
) -> None:
    keys = ["max_steps=1", "test_size=8", "eval_every=0", "infrequent_eval_every=0"]
    sft.main([f"log_path={tmp_path}", *keys, *argv])
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    recorded = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["learning_rate"]
    assert recorded == (1e-3 if "learning_rate=1e-3" in argv else 4e-3)
    assert line in log
    assert ("rough rule" in log) == ("lora_rank=1" in argv)


@pytest.mark.parametrize(
    ("tokens", "parameters", "rank", "fitting"),
    [(100, 100, 8, 8), (101, 100, 8, 16), (1000, 100, 8, 128), (10, 100, 8, 1)],
)
def test_a_fitting_rank_has_a_parameter_for_every_trained_token(
    tokens: int, parameters: int, rank: int, fitting: int
) -> None:
    assert fitting_rank(tokens, parameters, rank) == fitting
    assert fitting * parameters / rank >= tokens
