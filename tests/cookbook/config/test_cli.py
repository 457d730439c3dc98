"""Tests of keys, of their order of precedence, and of the errors for wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chz
import pytest
from chz.blueprint import Reference

from cookbook.config import cli, config_files
from cookbook.config.chz_private import EntrypointHelpException
from cookbook.data import FromConversationFileBuilder
from cookbook.data.types import SupervisedDatasetBuilder
from cookbook.errors import ConfigError, DataError
from cookbook.eval.evaluators import RunContext
from cookbook.supervised import train
from recipes.sft import DEFAULTS

MODEL = "Qwen/Qwen3-0.6B"  # its renderer is known by name, so no tokenizer is loaded


SAMPLES = "cookbook.eval.samples:SamplesEvaluatorBuilder"
GENERATION = "cookbook.eval.generation:GenerationEvaluatorBuilder"
FILE_BUILDER = "cookbook.data:FromConversationFileBuilder"


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


def test_the_data_use_the_model_the_renderer_and_the_seed_of_the_config() -> None:
    config = make("renderer_name=role_colon", "seed=9")
    common = config.dataset_builder.common_config
    assert (common.model_name_for_tokenizer, common.renderer_name) == (MODEL, "role_colon")
    assert config.dataset_builder.shuffle_seed == 9
    run = RunContext(Path("runs"), config.model_name, config.renderer_name, config.system_prompt)
    assert config.infrequent_evaluator_builders[0].in_run(run).renderer_name == "role_colon"


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("learning_rate: 1e-3\nbatch_size: 64\nmax_steps: 10\n", encoding="utf-8")
    config = make(f"config={file}", "max_steps=20")
    assert (config.learning_rate, config.max_steps) == (1e-3, 20)
    assert config.dataset_builder.common_config.batch_size == 64


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rat=1", "There is no key 'learning_rat'. Did you mean `learning_rate`?"),
        ("batch_sise=1", "There is no key 'batch_sise'. Did you mean `batch_size`?"),
        ("dataset_builder.datset=x", "There is no key 'dataset_builder.datset'. Did you mean"),
        ("learning_rate=fast", "Invalid learning_rate=fast: it takes a number or auto."),
        ("max_steps=2.5", "Invalid max_steps=2.5: it takes a whole number or None."),
        ("lr_schedule=saw", "Invalid lr_schedule=saw: it takes one of linear, cosine, constant."),
        ("train_mlp=maybe", "Invalid train_mlp=maybe: it takes True or False."),
        ("train_on_what=all", "it takes one of last_assistant_message, last_assistant_turn"),
        ("learning_rate=0", "Invalid learning_rate=0.0: must be finite and > 0."),
        ("batch_size=0", "Invalid batch_size=0: must be >= 1 conversation."),
        ("verbose", "unrecognised argument 'verbose'. Write key=value"),
        ("config=none.yaml", "there is no such file"),
        ("dataset_builder=nowhere:Builder", "nowhere:Builder cannot be imported"),
        (
            "dataset_builder=NoBuilder",
            "write dataset_builder.<key>=value for one of its keys (common_config, ",
        ),
        (
            "dataset_builder=" + SAMPLES,
            "it takes module:Class, a class of SupervisedDatasetBuilder, and this is none.",
        ),
        ("dataset_builder.common_config=8", "write dataset_builder.common_config.<key>=value"),
        ("evaluator_builders=foo", "it is a list. Write evaluator_builders.0=module:Class"),
        ("evaluator_builders=" + SAMPLES, f"it is a list. Write evaluator_builders.0={SAMPLES}"),
        ("evaluator_builders.x=" + SAMPLES, "is a list, whose items are evaluator_builders.0"),
        ("evaluator_builders.first.max_tokens=3", "is a list, whose items are evaluator_builders.0"),
        ("evaluator_builders.0=foo", "write evaluator_builders.0=module:Class"),
        ("evaluator_builders.1=" + SAMPLES, "has no evaluator_builders.0 before it"),
        ("evaluator_builders.0.max_tokens=3", "evaluator_builders.0 has no class yet. Write"),
        ("learning_rate.max=3", "learning_rate takes a number or auto, and has no keys below it."),
        ("train_on_what=everything", "all_tokens, all_user_and_system_messages, customized."),
        ("on_bad_row=drop", "Invalid on_bad_row=drop: it takes one of raise, skip."),
        ("if_log_path_exists=resum", "resume, raise, delete, ask. Did you mean `resume`?"),
        ("quantization=int4", "Invalid quantization=int4: it takes one of nf4, fp8 or None."),
        ("prompts.1=a", "prompts.0 before it"),
        (f"dataset_builder={FILE_BUILDER}", "dataset_builder.file_path=<text> is required: the file"),
    ],
)
def test_a_wrong_argument_raises_one_error_with_advice(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(argument)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_a_file_that_is_not_a_config_is_an_error(tmp_path: Path) -> None:
    for content, message in {"- a\n- b\n": "holds no keys", "a: [\n": "cannot be read"}.items():
        (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            make(f"config={tmp_path / 'bad.yaml'}")


def test_an_unknown_key_in_a_file_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="Did you mean `learning_rate`"):
        make(f"config={tmp_path / 'bad.yaml'}")


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*argv)
    return str(caught.value)


# -- one key, one field --------------------------------------------------------------------------


def test_a_short_key_that_matches_several_fields_is_refused_naming_all_of_them() -> None:
    two = [f"evaluator_builders.0={GENERATION}", "evaluator_builders.0.path=questions.jsonl"]
    for key, fields in {
        "max_tokens=7": ("evaluator_builders.0.max_tokens", "infrequent_evaluator_builders.0.max_tokens"),
        "0.max_tokens=7": ("evaluator_builders.0.max_tokens", "infrequent_evaluator_builders.0.max_tokens"),
        "format=alpaca": ("dataset_builder.format", "evaluator_builders.0.format"),
    }.items():
        said = refusal(*two, key)
        assert said.startswith(f"command line: {key.partition('=')[0]!r} is ambiguous.")
        assert all(field in said for field in fields)
    config = make(*two, "infrequent_evaluator_builders.0.max_tokens=7", "dataset_builder.format=alpaca")
    assert [config.evaluator_builders[0].max_tokens, config.infrequent_evaluator_builders[0].max_tokens] == [
        64,
        7,
    ]
    assert [config.evaluator_builders[0].format, config.dataset_builder.format] == [None, "alpaca"]


def test_a_field_of_the_config_itself_takes_precedence_for_its_name() -> None:
    config = make("seed=5", "renderer_name=qwen3", "system_prompt=Hi", f"evaluator_builders.0={SAMPLES}")
    assert (config.seed, config.renderer_name, config.system_prompt) == (5, "qwen3", "Hi")
    common = config.dataset_builder.common_config
    assert (common.renderer_name, common.system_prompt, config.dataset_builder.shuffle_seed) == (
        "qwen3",
        "Hi",
        5,
    )
    evaluator = config.evaluator_builders[0]
    assert (evaluator.seed, evaluator.renderer_name, evaluator.system_prompt) == (0, None, None)


@chz.chz
class TwoSidedBuilder(FromConversationFileBuilder):
    """A builder that evaluates on data of another builder, with fields of the same names."""

    eval_builder: FromConversationFileBuilder


TWO_SIDED = {
    **DEFAULTS,
    "dataset_builder": TwoSidedBuilder,
    "dataset_builder.eval_builder.common_config.model_name_for_tokenizer": Reference("model_name"),
    "dataset_builder.eval_builder.common_config.batch_size": Reference(
        "dataset_builder.common_config.batch_size"
    ),
}


def test_a_key_of_two_builders_is_ambiguous_unless_one_refers_to_the_other() -> None:
    paths = ["dataset_builder.file_path=a.jsonl", "dataset_builder.eval_builder.file_path=b.jsonl"]
    builder = cli.make_config(
        train.Config, TWO_SIDED, [f"model_name={MODEL}", *paths, "batch_size=3"]
    ).dataset_builder
    assert (builder.common_config.batch_size, builder.eval_builder.common_config.batch_size) == (3, 3)
    assert (builder.file_path, builder.eval_builder.file_path) == ("a.jsonl", "b.jsonl")
    for key in ("file_path=c.jsonl", "max_length=9", "common_config.max_length=9", "format=alpaca"):
        with pytest.raises(ConfigError, match=r"is ambiguous. Write one of dataset_builder\."):
            cli.make_config(train.Config, TWO_SIDED, [f"model_name={MODEL}", *paths, key])


def test_a_short_key_of_a_file_keeps_its_meaning_if_an_evaluator_is_added(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_tokens: 7\n", encoding="utf-8")
    config = make(f"config={file}", f"evaluator_builders.0={SAMPLES}")
    assert [config.evaluator_builders[0].max_tokens, config.infrequent_evaluator_builders[0].max_tokens] == [
        64,
        7,
    ]
    file.write_text(f"max_tokens: 7\nevaluator_builders:\n  - _type: {SAMPLES}\n", encoding="utf-8")
    assert refusal(f"config={file}").startswith(
        f"{file} line 1: 'max_tokens' is ambiguous. Write one of evaluator_"
    )


def test_a_file_may_have_keys_of_a_class_that_the_command_line_chooses(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("file_path: chats.jsonl\n", encoding="utf-8")
    assert (
        make(f"config={file}", f"dataset_builder={FILE_BUILDER}").dataset_builder.file_path == "chats.jsonl"
    )


def test_another_model_or_seed_replaces_all_occurrences_in_a_recorded_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_files.to_json(make("seed=1", "system_prompt=Hi"))), encoding="utf-8")
    config = cli.make_config(
        train.Config, DEFAULTS, [f"config={file}", "model_name=Qwen/Qwen3-4B", "seed=9", "system_prompt=Ho"]
    )
    common = config.dataset_builder.common_config
    assert (common.model_name_for_tokenizer, common.system_prompt) == ("Qwen/Qwen3-4B", "Ho")
    assert config.dataset_builder.shuffle_seed == 9


def test_a_recipe_may_refer_to_a_field_that_has_a_default() -> None:
    defaults = {key: value for key, value in DEFAULTS.items() if key not in ("seed", "renderer_name")}
    argv = [f"model_name={MODEL}", "--seed", "4"]
    config = cli.make_config(train.Config, defaults, argv)
    assert (config.seed, config.dataset_builder.shuffle_seed) == (4, 4)
    assert config.dataset_builder.common_config.renderer_name == config.renderer_name == "qwen3"
    assert cli.make_config(train.Config, defaults, argv[:1]).dataset_builder.shuffle_seed == 0
    with pytest.raises(EntrypointHelpException, match="\nseed=0\n"):
        cli.make_config(train.Config, defaults, ["--help"])


@chz.chz
class BareBuilder(SupervisedDatasetBuilder):
    """A dataset of any kind, without the keys that a recipe has defaults for."""

    size: int = 3


def test_defaults_of_keys_that_a_chosen_class_lacks_are_dropped() -> None:
    name = f"{BareBuilder.__module__}:BareBuilder"
    assert make(f"dataset_builder={name}", "size=4").dataset_builder == BareBuilder(size=4)
    assert "There is no key 'dataset'." in refusal(f"dataset_builder={name}", "dataset=pirate")
    assert "dataset_builder.dataset" in refusal(f"dataset_builder={name}", "dataset_builder.dataset=pirate")


def test_keys_of_a_replaced_class_are_named_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "dataset: pirate\ndataset_builder:\n  weights: [1, 2]\n  common_config: {batch_size: 3}\n",
        encoding="utf-8",
    )
    name = f"{BareBuilder.__module__}:BareBuilder"
    said = refusal(f"config={file}", f"dataset_builder={name}")
    assert said == (
        f"command line: dataset_builder={name} has no dataset ({file} line 1), weights ({file} line 3), "
        f"common_config.batch_size ({file} line 4). Take them out there, or choose another class."
    )


def test_a_list_of_evaluators_can_be_removed_from_a_recorded_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    recorded = make(f"evaluator_builders.0={SAMPLES}", "evaluator_builders.0.max_tokens=3")
    file.write_text(json.dumps(config_files.to_json(recorded)), encoding="utf-8")
    config = cli.make_config(train.Config, DEFAULTS, [f"config={file}", "evaluator_builders=[]"])
    assert config == chz.replace(recorded, evaluator_builders=[])


# -- lists ---------------------------------------------------------------------------------------


def test_a_list_that_is_given_as_a_whole_replaces_the_one_below_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("prompts: [a, b, c]\n", encoding="utf-8")
    (builder,) = make(f"config={file}").infrequent_evaluator_builders
    assert builder.prompts == ["a", "b", "c"]
    assert make(f"config={file}", "prompts=x").infrequent_evaluator_builders[0].prompts == ["x"]
    assert make(f"config={file}", "prompts.1=x").infrequent_evaluator_builders[0].prompts == ["a", "x", "c"]
    file.write_text("prompts: a,b\n", encoding="utf-8")
    assert "changes one item of a list that prompts=a,b" in refusal(f"config={file}", "prompts.1=x")
    file.write_text("infrequent_evaluator_builders: []\n", encoding="utf-8")
    assert make(f"config={file}").infrequent_evaluator_builders == []
    assert make("infrequent_evaluator_builders=[]").infrequent_evaluator_builders == []


def test_yaml_values_of_a_wrong_type_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for line, message in {
        "lora_rank: null": "Invalid lora_rank=None: it takes a whole number.",
        "lora_rank: true": "Invalid lora_rank=True: it takes a whole number.",
        "lora_rank: [8, 16]": "Invalid lora_rank: it takes a whole number, not a list",
        "learning_rate: {max: 1}": "learning_rate takes a number or auto, and has no keys below it.",
        "best_metric: off": "Invalid best_metric=False: it takes text or None. Put it in quotes.",
        "evaluator_builders: {}": "it is a list. Write evaluator_builders.0=module:Class",
        f"evaluator_builders: {{_type: '{SAMPLES}'}}": f"it is a list. Write evaluator_builders.0={SAMPLES}",
        "dataset_builder: [a]": "Invalid dataset_builder",
    }.items():
        file.write_text(f"seed: 1\n\n{line}\n", encoding="utf-8")
        said = refusal(f"config={file}")
        assert said.startswith(f"{file} line 3: ")
        assert message in said
    file.write_text(
        "gradient_checkpointing: on\ntrain_mlp: no\nmax_steps: null\ndataset_builder: {}\n", encoding="utf-8"
    )
    config = make(f"config={file}")
    assert (config.gradient_checkpointing, config.train_mlp, config.max_steps) == ("on", False, None)


# -- several errors, and their places --------------------------------------------------------------


def test_all_errors_are_reported_together_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "# a comment\nlearning_rat: 1\nmax_steps: many\n"
        "dataset_builder:\n  common_config:\n    batch_sise: 8\nseed: 1\nseed: 2\n",
        encoding="utf-8",
    )
    said = refusal(f"config={file}", "lora_rnk=8", "train_mlp=maybe", "verbose").splitlines()
    assert said[0] == "7 settings cannot be used."
    assert {line.strip().partition(": ")[0] for line in said[1:]} == {
        "command line",
        *(f"{file} line {number}" for number in (2, 3, 6, 8)),
    }
    assert sum(line.startswith("  command line: ") for line in said) == 3
    assert f"  {file} line 6: There is no key 'dataset_builder.common_config.batch_sise'." in "\n".join(said)
    assert f"  {file} line 8: seed is already given in line 7." in said


def test_a_key_that_is_repeated_in_a_file_in_any_form_is_refused(tmp_path: Path) -> None:
    whole = "dataset_builder.common_config.batch_size"
    file = tmp_path / "config.yaml"
    file.write_text(f"batch_size: 8\n{whole}: 8\n", encoding="utf-8")
    assert refusal(f"config={file}") == (
        f"{file} line 2: {whole} is {whole}, which {file} line 1 gives already. Give it once."
    )
    file.write_text(
        "base: &base\n  a: 1\nlora_rank: 8\n", encoding="utf-8"
    )  # an anchor is a key like any other
    assert "There is no key" in refusal(f"config={file}")
    file = tmp_path / "config.json"
    file.write_text(
        '{\n\t"lora_rank": 8,\n\t"dataset_builder": {\n"format": null, "format": "alpaca"},\n"lora_rank": 8}',
        encoding="utf-8",
    )
    assert refusal(f"config={file}").splitlines()[1:] == [
        f"  {file} line 4: dataset_builder.format is already given in line 4.",
        f"  {file} line 5: lora_rank is already given in line 2.",
    ]


def test_the_last_of_a_repeated_command_line_key_is_used_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = "dataset_builder.common_config.batch_size"
    config = make("seed=1", "--seed", "2", "batch_size=1", f"{whole}=2", "max_steps=7")
    assert (config.seed, config.dataset_builder.common_config.batch_size, config.max_steps) == (2, 2, 7)
    assert caplog.messages == [
        "seed is given twice (seed=1, seed=2). The last one counts.",
        f"{whole} is given twice (batch_size=1, {whole}=2). The last one counts.",
    ]
    assert "config is given twice" in refusal("config=a.yaml", "config=b.yaml")


# -- the forms of an argument --------------------------------------------------------------------


def test_a_value_may_follow_its_key_as_a_separate_argument() -> None:
    config = make(
        *(
            "--log_path",
            "/tmp/x",
            "--learning-rate",
            "1e-3",
            "--max-steps=7",
            "--early_stopping_min_delta",
            "-0",
        ),
        *("--system_prompt", "Be brief: yes", "--batch_size", "4", "--train_mlp", "False", "seed=3"),
    )
    assert (config.log_path, config.learning_rate, config.max_steps, config.seed) == ("/tmp/x", 1e-3, 7, 3)
    assert (config.system_prompt, config.train_mlp) == ("Be brief: yes", False)
    assert config.dataset_builder.common_config.batch_size == 4
    assert make("--system_prompt=a=b").system_prompt == "a=b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trace"], "--trace has no value. Write trace=True."),
        (["--trace", "--compile", "True"], "--trace has no value. Write trace=True."),
        (["--trace", "seed=1"], "--trace has no value. Write trace=True."),
        (["--no-train-mlp"], "There is no key 'no_train_mlp'. Write train_mlp=False."),
        (
            ["--max-steps"],
            "--max_steps has no value. Write max_steps=<value>: it takes a whole number or None.",
        ),
        (["--dataset-builder"], "--dataset_builder has no value. Write dataset_builder=module:Class."),
        (["--bf16"], "There is no key 'bf16'. `dtype` is the base model's"),
        (["--packing", "--load-in-4bit"], "There is no key 'load_in_4bit'. `quantization=nf4` holds"),
        (["--config"], "--config has no value. Write config=<value>."),
        (["--tarce", "True"], "There is no key 'tarce'. Did you mean `trace`?"),
        (["learning_rate", "=", "3e-4"], "write learning_rate=3e-4 without spaces"),
        (["learning_rate=", "3e-4"], "write learning_rate=3e-4 without spaces"),
        (["learning_rate", "=3e-4"], "write learning_rate=3e-4 without spaces"),
        (["learning_rate = 3e-4"], "write learning_rate=3e-4 without spaces"),
        (["--learning-rate", "=", "3e-4"], "write learning_rate=3e-4 without spaces"),
        (["learning_rate:3e-4"], "Write learning_rate=3e-4"),
        (["learning_rate", "3e-4"], "Write learning_rate=3e-4"),
        (["-lora_rank", "8"], "Write lora_rank=8"),
        (["configs/pirate_tiny.yaml"], "For a config file write config=configs/pirate_tiny.yaml"),
        (["run.json"], "For a config file write config=run.json"),
        ([__file__], f"For a config file write config={__file__}"),
        (["=3"], "unrecognised argument '=3'. Write key=value"),
        (["-v"], "unrecognised argument '-v'. Write key=value"),
    ],
)
def test_errors_for_other_forms_show_the_right_one(argv: list[str], message: str) -> None:
    said = refusal(*argv)
    assert said.replace("2 settings cannot be used.\n  ", "").startswith("command line: ")
    assert message in said


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


def test_help_fits_80_columns_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['sft', '--help']; import recipes.sft\n"
        "try: recipes.sft.main()\n"
        "finally:\n"
        "  heavy = {'torch', 'transformers', 'datasets', 'wandb', 'matplotlib', 'yaml', 'rich',\n"
        "    'asyncio', 'jinja2', 'importlib.metadata', 'renderers.base', 'cookbook.supervised.loop',\n"
        "    'cookbook.data.importers.trajectory'} & {*sys.modules}\n"
        "  assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning_rate=" in done.stdout
    assert "peak learning rate" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


# -- files that cannot be read --------------------------------------------------------------------

EIGHTFOLD = "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]" for n in range(9))
MERGED = "\n".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}" for n in range(40))


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8\nmax_steps: !!int x\n", "x cannot be read as int.*line 2"),
        ("lora_rank: 8\nmax_steps: !!float x\n", "x cannot be read as float.*line 2"),
        (
            "lora_rank: 8\nsystem_prompt: 2026-02-30\n",
            "2026-02-30 cannot be read as timestamp.*quotes.*line 2",
        ),
        ("train_mlp: !!bool x\n", "x cannot be read as bool.*line 1"),
        ("system_prompt: !!timestamp x\n", "x cannot be read as timestamp.*line 1"),
        ("max_steps: 0b_\n", "0b_ cannot be read as int.*line 1"),
        (f"max_steps: {'9' * 5000}\n", "999[.]{3} cannot be read as int.*line 1"),
        (f"max_steps: 0x{'f' * 5000}\n", "fff[.]{3} cannot be read as int.*line 1"),
        (f"max_steps: {'[' * 3000}{']' * 3000}\n", "nested in more than 100 levels"),
        (f"max_steps: {'[' * 150}{']' * 150}\n", "line 1 cannot be read: .*nested in more than 100 levels"),
        ("a: &a [*a]\n", "an alias refers to a value that contains it"),
        ("a: &a {b: {c: *a}}\n", "an alias refers to a value that contains it"),
        (f"a0: &a0 [x, x]\n{EIGHTFOLD}\n", "more than 100,000 values"),
        (f"a0: &a0 {{b: x}}\n{MERGED}\n", "more than 100,000 values"),
    ],
)
def test_yaml_that_cannot_be_read_is_refused_with_its_file_and_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"(?s){message}") as raised:
        make(f"config={file}")
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "[" * 150 + "]" * 150, "9" * 5000])
def test_json_that_python_cannot_read_is_refused_with_its_file(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(f'{{"max_steps": {value}}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read: ") as raised:
        make(f"config={file}")
    assert str(file) in str(raised.value)


def test_a_value_that_yaml_aliases_repeat_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("batch_size: &n 4\nmax_steps: *n\n", encoding="utf-8")
    config = make(f"config={file}")
    assert (config.dataset_builder.common_config.batch_size, config.max_steps) == (4, 4)


@pytest.mark.parametrize("key", ["a." * 2000 + "b", f"prompts.{'9' * 5000}", "prompts.²"])
def test_a_very_long_key_is_reported_as_unknown(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="There is no key"):
        make(f"{key}=1")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match="There is no key"):
        make(f"config={file}")


# -- mappings of plain values -------------------------------------------------------------------

KWARGS_IN_YAML = """
template_kwargs:
  enable_thinking: false
  date: "26"
  days: 26
  names: [a, {b: 1}]
  none: null
"""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (['template_kwargs={"enable_thinking": false, "n": null}'], {"enable_thinking": False, "n": None}),
        (["template_kwargs={'enable_thinking': False}"], {"enable_thinking": False}),
        (["template_kwargs.enable_thinking=False"], {"enable_thinking": False}),
        (["--template_kwargs.a", "low", "template_kwargs.n=3"], {"a": "low", "n": 3}),
        (['template_kwargs={"a": 1}', "template_kwargs.b=[1, 2]"], {"a": 1, "b": [1, 2]}),
        (["template_kwargs.a.b=x"], {"a": {"b": "x"}}),
        (["template_kwargs={}"], {}),
        (["template_kwargs=None"], None),
        ([], None),
    ],
)
def test_variables_of_the_template_are_given_whole_or_one_by_one(argv: list[str], expected: Any) -> None:
    config = make(*argv)
    assert config.template_kwargs == config.dataset_builder.common_config.template_kwargs == expected


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ([], {}),
        (["template_kwargs.date=x", "template_kwargs.more=1"], {"date": "x", "more": 1}),
        (['template_kwargs={"date": "x"}'], None),
    ],
)
def test_variables_of_a_file_keep_their_types_and_are_changed_one_by_one(
    tmp_path: Path, argv: list[str], changed: dict[str, Any] | None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(KWARGS_IN_YAML, encoding="utf-8")
    in_file = {"enable_thinking": False, "date": "26", "days": 26, "names": ["a", {"b": 1}], "none": None}
    config = make(f"config={file}", *argv)
    assert config.template_kwargs == ({"date": "x"} if changed is None else in_file | changed)
    recorded = tmp_path / "config.json"
    recorded.write_text(json.dumps(config_files.to_json(config)), encoding="utf-8")
    again = make(f"config={recorded}", "template_kwargs.last=1")
    assert again.template_kwargs == {**config.template_kwargs, "last": 1}
    assert again.dataset_builder.common_config.template_kwargs == again.template_kwargs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["template_kwargs=low"], r'Invalid template_kwargs=low: it takes names with values, as in \{"name"'),
        (["template_kwargs=[1]"], "Invalid template_kwargs="),
        (["template_kwargs.a=1", "template_kwargs.a.b=2"], "template_kwargs.a, which command line gives"),
        (["enable_thinking=False"], "template_kwargs.enable_thinking"),
    ],
)
def test_variables_of_the_template_in_another_form_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*argv)


@pytest.mark.parametrize("text", ["{_type: os:path, a: 1}", "{a: {_type: os:path}}"])
def test_no_class_is_a_variable_of_the_template(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"template_kwargs: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="it is an object with `_type` os:path"):
        make(f"config={file}")
