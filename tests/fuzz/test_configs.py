"""Tests that damaged config files are either read, or raise an error that says what is wrong."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import ODD_VALUES, RAW, Mutator, check_each, dumped, seeds

from cookbook.config import cli, config_files
from cookbook.config.chz_private import EntrypointHelpException
from cookbook.errors import ConfigError, ModelError
from cookbook.supervised import train
from cookbook.sweeps import make_plan
from recipes.sft import DEFAULTS

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))

ODD_SETTINGS: Sequence[Any] = (
    *(value for value in ODD_VALUES if value not in list(RAW)),
    *(
        float("nan"),
        float("inf"),
        10**400,
        -(10**20),
        "1e999",
        "0x10",
        "1_000",
        "²",
        "٣",
        "1e-4",
        "auto",
        "x,y",
    ),
    *(
        "cookbook.eval.samples:SamplesEvaluatorBuilder",
        "cookbook.eval.samples:",
        ":x",
        "os:path",
        "x:y",
        "..:a",
    ),
    *(
        {"_type": "cookbook.eval.generation:GenerationEvaluatorBuilder"},
        {"_type": None},
        {"_type": []},
        {"_type": ""},
    ),
    *(
        {"_type": "cookbook.data:FromConversationFileBuilder", "file_path": "x"},
        {"0": "a"},
        {"1": "a"},
    ),
    *([{"_type": "cookbook.eval.samples:SamplesEvaluatorBuilder"}], {"uniform": [0, 1]}, {"choice": []}),
    *({"loguniform": [0, 1]}, {"loguniform": [1e-5, 1e-3]}, {"uniform": "a"}, {"choice": [1, 2], "x": 1}),
)
ODD_KEYS: Sequence[str] = (
    *(
        "learning_rate",
        "batch_size",
        "dataset",
        "dataset_builder",
        "common_config",
        "max_length",
        "model_name",
    ),
    *(
        "evaluator_builders",
        "infrequent_evaluator_builders",
        "prompts",
        "name",
        "scores",
        "_type",
        "max_tokens",
    ),
    *(
        "learning_rat",
        "lr",
        "epochs",
        "num_epochs",
        "config",
        "sweep",
        "runs",
        "recipe",
        "metric",
        "num_samples",
    ),
    *("dataset_builder.common_config.batch_size", "evaluator_builders.0", "evaluator_builders.00", "a.b.c"),
    *(
        "evaluator_builders.99999999999",
        "prompts.²",
        "prompts.-1",
        "prompts.٣",
        ".",
        "..",
        "a..b",
        ".a",
        "a.",
        "",
    ),
    *(
        "help",
        "--help",
        "__init__",
        "__class__",
        "chz",
        "é",
        "a b",
        "prompts." + "9" * 5000,
        "log_path",
        "seed",
    ),
    *("loggers", "tracker", "resume", "per_device_train_batch_size", "lora_rank", "asha", "gpus_per_run"),
)
ODD_LINES = (
    *("a: &a [*a]", "a: &a {b: *a}", "a: *nowhere", "<<: 1", "<<: [1]", "<<: *nowhere", "<<: {max_steps: 3}"),
    *(
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "{[a]: b}: c",
        "max_steps: 1\nmax_steps: 2",
        "---",
        "...",
        "--- a\n--- b",
    ),
    *(
        "\tmax_steps: 1",
        "%YAML 9.9\n---",
        "%TAG ! x\n---",
        "max_steps: !!python/name:os.system",
        "a: !foo b",
        "a: !",
    ),
    *(
        "a: !!python/object/apply:os.getcwd []",
        "a: !!set {b, c}",
        "a: !!binary x",
        "a: !!binary é",
        "a: !!timestamp x",
    ),
    *("max_steps: !!int x", "max_steps: !!float x", "a: !!bool x", "a: !!null x", "a: 2020-99-99", "a: 1:60"),
    *(
        "max_steps: 190:20:30",
        "max_steps: .inf",
        "max_steps: .nan",
        "max_steps: 0o7",
        "max_steps: 0x",
        "a: 0b_",
    ),
    *(
        "a: 2020-01-01",
        "2020-01-01: a",
        "1: a",
        "1.5: a",
        "true: a",
        "null: a",
        "~: ~",
        "max_steps: 1_",
        "a: _",
    ),
    *(f"max_steps: {'9' * 5000}", f"max_steps: 0x{'f' * 5000}", "max_steps: " + "[" * 3000, "a: |\n  b\n c"),
    *(
        "max_steps: " + "[" * 700 + "]" * 700,
        "x: " + "{a: " * 700 + "1" + "}" * 700,
        "a: >",
        "- a",
        "a",
        "a: b: c",
    ),
    *(
        "a: 'b",
        'a: "b',
        'a: "\\x"',
        'a: "\\ud800"',
        'system_prompt: "\\ud800"',
        "a: @b",
        "a: `b",
        "a: %b",
        "#",
    ),
    *(
        "&a a: *a",
        "a: !!omap [b: c]",
        "a: !!pairs [b]",
        "a: !!str",
        "a: !!map []",
        "a: !!seq {}",
        "!!str a: b",
    ),
    "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]" for n in range(8)),
    "a0: &a0 {b: x}\n" + "\n".join(f"a{n + 1}: &a{n + 1} {{b: *a{n}, c: *a{n}}}" for n in range(30)),
    "a0: &a0 {b: x}\n" + "\n".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}" for n in range(25)),
    "\n".join(f"k{n}: 1" for n in range(300)),
)


@functools.cache
def recorded() -> dict[str, Any]:
    """Returns what a run records in its config.json."""
    argv = ["evaluator_builders.0=cookbook.eval.generation:GenerationEvaluatorBuilder"]
    argv += ["evaluator_builders.0.path=x.jsonl", "evaluator_builders.0.name=x", "system_prompt=Be brief."]
    values: dict[str, Any] = config_files.to_json(cli.make_config(train.Config, DEFAULTS, argv))
    return values


def check_config(seed: int) -> None:
    mutate = Mutator(seed)
    is_sweep = mutate.chance(0.15)
    with tempfile.TemporaryDirectory() as folder:
        path = write(mutate, is_sweep, Path(folder))
        try:
            if is_sweep:
                make_plan([f"sweep={path}", f"log_path={folder}/sweep"])
                return
            config = cli.make_config(train.Config, DEFAULTS, [f"config={path}"], "recipes.sft")
        except (ConfigError, ModelError, EntrypointHelpException):
            return
        check_is_recorded(config, Path(folder))


def write(mutate: Mutator, is_sweep: bool, folder: Path) -> Path:
    """Writes a changed config to a file, as YAML or as JSON."""
    rng = mutate.rng
    shipped = rng.choice(SWEEPS if is_sweep else CONFIGS).read_text(encoding="utf-8")
    values = yaml.safe_load(shipped) if is_sweep or mutate.chance(0.6) else recorded()
    way = rng.randrange(10)
    if way < 5:
        values = mutate.changed(values, ODD_SETTINGS, ODD_KEYS)
    is_json = not is_sweep and mutate.chance(0.5)
    if is_json:
        odd = (
            {**values, "max_steps": rng.choice(list(RAW))}
            if way == 5 and isinstance(values, dict)
            else values
        )
        text = dumped(odd)
    elif way == 5 or mutate.chance(0.2):
        text = shipped
    else:
        text = yaml.safe_dump(values, allow_unicode=mutate.chance(0.5))
    if 5 <= way < 8 and not is_json:
        lines = text.split("\n")
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(ODD_LINES))
        text = "\n".join(lines)
    elif way >= 5:
        text = mutate.text(text)
    content = text.encode("utf-8", "surrogatepass")
    if way == 9:
        content = mutate.bytes(content)
    path = folder / (
        "config.json" if is_json != mutate.chance(0.05) else rng.choice(("config.yaml", "config", "a b.yml"))
    )
    path.write_bytes(content)
    return path


def check_is_recorded(config: train.Config, folder: Path) -> None:
    """Checks that the config a run records is read as the same config."""
    path = folder / "recorded.json"
    path.write_text(json.dumps(config_files.to_json(config)), encoding="utf-8")
    again = cli.make_config(train.Config, DEFAULTS, [f"config={path}"], "recipes.sft")
    assert config_files.to_json(again) == config_files.to_json(config)


NUM_CONFIGS, SLICE = 500, 100


@pytest.mark.slow
def test_a_few_changed_config_files_are_configs_or_errors() -> None:
    check_each(check_config, seeds(0, 25))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_CONFIGS, SLICE))
def test_changed_config_files_are_configs_or_errors(first: int) -> None:
    check_each(check_config, seeds(first, SLICE))
