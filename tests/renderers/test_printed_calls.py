"""Tool calls are parsed in the form in which a chat template prints them, whatever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from renderers import get_renderer

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
}
CHATS = [
    [("look_up", {"city": "Oslo", "days": 3})],
    [("a.b-c", {"q": 'a "quoted" {word}\n<b>', "of": [1, {"x": None}]}), ("g", {}), ("g", {"k": True})],
]


def template(calls: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + calls
        + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def reply(text: str, calls: list[tuple[str, dict[str, Any]]], with_ids: bool) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        | ({"id": f"functions.{name}:{number}"} if with_ids else {})
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": made}


@pytest.mark.parametrize("form", FORMS)
def test_calls_that_a_template_prints_are_parsed_back(form: str, small_tokenizer: Callable[..., Any]) -> None:
    tokenizer = small_tokenizer(template(FORMS[form]))
    renderer = get_renderer("chat_template", tokenizer)
    user = {"role": "user", "content": "a"}
    for calls in CHATS:
        for text in ("", "I look.", "A list: [1, 2] <b>"):
            message = reply(text, calls, "id" in form)
            whole = tokenizer.apply_chat_template([user, message], tokenize=False)
            prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            said = whole[len(prompt) :].removesuffix("\n")
            tokens = tokenizer(said, add_special_tokens=False).input_ids
            assert renderer.parse_response(tokens) == (message, True)
            stream = renderer.parse_stream()
            deltas = [*stream.feed(tokens)]
            assert "".join(delta.text for delta in deltas if delta.field == "content") == text


@pytest.mark.parametrize("form", FORMS)
def test_text_that_is_not_quite_a_call_stays_text(form: str, small_tokenizer: Callable[..., Any]) -> None:
    renderer = get_renderer("chat_template", small_tokenizer(template(FORMS[form])))
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
    renderer = get_renderer("chat_template", small_tokenizer(template(form)))
    tokens = renderer.tokenizer("call:f k~1;<|im_end|>", add_special_tokens=False).input_ids
    assert renderer.parse_response(tokens) == ({"role": "assistant", "content": "call:f k~1;"}, True)


def test_control_tokens_that_a_reply_spells_begin_no_call(small_tokenizer: Callable[..., Any]) -> None:
    tokenizer = small_tokenizer(template(FORMS["a JSON list by name"]))
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
