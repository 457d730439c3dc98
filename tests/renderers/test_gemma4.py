"""The renderers of Gemma 4, compared with templates of both kinds."""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import TOOLS, WORDS, Truth

from cookbook.errors import RendererError

TOKENS = (
    "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|image|>",
)  # fmt: skip
EMPTY = "<|channel>thought\n<channel|>"
ASK = {"role": "user", "content": "How warm is it in Oslo?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
AMBIGUOUS = {"function": {"name": "f", "arguments": {"a:b": 1}}}
RESULT = {"role": "tool", "content": "7"}
MODES: dict[str, dict[str, Any]] = {
    "gemma4": {},
    "gemma4_thinking": {"enable_thinking": True},
    "gemma4_preserve_thinking": {"enable_thinking": True, "preserve_thinking": True},
}


@dataclass(frozen=True)
class GemmaTruth(Truth):
    """The template, with the reply that ends a conversation behind the template's own prompt for it.

    The templates of the larger models print an empty channel in the prompt, and none before the reply.
    """

    def text(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        printed = super().text(messages, tools, prompt)
        if prompt or messages[-1]["role"] != "assistant" or len(messages) == 1:
            return printed
        before = super().text(messages[:-1], tools, prompt=True)
        begun = before.removesuffix(EMPTY)
        if begun == before or not printed.startswith(begun):
            return printed
        return before + printed[len(begun) :]


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def conversation(rng: random.Random, thinks: bool) -> list[dict[str, Any]]:
    """Generates turns of a user and a model, some with rounds of calls and results."""

    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(0, 4)))

    def value() -> Any:
        return rng.choice(
            [text(), rng.randint(-5, 99), 1.5, True, None, [1, "a", None], {"B": text(), "a": 1}, []]
        )

    def thought(needed: bool = False) -> dict[str, Any]:
        return {"reasoning_content": f"{text()}x"} if thinks and (needed or rng.random() < 0.5) else {}

    role = rng.choice(["system", "developer"])
    messages: list[dict[str, Any]] = [{"role": role, "content": text()}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        is_behind_results = False
        for _ in range(rng.choice([0, 0, 1, 2])):
            names = rng.choice([["weather"], ["weather", "time"]])
            calls = [
                {
                    "function": {
                        "name": name,
                        "arguments": {key: value() for key in rng.sample(["city", "日", "X y"], 2)},
                    }
                }
                for name in names
            ]
            messages.append(reply("", tool_calls=calls, **thought(is_behind_results)))
            messages += [{"role": "tool", "name": name, "content": text()} for name in names]
            is_behind_results = True
        messages.append(reply(text(), **thought(is_behind_results)))
    return messages[: rng.choice([len(messages), len(messages) - 1]) or 1]


@pytest.fixture(params=["gemma4_12b", "gemma4_e2b"], scope="module")
def gemma(request: pytest.FixtureRequest, small_tokenizer: Any) -> Any:
    return small_tokenizer(chat_formats.template(request.param), TOKENS)


def check_mode(renderer: Any, truth: Truth, num_conversations: int) -> int:
    rng = random.Random(renderer.name)
    num_trained = 0
    for _ in range(num_conversations):
        messages = conversation(rng, thinks=renderer.thinks)
        tools = rng.choice([None, TOOLS, TOOLS[:1]])
        assert format_truth.check_text(renderer, truth, messages, tools)
        num_trained += format_truth.check_turns(renderer, truth, messages, tools)
    return num_trained


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", MODES)
def test_texts_prompts_and_trained_turns_are_those_of_the_template(renderer_of, gemma, name):
    truth = GemmaTruth(gemma.chat_template, {**MODES[name], "bos_token": "<bos>"})
    assert check_mode(renderer_of(name, gemma), truth, 20) > 20


@pytest.mark.published
@pytest.mark.parametrize("template", ["gemma4_12b", "gemma4_e2b"])
@pytest.mark.parametrize("name", MODES)
def test_texts_prompts_and_trained_turns_are_those_of_the_published_template(
    renderer_of, small_tokenizer, template, name
):
    tokenizer = small_tokenizer(chat_formats.published_template(template), TOKENS)
    truth = GemmaTruth(tokenizer.chat_template, {**MODES[name], "bos_token": "<bos>"})
    assert check_mode(renderer_of(name, tokenizer), truth, 200) > 200


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", MODES)
def test_any_conversation_is_printed_as_the_template_does_or_refused(renderer_of, gemma, name):
    truth = GemmaTruth(gemma.chat_template, {**MODES[name], "bos_token": "<bos>"})
    renderer = renderer_of(name, gemma)
    rng = random.Random(name)
    num_printed = num_trained = 0
    for _ in range(150):
        messages = format_truth.conversation(rng)
        tools = rng.choice([None, TOOLS])
        follows_call = True
        for before, message in pairwise([{"role": ""}, *messages]):
            if message["role"] == "tool":
                follows_call &= before["role"] == "tool" or bool(before.get("tool_calls"))
        if not follows_call:
            with pytest.raises(RendererError, match="results only behind the calls"):
                renderer.build_generation_prompt(messages, tools=tools)
            continue
        prompt = renderer.build_generation_prompt(messages, tools=tools)
        num_printed += 1
        assert gemma.decode(prompt.to_ints()) == truth.text(messages, tools, prompt=True)
        num_trained += format_truth.check_turns(renderer, truth, messages, tools)
    assert num_printed > 50
    assert num_trained > 10


def test_the_empty_channel_of_the_larger_models_belongs_to_the_prompt_alone(renderer_of, gemma, trained_runs):
    renderer = renderer_of("gemma4", gemma)
    chat = [ASK, reply("7 degrees."), ASK, reply("8.")]
    is_large = EMPTY.replace("\n", "\\n") in gemma.chat_template
    examples = renderer.build_supervised_examples(chat)
    runs = [trained_runs(gemma, example) for example in examples]
    assert runs == (
        [["7 degrees.<turn|>"], ["8.<turn|>"]] if is_large else [["7 degrees.<turn|>", "8.<turn|>"]]
    )
    texts = [gemma.decode(example[0].to_ints()) for example in examples]
    assert [text.count(EMPTY) for text in texts] == ([1, 1] if is_large else [0])
    for example, turn in zip(examples, [1, 3] if is_large else [3], strict=True):
        prompt = renderer.build_generation_prompt(chat[:turn]).to_ints()
        assert example[0].to_ints()[: len(prompt)] == prompt


def test_calls_end_with_the_token_that_begins_their_result(renderer_of, gemma, trained_runs):
    renderer = renderer_of("gemma4_thinking", gemma)
    chat = [
        ASK,
        reply("", tool_calls=[CALL], reasoning_content="Look."),
        RESULT,
        reply("7.", reasoning_content="So 7."),
    ]
    (example,) = renderer.build_supervised_examples(chat)
    assert trained_runs(gemma, example) == [
        '<|channel>thought\nLook.\n<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>',
        "So 7.\n<channel|>7.<turn|>",
    ]
    asked = renderer.parse_response(gemma(trained_runs(gemma, example)[0])["input_ids"])
    assert asked == (chat[1], True)
    told = renderer.parse_response(gemma(trained_runs(gemma, example)[1])["input_ids"])
    assert told == (chat[3], True)


def test_text_beside_a_call_is_trained_and_a_reply_behind_its_results_is_refused(
    renderer_of, gemma, trained_runs
):
    renderer = renderer_of("gemma4", gemma)
    asked = reply("Let me look.", tool_calls=[CALL])
    (example,) = renderer.build_supervised_examples(
        [ASK, {**asked, "train": True}, RESULT, reply("7.", train=False)]
    )
    (trained,) = trained_runs(gemma, example)
    assert trained.endswith("<tool_call|>Let me look.<|tool_response>")
    assert renderer.parse_response(gemma(trained)["input_ids"]) == (asked, True)
    with pytest.raises(
        RendererError, match="message 4: the message with the call that it follows has text too"
    ):
        renderer.build_supervised_examples([ASK, asked, RESULT, reply("7.")])


def test_a_thought_channel_in_the_content_is_thinking(renderer_of, gemma):
    renderer = renderer_of("gemma4_thinking", gemma)
    inline = [ASK, reply("<|channel>thought\nLook.\n<channel|>7.")]
    apart = [ASK, reply("7.", reasoning_content="Look.")]
    examples = [renderer.build_supervised_example(chat)[0].to_ints() for chat in (inline, apart)]
    assert examples[0] == examples[1]
    with pytest.raises(RendererError, match="message 2: the model's template would lose text"):
        renderer.build_supervised_example([ASK, reply("7.<|channel>thought\nLook.<channel|>")])


@pytest.mark.parametrize(
    ("name", "messages", "error"),
    [
        ("gemma4", [ASK, reply("7", reasoning_content="Look.")], "no place for the thinking of message 2"),
        ("gemma4", [ASK, reply("7"), reply("8")], "message 3, which follows another reply"),
        ("gemma4", [ASK, reply("7"), RESULT, reply("8")], "tool result in message 3"),
        ("gemma4_thinking", [ASK, ASKED, RESULT, reply("7")], "message has no thinking"),
        ("gemma4", [ASK, reply("", tool_calls=[AMBIGUOUS])], "read as the same call"),
    ],
)
def test_what_has_no_prompt_or_would_be_read_otherwise_is_refused(renderer_of, gemma, name, messages, error):
    with pytest.raises(RendererError, match=error):
        renderer_of(name, gemma).build_supervised_examples(messages)


@pytest.mark.parametrize(
    "text",
    [
        "<|tool_call>call:f{a:1<tool_call|><|tool_response>",
        "<|tool_call>call:f{a:}<tool_call|><|tool_response>",
        "<|tool_call>call:f{a:1,a:2}<tool_call|><|tool_response>",
        "<|tool_call>f{}<tool_call|><|tool_response>",
        "7.<|tool_response>",
        "<|tool_call>call:f{}<turn|>",
        "<|channel>thought\nLook.<turn|>",
        "7.<|turn><turn|>",
    ],
)
def test_a_malformed_reply_is_content(renderer_of, gemma, text):
    tokens = gemma(text)["input_ids"]
    message, is_whole = renderer_of("gemma4_thinking", gemma).parse_response(tokens)
    assert not is_whole
    assert message == {"role": "assistant", "content": gemma.decode(tokens[:-1])}
