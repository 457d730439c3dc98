"""Compares a renderer with a chat template over conversations: text, prompts, trained tokens, and replies.

The template is the truth. It is asked for the conversation up to each reply and for the prompt before it: the
trained tokens are what it prints between the two, up to the end of the turn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import chat_template_utils

from cookbook.errors import RendererError
from renderers import Renderer, TrainOnWhat

WORDS = ["Hi.", "\n", "\n\n", " ", "天気", "é", "ok", "<tool_response>", "</tool_response>", "5", "true"]
TAGS = [*WORDS, "<think>", "</think>", "<tool_call>"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f" Looks up <{name}>. 天 ",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which ", "enum": ["a", "é"], "default": 3},
                    "n": {"type": ["integer", "null"], "items": {"x": 1}},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
    for name in ("weather", "time")
]


@dataclass(frozen=True)
class Truth:
    """A chat template with options, and how a renderer may differ from what it prints."""

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    appended: Callable[[Mapping[str, Any]], str] = lambda reply: ""
    """The end token that the model writes after a last reply, and the template does not print."""

    def text(self, messages: Sequence[Any], tools: Any, prompt: bool = False) -> str:
        template = chat_template_utils._compile_jinja_template(self.source)
        options = {"documents": None, "add_generation_prompt": prompt, **self.options}
        printed = str(template.render(messages=messages, tools=tools, **options))
        return printed + (
            "" if prompt or messages[-1]["role"] != "assistant" else self.appended(messages[-1])
        )


def conversation(rng: random.Random, words: Sequence[str] = WORDS) -> list[dict[str, Any]]:
    """Generates a conversation, usually with a user's message before the first reply."""

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(0, 4)))

    def value() -> Any:
        return rng.choice([text(), rng.randint(-5, 99), 1.5, True, None, [1, "a", None], {"a": text()}, "5"])

    def call(name: str) -> dict[str, Any]:
        arguments = {key: value() for key in rng.sample(["city", "日", "x y"], rng.randint(0, 2))}
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    messages += [{"role": "user", "content": text()}] if rng.random() < 0.9 or not messages else []
    for _ in range(rng.randint(0, 6)):
        message: dict[str, Any] = {
            "role": rng.choice(["user", "assistant", "assistant", "tool"]),
            "content": text(),
        }
        if message["role"] == "assistant" and rng.random() < 0.5:
            message["reasoning_content"] = text()
        if message["role"] == "assistant" and rng.random() < 0.4:
            message["tool_calls"] = [call(name) for name in rng.choice([["weather"], ["weather", "time"]])]
        messages.append(message)
    return messages


def compare(
    renderer: Renderer, truth: Truth, num: int, others: Sequence[Renderer] = (), tags: Sequence[str] = TAGS
) -> tuple[int, int]:
    """Checks generated conversations, with `tags` in every other one.

    Returns how many of the `num` the template prints, and the number of trained turns in them.
    """
    rng = random.Random(renderer.name)
    num_printed = num_trained = 0
    for number in range(num):
        messages = conversation(rng, WORDS if number % 2 else tags)
        tools = rng.choice([None, TOOLS, TOOLS[:1]])
        if check_text(renderer, truth, messages, tools):
            num_printed += 1
            num_trained += check_turns(renderer, truth, messages, tools, others)
    return num_printed, num_trained


def check_text(renderer: Renderer, truth: Truth, messages: list[Any], tools: Any) -> bool:
    """Checks the text of a conversation and of the prompt after it; False if the template prints neither."""
    decode = renderer.tokenizer.decode
    try:
        whole, prompt = truth.text(messages, tools), truth.text(messages, tools, prompt=True)
    except Exception:  # any error of the template
        return False
    tokens, _ = renderer.build_supervised_example(messages, TrainOnWhat.ALL_TOKENS, tools)
    assert decode(tokens.to_ints()) == whole
    assert decode(renderer.build_generation_prompt(messages, tools=tools).to_ints()) == prompt
    return True


def check_turns(
    renderer: Renderer, truth: Truth, messages: list[Any], tools: Any, others: Sequence[Renderer] = ()
) -> int:
    """Checks each trained turn and returns their number; 0 if the renderer refuses the conversation.

    The prompt of a turn is the renderer's, or that of one of the `others` which render other modes.
    """
    decode = renderer.tokenizer.decode
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        examples = renderer.build_supervised_examples(messages, tools=tools)
    except RendererError:
        return 0
    assert len(examples) in (1, len(turns))
    for number, index in enumerate(turns):
        model_input, weights = examples[min(number, len(examples) - 1)]
        tokens = model_input.to_ints()
        for prompted in (renderer, *others):
            prompt = prompted.build_generation_prompt(messages[:index], tools=tools).to_ints()
            if tokens[: len(prompt)] == prompt:
                break
        else:
            raise AssertionError(f"No prompt begins the example of message {index + 1}: {decode(tokens)}")
        behind = list(zip(tokens, weights, strict=True))[len(prompt) :]
        length = next((i for i, (_, weight) in enumerate(behind) if not weight), len(behind))
        said = [token for token, _ in behind[:length]]
        printed = truth.text(messages[: index + 1], tools)[len(decode(prompt)) :]
        assert said
        assert printed.startswith(str(decode(said)))
        assert not printed[len(decode(said)) :].strip(), "the end of the turn is not trained"
        if len(examples) > 1:
            assert sum(weights) == length, "more than one turn is trained"
        check_reply(prompted, messages[:index], tools, prompt, said, messages[index])
    return len(turns)


def check_reply(
    renderer: Renderer, before: list[Any], tools: Any, prompt: list[int], said: list[int], reply: Any
) -> None:
    """Checks that a reply parses to a message that renders to the same tokens, whole and piece by piece."""
    message, is_whole = renderer.parse_response(said)
    assert is_whole
    assert renderer.parse_response(said[:-1]) == (message, False)
    (*_, (again, _)) = renderer.build_supervised_examples(
        [*before, message], TrainOnWhat.LAST_ASSISTANT_MESSAGE, tools
    )
    # Thinking in the content is given back apart from it, and thinking of white space not at all.
    if "</think>" not in json.dumps(reply) and reply.get("reasoning_content", "x").strip():
        assert again.to_ints()[len(prompt) : len(prompt) + len(said)] == said
    rng = random.Random(len(said))
    stream, shown = renderer.parse_stream(), {"content": "", "reasoning_content": ""}
    position = 0
    while position < len(said):
        step = rng.randint(1, 3)
        for delta in stream.feed(said[position : position + step]):
            shown[delta.field] += delta.text
        position += step
    assert stream.finish() == (message, True)
    assert shown == {key: message.get(key) or "" for key in shown}
