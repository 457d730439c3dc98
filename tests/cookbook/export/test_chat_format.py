"""The template that leaves prints what the renderer does, as transformers renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cookbook.errors import ConfigError
from cookbook.export.chat_format import ChatFormat, chat_format_of, find_chat_format
from cookbook.runs.find import find_trained_model
from renderers import Message

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
    """By transformers, as anybody does who has the template."""
    ids: list[int] = chat_format.tokenizer.apply_chat_template(
        messages, chat_template=chat_format.template, add_generation_prompt=True
    )["input_ids"]
    return ids


@pytest.mark.parametrize("system_prompt", [None, SYSTEM_PROMPT], ids=["", "system prompt"])
def test_the_template_that_leaves_prints_the_prompts_of_the_renderer(
    formatted: tuple[str, Any], system_prompt: str | None
) -> None:
    chat_format = chat_format_of(*formatted, system_prompt)
    for messages in CONVERSATIONS:
        expected = chat_format.renderer.build_generation_prompt(messages).to_ints()
        assert rendered(chat_format, messages) == expected


def test_what_ends_a_reply_is_what_the_renderer_stops_at(formatted: tuple[str, Any]) -> None:
    name, tokenizer = formatted
    chat_format = chat_format_of(name, tokenizer)
    stops = chat_format.renderer.get_stop_sequences()
    assert [*chat_format.stop_token_ids, *chat_format.stop_strings] == stops
    texts = [tokenizer.decode([stop]) if isinstance(stop, int) else stop for stop in stops]
    assert chat_format.stop_texts == texts


def test_the_tokenizers_own_template_leaves_as_it_is_where_it_prints_the_same(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("qwen3")
    assert chat_format_of("qwen3", tokenizer).template == tokenizer.chat_template


def test_a_template_that_asks_for_the_date_is_told_the_day_it_was_trained_with(
    tokenizer_of: Callable[[str], Any],
) -> None:
    template = chat_format_of("chat_template", tokenizer_of("llama3_2 by its template")).template
    assert "strftime_now(" not in template
    assert '"26 Jul 2024"' in template


def test_whoever_loads_the_tokenizer_renders_as_the_run_did(run: Path, tmp_path: Path) -> None:
    chat_format = find_chat_format(find_trained_model(str(run)))
    chat_format.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert chat_format.renderer.system_prompt
    for messages in CONVERSATIONS:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == chat_format.renderer.build_generation_prompt(messages).to_ints()


def test_tools_are_rendered_as_they_were_trained(tokenizer_of: Callable[[str], Any]) -> None:
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


def test_a_renderer_that_no_template_agrees_with_needs_one_given(tokenizer_of: Callable[[str], Any]) -> None:
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


def test_looking_for_a_template_leaves_the_tokenizer_alone(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("qwen3")
    before = tokenizer.chat_template
    chat_format_of("role_colon", tokenizer, SYSTEM_PROMPT)
    assert tokenizer.chat_template == before
