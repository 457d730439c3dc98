"""Tests of configs as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cookbook.config import cli, config_files
from cookbook.errors import ConfigError
from cookbook.supervised import train
from recipes.sft import DEFAULTS

REPOSITORY = Path(__file__).parents[3]
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_there_are_shipped_configs_for_the_demo_no_robots_and_tulu3() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SHIPPED)
    for dataset in ("pirate", "no_robots", "tulu3"):
        assert f"dataset: {dataset}\n" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_the_command_line_overrides_it(path: Path) -> None:
    argv = [f"config={path}", "learning_rate=3e-4"]
    if path.stem == "ladder_tiny":  # its model is what another run leaves
        argv.append("model_name=cookbook/tiny-chat")
    config = cli.make_config(train.Config, DEFAULTS, argv)
    assert config.learning_rate == 3e-4
    assert config.log_path != DEFAULTS["log_path"]
    for key in config_files.load(str(path)):
        assert all(part in path.read_text(encoding="utf-8") for part in key.split(".") if not part.isdigit())


def test_a_recorded_config_can_be_run_again(tmp_path: Path) -> None:
    argv = ["model_name=Qwen/Qwen3-0.6B", "dataset=tulu3", "batch_size=3", "max_steps=5", "prompts=a,b"]
    config = cli.make_config(train.Config, DEFAULTS, argv)
    recorded = config_files.to_json(config)
    (tmp_path / "config.json").write_text(json.dumps(recorded), encoding="utf-8")
    again = cli.make_config(train.Config, DEFAULTS, [f"config={tmp_path / 'config.json'}"])
    assert config_files.to_json(again) == recorded
    assert again == config


def test_every_derived_value_is_resolved_in_the_record(tiny_qwen3: str) -> None:
    config = cli.make_config(train.Config, DEFAULTS, [f"model_name={tiny_qwen3}"]).resolved()
    recorded = config_files.to_json(config)
    assert recorded["renderer_name"] == "chat_template"
    assert recorded["learning_rate"] == pytest.approx(5e-4 * (2000 / 32) ** 0.0775, rel=1e-3)
    assert recorded["dataset_builder"]["common_config"]["renderer_name"] == "chat_template"


def test_no_secret_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    config = cli.make_config(train.Config, DEFAULTS, ["model_name=Qwen/Qwen3-0.6B", "wandb_project=p"])
    assert "s3cr3t" not in json.dumps(config_files.to_json(config))


def test_a_missing_class_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere:Builder cannot be imported"):
        config_files.flatten({"dataset_builder": {"_type": "nowhere:Builder"}})


def test_differences_are_named_by_their_dotted_keys() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}}
    new = {"a": 1, "b": {"c": [1, 3], "e": 4}}
    assert config_files.differences(old, new) == {"b.c.1": (2, 3), "b.e": (None, 4)}


def test_a_new_field_with_its_default_is_not_a_difference_to_a_recorded_config() -> None:
    recorded = config_files.to_json(cli.make_config(train.Config, DEFAULTS, []))
    older = json.loads(json.dumps(recorded))
    del older["tools_in_system"]
    del older["dataset_builder"]["common_config"]["tools_in_system"]
    assert config_files.differences(config_files.with_defaults(older, recorded), recorded) == {}
    recorded["dataset_builder"]["common_config"]["tools_in_system"] = True
    found = config_files.differences(config_files.with_defaults(older, recorded), recorded)
    assert found == {"dataset_builder.common_config.tools_in_system": (None, True)}


def test_a_config_recorded_before_its_modules_moved_is_read_as_the_same(tmp_path: Path) -> None:
    new = config_files.to_json(cli.make_config(train.Config, DEFAULTS, []))
    name = new["dataset_builder"]["_type"]
    assert name.startswith("cookbook.data.builders:")
    older = name.replace("cookbook.data.", "cookbook.supervised.data.")
    old = {**new, "dataset_builder": {**new["dataset_builder"], "_type": older}}
    assert config_files.differences(config_files.with_defaults(old, new), new) == {}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(old), encoding="utf-8")
    assert config_files.to_json(cli.make_config(train.Config, DEFAULTS, [f"config={file}"])) == new
    argument = f"dataset_builder={older}"
    assert config_files.to_json(cli.make_config(train.Config, DEFAULTS, [argument])) == new
    for moved, home in (
        ("cookbook.supervised.types:ChatDatasetBuilderCommonConfig", "cookbook.data.types"),
        ("cookbook.supervised.nll_evaluator:NLLEvaluator", "cookbook.eval.nll"),
        ("cookbook.supervised.data:Conversation", "cookbook.data"),
        ("cookbook.eval.inspect_tasks:InspectEvaluatorBuilder", "cookbook.eval.integrations.inspect"),
        ("cookbook.eval.harness_tasks:HarnessEvaluatorBuilder", "cookbook.eval.integrations.lm_eval"),
    ):
        assert config_files.current_name(moved) == f"{home}:{moved.split(':')[1]}"
        assert config_files.importable(moved) == moved
    assert config_files.current_name("mine.data:Builder") == "mine.data:Builder"


@pytest.mark.parametrize("key", ["model_name", "system_prompt", "learning_rate", "seed"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_an_object_where_a_field_takes_a_plain_value_is_refused(
    key: str, is_recorded: bool, tmp_path: Path
) -> None:
    values = config_files.to_json(cli.make_config(train.Config, DEFAULTS, [])) if is_recorded else {}
    values[key] = {"_type": "cookbook.eval.generation:GenerationEvaluatorBuilder"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"Invalid {key}: it is an object with `_type` cookbook.eval"):
        cli.make_config(train.Config, DEFAULTS, [f"config={path}"])
