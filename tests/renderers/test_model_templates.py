"""The renderer `chat_template` with templates of models, each with a small tokenizer that has its tokens."""

import datetime
import json
import re
from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside_world import day_of_transformers

from cookbook.errors import RendererError
from renderers import TrainOnWhat
from renderers.jinja.chat import Chat
from renderers.jinja.template import Template
from renderers.jinja.today import TODAY

few = settings(max_examples=8, deadline=None)

CHAT: list[Any] = [
    {"role": "user", "content": "What is 15 + 27?"},
    {"role": "assistant", "content": "15 + 27 = 42. 😀"},
    {"role": "user", "content": " And then?\n"},
    {"role": "assistant", "content": "天気。\n\nThat is all. "},
]


@pytest.fixture(autouse=True, scope="module")
def stopped_clock():
    """Makes `apply_chat_template` give templates the same date as the renderer."""
    with day_of_transformers(TODAY):
        yield


@pytest.fixture(scope="session")
def tokenizer_for(small_tokenizer):
    """(name of a format): a small tokenizer with the model's template and its control tokens."""

    def load(name: str) -> Any:
        template = chat_formats.template(name)
        tokens = set(re.findall(r"<[|｜][^<> ]*?[|｜]>|<(?:start|end)_of_turn>", template))
        return small_tokenizer(template, tuple(sorted(tokens)))

    return load


@pytest.mark.parametrize(
    ("name", "end", "trims"),
    [
        ("gemma", "<end_of_turn>", True),
        ("gemma3", "<end_of_turn>", True),
        ("llama3", "<|eot_id|>", True),
        ("llama3_1", "<|eot_id|>", True),
        ("llama3_2", "<|eot_id|>", True),
        ("phi3", "<|end|>", False),
        ("qwen2_5", "<|im_end|>", False),
        ("qwen3_instruct_2507", "<|im_end|>", False),
    ],
)
def test_templates_that_keep_their_history_give_one_example(
    renderer_of, tokenizer_for, template_tokens, trained_runs, name, end, trims
):
    tokenizer = tokenizer_for(name)
    renderer = renderer_of("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples(CHAT)
    said = [m["content"].strip() if trims else m["content"] for m in CHAT[1::2]]
    assert trained_runs(tokenizer, example) == [f"{text}{end}" for text in said]
    assert example[0].to_ints() == template_tokens(tokenizer, CHAT)
    assert renderer.get_stop_sequences() == [tokenizer.convert_tokens_to_ids(end)]
    for turn in (1, 3):
        prompt = renderer.build_generation_prompt(CHAT[:turn]).to_ints()
        assert example[0].to_ints()[: len(prompt)] == prompt


def test_gpt_oss_ends_a_reply_differently_in_the_history(
    renderer_of, tokenizer_for, template_tokens, trained_runs
):
    tokenizer = tokenizer_for("gptoss")
    renderer = renderer_of("chat_template", tokenizer)
    thinking = [CHAT[0], {**CHAT[1], "thinking": "Add."}, CHAT[2], {**CHAT[3], "thinking": "Go on."}]
    examples = renderer.build_supervised_examples(thinking)
    assert [trained_runs(tokenizer, example) for example in examples] == [
        [
            f"<|channel|>analysis<|message|>{m['thinking']}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{m['content']}<|return|>"
        ]
        for m in thinking[1::2]
    ]
    assert examples[1][0].to_ints() == template_tokens(tokenizer, thinking)
    stops = tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences())
    assert stops == ["<|return|>", "<|call|>"]


def test_an_empty_gpt_oss_reply_is_trained_to_its_end(renderer_of, tokenizer_for, trained_runs):
    tokenizer = tokenizer_for("gptoss")
    chat = [CHAT[0], {"role": "assistant", "content": ""}]
    (example,) = renderer_of("chat_template", tokenizer).build_supervised_examples(chat)
    assert trained_runs(tokenizer, example) == ["<|channel|>final<|message|><|return|>"]


def test_a_deepseek_reply_closes_the_thought_of_its_prompt_which_the_template_drops(
    renderer_of, tokenizer_for, trained_runs
):
    tokenizer = tokenizer_for("deepseekv3")
    examples = renderer_of("chat_template", tokenizer).build_supervised_examples(CHAT)
    replies = [message["content"] for message in CHAT if message["role"] == "assistant"]
    said = [f"\n</think>\n\n{reply}<｜end▁of▁sentence｜>" for reply in replies]
    assert [run for example in examples for run in trained_runs(tokenizer, example)] == said
    for index, (tokens, weights) in zip((1, 3, 5), examples, strict=False):
        prompt = rendered(tokenizer, CHAT[:index], prompt=True)
        assert tokenizer.decode(tokens.to_ints()[: int(weights.argmax())]) == prompt


def test_the_refusal_of_a_system_role_by_gemma_is_reported(renderer_of, tokenizer_for):
    with pytest.raises(RendererError, match="System role not supported"):
        renderer_of("chat_template", tokenizer_for("gemma")).build_generation_prompt(
            [{"role": "system", "content": "Be kind."}, *CHAT[:1]]
        )


# Texts for which templates test, and texts that could be confused with what they print.
SNIPPETS = ["", "Hi.", " a\n", "\n\n", "</think>", "%s %", "天気", "<b>", "<tool_call>"]
SNIPPETS += ["<think>\nHm.\n</think>\n\nYes.", "<tool_response>1</tool_response>"]
SNIPPETS += ["<|channel|>analysis<|message|>"]
texts = st.sampled_from(SNIPPETS) | st.text(max_size=4)


@pytest.mark.cases(6)
@pytest.mark.parametrize(
    "name",
    [
        "deepseekv3",
        "gemma",
        "gemma3",
        "gptoss",
        "llama3",
        "llama3_1",
        "llama3_2",
        "phi3",
        "qwen2_5",
        "qwen3",
        "qwen3_instruct_2507",
    ],
)
@settings(max_examples=12, deadline=None)
@given(
    roles=st.sampled_from(["u", "ua", "sua", "uaua", "suauau", "uu", "a", "uat", "uaauau"]),
    thinks=st.booleans(),
    prompt=st.booleans(),
    data=st.data(),
)
def test_each_conversation_of_one_shape_is_printed_as_the_template_does(
    tokenizer_for, name, roles, thinks, prompt, data
):
    tokenizer = tokenizer_for(name)
    template = Template(tokenizer)
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    for _ in range(4):
        chat = [{"role": names[role], "content": data.draw(texts)} for role in roles]
        if thinks:
            chat = [{**m, "thinking": data.draw(texts)} if m["role"] == "assistant" else m for m in chat]
        try:
            theirs = rendered(tokenizer, chat, prompt=prompt)
        except Exception:
            with pytest.raises(RendererError):
                Chat(template, chat, None).text(len(chat), prompt)
        else:
            assert Chat(template, chat, None).text(len(chat), prompt) == theirs


# -- tools and thinking -------------------------------------------------------------------------

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Find the {name} <of> a 城市 <|im_end|>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where?"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "time")
]

words = st.lists(st.sampled_from(["Hi.", " ", "\n", "天気", "😀", "é", "{}", "ok"]), max_size=4).map("".join)
said = st.builds(str.__add__, st.sampled_from(["Yes.", "No", "42"]), words)


def called(name: str, arguments: Any) -> Any:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_chats(max_calls: int, strings: bool, says: bool, thinks: bool) -> st.SearchStrategy[list[Any]]:
    arguments = st.dictionaries(st.sampled_from(["city", "日"]), words | st.integers(), max_size=2)
    if strings:
        arguments = arguments.map(lambda given: json.dumps(given, ensure_ascii=False))
    calls = st.lists(
        st.builds(called, st.sampled_from(["weather", "time"]), arguments), min_size=1, max_size=max_calls
    )
    thoughts = st.none() | said if thinks else st.none()

    def one(role: str, content: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **{key: v for key, v in more.items() if v is not None}}

    asks = st.builds(
        lambda content, calls, thought: one(
            "assistant", "" if thought else content, tool_calls=calls, reasoning_content=thought
        ),
        said if says else st.just(""),
        calls,
        thoughts,
    )
    results = st.lists(st.builds(lambda content: one("tool", content), said), min_size=1, max_size=2)
    replies = st.builds(
        lambda content, thought: one("assistant", content, reasoning_content=thought), said, thoughts
    )
    chain = st.lists(st.tuples(asks, results), max_size=2)
    turns = st.lists(st.tuples(said, chain, replies), min_size=1, max_size=2)

    def spelled(drawn: list[Any]) -> list[Any]:
        messages: list[Any] = []
        for question, links, reply in drawn:
            messages.append(one("user", question))
            for ask, found in links:
                messages += [ask, *found]
            messages.append(reply)
        return messages

    return turns.map(spelled)


WITH_TOOLS = {
    "llama3_1": tool_chats(1, strings=False, says=False, thinks=False),
    "llama3_2": tool_chats(1, strings=False, says=False, thinks=False),
    "qwen2_5": tool_chats(2, strings=False, says=True, thinks=False),
    "qwen3": tool_chats(2, strings=False, says=True, thinks=True),
    "qwen3_instruct_2507": tool_chats(2, strings=False, says=True, thinks=False),
    "gptoss": tool_chats(1, strings=False, says=True, thinks=True),
    "deepseekv3": tool_chats(2, strings=True, says=True, thinks=False),
}


def rendered(tokenizer: Any, messages: list[Any], tools: Any = None, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", WITH_TOOLS)
@few
@given(data=st.data())
def test_conversations_with_tools_equal_those_of_the_template(renderer_of, tokenizer_for, name, data):
    messages = data.draw(WITH_TOOLS[name])
    tools = data.draw(st.sampled_from([TOOLS, None])) if name != "deepseekv3" else None
    tokenizer = tokenizer_for(name)
    renderer = renderer_of("chat_template", tokenizer)
    text = rendered(tokenizer, messages, tools)
    tokens, _ = renderer.build_supervised_example(messages, TrainOnWhat.ALL_TOKENS, tools)
    assert tokenizer.decode(tokens.to_ints()) == text
    if tools is None:  # the tools spell a control token
        pieces, begun = [], 0
        for turn in [i for i, m in enumerate(messages) if m["role"] == "assistant"]:
            prompt = rendered(tokenizer, messages[:turn], tools, prompt=True)
            if text.startswith(prompt):
                pieces.append(text[begun : len(prompt)])
                begun = len(prompt)
        pieces.append(text[begun:])
        encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        assert tokens.to_ints() == [token for piece in encoded for token in piece]


@pytest.mark.parametrize("name", [name for name in WITH_TOOLS if name != "deepseekv3"])
@few
@given(data=st.data())
def test_every_reply_is_trained_from_its_prompt_to_its_end(
    renderer_of, tokenizer_for, trained_runs, name, data
):
    messages = data.draw(WITH_TOOLS[name])
    tokenizer = tokenizer_for(name)
    renderer = renderer_of("chat_template", tokenizer)
    stops = tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences())
    turn = data.draw(st.sampled_from([i for i, m in enumerate(messages) if m["role"] == "assistant"]))
    last = (messages[: turn + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE, TOOLS)
    before = rendered(tokenizer, messages[:turn], TOOLS, prompt=True)
    whole = rendered(tokenizer, messages[: turn + 1], TOOLS)
    said = whole[len(before) :]
    if not whole.startswith(before):  # gpt-oss drops the thinking before a call, but not in the prompt
        assert name == "gptoss"
        assert before.endswith("<|end|><|start|>assistant")
        said = whole.rpartition("to=assistant")[2].partition("<|end|><|start|>assistant")[2]
    ((tokens, weights),) = renderer.build_supervised_examples(*last)
    prompt = renderer.build_generation_prompt(messages[:turn], tools=TOOLS).to_ints()
    assert tokens.to_ints()[: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == before
    assert not weights[: len(prompt)].any()
    (run,) = trained_runs(tokenizer, (tokens, weights))
    assert run == said.rstrip("\n")
    assert run.endswith(tuple(stops))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
@few
@given(data=st.data())
def test_tool_calls_in_tags_are_parsed(renderer_of, tokenizer_for, name, data):
    messages = data.draw(WITH_TOOLS[name])
    renderer = renderer_of("chat_template", tokenizer_for(name))
    for turn in [i for i, m in enumerate(messages) if m["role"] == "assistant"]:
        ((tokens, weights),) = renderer.build_supervised_examples(
            messages[: turn + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
        trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
        calls = [
            {"type": "function", "function": call["function"]}
            for call in messages[turn].get("tool_calls", [])
        ]
        reply = {**messages[turn], "tool_calls": calls} if calls else dict(messages[turn])
        if "reasoning_content" in reply:
            reply["reasoning_content"] = reply["reasoning_content"].rstrip("\n")
        assert renderer.parse_response(trained) == (reply, True)
        stream = renderer.parse_stream()
        deltas = [delta for token in trained for delta in stream.feed([token])]
        for field in ("content", "reasoning_content"):
            assert "".join(d.text for d in deltas if d.field == field) == reply.get(field, "")


def test_calls_in_the_form_of_the_template_are_parsed(renderer_of, tokenizer_for):
    renderer = renderer_of("chat_template", tokenizer_for("llama3_1"))
    asked = {"role": "assistant", "tool_calls": [called("time", {"city": "Oslo"})]}
    tokens, weights = renderer.build_supervised_example([CHAT[0], asked], tools=TOOLS)
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    found, is_whole = renderer.parse_response(trained)
    assert (is_whole, found["content"]) == (True, "")
    assert [call["function"] for call in found["tool_calls"]] == [
        {"name": "time", "arguments": {"city": "Oslo"}}
    ]


def test_templates_without_a_place_for_tools_refuse_them(renderer_of, tokenizer_for):
    takes = {
        name: renderer_of("chat_template", tokenizer_for(name)).takes_tools for name in sorted(WITH_TOOLS)
    }
    assert [name for name, found in takes.items() if not found] == ["deepseekv3"]
    for name in ("gemma", "gemma3", "llama3", "phi3"):
        renderer = renderer_of("chat_template", tokenizer_for(name))
        with pytest.raises(RendererError, match="no place for tools"):
            renderer.build_generation_prompt(CHAT[:1], tools=TOOLS)
        ask = {"role": "assistant", "content": "Hm.", "tool_calls": [called("time", {})]}
        with pytest.raises(RendererError, match="does not print tool calls"):
            renderer.build_supervised_example([CHAT[0], ask])


def test_deepseek_gets_json_arguments_and_empty_content(renderer_of, tokenizer_for):
    tokenizer = tokenizer_for("deepseekv3")
    renderer = renderer_of("chat_template", tokenizer)
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [called("time", {"城": 1})]}]
    spelled = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [called("time", '{"城": 1}')]}]
    tokens, _ = renderer.build_supervised_example(chat, TrainOnWhat.ALL_TOKENS)
    assert tokenizer.decode(tokens.to_ints()) == rendered(tokenizer, spelled)


def test_gpt_oss_refuses_several_calls_in_a_message(renderer_of, tokenizer_for):
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [called("time", {}), called("time", {})]}]
    with pytest.raises(RendererError, match=r"`tool_calls\[1\]\.\w+` of message 2"):
        renderer_of("chat_template", tokenizer_for("gptoss")).build_supervised_example(chat)


def test_llama_refuses_text_beside_a_call(renderer_of, tokenizer_for):
    chat = [CHAT[0], {"role": "assistant", "content": "time", "tool_calls": [called("time", {})]}]
    with pytest.raises(RendererError, match="`content` of message 2"):
        renderer_of("chat_template", tokenizer_for("llama3_1")).build_supervised_example(chat)


@pytest.mark.parametrize(("name", "date"), [("llama3_2", "26 Jul 2024"), ("gptoss", "2024-07-26")])
def test_a_conversation_has_the_same_tokens_on_any_day(renderer_of, tokenizer_for, name, date):
    tokenizer = tokenizer_for(name)
    with day_of_transformers(datetime.datetime(2031, 1, 2)):
        assert "2031" in rendered(tokenizer, CHAT)
        tokens = renderer_of("chat_template", tokenizer).build_generation_prompt(CHAT[:1]).to_ints()
    assert date in tokenizer.decode(tokens)
    assert "2031" not in tokenizer.decode(tokens)
