"""Chat templates as they are published, each on a small tokenizer that has its control tokens."""

import re
from typing import Any

import pytest

from cookbook.errors import RendererError

CHAT: list[Any] = [
    {"role": "user", "content": "What is 15 + 27?"},
    {"role": "assistant", "content": "15 + 27 = 42. 😀"},
    {"role": "user", "content": " And then?\n"},
    {"role": "assistant", "content": "天気。\n\nThat is all. "},
]


@pytest.fixture(scope="session")
def published(small_tokenizer, published_template):
    def load(name: str) -> Any:
        template = published_template(name)
        tokens = set(re.findall(r"<[|｜][^<> ]*?[|｜]>|<(?:start|end)_of_turn>", template))
        return small_tokenizer(template, tuple(sorted(tokens)))

    return load


@pytest.mark.parametrize(
    ("name", "end", "trims"),
    [
        ("gemma", "<end_of_turn>", True),
        ("gemma3", "<end_of_turn>", True),
        ("llama3", "<|eot_id|>", True),
        ("llama3_1", "<|eot_id|>", True),
        ("llama3_2", "<|eot_id|>", True),
        ("phi3", "<|end|>", False),
        ("qwen2_5", "<|im_end|>", False),
        ("qwen3_instruct_2507", "<|im_end|>", False),
    ],
)
def test_templates_that_keep_their_history_train_it_in_one_example(
    renderer_of, published, template_tokens, trained_runs, name, end, trims
):
    tokenizer = published(name)
    renderer = renderer_of("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples(CHAT)
    said = [m["content"].strip() if trims else m["content"] for m in CHAT[1::2]]
    assert trained_runs(tokenizer, example) == [f"{text}{end}" for text in said]
    assert example[0].to_ints() == template_tokens(tokenizer, CHAT)
    assert renderer.get_stop_sequences() == [tokenizer.convert_tokens_to_ids(end)]
    for turn in (1, 3):
        prompt = renderer.build_generation_prompt(CHAT[:turn]).to_ints()
        assert example[0].to_ints()[: len(prompt)] == prompt


def test_gpt_oss_ends_a_reply_otherwise_once_it_is_history(
    renderer_of, published, template_tokens, trained_runs
):
    tokenizer = published("gptoss")
    renderer = renderer_of("chat_template", tokenizer)
    thinking = [CHAT[0], {**CHAT[1], "thinking": "Add."}, CHAT[2], {**CHAT[3], "thinking": "Go on."}]
    examples = renderer.build_supervised_examples(thinking)
    assert [trained_runs(tokenizer, example) for example in examples] == [
        [
            f"<|channel|>analysis<|message|>{m['thinking']}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{m['content']}<|return|>"
        ]
        for m in thinking[1::2]
    ]
    assert examples[1][0].to_ints() == template_tokens(tokenizer, thinking)
    stops = tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences())
    assert stops == ["<|return|>", "<|call|>"]


def test_an_empty_gpt_oss_reply_is_trained_to_its_end(renderer_of, published, trained_runs):
    tokenizer = published("gptoss")
    chat = [CHAT[0], {"role": "assistant", "content": ""}]
    (example,) = renderer_of("chat_template", tokenizer).build_supervised_examples(chat)
    assert trained_runs(tokenizer, example) == ["<|channel|>final<|message|><|return|>"]


def test_deepseek_prompts_for_thinking_that_its_template_then_leaves_out(renderer_of, published):
    renderer = renderer_of("chat_template", published("deepseekv3"))
    with pytest.raises(RendererError, match="sampled from other prompts"):
        renderer.build_supervised_example(CHAT)


def test_gemma_says_that_it_has_no_system_role(renderer_of, published):
    with pytest.raises(RendererError, match="System role not supported"):
        renderer_of("chat_template", published("gemma")).build_generation_prompt(
            [{"role": "system", "content": "Be kind."}, *CHAT[:1]]
        )
