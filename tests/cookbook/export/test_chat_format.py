"""The exported template prints what the renderer does, when transformers renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slow import slow_after
from transformers import AutoTokenizer

from cookbook.errors import ConfigError
from cookbook.export.chat_format import ChatFormat, chat_format_of, find_chat_format
from cookbook.runs.find import find_trained_model
from renderers import Message, renderer_names

SYSTEM_PROMPT = 'Talk like a "pirate" {{ x }} {% y %}.\n\nUse \\n, \t and 🦜 — “rarely”.'

USER: Message = {"role": "user", "content": "What is 2 + 2?\nAnd 3 + 3?"}
REPLY: Message = {"role": "assistant", "content": "Four; and six.\n\nRight?"}
OTHER: Message = {"role": "user", "content": "Ünïcode 🙂 日本, please"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
CONVERSATIONS: list[list[Message]] = [
    [USER],
    [OTHER, REPLY, USER],
    [SYSTEM, OTHER],
    [SYSTEM, USER, REPLY, OTHER, REPLY, USER],
]


def rendered(chat_format: ChatFormat, messages: list[Message]) -> list[int]:
    """Returns the token ids of messages rendered by transformers."""
    ids: list[int] = chat_format.tokenizer.apply_chat_template(
        messages, chat_template=chat_format.template, add_generation_prompt=True
    )["input_ids"]
    return ids


@pytest.mark.cases(6)
@pytest.mark.parametrize("system_prompt", slow_after(1, [None, SYSTEM_PROMPT]))
def test_the_exported_template_prints_the_prompts_of_the_renderer(
    formatted: tuple[str, Any], format_of_each: ChatFormat, system_prompt: str | None
) -> None:
    chat_format = chat_format_of(*formatted, system_prompt) if system_prompt else format_of_each
    for messages in CONVERSATIONS:
        expected = chat_format.renderer.build_generation_prompt(messages).to_ints()
        assert rendered(chat_format, messages) == expected


THOUGHT: Message = {**REPLY, "reasoning_content": "Two and two."}
TELLS_ALL_THINKING = {
    "qwen3_5_preserve_thinking", "qwen3_6_preserve_thinking", "nemotron3_preserve_thinking",
    "kimi_k26_preserve_thinking",
}  # fmt: skip
"""Those of Qwen3.8, too, print the thinking of the history."""


@pytest.mark.cases(5)
def test_the_exported_template_prints_the_thinking_of_the_history_as_in_training(
    formatted: tuple[str, Any], format_of_each: ChatFormat
) -> None:
    chat_format = format_of_each
    if chat_format.renderer.name in ("role_colon", "chat_template"):
        pytest.skip("has no thinking")
    messages = [USER, THOUGHT, OTHER]
    expected = chat_format.renderer.build_generation_prompt(messages).to_ints()
    assert rendered(chat_format, messages) == expected
    has_thinking = "Two and two." in chat_format.tokenizer.decode(expected)
    assert has_thinking == (formatted[0] in TELLS_ALL_THINKING or formatted[0].startswith("qwen3_8"))


def test_every_renderer_whose_template_is_here_is_exported(exported_names: set[str]) -> None:
    without = {
        "chat_template", "kimi_k2_thinking", "nemotron3_low_thinking", "nemotron3_ultra",
        "nemotron3_ultra_disable_thinking", "nemotron3_ultra_medium_thinking",
        "nemotron3_ultra_preserve_thinking",
    }  # fmt: skip
    assert exported_names | without == {*renderer_names()}


@pytest.mark.cases(16)
def test_replies_end_at_the_stop_sequences_of_the_renderer(
    formatted: tuple[str, Any], format_of_each: ChatFormat
) -> None:
    _, tokenizer = formatted
    chat_format = format_of_each
    stops = chat_format.renderer.get_stop_sequences()
    assert [*chat_format.stop_token_ids, *chat_format.stop_strings] == stops
    texts = [tokenizer.decode([stop]) if isinstance(stop, int) else stop for stop in stops]
    assert chat_format.stop_texts == texts


def test_the_tokenizers_own_template_is_exported_unchanged_if_it_prints_the_same(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("qwen3")
    assert chat_format_of("qwen3", tokenizer).template == tokenizer.chat_template


def test_a_template_that_prints_the_date_is_exported_with_the_date_of_training(
    tokenizer_of: Callable[[str], Any],
) -> None:
    template = chat_format_of("chat_template", tokenizer_of("llama3_2 by its template")).template
    assert "strftime_now(" not in template
    assert '"26 Jul 2024"' in template


def test_the_exported_tokenizer_renders_as_the_run_did(run: Path, tmp_path: Path) -> None:
    chat_format = find_chat_format(find_trained_model(str(run)))
    chat_format.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert chat_format.renderer.system_prompt
    for messages in CONVERSATIONS:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == chat_format.renderer.build_generation_prompt(messages).to_ints()


def test_tools_are_rendered_as_in_training(tokenizer_of: Callable[[str], Any]) -> None:
    chat_format = chat_format_of("qwen3", tokenizer_of("qwen3"), SYSTEM_PROMPT)
    tool: Any = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    expected = chat_format.renderer.build_generation_prompt([USER], tools=[tool]).to_ints()
    found = chat_format.tokenizer.apply_chat_template(
        [USER], tools=[tool], chat_template=chat_format.template, add_generation_prompt=True
    )["input_ids"]
    assert found == expected


def test_a_renderer_without_a_matching_template_requires_chat_template(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("gemma3 under another template")
    with pytest.raises(ConfigError, match=r"(?s)`gemma3`.*It should print .* and prints .*chat_template="):
        chat_format_of("gemma3", tokenizer)
    given = tokenizer_of("gemma3").chat_template
    assert chat_format_of("gemma3", tokenizer, template=given).template == given


def test_a_given_template_is_compared_too(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("qwen3")
    wrong = tokenizer.chat_template.replace("assistant\\n", "assistant: ")
    with pytest.raises(ConfigError, match="should print .* and prints"):
        chat_format_of("qwen3", tokenizer, template=wrong)
    right = "{# mine #}" + tokenizer.chat_template
    assert chat_format_of("qwen3", tokenizer, template=right).template == right


def test_finding_a_template_does_not_change_the_tokenizer(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("qwen3")
    before = tokenizer.chat_template
    chat_format_of("role_colon", tokenizer, SYSTEM_PROMPT)
    assert tokenizer.chat_template == before
