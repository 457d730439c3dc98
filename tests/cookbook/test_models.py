"""Model names: the places where models are found, and the errors for missing ones."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_formats
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cookbook import embedded, models
from cookbook.engine.model.base_model import BaseModel
from cookbook.errors import ModelError
from cookbook.utils import extras
from renderers import get_renderer, renderer_names


@pytest.fixture
def model_folder(tiny_qwen3: str, tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))


def test_a_folder_and_a_hub_id_are_their_own_locations(tiny_qwen3: str) -> None:
    assert models.model_location(tiny_qwen3) == tiny_qwen3
    assert models.model_location("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_the_embedded_model_is_in_the_package() -> None:
    assert embedded.MODEL_NAME == "cookbook/tiny-chat"
    location = Path(models.model_location(embedded.MODEL_NAME))
    assert location == Path(embedded.__file__).parent / "tiny-chat"


def test_the_home_folder_is_expanded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert models.model_location("~/model") == str(model_folder)


@pytest.mark.parametrize("name", ["./none", "../none", "/none/at/all", "~/none-at-all", "gpt2", "a/b/c", ""])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        models.model_location(name)
    assert embedded.MODEL_NAME in str(caught.value) or "no config.json" in str(caught.value)


def test_a_file_or_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match="neither a folder on this machine nor a hub id"):
        models.model_location(str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config\.json"):
        models.model_location(str(tmp_path))


@pytest.mark.parametrize(
    ("model_name", "renderer"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("qwen/qwen3-8b", "qwen3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_instruct"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3_instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2_5"),
        ("google/gemma-3-1b-it", "gemma3"),
        ("openai/gpt-oss-20b", "gpt_oss"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3"),
        ("Qwen/Qwen3.5-2B", "qwen3_5_disable_thinking"),
        ("Qwen/Qwen3.5-9B", "qwen3_5"),
        ("moonshotai/Kimi-K2-Instruct", "kimi_k2"),
        ("moonshotai/Kimi-K2.5", "kimi_k25"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseekv3_1"),
        ("Qwen/Qwen3.5-27B", "qwen3_5"),
        ("Qwen/Qwen3.6-27B", "qwen3_6"),
        ("Qwen/Qwen3.8-27B", "qwen3_8"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl"),
        ("zai-org/GLM-4.5-Air", "glm4_5"),
        ("zai-org/GLM-4.6", "glm4_5"),
        ("zai-org/GLM-4.7-Flash", "glm5"),
        ("zai-org/GLM-5-FP8", "glm5"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron3"),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "nemotron3"),
        ("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8", "nemotron3_ultra"),
        ("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16", "nemotron3_ultra"),
        ("moonshotai/Kimi-K2-Thinking", "kimi_k2_thinking"),
        ("moonshotai/Kimi-K2.6", "kimi_k26"),
        ("google/gemma-4-E2B-it", "gemma4"),
        ("google/gemma-4-26B-A4B-it", "gemma4"),
    ],
)
def test_the_renderer_of_a_known_model_is_known_without_loading_it(model_name: str, renderer: str) -> None:
    assert models.recommended_renderer(model_name) == renderer


def test_every_recommended_renderer_is_registered() -> None:
    assert set(models.RENDERER_BY_TEMPLATE.values()) <= set(renderer_names())


@pytest.mark.published
def test_a_copy_of_a_model_has_the_renderer_of_its_published_template(model_folder: Path) -> None:
    source = chat_formats.published_template("qwen3")
    (model_folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    assert models.recommended_renderer(str(model_folder)) == "qwen3"


@pytest.mark.published
def test_a_published_template_has_the_renderer_that_was_compared_with_it() -> None:
    names = {
        "qwen3": "qwen3", "qwen3_instruct_2507": "qwen3_instruct", "qwen2_5": "qwen2_5", "llama3": "llama3",
        "llama3_1": "llama3", "gemma3": "gemma3", "gptoss": "gpt_oss", "phi3": "phi3", "qwen3_5": "qwen3_5",
        "qwen3_5_small": "qwen3_5_disable_thinking", "qwen3_6": "qwen3_6", "kimi_k2": "kimi_k2",
        "kimi_k2_5": "kimi_k25", "deepseek_v3_1": "deepseekv3_1",
        "glm4_5": "glm4_5", "nemotron3_nano": "nemotron3", "qwen3_vl": "qwen3_vl",
        "gemma4_12b": "gemma4", "gemma4_e2b": "gemma4",
    }  # fmt: skip
    found = {
        name: models.RENDERER_BY_TEMPLATE[models.fingerprint(chat_formats.published_template(name))]
        for name in names
    }
    assert found == names
    unknown = {path.stem for path in chat_formats.PUBLISHED_TEMPLATES.glob("*.jinja")} - set(names)
    assert all(
        models.fingerprint(chat_formats.published_template(name)) not in models.RENDERER_BY_TEMPLATE
        for name in unknown
    )


def test_the_renderer_of_another_model_follows_its_template(tiny_qwen3: str, model_folder: Path) -> None:
    assert models.recommended_renderer(tiny_qwen3) == "chat_template"
    (model_folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (model_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert models.recommended_renderer(str(model_folder)) == "role_colon"


@pytest.mark.parametrize("load", [models.get_tokenizer, BaseModel])
def test_a_hub_model_without_a_hub_is_refused_in_seconds_with_the_repair(load: Any) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load("nobody/no-such-model")
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.startswith(
        "Cannot load the tokenizer of 'nobody/no-such-model': it is not on this machine, and "
    )
    assert "offline mode is on (HF_HUB_OFFLINE)" in message
    assert "hf download nobody/no-such-model" in message
    assert "model_name=/path/to/model" in message
    assert f"model_name={embedded.MODEL_NAME}" in message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


def widen(path: Path) -> None:
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "intermediate_size": 128}),
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("config.json", lambda path: path.write_text("{", encoding="utf-8"), "tokenizer|weights"),
        ("config.json", lambda path: path.write_text("{}", encoding="utf-8"), "tokenizer|weights"),
        ("config.json", widen, "weights"),
        ("model.safetensors", cut, "weights"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "weights"),
        ("model.safetensors", Path.unlink, "weights"),
        ("model.safetensors", drop_a_tensor, "weights"),
        ("tokenizer.json", cut, "tokenizer"),
        ("tokenizer.json", Path.unlink, "tokenizer"),
    ],
    ids=[
        "broken-config",
        "empty-config",
        "config-of-another-shape",
        "truncated-weights",
        "empty-weights",
        "no-weights",
        "a-tensor-is-missing",
        "truncated-tokenizer",
        "no-tokenizer",
    ],
)
def test_a_damaged_model_folder_is_refused(model_folder: Path, file: str, damage: Any, what: str) -> None:
    damage(model_folder / file)
    with pytest.raises(ModelError, match=rf"Cannot load the ({what}) of '{model_folder}': .*") as caught:
        BaseModel(str(model_folder))
    assert "The folder is damaged or incomplete: copy or download it again." in str(caught.value)


def test_a_missing_package_is_no_damage_of_the_folder(model_folder: Path) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ImportError("TimmWrapperModel requires the timm library but it was not found.\nRun pip.")

    with pytest.raises(ModelError, match="requires the timm library but it was not found") as caught:
        models.load_from_hub_or_disk("weights", str(model_folder), load)
    assert "Install the package" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_code_that_comes_with_a_model_is_never_run(model_folder: Path) -> None:
    (model_folder / "modeling.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "of_its_own",
        "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"},
    }
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError):
        BaseModel(str(model_folder))


def test_a_token_that_exceeds_the_embedding_is_refused_with_the_repair(
    make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "model")
    models.check_vocabulary(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|ticket|>", "<|order|>"], special_tokens=True)
    longer = make_model_folder(tmp_path / "longer")
    tokenizer.save_pretrained(longer)
    with pytest.raises(ModelError, match="no row for '<|ticket|>'") as caught:
        models.check_vocabulary(str(longer))
    assert "resize_token_embeddings" in str(caught.value)
    assert "lora_rank=0" in str(caught.value)
    resized = make_model_folder(tmp_path / "resized", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(resized)
    models.check_vocabulary(str(resized))


def test_a_token_for_images_may_exceed_the_embedding(
    make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["extra_special_tokens"] = {"image_token": "<image_soft_token>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    models.check_vocabulary(str(folder))
    renderer = get_renderer("chat_template", AutoTokenizer.from_pretrained(folder))
    beyond = renderer.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "<image_soft_token>"}])
    assert beyond not in prompt.to_ints()


def test_a_package_that_a_model_needs_is_named_with_its_command(model_folder: Path) -> None:
    """As transformers says it of the encoders of pictures of Gemma 3n and FastVLM."""

    def load(*_: object, **__: object) -> None:
        raise ImportError(
            "\nTimmWrapperModel requires the timm library but it was not found in your environment. You can "
            "install it with pip:\n`pip install timm`. Please note that you may need to restart your runtime."
        )

    with pytest.raises(ModelError) as caught:
        models.load_from_hub_or_disk("weights", str(model_folder), load)
    first, second = str(caught.value).splitlines()
    assert first.endswith("requires the timm library but it was not found in your environment.")
    assert second == f"Install it with `{extras.pip()} install timm`, and run it again."
