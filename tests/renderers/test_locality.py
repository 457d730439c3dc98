"""The text of a long conversation's beginnings, against a run of the template for each of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cookbook.errors import RendererError
from renderers.locality import local_template
from renderers.sandbox import QuickSandbox, sandbox_like_theirs
from renderers.template import Chat, Template

PUBLISHED = Path(
    os.environ.get("COOKBOOK_TEMPLATES") or Path(__file__).parents[2].parent / "shared" / "chat_templates"
)
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOCAL = {
    "chatml": LOOP + PROMPT,
    "first": LOOP.replace("{{ m.content", "{{ loop.index }}{% if loop.first %}!{% endif %}{{ m.content")
    + PROMPT,
    "system": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}" + LOOP.replace("in messages", "in rest") + PROMPT,
    "same name": "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    + LOOP.replace("{{ m.content", "{{ messages[0].content }}{{ m.content")
    + PROMPT,
    "nested": LOOP.replace(
        "{{ m.content", "{% for c in m.content[:3] %}{{ c }}{{ loop.last }}{% endfor %}{{ m.content"
    )
    + PROMPT,
    "macro": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}"
    + LOOP.replace("m.content }}", "say(m) }}")
    + PROMPT,
    "alternating": LOOP.replace(
        "<|im_start|>",
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('No.') }}{% endif %}"
        "<|im_start|>",
    )
    + PROMPT,
}
NOT_LOCAL = {
    "last": LOOP.replace("{{ m.content", "{% if loop.last %}!{% endif %}{{ m.content"),
    "next": LOOP.replace("{{ m.content", "{{ loop.nextitem }}{{ m.content"),
    "length": "{{ messages | length }}" + LOOP,
    "length in the loop": LOOP.replace("{{ m.content", "{{ loop.length }}{{ m.content"),
    "from the end": LOOP.replace("{{ m.content", "{{ messages[-1].role }}{{ m.content"),
    "a neighbour": LOOP.replace("{{ m.content", "{{ messages[loop.index0 - 1].role }}{{ m.content"),
    "remembers": "{% set ns = namespace(n=0) %}"
    + LOOP.replace("{{ m.content", "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content"),
    "two loops": LOOP + LOOP,
    "backwards": LOOP.replace("in messages", "in messages[::-1]"),
    "filtered": LOOP.replace("in messages", "in messages if m.role == 'user'"),
    "all at once": LOOP + "{{ messages }}",
    "breaks": LOOP.replace("{{ m.content", "{% if m.content == 'x' %}{% break %}{% endif %}{{ m.content"),
    "the loop is passed on": "{% macro f(l) %}{{ l.last }}{% endmacro %}"
    + LOOP.replace("{{ m.content", "{{ f(loop) }}{{ m.content"),
    "in a nested loop": LOOP.replace(
        "{{ m.content", "{% for n in messages %}{{ n.role }}{% endfor %}{{ m.content"
    ),
    "otherwise": LOOP.replace("{% endfor", "{% else %}x{% endfor"),
    "captured": "{% set text %}" + LOOP + "{% endset %}{{ text | upper }}",
    "renamed in the loop": LOOP.replace(
        "{{ m.content", "{% set all = messages %}{{ all | length }}{{ m.content"
    ),
}


def conversation(num_messages: int, system: bool = False) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    messages: list[dict[str, Any]] = [
        {"role": roles[number % 2], "content": f"word {number}"} for number in range(num_messages)
    ]
    return [{"role": "system", "content": "Be brief."}, *messages] if system else messages


def is_local(source: str) -> bool:
    return local_template(source, sandbox_like_theirs(source, QuickSandbox)) is not None


def check_every_beginning(template: Template, messages: list[dict[str, Any]]) -> None:
    chat = Chat(template, messages, None)
    for number in range(1, len(messages) + 1):
        for prompt in (False, True):
            try:
                expected: str | None = template.text(messages[:number], prompt=prompt)
            except RendererError:
                expected = None
            try:
                found: str | None = chat.text(number, prompt)
            except RendererError:
                found = None
            assert found == expected


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("system", [False, True])
def test_every_beginning_is_what_the_template_prints_of_it(small_tokenizer, name, system):
    assert is_local(LOCAL[name])
    template = Template(small_tokenizer(LOCAL[name]))
    messages = conversation(40, system)
    check_every_beginning(template, messages)
    if name != "alternating" or not system:
        assert template.beginnings(messages, None, prompt=True) is not None


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_a_template_that_looks_ahead_or_remembers_is_run_for_each(small_tokenizer, name):
    assert not is_local(NOT_LOCAL[name])
    check_every_beginning(Template(small_tokenizer(NOT_LOCAL[name])), conversation(30))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published templates are not here")
@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_print_every_beginning_the_same(small_tokenizer, path):
    template = Template(small_tokenizer(path.read_text(encoding="utf-8")))
    for system in (False, True):
        check_every_beginning(template, [template.adapted(m) for m in conversation(26, system)])


def test_a_long_conversation_has_the_examples_of_its_turns(small_tokenizer, trained_runs):
    from renderers import get_renderer

    tokenizer = small_tokenizer("chatml")
    messages: list[Any] = conversation(60)
    example = get_renderer("chat_template", tokenizer).build_supervised_example(messages)
    assert tokenizer.decode(example[0].to_ints()) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_runs(tokenizer, example) == [f"{m['content']}<|im_end|>" for m in messages[1::2]]
