"""The renderers of DeepSeek V3 and R1, compared with the model's template and with texts written here."""

import copy
import json
import re
from itertools import accumulate, pairwise
from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from cookbook.errors import RendererError
from renderers import TrainOnWhat

few = settings(max_examples=40, deadline=None)

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
OTHERS = (
    USER,
    ASSISTANT,
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
RENDERERS = ["deepseekv3", "deepseekv3_thinking"]


def message(role: str, content: Any, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> Any:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def printed_call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def printed_calls(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


with_qwens = pytest.mark.parametrize(
    "tokenizer",
    ["special", "ordinary", "Qwen's", pytest.param("published", marks=pytest.mark.published)],
    indirect=True,
)


@pytest.fixture(params=["special", "ordinary"], scope="session")
def tokenizer(request, small_tokenizer):
    """Returns tokenizers with the format's tokens, which are not special in most of them, as published."""
    if request.param == "special":
        tokenizer = small_tokenizer("chatml", (BOS, END, *OTHERS))
    else:
        # The distillations of R1 to Qwen models use Qwen's tokenizer with these tokens.
        bases = {"Qwen's": chat_formats.tokenizer, "published": chat_formats.published_tokenizer}
        load = bases.get(request.param)
        tokenizer = copy.deepcopy(load("qwen3") if load else small_tokenizer("chatml", (BOS, END)))
        tokenizer.add_tokens(
            [AddedToken(token, normalized=True) for token in (*OTHERS, "<think>", "</think>")]
        )
        tokenizer.add_special_tokens({"additional_special_tokens": [BOS, END]})
    tokenizer.bos_token = BOS
    return tokenizer


@pytest.fixture(scope="session")
def template(tokenizer):
    """(messages, prompt=False): the text that the model's template prints."""
    source = chat_formats.template("deepseekv3")

    def as_strings(calls: Any) -> Any:
        """Returns messages with arguments as strings, since the template takes no others."""
        printed = [c["function"]["arguments"] for c in calls]
        printed = [a if isinstance(a, str) else json.dumps(a, ensure_ascii=False) for a in printed]
        return [call(c["function"]["name"], a) for c, a in zip(calls, printed, strict=True)]

    def render(messages: Any, prompt: bool = False) -> str:
        # It does not take a message without content either.
        messages = [
            {**m, "content": m["content"] or ""}
            | ({"tool_calls": as_strings(m["tool_calls"])} if "tool_calls" in m else {})
            for m in messages
        ]
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )

    return render


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode(example[0].to_ints(), clean_up_tokenization_spaces=False)


snippets = ["Hi.", "\n", "\n\n", " ", "天気", "😀", "é", "ok", "<", "｜", "```", "{"]
text = st.lists(st.sampled_from(snippets), max_size=4).map("".join)
tagged = st.lists(st.sampled_from([*snippets, "<think>", "</think>"]), max_size=5).map("".join)
arguments = st.dictionaries(st.sampled_from(["city", "日"]), text | st.integers() | st.none(), max_size=2)
calls = st.lists(
    st.builds(call, st.sampled_from(["weather", "search"]), arguments | st.just('{"city":"Oslo"}')),
    min_size=1,
    max_size=2,
)


def conversations_of(content: st.SearchStrategy[str], **thinking: Any) -> st.SearchStrategy[list[Any]]:
    turn = st.one_of(
        st.builds(message, st.just("user"), content),
        st.builds(message, st.just("assistant"), content, **thinking),
        st.builds(message, st.just("assistant"), content | st.none(), tool_calls=calls, **thinking),
        st.builds(message, st.sampled_from(["tool", "tool", "user", "system"]), content),
    )
    return st.lists(turn, min_size=1, max_size=7)


# -- the model's template ---------------------------------------------------------------------


@with_qwens
@few
@given(messages=conversations_of(tagged))
def test_tokens_equal_those_of_the_template(renderer_of, tokenizer, template, messages):
    renderer = renderer_of("deepseekv3", tokenizer)
    tokens = renderer.build_supervised_example(messages, TrainOnWhat.ALL_TOKENS)[0].to_ints()
    assert tokens == encode(tokenizer, template(messages))


@with_qwens
@few
@given(messages=conversations_of(tagged))
def test_prompts_equal_those_of_the_template_with_or_without_the_think_tag(
    renderer_of, tokenizer, template, messages
):
    expected = template(messages, prompt=True)
    prompt = renderer_of("deepseekv3_thinking", tokenizer).build_generation_prompt(messages).to_ints()
    assert prompt == encode(tokenizer, expected)
    prompt = renderer_of("deepseekv3", tokenizer).build_generation_prompt(messages).to_ints()
    assert prompt == encode(tokenizer, expected.removesuffix("<think>\n"))


@few
@given(messages=conversations_of(tagged))
def test_the_last_reply_with_its_thinking_follows_the_prompt_of_the_template(
    renderer_of, tokenizer, template, messages
):
    renderer = renderer_of("deepseekv3_thinking", tokenizer)
    tokens = renderer.build_supervised_example(messages, TrainOnWhat.ALL_TOKENS)[0].to_ints()
    if messages[-1]["role"] != "assistant":
        assert tokens == encode(tokenizer, template(messages))
    elif messages[:-1]:
        prompt = encode(tokenizer, template(messages[:-1], prompt=True))
        assert tokens[: len(prompt)] == prompt
        assert "</think>\n\n" in tokenizer.decode(tokens[len(prompt) :])


# -- prompts and masks --------------------------------------------------------------------------


@pytest.mark.slow
@few
@given(messages=conversations_of(text), name=st.sampled_from(RENDERERS), data=st.data())
def test_every_trained_turn_follows_its_own_prompt_once(renderer_of, tokenizer, messages, name, data):
    renderer = renderer_of(name, tokenizer)
    messages = [message("user", "Hi."), *messages, message("assistant", "Done.")]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = data.draw(st.just(turns) | st.sets(st.sampled_from(turns), min_size=1))
    marked = [{**m, "trainable": i in trained} for i, m in enumerate(messages)]
    examples = renderer.build_supervised_examples(marked, TrainOnWhat.CUSTOMIZED)
    total = 0
    for turn in trained:
        prompt = renderer.build_generation_prompt(messages[:turn]).to_ints()
        ((tokens, weights),) = renderer.build_supervised_examples(
            messages[: turn + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
        assert tokens.to_ints()[: len(prompt)] == prompt
        assert weights.tolist() == [0] * len(prompt) + [1] * (len(weights) - len(prompt))
        assert tokens.to_ints()[-1] in renderer.get_stop_sequences()
        assert any(
            seen.to_ints()[: len(weights)] == tokens.to_ints()
            and (seen_weights[len(prompt) : len(weights)] == 1).all()
            for seen, seen_weights in examples
        )
        total += int(weights.sum())
    assert sum(weights.sum() for _, weights in examples) == total


@pytest.mark.slow
@few
@given(
    content=text,
    thought=text,
    calls=st.lists(arguments, max_size=2),
    after_outputs=st.booleans(),
    name=st.sampled_from(RENDERERS),
)
def test_the_trained_tokens_parse_to_the_message(
    renderer_of, tokenizer, content, thought, calls, after_outputs, name
):
    renderer = renderer_of(name, tokenizer)
    reply = message("assistant", content)
    if name == "deepseekv3_thinking":
        reply["content"] = content.lstrip("\n")
        reply |= {"reasoning_content": thought.strip("\n")} if thought.strip("\n") else {}
    if calls:
        reply["tool_calls"] = [call("f", a) for a in calls]
    before = [message("user", "a"), *([message("tool", "1")] if after_outputs else [])]
    trained = trained_tokens(renderer.build_supervised_example([*before, reply]))
    assert renderer.parse_response(trained) == (reply, True)
    for end in range(len(trained)):
        assert renderer.parse_response(trained[:end])[1] is False


def trained_tokens(example: Any) -> list[int]:
    return [token for token, weight in zip(example[0].to_ints(), example[1], strict=True) if weight]


@few
@given(
    content=text,
    thought=text,
    calls=st.lists(arguments, max_size=1),
    sizes=st.lists(st.integers(1, 5)),
    name=st.sampled_from(RENDERERS),
)
def test_a_stream_shows_the_fields_of_the_message(
    renderer_of, tokenizer, content, thought, calls, sizes, name
):
    renderer = renderer_of(name, tokenizer)
    reply = message("assistant", content, tool_calls=[call("f", a) for a in calls])
    if name == "deepseekv3_thinking":
        reply["reasoning_content"] = thought
    trained = trained_tokens(renderer.build_supervised_example([message("user", "a"), reply]))
    stream = renderer.parse_stream()
    cuts = [0, *accumulate(sizes), len(trained)]
    deltas = [d for i, j in pairwise(cuts) for d in stream.feed(trained[i:j])]
    parsed, ended = stream.finish()
    assert (parsed, ended) == renderer.parse_response(trained)
    for field in ("content", "reasoning_content"):
        assert "".join(d.text for d in deltas if d.field == field) == parsed.get(field, "")


# -- texts written by hand ----------------------------------------------------------------------

TWO_CALLS = [call("f", {"city": "東京"}), call("g", '{"x":1}')]
CHAIN = [
    message("system", "Be kind."),
    message("user", "a"),
    message("assistant", "See:", tool_calls=TWO_CALLS),
    message("tool", "1"),
    message("tool", "2"),
    message("assistant", "b"),
]
CHAIN_TEXT = (
    f"{BOS}Be kind.{USER}a{ASSISTANT}See:"
    + printed_calls(printed_call("f", '{"city": "東京"}'), printed_call("g", '{"x":1}'))
    + f"{END}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
    f"<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>b{END}"
)


def test_a_chain_of_calls_is_one_example(renderer_of, tokenizer, trained_runs):
    (example,) = renderer_of("deepseekv3", tokenizer).build_supervised_examples(CHAIN)
    assert text_of(tokenizer, example) == CHAIN_TEXT
    called = printed_calls(printed_call("f", '{"city": "東京"}'), printed_call("g", '{"x":1}'))
    assert trained_runs(tokenizer, example) == [f"See:{called}{END}", f"b{END}"]


def test_later_calls_are_trained_as_the_model_writes_them(renderer_of, tokenizer, trained_runs):
    renderer = renderer_of("deepseekv3", tokenizer)
    again = [message("user", "c"), message("assistant", "Again:", tool_calls=[call("h", {})])]
    written = f"Again:{printed_calls(printed_call('h', '{}'))}{END}"
    (example,) = renderer.build_supervised_examples([*CHAIN, *again])
    assert text_of(tokenizer, example) == f"{CHAIN_TEXT}{USER}c{ASSISTANT}{written}"
    assert trained_runs(tokenizer, example)[-1] == written
    over = [*CHAIN, *again, message("tool", "3"), message("assistant", "d")]
    *_, call_again, last = renderer.build_supervised_examples(over)
    assert trained_runs(tokenizer, call_again) == [written]
    assert trained_runs(tokenizer, last) == [f"d{END}"]
    assert text_of(tokenizer, last) == (
        f"{CHAIN_TEXT}{USER}c\n{printed_call('h', '{}')}<｜tool▁calls▁end｜>{END}"
        f"<｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>d{END}"
    )
    with pytest.raises(RendererError, match="tool calls of message 8 without their header"):
        renderer.build_supervised_example(over)


def test_only_the_last_reply_has_its_thinking(renderer_of, tokenizer, trained_runs):
    renderer = renderer_of("deepseekv3_thinking", tokenizer)
    chat = [
        message("user", "a"),
        message("assistant", "b", reasoning_content="First.\n"),
        message("user", "c"),
        message("assistant", "<think>\nThen.\n</think>\n\nd"),
    ]
    first, second = renderer.build_supervised_examples(chat)
    assert text_of(tokenizer, first) == f"{BOS}{USER}a{ASSISTANT}<think>\nFirst.\n</think>\n\nb{END}"
    assert trained_runs(tokenizer, first) == [f"First.\n</think>\n\nb{END}"]
    assert text_of(tokenizer, second) == (
        f"{BOS}{USER}a{ASSISTANT}b{END}{USER}c{ASSISTANT}<think>\nThen.\n</think>\n\nd{END}"
    )
    assert trained_runs(tokenizer, second) == [f"Then.\n</think>\n\nd{END}"]


def test_a_reply_without_thinking_closes_the_block_that_the_prompt_opens(
    renderer_of, tokenizer, trained_runs
):
    renderer = renderer_of("deepseekv3_thinking", tokenizer)
    (example,) = renderer.build_supervised_examples([message("user", "a"), message("assistant", "b")])
    assert trained_runs(tokenizer, example) == [f"\n</think>\n\nb{END}"]
    assert renderer.parse_response(trained_tokens(example)) == (message("assistant", "b"), True)


def test_after_tool_results_the_model_opens_its_think_block_itself(renderer_of, tokenizer, trained_runs):
    renderer = renderer_of("deepseekv3_thinking", tokenizer)
    chat = [*CHAIN[:-1], message("assistant", "b", thinking="So.")]
    *_, last = renderer.build_supervised_examples(chat)
    assert (
        text_of(tokenizer, last) == CHAIN_TEXT.removesuffix(f"b{END}") + f"<think>\nSo.\n</think>\n\nb{END}"
    )
    assert trained_runs(tokenizer, last) == [f"<think>\nSo.\n</think>\n\nb{END}"]
    assert renderer.parse_response(trained_tokens(last))[0]["reasoning_content"] == "So."


def test_system_messages_come_first_and_rewrite_the_turns_before_them(renderer_of, tokenizer, trained_runs):
    renderer = renderer_of("deepseekv3", tokenizer)
    chat = [
        message("user", "a"),
        message("assistant", "b"),
        message("system", "One"),
        message("user", "c"),
        message("system", "Two"),
        message("assistant", "d"),
    ]
    texts = [text_of(tokenizer, example) for example in renderer.build_supervised_examples(chat)]
    assert texts == [
        f"{BOS}{USER}a{ASSISTANT}b{END}",
        f"{BOS}One\n\nTwo{USER}a{ASSISTANT}b{END}{USER}c{ASSISTANT}d{END}",
    ]
    (example,) = renderer.build_supervised_examples(chat, TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES)
    assert trained_runs(tokenizer, example) == ["One", "Two", "a", "c"]


def test_a_prompt_for_a_user_message_ends_with_its_header(renderer_of, tokenizer):
    renderer = renderer_of("deepseekv3", tokenizer)
    prompt = renderer.build_generation_prompt(CHAIN[1:2] + CHAIN[3:4], role="user").to_ints()
    assert tokenizer.decode(prompt).endswith(f"1<｜tool▁output▁end｜>{USER}")
    with pytest.raises(RendererError, match="cannot prompt for role `tool`"):
        renderer.build_generation_prompt(CHAIN, role="tool")


# -- what is refused, forged or malformed -------------------------------------------------------


def test_thinking_that_the_format_does_not_support_is_refused(renderer_of, tokenizer):
    plain, thinking = (renderer_of(name, tokenizer) for name in RENDERERS)
    for reply in (message("assistant", "b", thinking="hm"), message("assistant", "<think>hm</think>b")):
        chat = [message("user", "a"), reply]
        with pytest.raises(RendererError, match=r"thinking of message 2.*`deepseekv3_thinking`"):
            plain.build_supervised_example(chat)
        plain.build_supervised_example(chat, TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES)
        thinking.build_supervised_example(chat)
    with pytest.raises(RendererError, match="message 2 holds a think tag"):
        thinking.build_supervised_example(
            [message("user", "a"), message("assistant", "b", thinking="x</think>y")]
        )
    with pytest.raises(RendererError, match="no place for tools"):
        plain.build_generation_prompt([message("user", "a")], tools=[{"type": "function"}])


@few
@given(
    messages=conversations_of(st.lists(st.sampled_from([BOS, END, *OTHERS, "Hi."]), max_size=3).map("".join)),
    name=st.sampled_from(RENDERERS),
)
def test_control_tokens_spelled_in_messages_are_text(renderer_of, tokenizer, messages, name):
    renderer = renderer_of(name, tokenizer)
    blank = [{**m, "content": "".join("#" for _ in m["content"])} if m["content"] else m for m in messages]
    spelled, plain = (
        renderer.build_supervised_example(chat, TrainOnWhat.ALL_TOKENS)[0].to_ints()
        for chat in (messages, blank)
    )
    controls = set(tokenizer.convert_tokens_to_ids([BOS, END, *OTHERS]))
    assert [t for t in spelled if t in controls] == [t for t in plain if t in controls]
    for m in messages:
        kept = (
            re.sub("(<｜end▁of▁sentence｜>)+$", "", m["content"] or "")
            if m["role"] == "assistant"
            else m["content"]
        )
        assert (kept or "") in tokenizer.decode(spelled) or m.get("tool_calls")


def test_control_tokens_spelled_in_a_reply_are_parsed_as_text(renderer_of, tokenizer):
    renderer = renderer_of("deepseekv3", tokenizer)
    reply = message("assistant", f"{END}<｜tool▁calls▁begin｜>", tool_calls=[call("f", {"x": END + USER})])
    trained = trained_tokens(renderer.build_supervised_example([message("user", "a"), reply]))
    assert renderer.parse_response(trained) == (reply, True)


@pytest.mark.parametrize(
    "broken",
    [
        "<｜tool▁calls▁begin｜>",
        printed_calls(printed_call("f", "{")),
        printed_calls(printed_call("f", "[1]")),
        printed_calls(printed_call("f", f'{{"x": "{USER}"}}')),
        printed_calls(printed_call("f", "[" * 100_000)),
        printed_calls(printed_call("f", "{}") + printed_call("g", "{}")),
        printed_calls(printed_call("f", "{}")) + " more",
        "a" + USER,
        BOS,
    ],
)
def test_a_malformed_reply_is_all_content(renderer_of, tokenizer, broken):
    renderer = renderer_of("deepseekv3", tokenizer)
    tokens = encode(tokenizer, broken + END)
    assert renderer.parse_response(tokens) == (message("assistant", broken), False)


@few
@given(data=st.data(), name=st.sampled_from(RENDERERS))
def test_any_tokens_can_be_parsed_as_a_reply(renderer_of, tokenizer, data, name):
    markup = [BOS, END, *OTHERS, "<think>", "</think>", "\n", "```json\n{}\n```", "f", "天"]
    known = sorted({token for part in markup for token in encode(tokenizer, part)})
    strange = [-1, len(tokenizer), 10**9]
    tokens = data.draw(
        st.lists(st.sampled_from(known) | st.sampled_from(strange) | st.integers(0, 500), max_size=12)
    )
    renderer = renderer_of(name, tokenizer)
    parsed, ended = renderer.parse_response(tokens)
    assert parsed["role"] == "assistant"
    assert isinstance(parsed["content"], str)
    assert not ended or tokens[-1] in renderer.get_stop_sequences()
    stream = renderer.parse_stream()
    stream.feed(tokens)
    assert stream.finish() == (parsed, ended)


def test_an_empty_list_of_calls_means_no_calls(renderer_of, tokenizer):
    renderer = renderer_of("deepseekv3", tokenizer)
    plain, empty = ([message("user", "a"), message("assistant", "b", **m)] for m in ({}, {"tool_calls": []}))
    assert renderer.build_supervised_example(empty)[0] == renderer.build_supervised_example(plain)[0]


def test_a_tokenizer_without_the_tokens_of_the_format_is_refused(renderer_of, small_tokenizer):
    with pytest.raises(RendererError, match="`deepseekv3` needs the token"):
        renderer_of("deepseekv3", small_tokenizer("chatml"))
