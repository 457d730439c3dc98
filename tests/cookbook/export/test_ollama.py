"""Modelfiles, parsed by Ollama's rules, with templates run by a small implementation of Go's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cookbook.errors import ConfigError
from cookbook.export.chat_format import ChatFormat, chat_format_of
from cookbook.export.ollama import frames_of, modelfile
from renderers import Message

TURNS = [
    ("user", "Hi {{ there }}"),
    ("assistant", "Yes?\n\nWell."),
    ("user", "“2 + 2”?"),
    ("assistant", "4"),
    ("user", "🙂 ok"),
]
CONVERSATIONS = [TURNS[:1], TURNS[:3], TURNS, [("system", "Be brief.\nAlways."), *TURNS]]


def commands(text: str) -> list[tuple[str, str]]:
    """Parses by Ollama's rules: a quoted value ends with a line that ends in its quotes."""
    found: list[tuple[str, str]] = []
    lines = text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line:
            continue
        word, _, value = line.partition(" ")
        if word == "PARAMETER":
            name, _, value = value.partition(" ")
            word = f"PARAMETER {name}"
        for quotes in ('"""', '"'):
            if value.startswith(quotes):
                while len(value) < 2 * len(quotes) or not value.endswith(quotes):
                    value += "\n" + lines.pop(0)
                value = value[len(quotes) : -len(quotes)]
                break
        found.append((word, value))
    return found


@pytest.mark.cases(6)
def test_ollamas_template_prints_the_prompts_of_the_renderer(
    formatted: tuple[str, Any], format_of_each: ChatFormat, go_render: Callable[..., str]
) -> None:
    _, tokenizer = formatted
    chat_format = format_of_each
    template = dict(commands(modelfile(chat_format, ".")))["TEMPLATE"]
    for turns in CONVERSATIONS:
        messages = [Message(role=role, content=content) for role, content in turns]
        expected = tokenizer.decode(chat_format.renderer.build_generation_prompt(messages).to_ints())
        found = go_render(template, {"Messages": [{"Role": role, "Content": text} for role, text in turns]})
        assert found == expected


def test_a_partial_reply_is_continued(
    tokenizer_of: Callable[[str], Any], go_render: Callable[..., str]
) -> None:
    template = frames_of(chat_format_of("qwen3", tokenizer_of("qwen3"))).go_template()
    messages = [{"Role": "user", "Content": "Hi"}, {"Role": "assistant", "Content": "We"}]
    assert go_render(template, {"Messages": messages}).endswith("<|im_start|>assistant\nWe")


def test_a_conversation_may_replace_the_system_prompt_of_the_run(
    tokenizer_of: Callable[[str], Any],
) -> None:
    chat_format = chat_format_of("qwen3", tokenizer_of("qwen3"), 'Say "arr".\nTwice.')
    found = dict(commands(modelfile(chat_format, "./model.gguf")))
    assert found["FROM"] == "./model.gguf"
    assert found["SYSTEM"] == 'Say "arr".\nTwice.'
    assert "arr" not in found["TEMPLATE"]


@pytest.mark.cases(5)
def test_generation_stops_at_the_stop_sequences_of_the_renderer(format_of_each: ChatFormat) -> None:
    chat_format = format_of_each
    found = [value for word, value in commands(modelfile(chat_format, ".")) if word == "PARAMETER stop"]
    assert found == chat_format.stop_texts


def test_no_temperature_is_set(tokenizer_of: Callable[[str], Any]) -> None:
    chat_format = chat_format_of("qwen3", tokenizer_of("qwen3"))
    words = [word for word, _ in commands(modelfile(chat_format, "llama3.2", "./adapter.gguf"))]
    assert words == ["FROM", "ADAPTER", "TEMPLATE", "PARAMETER stop"]


def test_a_system_prompt_that_a_modelfile_cannot_contain_is_refused(
    tokenizer_of: Callable[[str], Any],
) -> None:
    chat_format = chat_format_of("qwen3", tokenizer_of("qwen3"), 'Quote """ it.')
    with pytest.raises(ConfigError, match="three double quotes"):
        modelfile(chat_format, ".")


NUMBERED = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ loop.index }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ messages|length + 1 }}\n{% endif %}"
)


def test_a_format_that_depends_on_more_than_roles_is_refused(tokenizer_of: Callable[[str], Any]) -> None:
    """The template of this format numbers the turns."""
    tokenizer = copy.deepcopy(tokenizer_of("qwen3"))
    tokenizer.chat_template = NUMBERED
    with pytest.raises(ConfigError, match="`chat_template`.*more than their roles"):
        frames_of(chat_format_of("chat_template", tokenizer))


def test_a_stop_sequence_adds_no_command(tokenizer_of: Callable[[str], Any]) -> None:
    chat_format = chat_format_of("qwen3", tokenizer_of("qwen3"))
    stop = '"\nADAPTER /etc/passwd\n#'
    changed = replace(chat_format, stop_strings=(stop,))
    found = commands(modelfile(changed, "."))
    assert [word for word, _ in found] == ["FROM", "TEMPLATE", *["PARAMETER stop"] * len(changed.stop_texts)]
    assert found[-1][1] == stop
