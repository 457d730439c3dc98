"""The renderer `chat_template`, compared with the templates themselves."""

import copy
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from cookbook.errors import RendererError
from renderers import TrainOnWhat, get_renderer
from renderers.encoder import ESCAPE

few = settings(max_examples=40, deadline=None)

# Text that is difficult for a renderer: white space at borders, other scripts, spelled control tokens.
snippets = [
    "hello",
    "Hi.",
    " ",
    "\n",
    "\n\n",
    "  ",
    "天気",
    "😀",
    "é",
    "e\u0301",
    "<think>",
    "x|>",
    "<|",
    "42",
    "\t",
    ":",
]
plain_text = (st.lists(st.sampled_from(snippets), max_size=5).map("".join) | st.text(max_size=8)).filter(
    lambda text: not re.search(r"<\|\w+\|>|<bos>", text)  # hypothesis uses constants of the tested code
)
forging_text = st.lists(
    st.sampled_from([*snippets, "<|im_end|>", "<|im_start|>", "<|eot|>", "<bos>"]), max_size=5
).map("".join)


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Any:
    return {"role": "assistant", "content": content, **more}


def refusal(build: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(RendererError) as caught:
        build(*arguments, **more)
    return str(caught.value)


def chats(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Any]]:
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)
    return turns.map(lambda pairs: [m for a, b in pairs for m in (user(a), assistant(b))])


def without_ends(template: str, content: str) -> str:
    """Returns a reply without the end tokens of these templates that its text spells at its end."""
    ends = "<\\|im_end\\|>|<\\|eot\\|>" if "<|eot|>" in template else "<\\|im_end\\|>"
    while (found := re.search(f"({ends})\\s*$", content)) is not None:
        content = content[: found.start()]
    return content


def reply_of(tokenizer: Any, content: str, thinks: bool = False) -> str:
    """Returns the text that a model must write, by a rule for each template of these tests."""
    template = tokenizer.chat_template
    content = without_ends(template, content)
    block = "<think>\n\n</think>\n\n" if thinks else ""
    return (
        block
        + (content.strip() if "trim" in template else content)
        + ("<|eot|>" if "<|eot|>" in template else "<|im_end|>")
    )


def is_joined(tokenizer: Any, prompt: str, reply: str) -> bool:
    """Returns whether a token would span the end of the prompt and the start of the reply."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return encode(prompt + reply)[: len(encode(prompt))] != encode(prompt)


@pytest.mark.cases(3)
@few
@given(messages=chats(plain_text))
def test_tokens_equal_those_of_the_template(renderer_of, templated, template_tokens, messages):
    renderer = renderer_of("chat_template", templated)
    render = templated.apply_chat_template
    thinks = "think" in templated.chat_template
    joined = any(
        is_joined(
            templated,
            render(messages[:i], tokenize=False, add_generation_prompt=True),
            reply_of(templated, messages[i]["content"], thinks and i == len(messages) - 1),
        )
        for i in range(1, len(messages), 2)
    )
    tokens = renderer.build_supervised_example(messages)[0].to_ints()
    assert templated.decode(tokens) == render(messages, tokenize=False)
    assert joined or tokens == template_tokens(templated, messages)


@pytest.mark.cases(4)
@few
@given(messages=chats(forging_text))
@example(messages=[user("<|im_end|>"), assistant("\n<|im_end|>")])
def test_exactly_the_replies_and_their_end_tokens_are_trained(renderer_of, templated, trained_runs, messages):
    examples = renderer_of("chat_template", templated).build_supervised_examples(messages)
    thinks = "think" in templated.chat_template
    runs = [run for one in examples for run in trained_runs(templated, one)]
    assert runs == [reply_of(templated, m["content"], thinks) for m in messages if m["role"] == "assistant"]
    assert len(examples) == (len(messages) // 2 if thinks else 1)


@pytest.mark.cases(3)
@few
@given(messages=chats(forging_text))
def test_the_generation_prompt_is_a_prefix_of_the_example(renderer_of, templated, messages):
    renderer = renderer_of("chat_template", templated)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    examples = renderer.build_supervised_examples(messages)
    for number, turn in enumerate(turns):
        tokens, weights = examples[number if len(examples) > 1 else 0]
        prompt = renderer.build_generation_prompt(messages[:turn]).to_ints()
        assert tokens.to_ints()[: len(prompt)] == prompt
        assert weights[len(prompt)] == 1
        assert weights[len(prompt) - 1] == 0


@pytest.mark.cases(3)
@few
@given(messages=chats(forging_text))
def test_a_message_cannot_forge_a_control_token(renderer_of, templated, messages):
    spelled = [
        "<|im_end|>",
        "<bos>",
        *(c for c in ("<|im_start|>", "<|eot|>") if c in templated.chat_template),
    ]
    control = set(templated.convert_tokens_to_ids(spelled))
    innocent = [{**message, "content": "x"} for message in messages]
    renderer = renderer_of("chat_template", templated)
    found, expected = (
        [token for token in renderer.build_supervised_example(chat)[0].to_ints() if token in control]
        for chat in (messages, innocent)
    )
    assert found == expected
    text = templated.decode(renderer.build_supervised_example(messages)[0].to_ints())
    kept = [
        {**m, "content": without_ends(templated.chat_template, m["content"])}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
    assert text == templated.apply_chat_template(kept, tokenize=False)


def test_control_tokens_spelled_in_messages_are_encoded_as_text(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer("chatml")
    tokens = (
        renderer_of("chat_template", tokenizer).build_generation_prompt([user("<|im_end|> ok")]).to_ints()
    )
    encode = lambda text: tokenizer(text, split_special_tokens=True)["input_ids"]  # noqa: E731
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokens == [
        start,
        *encode("user\n<|im_end|> ok"),
        end,
        *encode("\n"),
        start,
        *encode("assistant\n"),
    ]


def test_a_message_cannot_forge_frame_tokens_that_are_not_special(renderer_of, small_tokenizer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = small_tokenizer(template)
    tokenizer.add_tokens(["<assistant>"])
    renderer = renderer_of("chat_template", tokenizer)
    frame = tokenizer.convert_tokens_to_ids("<assistant>")
    assert renderer.build_generation_prompt([user("<assistant>Sure.")]).to_ints().count(frame) == 1


def test_normalization_cannot_turn_text_into_a_control_token(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer(small_tokenizer("chatml").chat_template + "{# lower case #}")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens({"unk_token": AddedToken("<|stop|>", normalized=True, special=True)})
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop in tokenizer("<|STOP|>")["input_ids"]
    prompt = renderer_of("chat_template", tokenizer).build_generation_prompt([user("<|STOP|>")])
    assert stop not in prompt.to_ints()


@pytest.mark.cases(3)
@few
@given(content=plain_text)
def test_the_trained_tokens_parse_to_the_message(renderer_of, templated, content):
    renderer = renderer_of("chat_template", templated)
    tokens, weights = renderer.build_supervised_example([user("hello"), assistant(content)])
    message, ended = renderer.parse_response([t for t, w in zip(tokens.to_ints(), weights, strict=True) if w])
    said = reply_of(templated, content).removesuffix("<|im_end|>").removesuffix("<|eot|>")
    assert ended
    assert message == assistant(said.lstrip("\n") if "think" in templated.chat_template else said)


def test_a_reply_that_is_truncated_or_continues_after_its_end_is_not_ended(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer("chatml")
    renderer = renderer_of("chat_template", tokenizer)
    hello, (end,) = tokenizer("hello")["input_ids"], renderer.get_stop_sequences()
    assert renderer.parse_response([*hello, end]) == (assistant("hello"), True)
    assert renderer.parse_response(hello) == (assistant("hello"), False)
    assert renderer.parse_response([*hello, end, *hello]) == (assistant("hello"), False)
    assert renderer.parse_response([]) == (assistant(""), False)
    assert renderer.parse_response([*hello, 10**6, -1, end]) == (assistant("hello"), False)


def test_thinking_is_parsed_to_reasoning_content(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer("forgetful")
    renderer = renderer_of("chat_template", tokenizer)
    tokens, weights = renderer.build_supervised_example([user("hi"), assistant("42", thinking="Hm.\n\nYes.")])
    trained = [t for t, w in zip(tokens.to_ints(), weights, strict=True) if w]
    assert renderer.parse_response(trained) == (assistant("42", reasoning_content="Hm.\n\nYes."), True)


def test_a_conversation_with_rewritten_history_gives_one_example_per_turn(
    renderer_of, small_tokenizer, trained_runs, template_tokens
):
    tokenizer = small_tokenizer("forgetful")
    renderer = renderer_of("chat_template", tokenizer)
    chat = [
        user("a"),
        assistant("b", reasoning_content="B"),
        user("c"),
        assistant("d", reasoning_content="D"),
    ]
    examples = renderer.build_supervised_examples(chat)
    assert [tokens.to_ints() for tokens, _ in examples] == [
        template_tokens(tokenizer, chat[:2]),
        template_tokens(tokenizer, chat),
    ]
    assert [trained_runs(tokenizer, one) for one in examples] == [
        ["<think>\nB\n</think>\n\nb<|im_end|>"],
        ["<think>\nD\n</think>\n\nd<|im_end|>"],
    ]
    assert len(renderer.build_supervised_examples(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)) == 1
    # In a single example, the earlier reply is trained as the template prints it in the history.
    whole = renderer.build_supervised_example(chat)
    assert trained_runs(tokenizer, whole) == ["b<|im_end|>", "<think>\nD\n</think>\n\nd<|im_end|>"]


def test_every_message_is_trained_in_one_of_the_examples(renderer_of, small_tokenizer, trained_runs):
    tokenizer = small_tokenizer("forgetful")
    chat = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    examples = renderer_of("chat_template", tokenizer).build_supervised_examples(
        chat, TrainOnWhat.ALL_MESSAGES
    )
    block = "<think>\n\n</think>\n\n"
    assert [trained_runs(tokenizer, one) for one in examples] == [
        ["a<|im_end|>", f"{block}b<|im_end|>"],
        ["c<|im_end|>", f"{block}d<|im_end|>"],
        ["e<|im_end|>"],
    ]


any_chat = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": plain_text,
            "trainable": st.booleans() | st.none(),
        }
    ),
    max_size=6,
).map(lambda messages: [user("hello"), *messages])


@pytest.mark.cases(3)
@pytest.mark.parametrize("mode", TrainOnWhat)
@few
@given(chat=any_chat)
def test_the_weights_of_each_mode_equal_weights_written_by_hand(renderer_of, small_tokenizer, mode, chat):
    tokenizer = small_tokenizer("chatml")
    roles = [message["role"] for message in chat]
    last_user = max(i for i, role in enumerate(roles) if role == "user")
    replies = [i for i, role in enumerate(roles) if role == "assistant"]
    chosen = {
        "last_assistant_message": replies[-1:],
        "last_assistant_turn": [i for i in replies if i > last_user],
        "all_assistant_messages": replies,
        "all_messages": range(len(chat)),
        "all_tokens": range(len(chat)),
        "all_user_and_system_messages": [i for i, role in enumerate(roles) if role != "assistant"],
        "customized": [i for i, message in enumerate(chat) if message.get("trainable")],
    }[mode.value]

    def encode(text: str) -> Any:
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    expected_tokens: list[int] = []
    expected: list[float] = []
    for i, message in enumerate(chat):
        header, text = f"<|im_start|>{message['role']}\n", message["content"]
        if message["role"] == "assistant":  # encoded separately from its prompt
            before, said = encode(header)["input_ids"], encode(text)["input_ids"]
            body, trained = before + said, [0.0] * len(before) + [1.0] * len(said)
        else:  # a token belongs to the text in which it begins
            body, offsets = encode(header + text)["input_ids"], encode(header + text)["offset_mapping"]
            trained = [float(start >= len(header)) for start, _ in offsets]
        expected_tokens += [*body, *encode("<|im_end|>\n")["input_ids"]]
        weights = [*trained, 1.0, 0.0]
        if mode == "all_tokens":
            weights = [1.0] * len(weights)
        is_trained = i in chosen and message.get("trainable") is not False
        expected += [weight * is_trained for weight in weights]

    tokens, weights = renderer_of("chat_template", tokenizer).build_supervised_example(chat, mode)
    assert tokens.to_ints() == expected_tokens
    assert weights.dtype == np.float32
    assert weights.tolist() == expected


@pytest.mark.slow
@few
@given(chat=any_chat)
@example(chat=[user("42")])
def test_weights_are_right_if_the_tokenizer_drops_white_space_from_its_offsets(
    renderer_of, small_tokenizer, chat
):
    hidden, shown = (
        renderer_of("chat_template", small_tokenizer("wordy", trim_offsets=trims)).build_supervised_example(
            chat, TrainOnWhat.ALL_MESSAGES
        )
        for trims in (True, False)
    )
    assert hidden[0] == shown[0]
    assert hidden[1].tolist() == shown[1].tolist()


def test_text_after_the_end_token_is_not_trained(renderer_of, small_tokenizer, trained_runs):
    tokenizer = small_tokenizer("closing")
    chat = [user("a"), assistant("b")]
    one = renderer_of("chat_template", tokenizer).build_supervised_example(chat)
    assert trained_runs(tokenizer, one) == ["b<|im_end|>"]
    assert tokenizer.decode(one[0].to_ints()[-2:]) == "\n<|end|>"


def test_a_prompt_and_a_reply_that_would_share_a_token_are_encoded_separately(
    renderer_of, small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer("wordy")
    chat = [user("a"), assistant("hello"), user("b"), assistant("hello")]
    renderer = renderer_of("chat_template", tokenizer)
    tokens, weights = renderer.build_supervised_example(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    assert trained_runs(tokenizer, (tokens, weights)) == ["hello<|im_end|>"]
    prompt = renderer.build_generation_prompt(chat[:3]).to_ints()
    assert tokens.to_ints()[: len(prompt)] == prompt
    assert renderer.build_supervised_example(chat)[0] == tokens, "tokens do not depend on what is trained"


def test_truncation_and_padding_set_on_the_tokenizer_are_ignored(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer("headers")
    renderer = renderer_of("role_colon", tokenizer)
    before = renderer.build_generation_prompt([user("hello there")])
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert renderer.build_generation_prompt([user("hello there")]) == before
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert renderer.build_generation_prompt([user("hello there")]) == before


def test_text_parts_are_concatenated(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("chatml"))
    parts = [
        {"type": "text", "text": "hel"},
        {"type": "text", "text": "lo <|im_"},
        {"type": "text", "text": "end|>"},
    ]
    split = renderer.build_generation_prompt([{"role": "user", "content": parts}])
    assert split == renderer.build_generation_prompt([user("hello <|im_end|>")])


# -- generated templates ------------------------------------------------------------------------

BLOCK = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
ENDS = ["<|im_end|>", "<|eot|>"]


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Returns a generated template, and the parts from which it is generated."""
    made: dict[str, Any] = {
        "opening": draw(st.sampled_from(["", "<|im_start|>", "<bos>"])),
        "header": draw(st.sampled_from(["<|header|>{}<|text|>\n\n", "<|im_start|>{}\n", "{}: "])),
        "trims": draw(st.booleans()),
        "thinks": draw(st.sampled_from(["never", "last", "always"])),
        "before_end": draw(st.sampled_from(["", "\n"])),
        "end": draw(st.sampled_from(ENDS)),
        "last_end": draw(st.sampled_from([None, *ENDS])),
        "after_end": draw(st.sampled_from(["", "\n", "<|text|>", *ENDS])),
        "closing": draw(st.sampled_from(["", "\n", "<|end|>", *ENDS])),
        "prompt": draw(st.sampled_from(["", "", "<think>\n"])),
    }
    content = "{{ m.content | trim }}" if made["trims"] else "{{ m.content }}"
    block = {"never": "", "always": BLOCK, "last": "{% if loop.last %}" + BLOCK + "{% endif %}"}[
        made["thinks"]
    ]
    last_end = made["last_end"] or made["end"]
    end = (
        "{% if loop.last and m.role == 'assistant' %}" + last_end + "{% else %}" + made["end"] + "{% endif %}"
    )
    template = (
        made["opening"]
        + "{% for m in messages %}"
        + made["header"].format("{{ m.role }}")
        + "{% if m.role == 'assistant' %}"
        + block
        + "{% endif %}"
        + f"{content}{made['before_end']}{end}{made['after_end']}"
        + "{% endfor %}{% if add_generation_prompt %}"
        + made["header"].format("assistant")
        + made["prompt"]
        + "{% else %}"
        + made["closing"]
        + "{% endif %}"
    )
    return template, made


def reply_of_made(made: dict[str, Any], content: str) -> str | None:
    """Returns the text after the prompt; None if the template does not continue its own prompt."""
    block = "" if made["thinks"] == "never" else "<think>\n\n</think>\n\n"
    printed = "".join(made[part] or "" for part in ("end", "last_end", "after_end", "closing"))
    content = without_ends(printed, content)
    said = content.strip() if made["trims"] else content
    end = made["last_end"] or made["end"]
    if end == made["end"] not in ("<|im_end|>", made["after_end"]):  # all tokens up to the end-of-text token
        end += made["after_end"].strip()
    reply = block + said + made["before_end"] + end
    return reply.removeprefix(made["prompt"]) if reply.startswith(made["prompt"]) else None


@few
@given(made=templates(), text=forging_text, empty=st.booleans())
def test_the_mask_is_right_or_refused_under_any_template(small_tokenizer, trained_runs, made, text, empty):
    template, parts = made
    chat = [user("a"), assistant(text), user("b"), assistant("" if empty else text)]
    replies = [reply_of_made(parts, chat[turn]["content"]) for turn in (1, 3)]
    renderer = get_renderer("chat_template", small_tokenizer(template))
    try:
        examples = renderer.build_supervised_examples(chat)
    except RendererError:
        # The conversations of this template do not contain its prompt, unless a message happens to spell it.
        assert None in replies or (parts["prompt"] and parts["thinks"] == "never")
        return
    runs = [run for one in examples for run in trained_runs(renderer.tokenizer, one)]
    if None in replies:  # the prompt opens a thought that the template never prints: the reply closes it
        assert parts["prompt"]
        assert parts["thinks"] == "never"
        plain = [reply_of_made({**parts, "prompt": ""}, chat[turn]["content"]) for turn in (1, 3)]
        assert runs == [f"\n</think>\n\n{said}" for said in plain]
    else:
        assert runs == replies
    for number, turn in enumerate((1, 3)):
        tokens = examples[min(number, len(examples) - 1)][0].to_ints()
        prompt = renderer.build_generation_prompt(chat[:turn]).to_ints()
        assert tokens[: len(prompt)] == prompt


def test_a_reply_with_a_stop_token_inside_is_refused(renderer_of, small_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{{ m.reasoning_content or '' }}<|im_end|><|text|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|end|>{% endif %}"
    )
    renderer = renderer_of("chat_template", small_tokenizer(template))
    chat = [user("a"), assistant("b", thinking="hm")]
    assert "'<|im_end|>' inside message 2" in refusal(renderer.build_supervised_example, chat)


def test_an_end_token_that_is_not_special_cannot_be_forged_by_a_reply(renderer_of, small_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</turn>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = small_tokenizer(template)
    tokenizer.add_tokens(["</turn>"])
    end = tokenizer.convert_tokens_to_ids("</turn>")
    tokens, weights = renderer_of("chat_template", tokenizer).build_supervised_example(
        [user("a"), assistant("b</turn>c</turn>")]
    )
    assert tokens.to_ints().count(end) == 2
    assert tokens.to_ints()[-1] == end
    assert weights[-1] == 1


def test_parts_that_a_template_joins_cannot_forge_a_control_token(renderer_of, small_tokenizer):
    template = small_tokenizer("chatml").chat_template.replace("m.content", "m.content | replace('~', '')")
    renderer = renderer_of("chat_template", small_tokenizer(template))
    for role in ("user", "system"):
        chat = [{"role": role, "content": "<|im_~end|>"}, user("x")]
        assert "makes a control token" in refusal(renderer.build_generation_prompt, chat)
    renderer.build_generation_prompt([user("<|im_ and ~ are fine")])
    named = small_tokenizer("chatml").chat_template.replace("m.role }}", "m.role }}<|{{ m.name }}|>")
    renderer = renderer_of("chat_template", small_tokenizer(named))
    renderer.build_generation_prompt([{**user("x"), "name": "ann"}])


# -- what a template would lose -----------------------------------------------------------------

CALL: Any = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_tool_calls_that_the_template_does_not_print_are_refused(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("chatml"))
    chat = [user("a"), assistant("b", tool_calls=[CALL]), user("c"), assistant("d")]
    assert "does not print tool calls (message 2)" in refusal(renderer.build_supervised_example, chat)


def test_dropped_thinking_is_detected_even_if_the_content_repeats_it(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("chatml"))
    chat = [user("a"), assistant("It is 42.", reasoning_content="42")]
    assert "`reasoning_content` of message 2" in refusal(renderer.build_supervised_example, chat)


def test_a_template_that_removes_a_part_of_the_content_is_refused(renderer_of, small_tokenizer):
    template = small_tokenizer("chatml").chat_template.replace("m.content", "m.content.split('END')[-1]")
    renderer = renderer_of("chat_template", small_tokenizer(template))
    chat = [user("a"), assistant("hm END b")]
    assert "`content` of message 2" in refusal(renderer.build_supervised_example, chat)
    renderer.build_supervised_example([user("a"), assistant("b")])


# -- weights, system prompt, parts --------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template", "qwen3_instruct"])
@pytest.mark.parametrize("mode", [mode for mode in TrainOnWhat if mode != TrainOnWhat.ALL_TOKENS])
def test_the_weight_of_a_message_scales_its_tokens(renderer_of, small_tokenizer, name, mode):
    renderer = renderer_of(name, small_tokenizer("chatml"))
    chat = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]

    def with_weights(factors: list[float]) -> list[Any]:
        return [
            {**message, "weight": factor, "trainable": True if factor else None}
            for message, factor in zip(chat, factors, strict=True)
        ]

    tokens, plain = renderer.build_supervised_example(with_weights([1.0] * 5), mode)
    factors = [0.5, 2.0, 0.25, 1.0, 0.0]
    weighted_chat = with_weights(factors)
    same, weighted = renderer.build_supervised_example(weighted_chat, mode)
    assert same == tokens
    expected = np.zeros_like(plain)
    for i, factor in enumerate(factors):
        only = with_weights([float(i == j) for j in range(5)])
        expected += factor * renderer.build_supervised_example(only, mode)[1]
    assert weighted.tolist() == expected.tolist()
    assert "all_tokens" in refusal(renderer.build_supervised_example, weighted_chat, TrainOnWhat.ALL_TOKENS)


def test_message_weights_apply_in_each_example_of_a_rewritten_history(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("forgetful"))
    chat = [
        user("a"),
        assistant("b", weight=0.5),
        user("c"),
        assistant("d", weight=0),
        user("e"),
        assistant("f"),
    ]
    examples = renderer.build_supervised_examples(chat)
    assert [sorted(set(weights.tolist())) for _, weights in examples] == [[0, 0.5], [0, 1]]


@pytest.mark.parametrize("name", ["chat_template", "qwen3_instruct"])
@pytest.mark.parametrize("has_system", [True, False])
def test_the_system_prompt_precedes_the_conversation_and_is_trained_only_with_its_message(
    small_tokenizer, trained_runs, name, has_system
):
    tokenizer = small_tokenizer("chatml")
    renderer = get_renderer(name, tokenizer, "Be kind. <|im_end|>")
    chat = [*([{"role": "system", "content": "Be brief."}] if has_system else []), user("a"), assistant("b")]
    own = "\n\nBe brief." if has_system else ""
    tokens, weights = renderer.build_supervised_example(chat, TrainOnWhat.ALL_MESSAGES)
    assert tokenizer.decode(tokens.to_ints()) == (
        f"<|im_start|>system\nBe kind. <|im_end|>{own}<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    runs = trained_runs(tokenizer, (tokens, weights))
    system = [f"Be kind. <|im_end|>{own}<|im_end|>"] if has_system else []
    assert runs == [*system, "a<|im_end|>", "b<|im_end|>"]
    prompt = renderer.build_generation_prompt(chat[:-1]).to_ints()
    assert tokens.to_ints()[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["chat_template", "qwen3"])
def test_thinking_parts_become_reasoning_content(renderer_of, small_tokenizer, name):
    renderer = renderer_of(name, small_tokenizer("forgetful"))
    parts = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "4"},
        {"type": "text", "text": "2"},
    ]
    split = renderer.build_supervised_example([user("a"), assistant(parts)])
    whole = renderer.build_supervised_example([user("a"), assistant("42", reasoning_content="Hm.")])
    assert split[0] == whole[0]
    assert split[1].tolist() == whole[1].tolist()


@pytest.mark.parametrize("name", ["chat_template", "qwen3", "role_colon"])
def test_plain_text_is_trained_up_to_its_end(renderer_of, small_tokenizer, trained_runs, name):
    tokenizer = small_tokenizer("chatml")
    example = renderer_of(name, tokenizer).render_text("Hi. 天\n").with_model_input()
    assert trained_runs(tokenizer, example) == ["Hi. 天\n<|im_end|>"]


# -- replies ------------------------------------------------------------------------------------

HERMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGUN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
RESPONSE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "<response>\n{{ m.content }}\n</response>"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLON = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Tokens that a model may write, including part of a character, and truncated or nested markup.
SCRAPS = [
    "<think>",
    "\n",
    "</think>",
    "<tool_call>\n",
    "\n</tool_call>",
    '{"name": "f", "arguments": {}}',
    "a",
    "é",
    " ",
    "<response>\n",
    "\n</response>",
]


@pytest.mark.cases(3)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), scraps=st.lists(st.sampled_from(SCRAPS), max_size=6))
@pytest.mark.parametrize("template", ["chatml", "forgetful", HERMES, BEGUN, RESPONSE, COLON])
def test_any_tokens_are_parsed_the_same_at_once_and_in_a_stream(
    renderer_of, small_tokenizer, template, data, scraps
):
    tokenizer = small_tokenizer(template)
    renderer = renderer_of("chat_template", tokenizer)
    ids = st.integers(-1, len(tokenizer) + 1) | st.sampled_from(renderer.get_stop_sequences())
    tokens = tokenizer("".join(scraps))["input_ids"] + data.draw(st.lists(ids, max_size=8))
    message, ended = renderer.parse_response(tokens)
    stream = renderer.parse_stream()
    deltas = [delta for token in tokens for delta in stream.feed([token])]
    assert stream.finish() == (message, ended)
    if ended:
        for field in ("content", "reasoning_content"):
            assert "".join(d.text for d in deltas if d.field == field) == message.get(field, "")
    elif "tool_calls" not in message and "reasoning_content" not in message:
        assert isinstance(message["content"], str)


@pytest.mark.parametrize(
    ("template", "message", "said"),
    [
        (RESPONSE, {"content": "b"}, "<response>\nb\n</response><|im_end|>"),
        (
            RESPONSE,
            {"content": "b", "reasoning_content": "hm"},
            "<think>\nhm\n</think>\n<response>\nb\n</response><|im_end|>",
        ),
        (COLON, {"content": "b"}, " b<|im_end|>"),
        (COLON, {"content": " b"}, "  b<|im_end|>"),
    ],
)
def test_what_a_reply_has_in_front_of_its_text_is_trained_and_not_part_of_the_text(
    renderer_of, small_tokenizer, trained_runs, template, message, said
):
    tokenizer = small_tokenizer(template)
    renderer = renderer_of("chat_template", tokenizer)
    reply = {"role": "assistant", **message}
    (example,) = renderer.build_supervised_examples([{"role": "user", "content": "a"}, reply])
    assert trained_runs(tokenizer, example) == [said]
    assert renderer.parse_response(tokenizer(said, add_special_tokens=False)["input_ids"]) == (reply, True)


def test_a_reply_closes_the_think_block_that_its_prompt_opens(renderer_of, small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(BEGUN)
    renderer = renderer_of("chat_template", tokenizer)
    reply = assistant("42", reasoning_content="Hm.")
    one = renderer.build_supervised_example([user("a"), reply])
    assert trained_runs(tokenizer, one) == ["Hm.\n</think>\n\n42<|im_end|>"]
    trained = [t for t, w in zip(one[0].to_ints(), one[1], strict=True) if w]
    assert renderer.parse_response(trained) == (reply, True)
    assert renderer.parse_response(trained[-3:]) == (
        assistant(tokenizer.decode(trained[-3:-1])),
        False,
    )


def test_tool_calls_that_are_not_json_remain_text(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer(HERMES)
    renderer = renderer_of("chat_template", tokenizer)
    stop = renderer.get_stop_sequences()
    good = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert renderer.parse_response(tokenizer(good)["input_ids"] + stop) == (
        assistant("", tool_calls=[CALL]),
        True,
    )
    for bad in (good[:-3], good.replace("{", ""), good + "more", good.replace("f", "f" + good)):
        assert renderer.parse_response(tokenizer(bad)["input_ids"] + stop) == (assistant(bad), False)


# -- refusals -----------------------------------------------------------------------------------


def test_an_error_of_a_template_is_quoted(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("strict"))
    message = refusal(renderer.build_supervised_example, [user("a"), user("b"), assistant("c")])
    assert "Roles must alternate." in message
    assert "user, user, assistant" in message


def test_a_template_without_an_end_token_is_refused(small_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n--\n{% endfor %}"
    assert "learn to stop" in refusal(get_renderer, "chat_template", small_tokenizer(template))
    tokenizer = copy.deepcopy(small_tokenizer(template.replace("--\n", "")))
    tokenizer.eos_token = None
    assert "learn to stop" in refusal(get_renderer, "chat_template", tokenizer)


def test_a_tokenizer_without_a_template_is_refused(small_tokenizer):
    assert "no chat template" in refusal(get_renderer, "chat_template", small_tokenizer(""))


def test_a_template_that_contradicts_its_prompt_is_refused(renderer_of, small_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<answer>\n{% endif %}"
    )
    renderer = renderer_of("chat_template", small_tokenizer(template))
    assert "sampled from other prompts" in refusal(
        renderer.build_supervised_example, [user("a"), assistant("b")]
    )


def test_a_role_that_the_template_does_not_print_is_refused(renderer_of, small_tokenizer):
    template = re.sub(
        "(<.im_start.>{{ m.role }}.*?<.im_end.>\n)",
        r"{% if m.role != 'system' %}\1{% endif %}",
        small_tokenizer("chatml").chat_template,
        flags=re.DOTALL,
    )
    renderer = renderer_of("chat_template", small_tokenizer(template))
    message = refusal(renderer.build_generation_prompt, [{"role": "system", "content": "s"}, user("a")])
    assert message == (
        "The chat template does not print messages of role `system` (message 1). "
        "Supported: developer, user, assistant, tool."
    )


def test_thinking_that_the_template_would_drop_is_refused(renderer_of, small_tokenizer):
    renderer = renderer_of("chat_template", small_tokenizer("chatml"))
    chat = [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d")]
    assert "`reasoning_content` of message 2" in refusal(renderer.build_supervised_example, chat)
    renderer.build_supervised_example(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)


def test_a_reply_without_a_prompt_is_refused_only_if_it_is_trained(
    renderer_of, small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer("chatml")
    renderer = renderer_of("chat_template", tokenizer)
    chat = [assistant("Welcome."), user("a"), assistant("b")]
    assert "no prompt before the assistant's message 1" in refusal(renderer.build_supervised_example, chat)
    one = renderer.build_supervised_example(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    assert trained_runs(tokenizer, one) == ["b<|im_end|>"]


def test_a_conversation_without_a_reply_trains_nothing(renderer_of, small_tokenizer):
    _, weights = renderer_of("chat_template", small_tokenizer("chatml")).build_supervised_example([user("a")])
    assert not weights.any()


def test_text_that_a_template_prints_beside_a_field_cannot_forge_a_control_token(
    renderer_of, small_tokenizer
):
    chatml = small_tokenizer("chatml").chat_template
    for printed, content, name in [
        ("'<' ~ m.content ~ m.name", "|im_end|>", ""),
        ("m.content ~ m.name", "<", "|im_end|>"),
        ("m.content ~ m.name", "<|im_end|", ">"),
        ("m.content ~ m.name ~ '>'", "a <|im_", "end|"),
    ]:
        template = chatml.replace("m.content", f"({printed}) if m.role == 'user' else m.content")
        renderer = renderer_of("chat_template", small_tokenizer(template))
        chat = [{"role": "user", "content": content, "name": name}]
        assert "makes a control token" in refusal(renderer.build_generation_prompt, chat)
        renderer.build_generation_prompt([{"role": "user", "content": "a < b | c > d", "name": "_|"}])


def test_an_escape_cannot_be_forged_through_a_normalizer(small_tokenizer):
    tokenizer = small_tokenizer("chatml", ("<|x|>",))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<|y|>", special=True, normalized=True)])
    renderer = get_renderer("chat_template", tokenizer)
    for index in range(12):
        try:
            tokens = renderer.build_generation_prompt([user(f"<|x|>{ESCAPE}{index}\u037e")]).to_ints()
        except RendererError:
            continue
        assert tokenizer.convert_tokens_to_ids("<|y|>") not in tokens


def test_a_template_that_reads_thinking_as_reasoning_gets_it(renderer_of, small_tokenizer, trained_runs):
    said = "(('(' ~ m.reasoning ~ ')') if m.reasoning else '') ~ m.content"
    tokenizer = small_tokenizer(small_tokenizer("chatml").chat_template.replace("m.content", said))
    for key in ("reasoning", "reasoning_content"):
        example = renderer_of("chat_template", tokenizer).build_supervised_example(
            [user("a"), assistant("b", **{key: "hm"})]
        )
        assert trained_runs(tokenizer, example) == ["(hm)b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for message in messages %}\n{{ message[ }}{% endfor %}", "in line 2 of it"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% unknown %}", "unknown tag 'unknown'"),
    ],
)
def test_a_template_that_is_not_valid_jinja_is_refused_with_its_line(
    tiny_tokenizer: Any, template: str, problem: str
) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(RendererError, match=f"The chat template is not valid Jinja: .*{problem}"):
        get_renderer("chat_template", tiny_tokenizer)
