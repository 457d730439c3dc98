"""Renderers by name, and what the package shows."""

import subprocess
import sys

import pytest

import renderers
from cookbook.errors import RendererError
from renderers import get_renderer, register_renderer, registry, renderer_names

NAMES = [
    "chat_template",
    "deepseekv3",
    "deepseekv3_thinking",
    "gemma3",
    "gpt_oss",
    "gpt_oss_high",
    "gpt_oss_low",
    "llama3",
    "phi3",
    "qwen2_5",
    "qwen3",
    "qwen3_disable_thinking",
    "qwen3_instruct",
    "role_colon",
]


def test_the_public_names_are_these():
    assert renderers.__all__ == [
        "Delta",
        "Message",
        "Renderer",
        "ResponseStream",
        "TrainOnWhat",
        "get_renderer",
        "register_renderer",
        "renderer_names",
    ]


def test_importing_renderers_imports_neither_torch_nor_transformers():
    check = "import renderers, sys; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_renderers_of_the_package_are_registered_by_their_own_names(small_tokenizer):
    assert renderer_names() == NAMES
    assert get_renderer("role_colon", small_tokenizer()).name == "role_colon"


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(RendererError) as caught:
        get_renderer("qwen_3", None)
    assert str(caught.value) == (
        "There is no renderer named `qwen_3`. Did you mean `qwen3`? " + f"Renderers: {', '.join(NAMES)}."
    )


def test_a_name_is_registered_once(small_tokenizer):
    made = []
    register_renderer("of_this_test", lambda tokenizer: made.append(tokenizer) or "a renderer")
    try:
        assert get_renderer("of_this_test", "a tokenizer") == "a renderer"
        assert made == ["a tokenizer"]
        with pytest.raises(RendererError, match="registered already"):
            register_renderer("of_this_test", lambda tokenizer: None)
    finally:
        del registry._factories["of_this_test"]
