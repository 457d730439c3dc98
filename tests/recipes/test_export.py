"""The command python -m recipes.export."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from slow import slow_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook import ServiceClient, embedded
from cookbook.data import NamedChatDatasetBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.supervised import train
from recipes import export

Exporting = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    rows = embedded.PIRATE_PATH.read_text(encoding="utf-8").splitlines()[:40]
    data = tmp_path_factory.mktemp("data") / "pirate.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer="cookbook/tiny-chat", batch_size=4)
    config = train.Config(
        log_path=str(folder),
        model_name="cookbook/tiny-chat",
        dataset_builder=NamedChatDatasetBuilder(dataset=str(data), common_config=common, test_size=8),
        lora_rank=4,
        max_steps=2,
        save_every=1,
    )
    asyncio.run(train.main(config))
    return folder


@pytest.fixture
def exporting(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Exporting:
    """A function of (*arguments) that runs the command in a new folder, which has the run `run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "run").symlink_to(run)

    def call(*arguments: str, fails: bool = False) -> str:
        capsys.readouterr()
        if fails:
            with pytest.raises(SystemExit) as stopped:
                export.main(list(arguments))
            assert stopped.value.code == 1
            return capsys.readouterr().err
        export.main(list(arguments))
        return capsys.readouterr().out

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "command"),
    slow_after(
        2,
        [
            ("adapter", "--lora-modules parrot=out --max-lora-rank 8"),
            ("merged", "vllm serve out --chat-template out/chat_template.jinja"),
            ("gguf", "llama-server -m out/model-bf16.gguf --jinja"),
            ("ollama", "ollama create parrot -f out/Modelfile\nollama run parrot"),
        ],
    ),
)
def test_output_of_every_format_fits_a_terminal_and_ends_with_the_next_command(
    exporting: Exporting, format: str, command: str
) -> None:
    printed = exporting("checkpoint=run", "to=out", f"format={format}")
    assert max(map(len, printed.splitlines())) <= 79 or "/embedded/" in printed
    assert "after 2 steps" in printed
    assert command in printed.replace(" \\\n    ", " ")
    assert printed.index("Next:") < printed.index(command.split(" ")[0], printed.index("Next:"))
    assert Path("out/README.md").is_file()
    assert not list(Path().glob(".out*"))


def test_plain_transformers_chats_with_a_merged_run(exporting: Exporting) -> None:
    exporting("checkpoint=run", "to=out", "format=merged", "dtype=float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
    assert reply[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_the_best_checkpoint_of_a_run_is_exported_or_the_last(exporting: Exporting, run: Path) -> None:
    shutil.copytree(run, "with-best")
    CheckpointLog(Path("with-best")).mark_best(1, "test/nll", 0.5)
    assert "checkpoints/000001, after 1 step" in exporting("checkpoint=with-best", "to=a")
    assert "checkpoints/000001" in exporting("checkpoint=with-best", "to=b", "which=best")
    assert "checkpoints/final, after 2 steps" in exporting("checkpoint=with-best", "to=c", "which=last")


def test_a_run_without_a_best_checkpoint_exports_the_last(exporting: Exporting, run: Path) -> None:
    shutil.copytree(run, "without")
    rows = [
        json.loads(line)
        for line in Path("without/checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    kept = ["name", "path", "step", "epoch", "batch"]
    lines = [json.dumps({key: row[key] for key in kept}) + "\n" for row in rows]
    Path("without/checkpoints.jsonl").write_text("".join(lines), encoding="utf-8")
    assert "checkpoints/final, after 2 steps" in exporting("checkpoint=without", "to=a")
    assert "has no best checkpoint" in exporting("checkpoint=without", "to=b", "which=best", fails=True)


def test_a_checkpoint_is_exported_by_its_own_folder(exporting: Exporting) -> None:
    assert "after 1 step" in exporting("checkpoint=run/checkpoints/000001", "to=out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=rnu", "to=out"], "There is no checkpoint rnu. Give the folder of a run"),
        (["checkpoint=run/checkpoints/fnal", "to=out"], "has: 000001, final"),
        (["checkpoint=run", "to=out", "format=gguff"], "Supported: adapter, merged, gguf, ollama"),
        (["checkpoint=run", "to=out", "fromat=gguf"], "Did you mean `format`?"),
        (
            ["checkpoint=run", "to=out", "max_shard_size=huge"],
            "Invalid max_shard_size=huge: write a number and a unit, as in 4GB",
        ),
        (["checkpoint=run", "to=out", "dtype=float8"], "Invalid dtype=float8: it takes one of auto"),
        (["checkpoint=run", "to=out", "ollama_base=x"], "ollama_base= applies to format=ollama only"),
        (["checkpoint=run", "to=hf://parrot"], "rite hf://owner/name"),
        (["checkpoint=run", "to=hf://owner/parrot"], "offline mode is on"),
        (["checkpoint=run", "to=out", "push_to=owner/parrot"], "offline mode is on"),
        (
            ["checkpoint=run", "to=out", "base_model=./nowhere"],
            "neither a folder on this machine nor a hub id",
        ),
        (["checkpoint=run", "to=out", "base_model=owner/nowhere"], "not on this machine"),
        (["checkpoint=run", "to=out", "chat_template=x.jinja"], "there is no such file"),
        (["checkpoint=run", "to=out", "format=ollama", "ollama_base=qwen3"], "tied to the embeddings"),
    ],
)
def test_invalid_arguments_are_one_error_and_write_nothing(
    exporting: Exporting, arguments: list[str], message: str
) -> None:
    printed = exporting(*arguments, fails=True)
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_kept(exporting: Exporting) -> None:
    exporting("checkpoint=run", "to=out")
    assert "is not empty" in exporting("checkpoint=run", "to=out", fails=True)
    exporting("checkpoint=run", "to=out", "format=merged", "overwrite=True")
    assert not Path("out/adapter_config.json").exists()
    Path("out/thesis.tex").write_text("mine", encoding="utf-8")
    printed = exporting("checkpoint=run", "to=out", "overwrite=True", fails=True)
    assert "holds thesis.tex, which no export wrote" in printed
    assert Path("out/config.json").exists()


def test_a_checkpoint_is_not_overwritten_by_its_export(exporting: Exporting, tiny_qwen3: str) -> None:
    exporting(
        f"checkpoint={tiny_qwen3}", "to=model", "format=merged"
    )  # a model folder counts as a full fine-tune
    printed = exporting("checkpoint=model", "to=model", "format=merged", "overwrite=True", fails=True)
    assert "is the checkpoint itself" in printed
    assert Path("model/model.safetensors").exists()


def test_a_full_fine_tune_has_no_adapter_to_export(exporting: Exporting, tiny_qwen3: str) -> None:
    assert "Export format=merged" in exporting(f"checkpoint={tiny_qwen3}", "to=out", fails=True)


def test_an_unsupported_gguf_export_names_the_commands_that_convert_the_model(
    exporting: Exporting, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_model_folder(tmp_path / "gemma", "gemma2", query_pre_attn_scalar=8)
    printed = exporting("checkpoint=gemma", "to=out", "format=gguf", fails=True)
    assert "it is a Gemma2ForCausalLM" in printed
    assert "python -m recipes.export checkpoint=gemma to=out-merged format=merged\n" in printed
    command = "python llama.cpp/convert_hf_to_gguf.py out-merged --outfile out/model.gguf --outtype auto"
    assert command in printed.replace(" \\\n    ", " ")


def test_ollama_gets_merged_weights_if_gguf_is_not_supported(
    exporting: Exporting, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_model_folder(tmp_path / "gemma", "gemma2", query_pre_attn_scalar=8)
    exporting("checkpoint=gemma", "to=out", "format=ollama")
    assert Path("out/Modelfile").read_text(encoding="utf-8").startswith("FROM .\n")
    assert Path("out/model.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_is_exported_for_a_model_of_ollamas_library(
    exporting: Exporting, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "mine", tie_word_embeddings=False)
    service = ServiceClient(checkpoint_dir=tmp_path)
    training = service.create_lora_training_client(str(base), rank=2)
    path = training.save_weights_for_sampler("tuned").result().path
    service.close()
    exporting(f"checkpoint={path}", "to=out", "format=ollama", "ollama_base=mine:1b")
    assert (
        Path("out/Modelfile").read_text(encoding="utf-8").startswith("FROM mine:1b\nADAPTER ./adapter.gguf\n")
    )
    assert not list(Path("out").glob("model*"))


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), ("fp8", 8)])
def test_a_run_on_quantized_weights_reports_what_it_is_merged_into(
    exporting: Exporting, run: Path, tmp_path: Path, quantization: str, bits: int
) -> None:
    copy = tmp_path / quantization
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "quantization": quantization}), encoding="utf-8")
    printed = " ".join(exporting(f"checkpoint={quantization}", "to=out", "format=merged").split())
    assert f"Trained on a base in {bits} bits" in printed
    assert f"trained on a base model in {bits} bits" in Path("out/README.md").read_text(encoding="utf-8")


@pytest.mark.cases(1)
@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("format", ["adapter", "merged", "gguf"])
def test_exported_files_have_the_modes_of_the_umask(exporting: Exporting, format: str, umask: int) -> None:
    earlier = os.umask(umask)
    try:
        exporting("checkpoint=run", "to=out", f"format={format}")
    finally:
        os.umask(earlier)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in Path("out").iterdir()}
    assert len(modes) > 2
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert stat.S_IMODE(Path("out").stat().st_mode) == 0o777 & ~umask


def test_overwriting_an_export_keeps_folders_and_links_of_the_user(exporting: Exporting) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("dear", encoding="utf-8")
    for place in ("tokenizer-data", "model-x.safetensors"):
        Path("out").mkdir()
        if place == "tokenizer-data":
            shutil.copytree("mine", f"out/{place}")
        else:
            Path("out", place).symlink_to(Path("mine").absolute())
        printed = exporting("checkpoint=run", "to=out", "overwrite=True", fails=True)
        assert f"holds {place}, which no export wrote" in printed
        assert Path("out", place, "notes.txt").exists()
        shutil.rmtree("out")


def test_an_index_that_names_a_file_outside_the_base_model_is_refused(
    exporting: Exporting, tmp_path: Path
) -> None:
    shutil.copytree(embedded.MODEL_PATH, "base")
    elsewhere = tmp_path / "elsewhere.safetensors"
    Path("base/model.safetensors").rename(elsewhere)
    with safe_open(elsewhere, "pt") as file:
        weights = list(file.keys())
    for name in (str(elsewhere), "../elsewhere.safetensors", 3):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        Path("base/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        printed = exporting("checkpoint=run", "to=out", "format=merged", "base_model=base", fails=True)
        names_none = f"`weight_map` names {name!r}, which is no file of the folder"
        assert (names_none if isinstance(name, str) else "is 3, expected text") in printed
        assert not Path("out").exists()
