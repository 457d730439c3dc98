"""Tests that keys of other trainers are answered with the key here, or with why none is needed."""

from __future__ import annotations

import re

import pytest

from cookbook.config import cli, other_trainers
from cookbook.errors import ConfigError
from cookbook.supervised import train
from recipes import chat
from recipes.sft import DEFAULTS

MODEL = "model_name=Qwen/Qwen3-0.6B"
RESOLVER = cli.make_resolver(train.Config, DEFAULTS, cli.Arguments())
VALUES = sorted(
    {value for answer in other_trainers.ANSWERS.values() for value in re.findall(r"`(\w+=[^`]*)`", answer)}
)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.make_config(train.Config, DEFAULTS, [MODEL, *argv])
    return str(caught.value)


@pytest.mark.parametrize("answer", sorted(set(other_trainers.ANSWERS.values())))
def test_every_key_that_an_answer_names_is_one_key_here(answer: str) -> None:
    """The recipe's own evaluators are included, so that the answer can be copied."""
    assert answer[-1] != "."
    assert len(re.findall("`", answer)) == 2 * len(other_trainers.keys_in(answer))
    for key in other_trainers.keys_in(answer):
        found = [whole for whole in RESOLVER.params if whole == key or whole.endswith(f".{key}")]
        assert key in RESOLVER.params or len(found) == 1, key


@pytest.mark.parametrize("setting", VALUES)
def test_every_value_that_an_answer_names_is_accepted(setting: str) -> None:
    more = ["quantization=None"] if setting.startswith("lora_rank=0") else []
    assert cli.make_config(train.Config, DEFAULTS, [MODEL, setting, *more])


def test_no_answer_is_for_a_key_of_this_project() -> None:
    """Such an answer would never be shown."""
    for key in other_trainers.ANSWERS:
        assert key not in RESOLVER.params
        assert not [whole for whole in RESOLVER.params if whole.endswith(f".{key}")], key
    assert len(other_trainers.ANSWERS) >= 300


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("base_model", "Use `model_name`."),
        ("model_name_or_path", "Use `model_name`."),
        ("lr", "Use `learning_rate`."),
        ("num_train_epochs", "Use `num_epochs`."),
        ("lora_r", "Use `lora_rank`."),
        ("output_dir", "Use `log_path`."),
        ("max_seq_length", "Use `max_length`."),
        ("max_seq_len", "Use `max_length`."),
        ("cutoff_len", "Use `max_length`."),
        ("sequence_len", "Use `max_length`."),
        ("load_in_4bit", "`quantization=nf4` holds the base model in 4 bits."),
        ("per_device_train_batch_size", "`batch_size` counts the conversations of an optimizer step"),
        ("gradient_accumulation_steps", "`batch_size` counts the conversations of an optimizer step"),
        ("packing", "Sequences always share rows without seeing each other. Remove it."),
        ("bf16", "`dtype` is the base model's"),
        ("target_modules", "`lora_targets` names layers, or matches them by regular expressions"),
        ("layers_to_transform", "Use `lora_targets` with a regular expression"),
        ("new_special_tokens", "`add_tokens` adds tokens"),
        ("peft_use_rslora", "Use `use_rslora`"),
        ("template", "`renderer_name` names the chat format"),
        ("report_to", "`wandb_project`, `trackio_project` and `tensorboard`"),
        ("assistant_only_loss", "`train_on_what=all_assistant_messages`"),
        ("hub_model_id", "python -m recipes.export"),
        ("resume_from_checkpoint", "The same command in the same `log_path` resumes."),
        ("deepspeed", "`shard` says how"),
    ],
)
def test_a_key_of_another_trainer_is_answered_by_its_meaning(key: str, answer: str) -> None:
    for written in (f"{key}=1", f"--{key.replace('_', '-')}=1"):
        said = refusal(written)
        assert said.startswith(f"command line: There is no key '{key}'. ")
        assert answer in said


def test_a_nested_section_of_another_trainer_is_answered_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "axolotl.yaml"
    file.write_text(
        "base_model: Qwen/Qwen3-0.6B\ndatasets:\n  - path: a.jsonl\n    type: alpaca\n"
        "tokenizer:\n  _component_: torchtune.models\n  path: x\nlearning_rate: 1e-4\n",
        encoding="utf-8",
    )
    said = refusal(f"config={file}").splitlines()
    assert len(said) == 4
    assert "line 1: There is no key 'base_model'. Use `model_name`." in said[1]
    assert "line 2: There is no key 'datasets'. `dataset` is" in said[2]
    assert "There is no key 'tokenizer'. The tokenizer is that of `model_name`." in said[3]


def test_a_recipe_that_does_not_train_gives_no_such_answers() -> None:
    with pytest.raises(ConfigError) as caught:
        cli.make_config(chat.ChatConfig, {}, ["model_name=x", "lr=1"])
    assert "learning_rate" not in str(caught.value)
