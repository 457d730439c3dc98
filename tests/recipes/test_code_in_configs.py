"""Only code that the user names is imported for a config, and only after everything else is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import Programs
from slow import slow_after

from cookbook.config import cli, config_files
from cookbook.errors import ConfigError
from cookbook.supervised import train
from recipes.sft import DEFAULTS

DECOY = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
import chz
from cookbook.supervised.data import NamedChatDatasetBuilder
from cookbook.eval.samples import SamplesEvaluatorBuilder

@chz.chz
class Builder(NamedChatDatasetBuilder):
    num_stars: int = 3

@chz.chz
class Evaluator(SamplesEvaluatorBuilder):
    pass
"""


@pytest.fixture
def decoy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module that writes a file when it is imported."""
    (tmp_path / "decoy.py").write_text(DECOY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("decoy", None)


def was_imported(folder: Path) -> bool:
    return (folder / "imported").exists()


def recorded_config(**changes: Any) -> dict[str, Any]:
    """Returns the config that a run records, with the decoy for every class."""
    config = config_files.to_json(cli.make_config(train.Config, DEFAULTS, ["log_path=run"]))
    config["dataset_builder"]["_type"] = "decoy:Builder"
    config["infrequent_evaluator_builders"][0]["_type"] = "decoy:Evaluator"
    return {**config, **changes}


def make(*argv: str) -> train.Config:
    return cli.make_config(train.Config, DEFAULTS, argv)


@pytest.fixture
def run(programs: Programs, decoy: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function of (module, *argv) that runs a command in the decoy's folder, from which it imports."""
    return lambda *argv: programs.run(*argv, cwd=decoy)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "argv",
    [
        ["dataset_builder=decoy:Builder"],
        ["dataset_builder=decoy.Builder"],
        ["infrequent_evaluator_builders.0=decoy:Evaluator"],
        ["config=mine.yaml"],
        ["config=recorded.json"],
        ["batch_size=decoy:Builder"],
        ["log_path=decoy:Builder"],
    ],
)
@pytest.mark.parametrize("recipe", slow_after(1, ["recipes.sft", "recipes.preview"]))
def test_help_imports_no_module_that_a_config_names(
    run: Callable[..., Any], recipe: str, argv: list[str], decoy: Path
) -> None:
    (decoy / "mine.yaml").write_text(
        "dataset_builder:\n  _type: decoy:Builder\n  num_stars: 4\n", encoding="utf-8"
    )
    (decoy / "recorded.json").write_text(json.dumps(recorded_config()), encoding="utf-8")
    done = run(recipe, *argv, "--help")
    assert not was_imported(decoy), done.stderr
    if done.returncode == 0:
        assert "learning_rate=" in done.stdout
    if argv[0] == "dataset_builder=decoy:Builder":
        assert "dataset_builder=decoy:Builder (not imported for help" in done.stdout


@pytest.mark.parametrize(
    ("argv", "problem"),
    {
        ("dataset_builder=decoy:Builder", "lora_rank=many"): "Invalid lora_rank=many",
        (
            "dataset_builder=decoy:Builder",
            "log_path.deeper=1",
        ): "log_path takes text, and has no keys below it",
        ("dataset_builder=decoy:Builder", "lr_schedule=cosin"): "Did you mean",
        ("dataset_builder=decoy:Builder", "--device"): "--device has no value",
        ("batch_size=decoy:Builder",): "Invalid batch_size=decoy:Builder",
        ("weights=decoy:Builder",): "Invalid weights=decoy:Builder",
        ("lr_schedule=decoy:Builder",): "Invalid lr_schedule=decoy:Builder",
        ("dataset_builder=decoy:Builder[os]",): "Invalid dataset_builder",
        ("dataset_builder=decoy:Builder()",): "Invalid dataset_builder",
        ("nothing=decoy:Builder",): "There is no key 'nothing'",
    }.items(),
)
def test_problems_that_need_no_import_are_reported_before_any(
    argv: tuple[str, ...], problem: str, decoy: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        make(*argv)
    assert problem in str(error.value)
    assert not was_imported(decoy)


def test_a_class_that_the_user_names_is_imported_with_its_keys(decoy: Path) -> None:
    (decoy / "mine.yaml").write_text(
        "dataset_builder:\n  _type: decoy:Builder\n  num_stars: 4\n", encoding="utf-8"
    )
    for argv in (
        ["dataset_builder=decoy:Builder", "num_stars=4", "batch_size=2"],
        ["config=mine.yaml", "batch_size=2"],
    ):
        builder: Any = make(*argv).dataset_builder
        assert (type(builder).__name__, builder.num_stars, builder.common_config.batch_size) == (
            "Builder",
            4,
            2,
        )
    with pytest.raises(ConfigError, match=r"There is no key 'num_star'.*Did you mean `num_stars`"):
        make("dataset_builder=decoy:Builder", "num_star=4")


def test_a_recorded_config_runs_no_foreign_code_unless_it_is_named_again(decoy: Path) -> None:
    (decoy / "recorded.json").write_text(json.dumps(recorded_config()), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        make("config=recorded.json")
    assert "dataset_builder is decoy:Builder, which is code outside of this project" in str(error.value)
    assert "name it too: dataset_builder=decoy:Builder" in str(error.value)
    assert not was_imported(decoy)
    named = config_files.foreign_classes(recorded_config())
    config = make("config=recorded.json", *(f"{key}={name}" for key, name in named.items()))
    assert type(config.dataset_builder).__name__ == "Builder"
    assert type(config.infrequent_evaluator_builders[0]).__name__ == "Evaluator"
    assert config_files.to_json(config)["dataset_builder"]["_type"] == "decoy:Builder"


@pytest.mark.parametrize(
    "name",
    [
        "cookbook.jobs.head:subprocess.run",
        "cookbook.config.cli:run",
        "lambda:x",
        "subprocess:run",
        "os:system",
    ],
)
def test_a_recorded_config_calls_no_function(name: str, decoy: Path) -> None:
    config = recorded_config()
    config["dataset_builder"] = {"_type": name}
    config["infrequent_evaluator_builders"] = []
    (decoy / "recorded.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"what a run recorded is only data"):
        make("config=recorded.json")


def test_a_config_recorded_by_this_project_is_read_as_before(decoy: Path) -> None:
    config = make("log_path=run", "batch_size=3")
    (decoy / "recorded.json").write_text(json.dumps(config_files.to_json(config)), encoding="utf-8")
    assert config_files.to_json(make("config=recorded.json")) == config_files.to_json(config)


def _shared_run(folder: Path) -> Path:
    """Writes the folder of a run as another person may have made it."""
    run_folder = folder / "run"
    (run_folder / "checkpoints" / "final").mkdir(parents=True)
    (run_folder / "config.json").write_text(json.dumps(recorded_config()), encoding="utf-8")
    row = {"step": 1, "train/nll": 1.0, "test/nll": 1.0, "optim/learning_rate": 1e-4}
    (run_folder / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    checkpoint = {"name": "final", "path": "checkpoints/final", "step": 1, "epoch": 0, "batch": 1}
    (run_folder / "checkpoints.jsonl").write_text(json.dumps(checkpoint) + "\n", encoding="utf-8")
    return run_folder


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "argv",
    [
        ["recipes.report", "run"],
        ["recipes.report", "run", "run", "to=both.html"],
        ["recipes.export", "checkpoint=run", "to=exported", "format=merged"],
        ["recipes.chat", "checkpoint=run"],
        ["recipes.sft", "log_path=run", "max_steps=1"],
        ["recipes.sft", "config=run/config.json"],
        ["recipes.preview", "config=run/config.json"],
        ["recipes.sweep", "config=run/config.json", "seed=0,1"],
        ["recipes.jobs", "submit", "sft", "config=run/config.json"],
    ],
    ids=" ".join,
)
def test_no_command_imports_what_a_shared_run_names(
    run: Callable[..., Any], argv: list[str], decoy: Path
) -> None:
    _shared_run(decoy)
    done = run(*argv)
    assert not was_imported(decoy), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
