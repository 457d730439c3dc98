"""The registry of renderers, and the public names of the package."""

import importlib
import re
import subprocess
import sys

import pytest

import renderers
from cookbook.errors import RendererError
from renderers import base, formats, get_renderer, other_names, register_renderer, registry, renderer_names

NAMES = [
    "chat_template",
    "deepseekv3",
    "deepseekv3_1",
    "deepseekv3_1_thinking",
    "deepseekv3_thinking",
    "gemma3",
    "gemma4",
    "gemma4_preserve_thinking",
    "gemma4_thinking",
    "glm4_5",
    "glm4_5_disable_thinking",
    "glm5",
    "glm5_disable_thinking",
    "gpt_oss",
    "gpt_oss_high",
    "gpt_oss_low",
    "kimi_k2",
    "kimi_k25",
    "kimi_k25_disable_thinking",
    "kimi_k26",
    "kimi_k26_disable_thinking",
    "kimi_k26_preserve_thinking",
    "kimi_k2_thinking",
    "llama3",
    "nemotron3",
    "nemotron3_disable_thinking",
    "nemotron3_low_thinking",
    "nemotron3_preserve_thinking",
    "nemotron3_ultra",
    "nemotron3_ultra_disable_thinking",
    "nemotron3_ultra_medium_thinking",
    "nemotron3_ultra_preserve_thinking",
    "phi3",
    "qwen2_5",
    "qwen3",
    "qwen3_5",
    "qwen3_5_disable_thinking",
    "qwen3_5_preserve_thinking",
    "qwen3_6",
    "qwen3_6_disable_thinking",
    "qwen3_6_preserve_thinking",
    "qwen3_8",
    "qwen3_8_disable_thinking",
    "qwen3_8_low_reasoning",
    "qwen3_8_medium_reasoning",
    "qwen3_8_xhigh_reasoning",
    "qwen3_disable_thinking",
    "qwen3_instruct",
    "qwen3_vl",
    "qwen3_vl_instruct",
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


def test_importing_a_format_imports_neither_torch_nor_transformers_and_the_names_need_no_format():
    check = (
        "import importlib, sys, renderers\n"
        "renderers.renderer_names()\n"
        "print(sorted(name for name in sys.modules if name.startswith(('renderers.formats.', 'jinja2'))))\n"
        "for place in renderers.formats.BUILT_IN.values():\n"
        "    importlib.import_module('renderers.' + place.partition(':')[0])\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_renderers_of_the_package_are_registered_by_their_own_names(small_tokenizer):
    assert renderer_names() == NAMES
    assert get_renderer("role_colon", small_tokenizer()).name == "role_colon"
    for name, place in formats.BUILT_IN.items():
        module, _, class_name = place.partition(":")
        assert getattr(importlib.import_module(f"renderers.{module}"), class_name).name == name


def test_every_public_name_and_every_class_of_the_package_can_be_imported_from_it():
    assert {name for name in renderers.__all__ if getattr(renderers, name).__name__ != name} == set()
    assert renderers.Renderer is base.Renderer
    for place in formats.BUILT_IN.values():
        module, _, class_name = place.partition(":")
        assert getattr(renderers, class_name) is getattr(
            importlib.import_module(f"renderers.{module}"), class_name
        )
    assert dir(renderers) == sorted(renderers.__all__)
    with pytest.raises(AttributeError, match="module 'renderers' has no attribute 'Qwen4Renderer'"):
        renderers.Qwen4Renderer  # noqa: B018


def test_an_unknown_name_is_an_error_with_the_nearest_name():
    with pytest.raises(RendererError) as caught:
        get_renderer("qwen_3", None)
    assert str(caught.value) == (
        "Unknown renderer `qwen_3`. Did you mean `qwen3`? " + f"Supported: {', '.join(NAMES)}."
    )


def said_of(name):
    with pytest.raises(RendererError) as caught:
        get_renderer(name, None)
    return str(caught.value).removesuffix(f" Supported: {', '.join(NAMES)}.")


def test_a_name_of_tinker_cookbook_is_an_error_with_its_equivalent_here():
    for name, answer in {
        "deepseekv3_disable_thinking": "Here it is `deepseekv3` for V3",
        "DeepSeekV3-disable-thinking": "Here it is `deepseekv3` for V3",
        "gpt_oss_medium_reasoning": "Here it is `gpt_oss`.",
        "gpt_oss_high_reasoning": "Here it is `gpt_oss_high`.",
        "kimi_k31_pro_max_reasoning": "It is not supported here. Use `chat_template`",
    }.items():
        assert said_of(name).startswith(f"Unknown renderer `{name}`. {answer}")
        assert "_thinking`" not in said_of(name).removeprefix(f"Unknown renderer `{name}`.")
        assert "qwen2_5" not in said_of(name)


def test_every_equivalent_is_registered_and_its_name_in_tinker_cookbook_is_not():
    for name, answer in other_names.ANSWERS.items():
        assert name not in NAMES
        named = re.findall("`([^`]+)`", answer)
        assert named
        assert set(named) <= set(NAMES)


def test_no_other_version_and_no_opposite_is_suggested():
    for name in ("deepseekv3_no_thinking", "qwen2", "qwen4", "gemma2", "phi4", "llama4"):
        assert said_of(name) == f"Unknown renderer `{name}`."


def test_a_name_cannot_be_registered_twice(small_tokenizer):
    made = []
    register_renderer("of_this_test", lambda tokenizer: made.append(tokenizer) or "a renderer")
    try:
        assert get_renderer("of_this_test", "a tokenizer") == "a renderer"
        assert made == ["a tokenizer"]
        with pytest.raises(RendererError, match="registered already"):
            register_renderer("of_this_test", lambda tokenizer: None)
    finally:
        del registry._factories["of_this_test"]
