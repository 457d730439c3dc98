"""The renderers of Kimi K2, K2 Thinking, K2.5 and K2.6, compared with their templates."""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import chat_formats
import format_truth
import jinja2
import pytest
from format_truth import TOOLS, WORDS, Truth

from cookbook.errors import RendererError
from cookbook.utils import notes

ASK = {"role": "user", "content": "2 + 2?"}
HEADER = "<|im_assistant|>assistant<|im_middle|>"
FORMATS: dict[str, dict[str, Any]] = {
    "kimi_k25": {},
    "kimi_k26": {},
    "kimi_k25_disable_thinking": {"thinking": False},
    "kimi_k26_disable_thinking": {"thinking": False},
    "kimi_k26_preserve_thinking": {"preserve_thinking": True},
}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class KimiTruth(Truth):
    """Prints a last reply as the model writes it: with its thinking, as the template prints one alone."""

    def text(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        if prompt or messages[-1]["role"] != "assistant":
            return super().text(messages, tools, prompt)
        alone = Truth(self.source, {**self.options, "preserve_thinking": True})
        return super().text(messages[:-1], tools) + alone.text(messages[-1:], None)


@cache
def mutable_template(source: str) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


@dataclass(frozen=True)
class MutableTruth(Truth):
    """Renders without the sandbox of transformers, which refuses K2's template when a tool is called."""

    def text(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        template = mutable_template(self.source)
        return template.render(messages=messages, tools=tools, add_generation_prompt=prompt)


def tokenizer_for(small_tokenizer: Any, template: str) -> Any:
    tokens = {*re.findall(r"<\|\w+\|>", template), "<|tool_call_argument_begin|>"}
    return small_tokenizer(template, tuple(sorted(tokens)))


def conversation(rng: random.Random, thinks: bool) -> list[Any]:
    """Generates a conversation whose calls have ids in the format's own form."""
    messages = format_truth.conversation(rng, WORDS)
    ids: list[str] = []
    num_results = 0
    for message in messages:
        for one in message.get("tool_calls", []):
            one["id"] = f"functions.{one['function']['name']}:{len(ids)}"
            ids.append(one["id"])
        if message["role"] == "tool":
            message["tool_call_id"] = ids[num_results] if num_results < len(ids) else "functions.f:99"
            num_results += 1
        if not thinks:
            message.pop("reasoning_content", None)
    return messages


def compare(renderer: Any, truth: Truth, num: int, thinks: bool = True) -> int:
    rng = random.Random(renderer.name)
    num_trained = 0
    for _ in range(num):
        messages, tools = conversation(rng, thinks), rng.choice([None, TOOLS])
        if truth.text(messages, tools) and format_truth.check_text(renderer, truth, messages, tools):
            num_trained += format_truth.check_turns(renderer, truth, messages, tools)
    return num_trained


with_sources = pytest.mark.parametrize(
    "source",
    [chat_formats.template, pytest.param(chat_formats.published_template, marks=pytest.mark.published)],
    ids=["own", "published"],
)


@pytest.mark.cases(2)
@with_sources
@pytest.mark.parametrize("name", FORMATS)
def test_texts_prompts_and_trained_turns_of_k2_5_are_those_of_the_template(
    renderer_of, small_tokenizer, name, source
):
    template = source("kimi_k2_5")
    renderer = renderer_of(name, tokenizer_for(small_tokenizer, template))
    truth = KimiTruth(template, FORMATS[name])
    assert compare(renderer, truth, 80, thinks="disable" not in name) > 60


@with_sources
def test_texts_prompts_and_trained_turns_of_k2_are_those_of_the_template(
    renderer_of, small_tokenizer, source
):
    template = source("kimi_k2")
    renderer = renderer_of("kimi_k2", tokenizer_for(small_tokenizer, template))
    assert compare(renderer, MutableTruth(template), 80, thinks=False) > 60


@pytest.fixture(scope="module")
def kimi(small_tokenizer: Any) -> Any:
    return tokenizer_for(small_tokenizer, chat_formats.template("kimi_k2_5"))


def texts(tokenizer: Any, renderer: Any, chat: list[Any]) -> list[str]:
    return [tokenizer.decode(tokens.to_ints()) for tokens, _ in renderer.build_supervised_examples(chat)]


def test_thinking_is_trained_once_and_dropped_up_to_the_last_answer(renderer_of, kimi, trained_runs):
    calling = reply("", reasoning_content="Look.", tool_calls=[call()])
    result = {"role": "tool", "content": "4"}
    chat = [ASK, calling, result, reply("It is 4.", reasoning_content="So."), ASK, reply("Still 4.")]
    renderer = renderer_of("kimi_k25", kimi)
    examples = renderer.build_supervised_examples(chat)
    assert [trained_runs(kimi, one) for one in examples] == [
        [
            "Look.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
            "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
        ],
        ["So.</think>It is 4.<|im_end|>"],
        ["</think>Still 4.<|im_end|>"],
    ]
    assert "Look." in kimi.decode(examples[1][0].to_ints())
    assert "Look." not in kimi.decode(examples[2][0].to_ints())
    (whole,) = texts(kimi, renderer_of("kimi_k26_preserve_thinking", kimi), chat)
    assert whole.count("<think>Look.</think>") == whole.count("<think>So.</think>It is 4.") == 1


def test_a_reply_without_thinking_is_trained_apart_if_its_prompt_has_thinking_that_is_dropped_later(
    renderer_of, kimi
):
    calling = reply("", reasoning_content="Look.", tool_calls=[call()], trainable=False)
    chat = [ASK, calling, {"role": "tool", "content": "4"}, reply("It is 4."), ASK, reply("Still 4.")]
    renderer = renderer_of("kimi_k25", kimi)
    first, second = (tokens.to_ints() for tokens, _ in renderer.build_supervised_examples(chat))
    prompt = renderer.build_generation_prompt(chat[:3]).to_ints()
    assert first[: len(prompt)] == prompt
    assert second[: len(prompt)] != prompt


def test_kimi_k2_thinking_writes_the_whole_think_block(renderer_of, kimi, trained_runs):
    renderer = renderer_of("kimi_k2_thinking", kimi)
    chat = [ASK, reply("4", reasoning_content="Sum.")]
    assert trained_runs(kimi, renderer.build_supervised_example(chat)) == ["<think>Sum.</think>4<|im_end|>"]
    prompt = kimi.decode(renderer.build_generation_prompt([ASK]).to_ints())
    assert prompt == (
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
        f"<|im_user|>user<|im_middle|>2 + 2?<|im_end|>{HEADER}"
    )
    ids = kimi("<think>Sum.</think>4<|im_end|>", add_special_tokens=False)["input_ids"]
    assert renderer.parse_response(ids) == (reply("4", reasoning_content="Sum."), True)
    assert renderer.parse_response(ids[:3])[1] is False


def test_an_id_of_another_form_is_replaced_in_the_call_and_in_its_result(renderer_of, kimi):
    calls = [{**call("weather"), "id": "call_a"}, {**call("time"), "id": "functions.time:7"}]
    chat = [
        ASK,
        reply("", tool_calls=calls),
        {"role": "tool", "tool_call_id": "functions.time:7", "content": "noon"},
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
    ]
    with notes.collected() as found:
        (text,) = texts(kimi, renderer_of("kimi_k25", kimi), chat)
    assert re.findall(r"call_begin\|>(\S+?)<", text) == ["functions.weather:0", "functions.time:7"]
    assert re.findall(r"Return of (\S+)\n(\w+)", text) == [
        ("functions.time:7", "noon"),
        ("functions.weather:0", "rain"),
    ]
    assert any("id of another form" in line for line in notes.lines(found))


def test_calls_of_a_reply_have_their_names_and_ids(renderer_of, kimi):
    renderer = renderer_of("kimi_k25", kimi)
    chat = [ASK, reply("Well.", reasoning_content="Hm.", tool_calls=[call("a.b", x="日"), call()])]
    tokens = renderer.build_supervised_example(chat)[0].to_ints()
    said = tokens[renderer.build_generation_prompt([ASK]).length :]
    message, is_whole = renderer.parse_response(said)
    assert is_whole
    assert message == reply(
        "Well.",
        reasoning_content="Hm.",
        tool_calls=[
            {"id": "functions.a.b:0", **call("a.b", x="日")},
            {"id": "functions.f:1", **call()},
        ],
    )


@pytest.mark.parametrize(
    ("name", "chat", "error"),
    [
        ("kimi_k2", [ASK, reply("4", reasoning_content="Sum.")], "no place for the thinking of message 2"),
        ("kimi_k25_disable_thinking", [ASK, reply("<think>a</think>4")], "no place for the thinking"),
        ("kimi_k25", [ASK, reply("4", reasoning_content="a</think>b")], "message 2 holds a think tag"),
        (
            "kimi_k25",
            [ASK, reply("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])],
            "tool calls of message 2: their arguments are no JSON object",
        ),
    ],
)
def test_what_could_not_be_read_back_is_refused(renderer_of, kimi, name, chat, error):
    with pytest.raises(RendererError, match=error):
        renderer_of(name, kimi).build_supervised_examples(chat)


@pytest.mark.parametrize(
    "text",
    [
        "Hm.<|im_end|>",
        "</think><|tool_calls_section_begin|><|tool_calls_section_end|><|im_end|>",
        "</think><|tool_calls_section_begin|><|tool_call_begin|>call_1<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|><|im_end|>",
        "</think>a<|im_user|>b<|im_end|>",
    ],
)
def test_a_malformed_reply_is_its_whole_text(renderer_of, kimi, text):
    ids = kimi(text, add_special_tokens=False)["input_ids"]
    found = renderer_of("kimi_k25", kimi).parse_response(ids)
    assert found == (reply(text.removesuffix("<|im_end|>")), False)


def test_text_that_spells_the_tokens_of_a_call_is_text_of_the_reply(renderer_of, kimi, trained_runs):
    renderer = renderer_of("kimi_k25_disable_thinking", kimi)
    spelled = "See <|tool_calls_section_begin|><|im_user|>."
    example = renderer.build_supervised_example([ASK, reply(spelled)])
    ids = example[0].to_ints()
    assert kimi.convert_tokens_to_ids("<|tool_calls_section_begin|>") not in ids
    assert trained_runs(kimi, example) == [f"{spelled}<|im_end|>"]
    said = ids[renderer.build_generation_prompt([ASK]).length :]
    assert renderer.parse_response(said) == (reply(spelled), True)
