"""Keys, where they come from, and what a wrong one says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import chz
import pytest

from cookbook import cli
from cookbook.errors import ConfigError, DataError
from cookbook.eval.evaluators import RunContext
from cookbook.supervised import train
from recipes.sft import DEFAULTS

MODEL = "Qwen/Qwen3-0.6B"  # its renderer is known by name, so no tokenizer is loaded


def make(*argv: str) -> Any:
    return cli.make_config(train.Config, DEFAULTS, [f"model_name={MODEL}", *argv], prog="recipes.sft")


def test_every_field_of_the_config_is_a_key() -> None:
    config = make(
        "learning_rate=3e-4", "max_steps=7", "save_every=3", "log_path=/tmp/x", "seed=5", "train_mlp=False"
    )
    assert (config.learning_rate, config.max_steps, config.save_every) == (3e-4, 7, 3)
    assert (config.log_path, config.seed, config.train_mlp) == ("/tmp/x", 5, False)


def test_the_keys_of_the_data_can_be_given_by_their_last_part() -> None:
    config = make(
        "dataset=tulu3",
        "batch_size=4",
        "max_length=99",
        "test_size=7",
        "train_on_what=last_assistant_message",
    )
    builder = config.dataset_builder
    assert (builder.dataset, builder.test_size) == ("tulu3", 7)
    common = builder.common_config
    assert (common.batch_size, common.max_length, common.train_on_what.value) == (
        4,
        99,
        "last_assistant_message",
    )


def test_the_model_the_renderer_and_the_seed_reach_the_data() -> None:
    config = make("renderer_name=role_colon", "seed=9")
    common = config.dataset_builder.common_config
    assert (common.model_name_for_tokenizer, common.renderer_name) == (MODEL, "role_colon")
    assert config.dataset_builder.shuffle_seed == 9
    run = RunContext(Path("runs"), config.model_name, config.renderer_name, config.system_prompt)
    assert config.infrequent_evaluator_builders[0].in_run(run).renderer_name == "role_colon"


def test_later_wins_defaults_then_the_file_then_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("learning_rate: 1e-3\nbatch_size: 64\nmax_steps: 10\n", encoding="utf-8")
    config = make(f"config={file}", "max_steps=20")
    assert (config.learning_rate, config.max_steps) == (1e-3, 20)
    assert config.dataset_builder.common_config.batch_size == 64


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rat=1", "There is no key 'learning_rat'. Did you mean learning_rate?"),
        ("batch_sise=1", "There is no key 'batch_sise'. Did you mean batch_size?"),
        ("dataset_builder.datset=x", "There is no key 'dataset_builder.datset'. Did you mean"),
        ("learning_rate=fast", "learning_rate=fast is impossible. It takes a number or auto."),
        ("max_steps=2.5", "max_steps=2.5 is impossible. It takes a whole number or None."),
        ("lr_schedule=saw", "lr_schedule=saw is impossible. It takes one of linear, cosine, constant."),
        ("train_mlp=maybe", "train_mlp=maybe is impossible. It takes True or False."),
        ("train_on_what=all", "It takes one of last_assistant_message, last_assistant_turn"),
        ("learning_rate=0", "learning_rate=0.0 is impossible. It must be above 0."),
        ("batch_size=0", "batch_size=0. A step needs at least one conversation."),
        ("verbose", "'verbose' is no setting. Write key=value"),
        ("config=none.yaml", "there is no such file"),
        ("dataset_builder=nowhere:Builder", "dataset_builder=nowhere:Builder is impossible"),
    ],
)
def test_a_wrong_argument_is_one_error_that_says_what_to_change(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(argument)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_a_file_that_is_no_config_is_an_error(tmp_path: Path) -> None:
    for content, message in {"- a\n- b\n": "holds no keys", "a: [\n": "cannot be read"}.items():
        (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            make(f"config={tmp_path / 'bad.yaml'}")


def test_an_unknown_key_in_a_file_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="Did you mean learning_rate"):
        make(f"config={tmp_path / 'bad.yaml'}")


@chz.chz
class TinyConfig:
    name: str = "x"


def test_an_error_ends_a_recipe_with_its_message_and_no_traceback(capsys: pytest.CaptureFixture) -> None:
    async def fail(config: TinyConfig) -> None:
        error = DataError("row 3 of chats.jsonl is bad.")
        error.add_note("(batch 2)")
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(TinyConfig, fail, {}, prog="tiny", argv=[])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "DataError: row 3 of chats.jsonl is bad.\n(batch 2)\n"


def test_help_fits_80_columns_and_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; sys.argv = ['sft', '--help']; import recipes.sft\n"
        "try: recipes.sft.main()\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning_rate=" in done.stdout
    assert "peak learning rate" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
