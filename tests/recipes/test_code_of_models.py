"""No command runs code that comes with a model unless COOKBOOK_TRUST_REMOTE_CODE names that model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import peft
import pytest
import torch
from outside_world import type_into_pipe
from programs import Programs
from slow import slow_after, slow_except
from transformers import AutoModelForCausalLM

from cookbook import models
from cookbook.config import cli

CODE = """
import pathlib
pathlib.Path({decoy!r}).touch()
from transformers import AutoConfig, PreTrainedConfig, Qwen3ForCausalLM, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "of_its_own"
class Model(Qwen3ForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "modeling.Config",
    "AutoModelForCausalLM": "modeling.Model",
    "AutoTokenizer": ["modeling.Tokenizer", "modeling.Tokenizer"],
    "AutoProcessor": "modeling.Tokenizer",
}


Command: TypeAlias = Callable[[str], tuple[str, list[str]]]


def rewrite(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    return tmp_path / "the_code_ran"


@pytest.fixture
def base(tmp_path: Path, decoy: Path, make_model_folder: Callable[..., Path]) -> Path:
    """A model with its own code for everything that transformers loads."""
    folder = make_model_folder(tmp_path / "base")
    (folder / "modeling.py").write_text(CODE.format(decoy=str(decoy)), encoding="utf-8")
    (folder / "custom_generate").mkdir()
    for name in ("generate.py", "__init__.py"):
        (folder / "custom_generate" / name).write_text(CODE.format(decoy=str(decoy)), encoding="utf-8")
    rewrite(folder / "config.json", auto_map=AUTO_MAP)
    rewrite(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    rewrite(folder / "generation_config.json", auto_map=AUTO_MAP, custom_generate="modeling")
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    return tmp_path / "adapter"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    return tmp_path / "rows.jsonl"


def run(recipe: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a recipe in this process, answers `y` to every question, and returns the exit code."""
    type_into_pipe(monkeypatch, "y\n" * 50)
    models.get_tokenizer.cache_clear()
    module = importlib.import_module(f"recipes.{recipe}")
    try:
        if recipe == "sft_loop":
            monkeypatch.setenv("HOME", str(Path(argv.pop())))
            with cli.exiting_on_errors():
                module.main(argv)
        else:
            module.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    return 0


def commands(base: Path, adapter: Path, rows: Path, folder: Path) -> dict[str, tuple[str, list[str]]]:
    model, run_folder = f"model_name={base}", f"log_path={folder}"
    train = [model, f"dataset={rows}", run_folder, "max_steps=1", "batch_size=2", "lora_rank=2"]
    exports = {
        f"export {kind}": ("export", [f"checkpoint={adapter}", f"format={kind}", f"to={folder}-{kind}"])
        for kind in ("adapter", "merged", "gguf", "ollama")
    }
    return {
        "sft": ("sft", train),
        "sft full": ("sft", [*train[:2], f"{run_folder}-full", *train[3:5], "lora_rank=0"]),
        "sft from an adapter": ("sft", [*train[:2], f"{run_folder}-on", f"load_checkpoint_path={adapter}"]),
        "preview": ("preview", [model, f"dataset={rows}", f"html={folder}.html"]),
        "chat": ("chat", [model, "max_tokens=2"]),
        "chat with an adapter": ("chat", [f"checkpoint={adapter}", "max_tokens=2"]),
        "sft_loop": (
            "sft_loop",
            [model, f"data_path={rows}", "num_steps=1", "batch_size=1", "num_test=1", str(folder)],
        ),
        **exports,
    }


NAMES = list(commands(*[Path()] * 4))


@pytest.fixture
def command(base: Path, adapter: Path, rows: Path, tmp_path: Path) -> Command:
    """Returns the recipe and the arguments of a named command on the model."""
    return lambda name: commands(base, adapter, rows, tmp_path / "run")[name]


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_an_unknown_architecture_is_refused_without_running_its_code(
    name: str,
    base: Path,
    command: Command,
    decoy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(base / "config.json", model_type="of_its_own")
    recipe, argv = command(name)
    code = run(recipe, argv, monkeypatch)
    assert not decoy.exists()
    error = capsys.readouterr().err
    if name == "export adapter":  # it loads only the tokenizer, whose class is known
        assert code == 0, error
        return
    assert code != 0
    assert "code that comes with the model, which is not run" in " ".join(error.split()), error
    assert "name the model in COOKBOOK_TRUST_REMOTE_CODE" in " ".join(error.split()), error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["sft", "chat", "export merged"], NAMES))
def test_a_model_of_a_known_architecture_is_loaded_without_its_code(
    name: str,
    command: Command,
    decoy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, argv = command(name)
    run(recipe, argv, monkeypatch)
    assert not decoy.exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", slow_after(2, ["sft", "export adapter", "chat", "sft full", "export merged"])
)
def test_the_code_of_a_model_that_the_user_names_runs_and_no_other(
    name: str,
    base: Path,
    command: Command,
    decoy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(base / "config.json", model_type="of_its_own", architectures=["Model"])
    recipe, argv = command(name)
    others = [str(base.parent), "base", f"{base}2", "", "*", "True", "1", base.name]
    monkeypatch.setenv("COOKBOOK_TRUST_REMOTE_CODE", ",".join(others))
    assert run(recipe, argv, monkeypatch) == (0 if name == "export adapter" else 1)
    assert not decoy.exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("COOKBOOK_TRUST_REMOTE_CODE", f"org/other, {base}")
    capsys.readouterr()
    again = {"sft": ["if_log_path_exists=delete"], "export": ["overwrite=True"]}.get(recipe, [])
    code = run(recipe, [*argv, *again], monkeypatch)
    error = " ".join(capsys.readouterr().err.split())
    assert decoy.exists(), error
    if name in ("sft full", "export merged"):
        assert code != 0
        assert "which is not copied" in error
    else:
        assert code == 0, error


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_the_user_names_brings_no_code_of_another(
    file: str,
    base: Path,
    decoy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    auto_map = {**AUTO_MAP, "AutoTokenizer": ["org/other--modeling.Tokenizer", None]}
    rewrite(base / file, model_type="of_its_own", auto_map=auto_map)
    monkeypatch.setenv("COOKBOOK_TRUST_REMOTE_CODE", str(base))
    assert run("chat", [f"model_name={base}"], monkeypatch) != 0
    assert "names code of another repository" in " ".join(capsys.readouterr().err.split())
    assert not decoy.exists()


def test_an_export_names_no_code(
    command: Command, decoy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("adapter", "merged"):
        assert run(*command(f"export {kind}"), monkeypatch) == 0
        for path in Path(f"{tmp_path / 'run'}-{kind}").glob("*.json"):
            assert "modeling" not in path.read_text(encoding="utf-8") or path.name == "tokenizer.json", path
    assert not decoy.exists()


@pytest.mark.slow
def test_a_process_with_yes_on_standard_input_runs_no_code(
    base: Path, adapter: Path, decoy: Path, tmp_path: Path, programs: Programs
) -> None:
    rewrite(base / "config.json", model_type="of_its_own")
    argv = [f"checkpoint={adapter}", "format=merged", f"to={tmp_path / 'm'}"]
    done = programs.run("recipes.export", *argv, stdin=b"y\n" * 9)
    assert done.returncode != 0
    assert not decoy.exists()
    assert "Do you wish to run" not in done.stdout + done.stderr


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_names_code_on_the_hub_is_refused(
    key: str, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("somebody/kernel", {"": "somebody/kernel"}, {"text_config": "somebody/kernel"}):
        rewrite(base / "config.json", **{key: value})
        assert run("chat", [f"model_name={base}"], monkeypatch) != 0
        assert f"names code on the hub: {key}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**9),
        ("hidden_size", 10**6),
        ("vocab_size", 10**7),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 10**7),
        ("intermediate_size", 10**30),
    ],
)
def test_impossible_sizes_are_refused_before_memory_is_allocated(
    key: str, value: int, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(base / "config.json", **{key: value})
    assert run("chat", [f"model_name={base}"], monkeypatch) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert f"`{key}` is" in error or "requires" in error, error
    assert "Traceback" not in error


def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    for recipe, argv in (
        ("chat", [f"model_name={base}"]),
        ("sft", [f"model_name={base}", f"dataset={rows}", f"log_path={tmp_path / 'run'}", "max_steps=1"]),
    ):
        assert run(recipe, argv, monkeypatch) != 0
        error = " ".join(capsys.readouterr().err.split())
        assert "Pickle files are never loaded" in error
        assert "convert it once" in error
