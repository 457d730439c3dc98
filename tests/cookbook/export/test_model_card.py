"""README.md of an export, as read by the hub and by people."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

from cookbook import ModelInput, ServiceClient, embedded
from cookbook.config.cli import make_config
from cookbook.export.chat_format import find_chat_format
from cookbook.export.config import ExportConfig
from cookbook.export.export import main
from cookbook.export.model_card import Usage, write_model_card
from cookbook.runs.find import find_trained_model

SECRET = "hf_secretsecret"


def export(folder: Path, **keys: Any) -> Path:
    argv = [f"{key}={value}" for key, value in {"to": folder, **keys}.items()]
    asyncio.run(main(make_config(ExportConfig, {}, argv)))
    return folder


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_the_program_of_the_card_runs_and_is_short(
    run: Path,
    tmp_path: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = export(tmp_path / "out", checkpoint=run, format=format)
    capsys.readouterr()
    code = code_of((folder / "README.md").read_text(encoding="utf-8"))
    assert len([line for line in code.splitlines() if line]) <= 14
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"[a-z]{2,}", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_the_program_uses_the_stop_strings_of_a_format(
    tiny_qwen3: str, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ServiceClient(checkpoint_dir=tmp_path)
    training = service.create_lora_training_client(
        tiny_qwen3, rank=2, user_metadata={"renderer_name": "role_colon"}
    )
    path = training.save_weights_for_sampler("tuned").result().path
    service.close()
    folder = export(tmp_path / "out", checkpoint=path, format=format)
    code = code_of((folder / "README.md").read_text(encoding="utf-8")).replace(
        "/path/to/tiny-qwen3", tiny_qwen3
    )
    assert ('stop_strings=["\\n\\nUser:"]' in code) == (
        format == "adapter"
    )  # merged weights have them in their generation config
    monkeypatch.chdir(folder)
    exec(compile(code.replace("max_new_tokens=200", "max_new_tokens=3"), "README.md", "exec"), {})


@pytest.mark.slow
def test_the_hub_reads_the_metadata(run: Path, tmp_path: Path) -> None:
    adapter = ModelCard.load(export(tmp_path / "adapter", checkpoint=run) / "README.md").data
    merged = ModelCard.load(export(tmp_path / "merged", checkpoint=run, format="merged") / "README.md").data
    assert (adapter.library_name, merged.library_name) == ("peft", "transformers")
    assert adapter.pipeline_tag == "text-generation"
    assert {"sft", "lora"} <= set(adapter.tags)
    assert adapter.base_model is None  # the embedded model is not on the hub


def test_a_base_model_and_data_of_the_hub_are_named(run: Path) -> None:
    source = find_trained_model(str(run))
    assert source.run is not None
    chat_format = find_chat_format(source)
    builder = {
        **source.run.config["dataset_builder"],
        "dataset": "no_robots,allenai/x:default:train,chats.jsonl",
    }
    record = replace(source.run, config={**source.run.config, "dataset_builder": builder})
    source = replace(source, base_model="Qwen/Qwen3-0.6B", run=record)
    folder = run.parent / "named"
    folder.mkdir()
    write_model_card(source, chat_format, Usage("x", "bash", "peft", "LoRA adapter"), "x", folder)
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert data.base_model_relation == "adapter"
    assert data.datasets == ["HuggingFaceH4/no_robots", "allenai/x"]


@pytest.mark.slow
def test_data_settings_results_and_curves_come_from_the_run(run: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "out", checkpoint=run)
    card = (folder / "README.md").read_text(encoding="utf-8")
    (data,) = json.loads((run / "data.json").read_text(encoding="utf-8"))["sources"]
    assert f"| {data['name']} | {data['rows']:,} | {data['examples']:,} | {data['tokens']:,} |" in card
    assert "| `lora_rank` | 4 |" in card
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [row["test/nll"] for row in rows if "test/nll" in row]
    assert f"| `test/nll` | {measured[0]:.4g} | {measured[-1]:.4g} |" in card
    assert "after 4 steps" in card
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 800
        assert len(set(picture.convert("L").get_flattened_data())) > 10
    assert "![What the run measured](curves.png)" in card
    assert '> You are a "pirate" {{ of }}\n> few words \\ 🦜.' in card


@pytest.mark.parametrize("format", ["adapter", "merged", "ollama"])
def test_no_local_path_and_no_secret_is_on_the_card(
    run: Path, tmp_path: Path, format: str, make_model_folder: Callable[..., Path]
) -> None:
    copy = tmp_path / "private-place" / "parrot"
    shutil.copytree(run, copy)
    config = (copy / "config.json").read_text(encoding="utf-8")
    config = config.replace('"wandb_project": null', f'"wandb_project": "{SECRET}"')
    config = config.replace('"dataset": "pirate"', f'"dataset": "{tmp_path}/private-place/data/chats.jsonl"')
    (copy / "config.json").write_text(config, encoding="utf-8")
    data = (copy / "data.json").read_text(encoding="utf-8")
    (copy / "data.json").write_text(
        data.replace("pirate.jsonl", f"{tmp_path}/private-place/data/chats.jsonl"), encoding="utf-8"
    )
    folder = export(tmp_path / "out", checkpoint=copy, format=format)
    names = [path.name for path in folder.iterdir()]
    assert "chats.jsonl" in (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.iterdir():
        content = path.read_bytes()
        for word in (SECRET, "private-place", str(Path(__file__).parents[3])):
            assert word.encode() not in content, (path.name, word)
    assert not {"optimizer.safetensors", "train.log", "metrics.jsonl"} & set(names)


def test_a_base_model_in_a_folder_is_not_named_like_one_on_the_hub(
    make_model_folder: Callable[..., Path], make_adapted: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "somewhere" / "mine")
    make_adapted(base, tmp_path / "adapter")
    folder = export(tmp_path / "out", checkpoint=tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "mine (a folder of the machine it was trained on)"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert '"/path/to/mine"' in card
    assert "somewhere" not in card


@pytest.mark.slow
def test_an_exported_adapter_is_loaded_by_plain_peft_and_by_this_project(run: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "out", checkpoint=run)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(embedded.MODEL_PATH, dtype=torch.float32), str(folder)
    )
    tokens = list(range(3, 60))
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    found = scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    service = ServiceClient()
    for path in (run / "checkpoints" / "final", folder):
        client = service.create_sampling_client(model_path=path)
        expected = client.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    service.close()
    assert (
        find_trained_model(str(folder)).info.user_metadata == find_trained_model(str(run)).info.user_metadata
    )


def test_foreign_names_and_texts_are_shown_as_text_on_the_card(run: Path, tmp_path: Path) -> None:
    evil = "x |\n\n# Official <img src=x>\n\n```bash\nsteal\n```\n[click](javascript:a) \x1b[2J"
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    data["sources"][0]["name"] = evil
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"learning_rate": evil, "dataset_builder": 5}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "made/` | Official <img src=x>": 1.0}) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = find_trained_model(str(folder))
    usage = Usage("cat <<end\n```\n# not a title\nend", "bash", None, "it")
    write_model_card(source, find_chat_format(source), usage, evil, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    body = card.partition("\n---\n")[2]
    body = body.replace("````bash\ncat <<end\n```\n# not a title\nend\n````", "")
    assert "not a title" not in body
    assert [line for line in body.splitlines() if line.startswith(("# ", "```"))] == [
        line for line in body.splitlines() if line.startswith("# x &#124;")
    ]
    assert not re.search(r"<img|\[click|\x1b|```", body)
    assert body.count("Official &#60;img src=x&#62;") == 4
