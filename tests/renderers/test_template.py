"""A chat template called directly, compared with `apply_chat_template`."""

import datetime
import functools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside_world import day_of_transformers

from cookbook.errors import RendererError
from renderers import get_renderer
from renderers.jinja.chat import Chat
from renderers.jinja.template import Template

text = st.text(max_size=8) | st.sampled_from(["", " a\n", "<|im_end|>", "{{ messages }}", "<b>&amp;", "天😀"])
values = st.recursive(
    text | st.integers() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": text},
    optional={"name": text, "reasoning_content": text, "items": values, "extra": values},
)

# Operations of templates on messages, for each of which the sandbox has its own shortcut or check.
EXPRESSIONS = [
    "m.content | trim",
    "m['content'].strip().split('</think>')[-1].lstrip('\\n')",
    "m.content.startswith('a') ~ m.content.title() ~ m.content[1:]",
    "m.missing is defined ~ m['missing'] is defined ~ (m.missing or 'none')",
    "m.items is mapping ~ m['items'] is defined ~ m.get('name', 'nobody') ~ (m.keys() | list | length)",
    "m.items() | list | tojson",
    "m | tojson ~ (m | tojson(indent=2)) ~ (m.extra | default({}) | tojson)",
    "loop.first ~ loop.last ~ loop.index ~ loop.index0 ~ loop.length ~ loop.revindex ~ loop.revindex0",
    "loop.previtem.content if loop.previtem is defined else loop.nextitem.content",
    "loop.cycle('a', 'b') ~ loop.depth ~ loop.changed(m.role)",
    "'{} {m}'.format(m.content, m=m.role) ~ '{0[role]}'.format(m) ~ '{x}'.format_map({'x': m.content})",
    "(m.thinking or '') ~ (m.reasoning_content or '')",
    "bos_token ~ eos_token ~ tools ~ documents ~ add_generation_prompt ~ messages | length",
    "namespace(x=m.content).x ~ namespace(l=[m.role]).l[0] ~ (namespace().none is defined)",
    "dict(a=m.role).a ~ ('%s' % m.content) ~ (m.content is string)",
    "m.content.__class__ ~ m.__class__ ~ loop.__init__ ~ loop._iterable ~ m._private",
]
ATTACKS = [
    "m.content.__class__.__mro__",
    "m.__class__.__subclasses__()",
    "loop.__init__.__globals__",
    "loop._iterable.foo",
    "namespace(x=1).__class__.__mro__",
    "namespace(f='{0.__class__.__mro__}'.format).f(m)",
    "m.update({'content': 'x'})",
    "m.clear()",
    "messages.append(m)",
    "messages.pop()",
    "'{0.__class__.__mro__}'.format(m)",
    "'{x.__class__.__mro__}'.format_map({'x': m})",
    "m.content.format.__self__.__class__.__base__",
    "strftime_now.__self__.year",
    "strftime_now.__globals__.x",
    "raise_exception.__globals__.x",
    "range(10 ** 9) | list",
    "(m | attr('__class__')).__mro__",
]


def looped(expression: str) -> str:
    return "{% for m in messages %}{{ " + expression + " }}|{% endfor %}"


@pytest.mark.cases(8)
@pytest.mark.parametrize("expression", EXPRESSIONS)
@settings(max_examples=10, deadline=None)
@given(chat=st.lists(messages, min_size=1, max_size=3), prompt=st.booleans())
def test_the_text_equals_that_of_apply_chat_template(small_tokenizer, expression, chat, prompt):
    tokenizer = small_tokenizer(looped(expression))
    theirs: Any
    try:
        theirs = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        theirs = None
    conversation = Chat(Template(tokenizer), chat, None)
    if theirs is None:
        with pytest.raises(RendererError):
            conversation.text(len(chat), prompt)
    else:
        assert conversation.text(len(chat), prompt) == theirs


# Ways for a template to test a text, or to hide it.
CURIOSITIES = [
    "m.content | length ~ m.content | upper ~ m.content | first ~ (m.content | list) ~ m.content | reverse",
    "m.content[0] ~ m.content[-1:] ~ (m.content > 'a') ~ m.content * 2 ~ (m.content | replace('a', 'b'))",
    "(m.content == 'a') ~ (m.content != '') ~ ('a' == m.content) ~ ('a' in m.content) ~ (m.content in 'ab')",
    "(m.content in ['a', 'b']) ~ {'a': 1}[m.content] ~ {'a': 1}.get(m.content) ~ {m.content: 1}",
    "(m.content is iterable) ~ (m.content is sequence) ~ (m.content is none) ~ (m.content is sameas 'a')",
    "(m.content is equalto 'a') ~ (m.content is in ['a']) ~ (m.content is lower) ~ (m.content is callable)",
    "messages | map(attribute='content') | join ~ (messages | selectattr('content', 'equalto', 'a') | list)",
    "messages.index(m) ~ (m == messages[0]) ~ messages.count(messages[-1]) ~ (m in messages[1:])",
    "m.values() | list ~ (m | tojson) ~ (m | string) ~ m ~ (m.items() | list | length) ~ m | length",
    "[m.content] | join ~ [m.content, 'b'] | max ~ ','.join([m.content]) ~ '%s' % m.content",
    "m.content | default('x', true) ~ (m.content or 'x') ~ ('y' if m.content else 'z') ~ (not m.content)",
    "namespace(x=m.content).x ~ (namespace(x=m.content).x == 'a') ~ namespace(x=m.content)",
    "loop.changed(m.content) ~ loop.cycle(m.content, 'b') ~ joiner(m.content)() ~ cycler(m.content).next()",
    "m.content.strip ~ m.content.strip.name ~ m.content.strip() ~ (m.content.strip is callable)",
    "m.content.startswith('a') ~ m.content.endswith(m.content) ~ m.content.count('a')",
    "m.content.split('a')[0] ~ m.content.replace('a', '') ~ m.content.find('a') ~ m.content.isspace()",
    "m.content | trim ~ (m.content | trim('a')) ~ m.content.lower().title() ~ (m.content ~ 'b').strip()",
    "m.content | escape ~ m.content | safe ~ ('<' | safe) ~ m.content ~ (m.content | string)",
    "'100%' ~ m.content ~ '%s %(a)s' ~ 1 ~ none ~ 1.5 ~ true ~ missing",
]
CURIOUS_TEMPLATES = [
    "{% for m in messages %}{% set x %}{{ m.content }}!{% endset %}{{ x }}{% endfor %}",
    "{% macro f(x) %}[{{ x }}{{ missing }}{{ 1 }}]{% endmacro %}"
    "{% for m in messages %}{{ f(m.content) }}{{ f(m.role) }}{% endfor %}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}"
    "{% for m in messages %}{% call f() %}{{ m.content }}{% endcall %}{% endfor %}",
    "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "{% for m in messages %}{% autoescape true %}{{ m.content ~ '<' }}{{ m.content }}{% endautoescape %}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages if m.content %}{{ m.content }}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.content == 'a' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages recursive %}{{ m.content }}{{ loop([]) }}{% endfor %}",
    "{% for a in messages %}{% for b in messages %}{{ a.content in b.content }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = ns.last + m.content %}"
    "{{ ns.last | trim }}{% endfor %}",
    "{% for m in messages %}{% if m.content %}{{ raise_exception(m.content) }}{% endif %}{% endfor %}",
]
short = st.sampled_from(["", "a", " a ", "b", "ab\n", "%s", "<b>", "</think>"]) | st.text(max_size=3)


@pytest.mark.cases(8)
@pytest.mark.parametrize(
    "template",
    [*CURIOUS_TEMPLATES, *(looped(one) for one in EXPRESSIONS), *(looped(one) for one in CURIOSITIES)],
)
@settings(max_examples=4, deadline=None)
@given(
    roles=st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=3),
    more=st.sampled_from([(), ("reasoning_content",), ("name", "items")]),
    data=st.data(),
)
def test_each_conversation_of_one_shape_is_printed_as_apply_chat_template_does(
    small_tokenizer, template, roles, more, data
):
    tokenizer = small_tokenizer(template)
    ours = Template(tokenizer)
    series = st.lists(
        st.lists(st.tuples(*[short] * (1 + len(more))), min_size=3, max_size=3), min_size=3, max_size=5
    )
    for texts in data.draw(series):
        chat = [
            {"role": role, **dict(zip(("content", *more), given, strict=True))}
            for role, given in zip(roles, texts, strict=False)
        ]
        try:
            theirs = tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:
            with pytest.raises(RendererError):
                Chat(ours, chat, None).text(len(chat))
        else:
            # what a method of a dict prints has its address
            without_addresses = functools.partial(re.sub, "0x[0-9a-f]+", "0x0")
            assert without_addresses(Chat(ours, chat, None).text(len(chat))) == without_addresses(theirs)


@pytest.mark.parametrize(
    "expression",
    [
        "{{ 'abc' % m.content }}",
        "{{ 'abc' % m.content.strip }}",
        "{{ ('<' | e) % m.content }}",
        "{{ m.content.strip(chars='a') }}",
        "{{ m.content.strip('a', 'b') }}",
        "{{ m.content.lower('a') }}",
        "{{ m.content.startswith() }}",
        "{{ m.content | trim('a', 'b') }}",
        "{% call m.content.strip() %}{% endcall %}",
        "{% filter length %}a{% endfilter %}",
        "{% include m.content ignore missing %}",
    ],
)
@pytest.mark.parametrize("content", ["", "a"])
def test_forbidden_operations_are_refused_every_time(small_tokenizer, expression, content):
    tokenizer = small_tokenizer("{% for m in messages %}" + expression + "{% endfor %}")
    chat = [{"role": "user", "content": content}]
    with pytest.raises(TypeError):
        tokenizer.apply_chat_template(chat, tokenize=False)
    template = Template(tokenizer)
    for _ in range(3):
        with pytest.raises(RendererError, match="refuses"):
            template.text(chat)


def test_keys_that_are_equal_but_print_differently_are_distinguished(small_tokenizer):
    tokenizer = small_tokenizer("{% for key in messages[0] %}{{ key }} {% endfor %}")
    template = Template(tokenizer)
    for key in (1, 1, 1, True, 1.0):
        message: Any = {"role": "user", "content": "x", key: "y"}
        assert template.text([message]) == f"role content {key} "


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_sandbox_cannot_be_escaped(small_tokenizer, attack):
    tokenizer = small_tokenizer(looped(attack))
    chat = [{"role": "user", "content": "x"}]
    with pytest.raises(Exception):  # noqa: B017, PT011 - it is closed to begin with
        tokenizer.apply_chat_template(chat, tokenize=False)
    template = Template(tokenizer)
    for _ in range(3):
        with pytest.raises(RendererError):
            template.text(chat)
    assert chat == [{"role": "user", "content": "x"}]


def test_templates_get_the_same_date_on_any_day(small_tokenizer):
    template = Template(small_tokenizer("{{ strftime_now('%Y-%m-%d %d %b %Y %H:%M') }}"))
    with day_of_transformers(datetime.datetime(2031, 1, 2)):
        assert template.text([{"role": "user", "content": "x"}]) == "2024-07-26 26 Jul 2024 00:00"


def test_a_separate_template_for_tools_is_used_with_tools(small_tokenizer):
    tokenizer = small_tokenizer("{# for two #}")
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    template = Template(tokenizer)
    message = {"role": "user", "content": "x"}
    assert template.text([message]) == "plain"
    assert template.text([message], [{"type": "function", "function": {"name": "f"}}]) == "f"


def test_only_plain_values_reach_the_template(small_tokenizer):
    class Text(str):
        secret = "no"

    template = Template(small_tokenizer("{{ messages[0].x | tojson }}{{ messages[0].x.secret }}"))
    shown = {"n": np.int64(3), "b": np.bool_(False), "t": (1, Text("é"))}
    chat = Chat(template, [{"role": "user", "content": "", "x": shown}], None)
    assert chat.text(1) == '{"n": 3, "b": false, "t": [1, "é"]}'
    assert Chat(template, [{"role": "user", "content": "", "x": Text("a")}], None).text(1) == '"a"'


def test_a_value_that_json_cannot_represent_is_refused_only_if_it_is_printed(small_tokenizer):
    message = {"role": "user", "content": "x", "when": datetime.date(2024, 1, 1)}
    assert Chat(Template(small_tokenizer("{{ messages[0].content }}")), [message], None).text(1) == "x"
    for expression in ("messages[0].when", "messages[0].when | tojson", "messages[0] | tojson"):
        template = Template(small_tokenizer("{{ " + expression + " }}"))
        with pytest.raises(RendererError, match="refuses"):
            Chat(template, [message], None).text(1)


CALLS = (
    "{% for m in messages %}{{ m.content | default('') }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}({{ ARGUMENTS }})]{% endfor %}{% endfor %}"
)
CALL: Any = {"type": "function", "function": {"name": "f", "arguments": {"x": "天"}}}


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (CALLS.replace("ARGUMENTS", "call.function.arguments | tojson"), '[f({"x": "天"})]'),
        (CALLS.replace("ARGUMENTS", "'' + call.function.arguments"), '[f({"x": "天"})]'),
        (CALLS.replace(" | default('')", " + ''").replace("ARGUMENTS", "call.function.arguments.x"), None),
        ("{% for m in messages %}{{ '' + m.content }}{% endfor %}", None),
    ],
)
def test_arguments_and_content_have_the_form_that_the_template_needs(small_tokenizer, template, printed):
    found = Template(small_tokenizer(template))
    assert found.prints_calls == (printed is not None)
    if printed is not None:
        message = {"role": "assistant", "tool_calls": [CALL]}
        assert Chat(found, [message], None).text(1) == printed
    reply = {"role": "assistant", "reasoning_content": "x"}
    assert Chat(found, [reply], None).text(1) == ""


def test_the_callers_messages_are_not_changed(small_tokenizer):
    template = Template(small_tokenizer(CALLS.replace("ARGUMENTS", "'' + call.function.arguments")))
    message = {"role": "assistant", "tool_calls": [CALL], "thinking": "x"}
    Chat(template, [message], None).text(1)
    assert message == {"role": "assistant", "tool_calls": [CALL], "thinking": "x"}
    assert CALL["function"]["arguments"] == {"x": "天"}


NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_needs_a_system_message_is_served_with_one_and_refuses_a_row_without(
    small_tokenizer: Any,
) -> None:
    tokenizer = small_tokenizer(NEEDS_SYSTEM, ("<|im_start|>", "<|im_end|>"))
    renderer = get_renderer("chat_template", tokenizer)
    chat: list[Any] = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    system = {"role": "system", "content": "Be brief."}
    tokens, weights = renderer.build_supervised_example([system, *chat])
    assert tokenizer.decode(tokens.to_ints()) == tokenizer.apply_chat_template(
        [system, *chat], tokenize=False
    )
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    assert tokenizer.decode(trained) == "4<|im_end|>"
    with pytest.raises(RendererError, match="refuses messages of roles user, assistant: no system message"):
        renderer.build_supervised_example(chat)
