"""The end of a turn under templates that print it in parts, late, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from cookbook.errors import RendererError
from renderers import TrainOnWhat, get_renderer

PROMPT = "{% if add_generation_prompt %}<|header|>assistant<|text|>{% endif %}"
HEADER = "<|header|>{{ m.role }}<|text|>{{ m.content }}"

# Two tokens end a reply, one any other message (Cohere).
TWO_TOKENS = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m.role == 'assistant' %}<|end|>{% endif %}<|eot|>{% endfor %}"
    + PROMPT
)
# The next message begins with the token that ends the one before it (GLM).
NEXT_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|header|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}:"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|end|>{{ m.content }}{% else %}<|eot|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header|>{% endif %}"
)
# The end is printed in front of the next message only, on a line of its own.
LATE = (
    "{% for m in messages %}"
    + HEADER
    + "{{ '\n<|eot|>' if not loop.last or m.role == 'user' }}{% endfor %}"
    + PROMPT
)
# Text stands between the reply and the tokens that end it.
WORDS = (
    "{% for m in messages %}"
    + HEADER
    + "{{ ' END ' ~ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    + PROMPT
)
# Words begin the messages, and nothing ends them (SOLAR).
NO_END = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
CALLS = (
    "{% for m in messages %}<|header|>{{ m.role }}<|text|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<|im_start|>{{ call.function.name }}{{ call.function.arguments | tojson }}<|end|>{% endfor %}"
    "{{ '<bos>' if m.tool_calls else '<|eot|>' }}{% endfor %}" + PROMPT
)


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def reply(content: str, **more: Any) -> Any:
    return {"role": "assistant", "content": content, **more}


CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CHAT = [user("a"), reply("b"), user("c"), reply("d")]


@pytest.mark.parametrize(
    ("template", "end", "stop", "appended"),
    [
        (TWO_TOKENS, "<|end|><|eot|>", "<|eot|>", ""),
        (NEXT_HEADER, "<|eot|>", "<|eot|>", "<|eot|>"),
        (LATE, "\n<|eot|>", "<|eot|>", "\n<|eot|>"),
        (WORDS, " END <|im_end|>", "<|im_end|>", ""),
    ],
)
def test_the_end_of_a_turn_is_all_of_it(small_tokenizer, trained_runs, template, end, stop, appended):
    tokenizer = small_tokenizer(template)
    renderer = get_renderer("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples(CHAT)
    assert trained_runs(tokenizer, example) == [f"b{end}", f"d{end}"]
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences())[0] == stop
    text = tokenizer.decode(example[0].to_ints())
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False) + appended
    for turn in (1, 3):
        prompt = renderer.build_generation_prompt(CHAT[:turn]).to_ints()
        assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
            CHAT[:turn], tokenize=False, add_generation_prompt=True
        )
        assert example[0].to_ints()[: len(prompt)] == prompt
    said = tokenizer(f"d{end}", add_special_tokens=False)["input_ids"]
    assert renderer.parse_response(said) == (reply("d"), True)
    stream = renderer.parse_stream()
    deltas = [delta for token in said for delta in stream.feed([token])]
    assert "".join(delta.text for delta in deltas) == "d"
    assert stream.finish() == (reply("d"), True)


def test_a_reply_that_the_template_never_ends_ends_with_the_end_of_text(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(NO_END)
    renderer = get_renderer("chat_template", tokenizer)
    examples = renderer.build_supervised_examples(CHAT)
    assert [trained_runs(tokenizer, one) for one in examples] == [["b<|im_end|>"], ["d<|im_end|>"]]
    for turn, example in zip((1, 3), examples, strict=True):
        prompt = tokenizer.apply_chat_template(CHAT[:turn], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example[0].to_ints()).startswith(prompt)
        sampled = renderer.build_generation_prompt(CHAT[:turn]).to_ints()
        assert example[0].to_ints()[: len(sampled)] == sampled
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|im_end|>"]
    said = tokenizer("d<|im_end|>", add_special_tokens=False)["input_ids"]
    assert renderer.parse_response(said) == (reply("d"), True)


def test_a_completion_gets_what_is_missing_of_the_end(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(TWO_TOKENS)
    renderer = get_renderer("chat_template", tokenizer)
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    for completion in ("b", "b<|end|>", "b<|end|><|eot|>"):
        example = renderer.render_completion(prompt, completion).with_model_input()
        assert trained_runs(tokenizer, example) == ["b<|end|><|eot|>"], completion


def test_a_call_ends_with_the_token_that_begins_its_result(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(NEXT_HEADER)
    renderer = get_renderer("chat_template", tokenizer)
    call, result = reply("", tool_calls=[CALL]), {"role": "tool", "content": "r", "tool_call_id": "call00001"}
    said = '<call>f:{"x": 1}</call><|end|>'
    (example,) = renderer.build_supervised_examples([user("a"), call])
    assert trained_runs(tokenizer, example) == [said]
    (example,) = renderer.build_supervised_examples([user("a"), call, result, reply("b")])
    assert trained_runs(tokenizer, example) == [said, "b<|eot|>"]
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|eot|>", "<|end|>"]


@pytest.mark.parametrize("content", ["", "x"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_token_that_closes_a_call_is_not_its_end(small_tokenizer, trained_runs, content, number):
    tokenizer = small_tokenizer(CALLS)
    renderer = get_renderer("chat_template", tokenizer)
    chat = [user("a"), reply(content, tool_calls=[CALL] * number)]
    (example,) = renderer.build_supervised_examples(chat)
    closed = '<|im_start|>f{"x": 1}<|end|>' * number
    assert trained_runs(tokenizer, example) == [f"{content}{closed}<bos>"]
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|eot|>", "<bos>"]


def test_a_message_that_is_not_a_reply_is_not_trained_to_begin_the_next(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(NEXT_HEADER)
    chat = [{"role": "system", "content": "s"}, user("a"), reply("b")]
    renderer = get_renderer("chat_template", tokenizer)
    example = renderer.build_supervised_example(chat, TrainOnWhat.ALL_MESSAGES)
    assert trained_runs(tokenizer, example) == ["s", "a", "b<|eot|>"]


def test_the_header_of_a_second_reply_in_a_row_is_not_trained(small_tokenizer, trained_runs):
    prompt = PROMPT.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'")
    tokenizer = small_tokenizer("{% for m in messages %}" + HEADER + "<|eot|>{% endfor %}" + prompt)
    renderer = get_renderer("chat_template", tokenizer)
    chat = [user("a"), reply("b"), reply("c")]
    (example,) = renderer.build_supervised_examples(chat)
    assert trained_runs(tokenizer, example) == ["b<|eot|>", "c<|eot|>"]
    before = renderer.build_generation_prompt(chat[:2]).to_ints()
    assert tokenizer.decode(before).endswith("b<|eot|><|header|>assistant<|text|>")
    assert example[0].to_ints()[: len(before)] == before


def test_the_first_word_of_a_users_message_is_trained_with_the_space_before_it(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer("wordy")
    renderer = get_renderer("chat_template", tokenizer)
    chat = [user("hello"), reply("x")]
    example = renderer.build_supervised_example(chat, TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES)
    assert trained_runs(tokenizer, example) == [" hello<|im_end|>"]


def test_a_reply_in_which_the_end_of_a_turn_stands_before_a_call_is_refused(small_tokenizer):
    template = CALLS.replace("<|im_start|>{{ call", "<|eot|>{{ call")
    renderer = get_renderer("chat_template", small_tokenizer(template))
    with pytest.raises(RendererError, match=r"'<\|eot\|>' inside message 2"):
        renderer.build_supervised_examples([user("a"), reply("b", tool_calls=[CALL])])


def test_calls_that_are_turns_of_their_own_end_as_one_call_does(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(
        "{% for m in messages %}{% for call in m.tool_calls %}"
        "<|header|>{{ m.role }}: {{ call.function.name }}<|text|>"
        "{{ call.function.arguments | tojson }}<|end|>{% endfor %}"
        "{% if not m.tool_calls %}" + HEADER + "<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant{% endif %}"
    )
    renderer = get_renderer("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples([user("a"), reply("", tool_calls=[CALL])])
    assert trained_runs(tokenizer, example) == [': f<|text|>{"x": 1}<|end|>']
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|eot|>", "<|end|>"]
    with pytest.raises(RendererError, match=r"'<\|end\|>' inside message 2"):
        renderer.build_supervised_examples([user("a"), reply("", tool_calls=[CALL, CALL])])


def test_a_reply_that_ends_with_no_stop_token_is_refused(small_tokenizer):
    template = (
        "{% for m in messages %}" + HEADER + "{{ '<|end|>' if '!' in m.content else '<|eot|>' }}{% endfor %}"
    )
    renderer = get_renderer("chat_template", small_tokenizer(template + PROMPT))
    assert len(renderer.build_supervised_examples([user("a"), reply("b")])) == 1
    with pytest.raises(RendererError, match="holds no end-of-turn token"):
        renderer.build_supervised_examples([user("a"), reply("b!")])
