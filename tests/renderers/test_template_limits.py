"""Templates that would run forever, or produce more text than fits into memory."""

# ruff: noqa: E501 - templates are one line each

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

from cookbook.errors import RendererError
from renderers import get_renderer
from renderers.jinja.sandbox import compiled
from renderers.jinja.template_limits import Limits, TemplateLimitError

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]

DOUBLING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(80) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ %s }}"
)

LARGE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a product from the right": "{% set x = 10**10 * 'a' %}",
    "a product in a condition": "{% if 'a' * 10**10 %}x{% endif %}",
    "a list": "{{ ([0] * 10**10)|length }}",
    "bytes": "{{ ('a'.encode() * 10**10)|length }}",
    "~": DOUBLING % ("'abc'", "ns.x ~ ns.x", "1"),
    "~ of HTML": "{% autoescape true %}" + DOUBLING % ("'abc'", "ns.x ~ ns.x", "1") + "{% endautoescape %}",
    "+": DOUBLING % ("'abc'", "ns.x + ns.x", "1"),
    "+ of lists": DOUBLING % ("[1]", "ns.x + ns.x", "1"),
    "set blocks": "{% set a = 'abc' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 80,
    "lists in lists": DOUBLING % ("['a']", "[ns.x, ns.x]", "ns.x"),
    "lists in lists as JSON": DOUBLING % ("['a']", "(ns.x * 2)|batch(2)|list", "ns.x|tojson"),
    "mappings in mappings": DOUBLING % ("{}", "dict(a=ns.x, b=ns.x)", "ns.x|string"),
    "mappings that are compared": DOUBLING % ("{}", "dict(a=ns.x, b=ns.x)", "ns.x == ns.x|items"),
    "center": "{{ 'a'|center(10**9) }}",
    "center by name": "{{ 'a'|center(width=10**9) }}",
    "a filter's block": "{% filter center(10**9) %}x{% endfilter %}",
    "center through map": "{{ ['a', 'b']|map('center', 10**9)|list }}",
    "the method center": "{{ 'a'.center(10**9) }}",
    "a method by subscript": "{{ 'a'['ljust'](10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "join": "{{ range(10**5)|join('x' * 10**5) }}",
    "the method join": "{{ ('x' * 10**5).join(range(10**5)|map('string')) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% with a star": "{{ '%*d' % (10**9, 1) }}",
    "% with a precision": "{{ '%.1000000000f' % 1.0 }}",
    "% by key": "{{ ('%(a)s' * 10**5) % {'a': 'x' * 10**5} }}",
    "the filter format": "{{ '%1000000000d'|format(1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format with a width": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format again and again": "{{ ('{0}' * 10**5).format('x' * 10**5) }}",
    "replace": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "the method replace": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "split again and again": "{% set x = 'a ' * 10**6 %}{% for i in range(99) %}{% set y = x.split(' ') %}{% endfor %}",
    "strip again and again": "{% set x = 'a' * 10**6 %}{% for i in range(999) %}{% set y = x.strip('b') %}{% endfor %}",
    "translate": "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "tabs": "{{ ('\\t' * 10**6).expandtabs(10**6) }}",
    "bytes of a number": "{{ (5).to_bytes(byteorder='big', length=10**10)|length }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "indented JSON": "{{ [[1]]|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list|length }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "round": "{{ 1.5|round(10**9) }}",
    "lorem ipsum": "{{ lipsum(n=10**7) }}",
    "powers": DOUBLING % ("3", "ns.x * ns.x", "1"),
    "a power": "{{ 10 ** (10 ** 10) }}",
    "wordwrap": "{{ ('a' * 10**7)|wordwrap(1) }}",
    "striptags": "{{ ('<!-- -->' * 10**6)|striptags }}",
    "a sum of lists": "{{ ([[1] * 1000] * 30000)|sum(start=[])|length }}",
    "lists of ranges": "{{ ([range(100000)] * 100000)|map('list')|list|length }}",
    "blocks of a macro": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 19
    + "x" * 1000
    + "{% endcall %}" * 19,
}

ENDLESS = {
    "loops in loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for i in range(10**5) %}{% for j in range(10**5) if j < 0 %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}",
    "JSON again and again": "{% for i in range(10**5) %}{% for j in range(10**5) %}"
    "{% set x = messages|tojson %}{% endfor %}{% endfor %}",
}


@pytest.mark.cases(6)
@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_a_template_is_refused_before_it_produces_too_much(source: str) -> None:
    with pytest.raises(TemplateLimitError, match=r"characters|width|bits"):
        compiled(source).render(messages=CHAT)


@pytest.mark.cases(2)
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_runs_forever_is_stopped(source: str) -> None:
    with pytest.raises(
        TemplateLimitError, match=r"ran for more than 0\.27 s, the limit for 2 messages in line 1"
    ):
        compiled(source, Limits(seconds=0.25)).render(messages=CHAT)


def test_a_template_on_another_thread_is_stopped() -> None:
    errors: list[BaseException] = []

    def render() -> None:
        try:
            compiled(ENDLESS["a macro"], Limits(seconds=0.25)).render(messages=CHAT)
        except TemplateLimitError as error:
            errors.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert len(errors) == 1


def test_the_limits_of_a_run_grow_with_its_conversation() -> None:
    limits = Limits(seconds=0.25, characters=10_000)
    remembers = (
        "{% set ns = namespace(text='') %}"
        "{% for message in messages %}{% set ns.text = ns.text ~ message.content %}{% endfor %}"
        "{{ ns.text }}"
    )
    many = [{"role": "user", "content": "word " * 10} for _ in range(2000)]
    assert compiled(remembers, limits).render(messages=many) == "word " * 20_000


@pytest.mark.slow
def test_a_template_that_ran_too_long_is_stopped_sooner_the_next_time() -> None:
    template = compiled(ENDLESS["loops in loops"], Limits(seconds=0.4, least_seconds=0.1))
    said = []
    for _ in range(4):
        with pytest.raises(TemplateLimitError) as error:
            template.render(messages=[])
        said.append(str(error.value).split(" s,")[0])
    assert said == [f"It ran for more than {seconds}" for seconds in ("0.4", "0.2", "0.1", "0.1")]


def test_the_error_of_a_renderer_names_the_limit_that_a_template_exceeded(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + message.content + '<|im_end|>' }}\n"
        "{% if message.content == 'bomb' %}{{ 'a' * 10**10 }}{% endif %}{% endfor %}"
    )
    renderer = get_renderer("chat_template", tokenizer)
    bomb = [{"role": "user", "content": "bomb"}, {"role": "assistant", "content": "Hello."}]
    for _ in range(4):  # later iterations are recorded, and then printed without running the template
        with pytest.raises(
            RendererError, match=r"more than [\d,]+ characters of text.* line 2 of the template"
        ):
            renderer.build_supervised_examples(bomb)
    assert renderer.build_supervised_examples(CHAT)


def test_deeply_nested_templates_are_refused() -> None:
    for source in ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if a %}" * 120 + "{% endif %}" * 120):
        with pytest.raises(RendererError, match="nested too deeply"):
            compiled(source)


def test_a_legitimate_template_is_not_stopped() -> None:
    source = (
        "{{ '%-5s|%d' % ('a', 3) }} {{ '{:>5}|{}'.format('b', [1, 'x']) }} {{ 'a' ~ 1 ~ none }} {{ 7 % 4 }} "
        "{{ 2 ** 10 }} {{ 3 * 'ab' }} {{ [1] + [2, 3] }} {{ messages|map(attribute='role')|join(', ') }} "
        "{{ 'x'|center(5) }}| {{ [1, 2, 3]|batch(2)|list }} {{ {'a': [1, none]}|tojson(indent=2) }} "
        "{{ ' x '.strip().upper() }} {{ 'a-b'.split('-') }} {{ 'aXbX'.replace('X', '--') }} {{ 1.25|round(1) }}"
    )
    assert compiled(source).render(messages=CHAT) == (
        "a    |3     b|[1, 'x'] a1None 3 1024 ababab [1, 2, 3] user, assistant   x  | [[1, 2], [3]] "
        "{\n  \"a\": [\n    1,\n    null\n  ]\n} X ['a', 'b'] a--b-- 1.2"
    )


@pytest.mark.slow
def test_the_memory_of_a_run_is_bounded() -> None:
    program = """
        import resource
        from renderers.jinja.sandbox import compiled
        compiled("x").render()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        doubling = "{% set ns = namespace(x='abc') %}{% for i in range(80) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
        literal = "{% set x %}{% for i in range(100000) %}" + "y" * 100_000 + "{% endfor %}{% endset %}"
        for source in ("{{ 'a' * 10**10 }}", doubling, literal):
            try:
                compiled(source).render(messages=[])
            except Exception as error:
                assert "characters of text" in str(error), error
            else:
                raise AssertionError(source)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 600
