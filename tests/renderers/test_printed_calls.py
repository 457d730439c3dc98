"""Tool calls are parsed in the form in which a chat template prints them, whatever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from renderers import get_renderer


def template_of(reply: str) -> str:
    """Returns a template that prints messages `m` so."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + reply
        + "<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
FORMS = {
    "a JSON list": "{% if m.tool_calls %}[TOOL_CALLS][" + CALLS + '{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments | tojson }}}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}",
    "a JSON list between tags": "{% if m.tool_calls %}{{ '\n\n' if m.content }}<TOOLCALL>["
    + CALLS
    + "{{ {'name': f.name, 'parameters': f.arguments} | tojson }}{{ ', ' if not loop.last }}{% endfor %}]"
    "</TOOLCALL>{% endif %}",
    "a JSON list with ids": "{% if m.tool_calls %}[TOOL_CALLS] ["
    + CALLS
    + "{{ {'id': c.id, 'function': {'name': f.name, 'arguments': f.arguments | tojson}} | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}",
    "a JSON list by name": "{% if m.tool_calls %}<|header|>[" + CALLS + "{{ {f.name: f.arguments} | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]<|text|>{% endif %}",
    "an object for each": CALLS + "<call>{{ {'name': f.name, 'arguments': f.arguments} | tojson }}</call>"
    "{{ '\n' if not loop.last }}{% endfor %}",
    "functions": CALLS + "<function={{ f.name }}>{{ f.arguments | tojson }}</function>{% endfor %}",
    "names and ids": CALLS + "[CALL]{{ f.name }}[ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}{% endfor %}",
    "ids that name the function": "{% if m.tool_calls %}<|header|>" + CALLS + "<|text|>{{ c.id }}<|eot|>"
    "{{ f.arguments | tojson }}<|end|>{% endfor %}<|header|>{% endif %}",
    "tags": CALLS + "\n<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n"
    "</tool_call>{% endfor %}",
    "keys and values": CALLS + "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}<arg_key>{{ k }}"
    "</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>"
    "{% endfor %}",
    "tags that show strings": "{% if m.tool_calls %}<calls>"
    + CALLS
    + '<invoke name="{{ f.name }}">{% for k, v in f.arguments.items() %}<parameter name="{{ k }}" string='
    '{% if v is string %}"true">{{ v }}{% else %}"false">{{ v | tojson }}{% endif %}</parameter>{% endfor %}'
    "</invoke>{% endfor %}</calls>{% endif %}",
    "numbered objects": "{% if m.tool_calls %}<act>["
    + CALLS
    + '{"number": "{{ loop.index0 }}", "tool": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{{ ',' if not loop.last }}{% endfor %}]</act>{% endif %}",
    "Python": "{% if m.tool_calls %}<calls>[" + CALLS + "{{ f.name }}({% for k, v in f.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]"
    "</calls>{% endif %}",
    "objects one behind the other": "{% if m.tool_calls %}<|header|>{% endif %}"
    + CALLS
    + "{{ {'name': f.name, 'parameters': f.arguments} | tojson }}{% endfor %}",
}
VALUES = (
    "{% macro value(v) %}{% if v is string %}<|q|>{{ v }}<|q|>{% elif v is mapping %}{{ '{' }}{% for k, e in "
    "v.items() %}<|q|>{{ k }}<|q|>:{{ value(e) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% elif v is "
    "boolean or v is none %}{{ v | tojson }}{% elif v is iterable %}[{% for e in v %}{{ value(e) }}"
    "{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
)
BARE = (
    CALLS
    + "<call>call:{{ f.name }}{{ '{' }}{% for k, v in f.arguments.items() %}{{ k }}:{{ value(v) }}"
    + "{{ ',' if not loop.last }}{% endfor %}{{ '}' }}</call>{% endfor %}"
)
"""As in Gemma 4. `<|q|>` is no token of the small tokenizer."""
PYTHON_LINES = (
    "{% if m.tool_calls %}<calls>\n```python\n"
    + CALLS
    + "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}"
    + "{{ ', ' if not loop.last }}{% endfor %})\n{% endfor %}```\n</calls>\n{% endif %}"
)
"""As in MiniCPM3."""
BESIDE_TEXT = {
    "objects with bare keys behind the text": VALUES + template_of("{{ m.content }}" + BARE),
    "objects with bare keys in front of the text": VALUES + template_of(BARE + "{{ m.content }}"),
    "Python in front of the text": template_of(PYTHON_LINES + "{{ m.content }}"),
    "a JSON object in front of the text": template_of(
        CALLS + "<call>{{ {'name': f.name, 'arguments': f.arguments} | tojson }}</call>{% endfor %}"
        "{{ m.content }}"
    ),
    "a text between tags": template_of(  # as in Llama 4
        "{% if m.tool_calls %}<|header|>{{ m.content }}<|text|>{% else %}{{ m.content }}{% endif %}"
        + CALLS
        + "{{ {'name': f.name, 'arguments': f.arguments} | tojson }}{% endfor %}"
    ),
}
CHATS = [
    [("look_up", {"city": "Oslo", "days": 3})],
    [("a.b-c", {"q": 'a "quoted" {word}\n<b>', "of": [1, {"x": None}]}), ("g", {}), ("g", {"k": True})],
]


def reply(text: str, calls: list[tuple[str, dict[str, Any]]], with_ids: bool) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        | ({"id": f"functions.{name}:{number}"} if with_ids else {})
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": made}


TEMPLATES = {form: template_of("{{ m.content }}" + calls) for form, calls in FORMS.items()} | BESIDE_TEXT


@pytest.mark.parametrize("form", TEMPLATES)
def test_calls_that_a_template_prints_are_parsed_back(form: str, small_tokenizer: Callable[..., Any]) -> None:
    tokenizer = small_tokenizer(TEMPLATES[form])
    renderer = get_renderer("chat_template", tokenizer)
    user = {"role": "user", "content": "a"}
    for calls in CHATS:
        for text in ("", "I look.", "A list: [1, 2] <b>"):
            message = reply(text, calls, "id" in form)
            whole = tokenizer.apply_chat_template([user, message], tokenize=False)
            prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            said = whole[len(prompt) : whole.rindex("<|im_end|>")] + "<|im_end|>"
            tokens = tokenizer(said, add_special_tokens=False).input_ids
            assert renderer.parse_response(tokens) == (message, True)
            stream = renderer.parse_stream()
            deltas = [*stream.feed(tokens)]
            assert "".join(delta.text for delta in deltas if delta.field == "content") == text


@pytest.mark.parametrize("form", FORMS)
def test_text_that_is_not_quite_a_call_stays_text(form: str, small_tokenizer: Callable[..., Any]) -> None:
    renderer = get_renderer("chat_template", small_tokenizer(template_of("{{ m.content }}" + FORMS[form])))
    for text in (
        'See <function=f>{"k": 1',
        "[TOOL_CALLS] is a token",
        "[CALL]f[ID]",
        "<call></call> <calls>",
    ):
        tokens = renderer.tokenizer(f"{text}<|im_end|>", add_special_tokens=False).input_ids
        assert renderer.parse_response(tokens) == ({"role": "assistant", "content": text}, True)


def test_calls_in_any_other_form_remain_text(small_tokenizer: Callable[..., Any]) -> None:
    form = (
        CALLS
        + "call:{{ f.name }}{% for k, v in f.arguments.items() %} {{ k }}~{{ v }}{% endfor %};{% endfor %}"
    )
    renderer = get_renderer("chat_template", small_tokenizer(template_of("{{ m.content }}" + form)))
    tokens = renderer.tokenizer("call:f k~1;<|im_end|>", add_special_tokens=False).input_ids
    assert renderer.parse_response(tokens) == ({"role": "assistant", "content": "call:f k~1;"}, True)


def test_control_tokens_that_a_reply_spells_begin_no_call(small_tokenizer: Callable[..., Any]) -> None:
    tokenizer = small_tokenizer(template_of("{{ m.content }}" + FORMS["a JSON list by name"]))
    renderer = get_renderer("chat_template", tokenizer)
    text = '<|header|>[{"f": {}}]<|text|>'
    ((example, weights),) = renderer.build_supervised_examples(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    )
    said = [token for token, weight in zip(example.to_ints(), weights, strict=True) if weight]
    assert renderer.parse_response(said) == ({"role": "assistant", "content": text}, True)
    (call,) = tokenizer("<|header|>", add_special_tokens=False).input_ids
    broken = [call, *tokenizer('[{"f": {}<|im_end|>', add_special_tokens=False).input_ids]
    assert renderer.parse_response(broken)[1] is False


def test_a_channel_with_a_name_is_a_tag_of_a_thought(small_tokenizer: Callable[..., Any]) -> None:
    """As in Gemma 4: the larger models' prompt not to think ends with an empty thought."""
    for empty in ("", "{% if not enable_thinking %}<|header|>thought\n<|text|>{% endif %}"):
        renderer = get_renderer(
            "chat_template",
            small_tokenizer(
                "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<|header|>"
                "thought\n{{ m.reasoning_content }}\n<|text|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n" + empty + "{% endif %}"
            ),
        )
        said = "<|header|>thought\nTwo.\n<|text|>4<|im_end|>"
        tokens = renderer.tokenizer(said, add_special_tokens=False).input_ids
        message = {"role": "assistant", "reasoning_content": "Two.", "content": "4"}
        assert renderer.parse_response(tokens) == (message, True)
        deltas = renderer.parse_stream().feed(tokens)
        assert [(delta.field, delta.text) for delta in deltas] == [
            ("reasoning_content", "Two."),
            ("content", "4"),
        ]


def test_tags_around_a_text_without_calls_belong_to_the_text(small_tokenizer: Callable[..., Any]) -> None:
    """Llama 4 writes Python between the tags in which its template prints the text beside calls."""
    renderer = get_renderer("chat_template", small_tokenizer(BESIDE_TEXT["a text between tags"]))
    tokens = renderer.tokenizer("<|header|>1 + 1<|text|><|im_end|>", add_special_tokens=False).input_ids
    message = {"role": "assistant", "content": "<|header|>1 + 1<|text|>"}
    assert renderer.parse_response(tokens) == (message, True)


def test_calls_alone_are_parsed_though_those_beside_a_text_have_more_control_tokens(
    small_tokenizer: Callable[..., Any],
) -> None:
    """As in gpt-oss, whose text beside calls is a message of its own."""
    beside = (
        "{% if m.tool_calls and m.content %}<|header|>{{ m.content }}<|text|>"
        "{% else %}{{ m.content }}{% endif %}"
    )
    calls = CALLS + " to={{ f.name }}<|eot|>{{ f.arguments | tojson }}{% endfor %}"
    renderer = get_renderer("chat_template", small_tokenizer(template_of(beside + calls)))
    for text, before in (("", ""), ("I look.", "<|header|>I look.<|text|>")):
        message = reply(text, [("f", {"k": 1})], with_ids=False)
        said = f'{before} to=f<|eot|>{{"k": 1}}<|im_end|>'
        tokens = renderer.tokenizer(said, add_special_tokens=False).input_ids
        assert renderer.parse_response(tokens) == (message, True)
        deltas = renderer.parse_stream().feed(tokens)
        assert "".join(delta.text for delta in deltas) == text


def test_thinking_replaces_the_empty_thought_of_a_template_that_prints_it_only_beside_calls(
    small_tokenizer: Callable[..., Any],
) -> None:
    """As in Kimi K2 Thinking. It was put behind the empty thought, with tags of its own."""
    thought = "<think>{{ m.reasoning_content if m.tool_calls }}</think>"
    calls = CALLS + "<call>{{ {'name': f.name, 'arguments': f.arguments} | tojson }}</call>{% endfor %}"
    printed = "{% if m.role == 'assistant' %}" + thought + "{% endif %}{{ m.content }}" + calls
    renderer = get_renderer("chat_template", small_tokenizer(template_of(printed)))
    user = {"role": "user", "content": "a"}
    for more, behind in (
        ({}, ""),
        (
            {"tool_calls": reply("", [("f", {})], False)["tool_calls"]},
            '<call>{"name": "f", "arguments": {}}</call>',
        ),
    ):
        message = {"role": "assistant", "reasoning_content": "Two.", "content": "4", **more}
        ((example, weights),) = renderer.build_supervised_examples([user, message])
        said = [token for token, weight in zip(example.to_ints(), weights, strict=True) if weight]
        assert renderer.tokenizer.decode(said) == f"<think>Two.</think>4{behind}<|im_end|>"
        assert renderer.parse_response(said) == (message, True)


def test_thinking_behind_a_new_line_is_parsed(small_tokenizer: Callable[..., Any]) -> None:
    """GLM-4.5's replies begin like this."""
    renderer = get_renderer(
        "chat_template",
        small_tokenizer(
            "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}\n<think>"
            "{{ m.reasoning_content or '' }}</think>{% endif %}\n{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
        ),
    )
    tokens = renderer.tokenizer("\n<think>Two.</think>\n4<|im_end|>", add_special_tokens=False).input_ids
    message = {"role": "assistant", "reasoning_content": "Two.", "content": "4"}
    assert renderer.parse_response(tokens) == (message, True)
    deltas = renderer.parse_stream().feed(tokens)
    assert {delta.field: delta.text.strip() for delta in deltas} == {
        "reasoning_content": "Two.",
        "content": "4",
    }
