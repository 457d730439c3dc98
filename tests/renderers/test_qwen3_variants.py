"""The renderers of Qwen3-Instruct-2507, and of Qwen3 with thinking disabled."""

import re
from itertools import pairwise
from typing import Any

import chat_formats
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cookbook.errors import RendererError
from renderers import TrainOnWhat

few = settings(max_examples=25, deadline=None)

INSTRUCT, SILENT = "qwen3_instruct", "qwen3_disable_thinking"
BLOCK = "<think>\n\n</think>\n\n"
HEADER = "<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

snippets = ["Hi.", "\n", "\n\n", " ", "天気", "😀", "é", "ok", "<tool_response>", "</tool_response>", "think"]
text = st.lists(st.sampled_from(snippets), max_size=5).map("".join)
arguments = st.dictionaries(st.sampled_from(["city", "日"]), text | st.integers() | st.none(), max_size=2)


def message(role: str, content: str, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> Any:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


calls = st.lists(
    st.builds(call, st.sampled_from(["weather", "search"]), arguments | st.just('{"city":"Oslo"}')),
    min_size=1,
    max_size=2,
)
requests = st.builds(lambda said, calls: message("assistant", said, tool_calls=calls), text, calls)
plain = st.builds(message, st.sampled_from(["user", "user", "assistant", "tool", "system"]), text)
conversations = st.lists(plain | requests, min_size=1, max_size=7)
tools = st.sampled_from([None, [TOOL], [TOOL, TOOL]])


def no_reply_follows_a_reply(messages: list[Any]) -> bool:
    return ("assistant", "assistant") not in pairwise(m["role"] for m in messages)


answered_conversations = conversations.map(lambda messages: [message("user", "Hi."), *messages]).filter(
    no_reply_follows_a_reply
)


@pytest.fixture(params=["small", "like Qwen3's"], scope="session")
def qwen(request, small_tokenizer):
    return small_tokenizer("chatml") if request.param == "small" else chat_formats.tokenizer("qwen3")


@pytest.fixture(scope="session")
def template_text():
    """(name, tokenizer, messages, tools, prompt=False): what the model's template prints."""

    def apply(name: str, tokenizer: Any, messages: Any, tools: Any, prompt: bool = False) -> str:
        template = chat_formats.template("qwen3_instruct_2507" if name == INSTRUCT else "qwen3")
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )

    return apply


def parted_tokens(name: str, tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text, with each reply encoded separately from the end of its prompt."""
    supplied = f"{re.escape(HEADER)}{BLOCK}" if name == SILENT else re.escape(HEADER)
    pieces = re.split(f"({supplied})", text)
    parts = ["".join(pieces[i : i + 2]) for i in range(0, len(pieces), 2)]
    assert "".join(parts) == text
    return [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("name", [INSTRUCT, SILENT])
@few
@given(messages=conversations, tools=tools)
def test_tokens_equal_those_of_the_template(renderer_of, qwen, template_text, name, messages, tools):
    renderer = renderer_of(name, qwen)
    mode = TrainOnWhat.ALL_TOKENS
    tokens = renderer.build_supervised_example(messages, mode, tools)[0].to_ints()
    assert tokens == parted_tokens(name, qwen, template_text(name, qwen, messages, tools))
    prompt = renderer.build_generation_prompt(messages, tools=tools).to_ints()
    assert prompt == parted_tokens(name, qwen, template_text(name, qwen, messages, tools, prompt=True))


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", [INSTRUCT, SILENT])
@few
@given(messages=answered_conversations, tools=tools)
def test_every_reply_is_trained_from_its_prompt_to_its_end(
    renderer_of, qwen, template_text, trained_runs, name, messages, tools
):
    renderer = renderer_of(name, qwen)
    examples = renderer.build_supervised_examples(messages, tools=tools)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = []
    for turn in turns:
        prompt = template_text(name, qwen, messages[:turn], tools, prompt=True)
        printed = template_text(name, qwen, messages[: turn + 1], tools)
        assert printed.startswith(prompt)
        expected.append(printed[len(prompt) :].removesuffix("\n"))
        one = renderer.build_supervised_example(
            messages[: turn + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE, tools
        )
        tokens = renderer.build_generation_prompt(messages[:turn], tools=tools).to_ints()
        assert one[0].to_ints()[: len(tokens)] == tokens
        assert trained_runs(qwen, one) == expected[-1:]
    assert [run for example in examples for run in trained_runs(qwen, example)] == expected
    assert len(examples) == 1 or (name == SILENT and len(examples) == len(turns))


@pytest.mark.parametrize("name", [INSTRUCT, SILENT])
@few
@given(said=text, calls=st.lists(arguments, max_size=2))
def test_the_trained_tokens_parse_to_the_message(renderer_of, qwen, name, said, calls):
    assume(name == INSTRUCT or not said.startswith("\n"))
    renderer = renderer_of(name, qwen)
    reply = message("assistant", said)
    reply |= {"tool_calls": [call("f", a) for a in calls]} if calls else {}
    tokens, weights = renderer.build_supervised_example([message("user", "a"), reply])
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    assert renderer.parse_response(trained) == (reply, True)
    assert renderer.parse_response(trained[:-1]) == (reply, False)


def test_qwen3_instruct_has_no_default_system_message_and_prints_string_arguments_unchanged(
    renderer_of, qwen, trained_runs
):
    renderer = renderer_of(INSTRUCT, qwen)
    chat = [message("user", "a"), message("assistant", "</think>", tool_calls=[call("f", '{"a":1}')])]
    example = renderer.build_supervised_example(chat)
    reply = '</think>\n<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call><|im_end|>'
    assert qwen.decode(example[0].to_ints()) == f"<|im_start|>user\na<|im_end|>\n{HEADER}{reply}\n"
    assert trained_runs(qwen, example) == [reply]
    with pytest.raises(RendererError, match="`qwen3_instruct` has no place for the thinking of message 2"):
        renderer.build_supervised_example([message("user", "a"), message("assistant", "b", thinking="hm")])


def test_tools_add_a_system_message_to_a_conversation_without_one(renderer_of, qwen):
    prompts = [
        qwen.decode(
            renderer_of(name, qwen).build_generation_prompt([message("user", "a")], tools=[TOOL]).to_ints()
        )
        for name in (INSTRUCT, SILENT)
    ]
    assert all(prompt.startswith("<|im_start|>system\n# Tools\n\nYou may call") for prompt in prompts)
    assert prompts[1] == prompts[0] + BLOCK


def test_the_empty_block_that_the_prompt_supplies_is_not_trained(renderer_of, qwen, trained_runs):
    renderer = renderer_of(SILENT, qwen)
    chat = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    first = f"<|im_start|>user\na<|im_end|>\n{HEADER}"
    second = f"<|im_end|>\n<|im_start|>user\nc<|im_end|>\n{HEADER}{BLOCK}"
    examples = renderer.build_supervised_examples(chat)
    assert [qwen.decode(tokens.to_ints()) for tokens, _ in examples] == [
        f"{first}{BLOCK}b<|im_end|>\n",
        f"{first}b{second}d<|im_end|>\n",
    ]
    assert [trained_runs(qwen, example) for example in examples] == [["b<|im_end|>"], ["d<|im_end|>"]]
    assert trained_runs(qwen, renderer.build_supervised_example(chat)) == ["b<|im_end|>", "d<|im_end|>"]
    assert qwen.decode(renderer.build_generation_prompt(chat[:3]).to_ints()) == f"{first}b{second}"


def test_replies_that_do_not_follow_the_prompt_without_thinking_are_refused(renderer_of, qwen, trained_runs):
    renderer = renderer_of(SILENT, qwen)
    ask, done = message("user", "a"), message("assistant", "d")
    for chat, error in [
        ([ask, message("assistant", "b", thinking="hm")], "thinking of message 2"),
        ([ask, message("assistant", "<think>\nhm\n</think>\n\nb")], "thinking of message 2"),
        ([message("system", "a"), done], "message 2, which no user's message precedes"),
        ([ask, done, done], "message 3, a reply right after a reply"),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer.build_supervised_examples(chat)
    before = message("assistant", "b", thinking="hm")
    example = renderer.build_supervised_example([ask, before, ask, done], TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    assert trained_runs(qwen, example) == ["d<|im_end|>"]


@pytest.mark.parametrize("name", [INSTRUCT, SILENT])
@few
@given(data=st.data())
def test_any_tokens_can_be_parsed_as_a_reply(renderer_of, small_tokenizer, name, data):
    tokenizer = small_tokenizer("chatml")
    renderer = renderer_of(name, tokenizer)
    tokens = data.draw(st.lists(st.integers(-2, len(tokenizer) + 2), max_size=20))
    parsed, well_formed = renderer.parse_response(tokens)
    known = all(0 <= token < len(tokenizer) for token in tokens)
    (end,) = renderer.get_stop_sequences()
    assert parsed["role"] == "assistant"
    assert well_formed == (known and tokens.count(end) == 1 and tokens[-1] == end)
