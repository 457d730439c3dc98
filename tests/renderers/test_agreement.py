"""Whether a renderer prints the format of its tokenizer's own chat template."""

import re
from typing import Any

import chat_formats
import pytest

from renderers import get_renderer
from renderers.agreement import disagreement

AGREEING = [
    ("qwen3", "qwen3"),
    ("qwen3_disable_thinking", "qwen3"),
    ("qwen3_instruct", "qwen3_instruct_2507"),
    ("qwen2_5", "qwen2_5"),
    ("llama3", "llama3_1"),
    ("gemma3", "gemma3"),
    ("phi3", "phi3"),
    ("gpt_oss_high", "gptoss"),
    ("deepseekv3", "deepseekv3"),
    ("deepseekv3_thinking", "deepseekv3"),
    ("deepseekv3_1", "deepseek_v3_1"),
    ("deepseekv3_1_thinking", "deepseek_v3_1"),
    ("kimi_k2", "kimi_k2"),
    ("kimi_k25", "kimi_k2_5"),
    ("kimi_k26_disable_thinking", "kimi_k2_5"),
    ("chat_template", "kimi_k2"),
]


@pytest.fixture(scope="module")
def tokenizer_for(small_tokenizer: Any) -> Any:
    def load(name: str) -> Any:
        template = chat_formats.template(name)
        tokens = set(re.findall(r"<[|｜][^<> ]*?[|｜]>|<(?:start|end)_of_turn>", template))
        if "deepseek" in name:
            tokens |= {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"}
        if "llama" in name:
            return chat_formats.tokenizer(name)
        tokens |= {"<|user|>", "<|end|>"} if "phi" in name else set()
        tokenizer = small_tokenizer(template, tuple(sorted(tokens)))
        if "deepseek" in name:
            tokenizer.bos_token, tokenizer.eos_token = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
        return tokenizer

    return load


@pytest.mark.cases(6)
@pytest.mark.parametrize(("name", "template"), AGREEING)
def test_a_renderer_agrees_with_the_template_of_its_model_in_any_mode(tokenizer_for, name, template):
    assert disagreement(get_renderer(name, tokenizer_for(template))) is None


@pytest.mark.parametrize(
    ("name", "template", "difference"),
    [
        (
            "deepseekv3",
            "deepseek_v3_1",
            r"it prints .* where the tokenizer's chat template prints .*</think>",
        ),
        ("kimi_k2_thinking", "kimi_k2", r"it prints .*<\|im_end\|><\|im_user"),
        ("kimi_k25", "kimi_k2", "You are Kimi"),
        ("qwen2_5", "qwen3", "You are Qwen"),
        ("role_colon", "qwen3", "User: Who are you"),
        ("kimi_k2_thinking", "qwen3", r"has the token <\|im_system\|>, which the tokenizer does not have"),
    ],
)
def test_another_format_is_named_with_the_first_difference(tokenizer_for, name, template, difference):
    tokenizer = tokenizer_for(template)
    assert re.search(difference, disagreement(get_renderer(name, tokenizer)) or "")


def test_a_base_model_without_a_template_has_no_other_format(small_tokenizer):
    assert disagreement(get_renderer("role_colon", small_tokenizer(""))) is None
