"""The examples of a conversation, compared with rendering each of them from its beginning."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_except
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cookbook.errors import RendererError
from renderers import TrainOnWhat, get_renderer, renderer_names
from renderers.rendering import Example
from renderers.tokens import Trail, length_of_common_start

FRAMES = {
    "llama3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
    "gemma": "<bos> <eos> <start_of_turn> <end_of_turn> <|turn> <turn|> <|channel> <channel|> <|tool> <tool|>"
    " <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|think|>",
    "glm": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|> <|end|>",
    "kimi": "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_start|> <|im_end|>"
    " <|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|>"
    " <|tool_call_argument_begin|> <|tool_call_end|>",
    "harmony": "<|start|> <|message|> <|channel|> <|return|> <|call|> <|constrain|>",
    "deepseek": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
    " <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>"
    " <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
}
CONTROLS = sorted({token for frame in FRAMES.values() for token in frame.split()})
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
KINDS = ("split", "flags", "metaspace first", "metaspace always", "prepend")
"""How the tokenizer splits and joins: in the last three, tokens depend on what is to the left of a text."""

TEXTS = [
    *("Hello there", "What is 42?", "it's a: b", "ok.\n", "天気 é", "word word end"),
    *(" hi ", "", "\n\nyes", "<|im_end|>", "a</think>b", "<think>\nx\n</think>\n\ny", "tab\t and   spaces"),
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}]


@cache
def backend(kind: str) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in ("split", "flags"):
        made = Tokenizer(models.BPE())
        words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        scheme = kind.removeprefix("metaspace ")
        if kind == "prepend":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Metaspace(prepend_scheme="first" if kind == "prepend" else scheme)
        fallback = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=fallback, show_progress=False)
    made.train_from_iterator([*chat_formats.CORPUS, *TEXTS], trainer)
    for number, token in enumerate(CONTROLS):
        strip = {"lstrip": number % 5 == 1, "rstrip": number % 5 == 2} if kind == "flags" else {}
        made.add_special_tokens([AddedToken(token, normalized=False, **strip)])
    made.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return made


@cache
def pair(kind: str, name: str) -> Any:
    """Two renderers of one format, the second of which renders from the beginning; an error if none fits."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if name.endswith(".jinja"):
        template = chat_formats.template(name.removesuffix(".jinja"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(kind), bos_token="<bos>", eos_token="<|im_end|>", chat_template=template
    )
    name = "chat_template" if name.endswith(".jinja") else name
    try:
        return [get_renderer(name, tokenizer) for _ in range(2)]
    except RendererError as error:
        return error


def conversation(seed: int) -> tuple[list[Any], list[Any] | None]:
    """Returns messages, with thinking and calls in some, and the tools."""
    choose = random.Random(seed)
    texts = TEXTS[:6] if seed % 2 else TEXTS
    thinks, calls = choose.random(), choose.random() * (seed % 3 > 0)
    messages: list[Any] = []
    if choose.random() < 0.4:
        messages.append({"role": "system", "content": choose.choice(texts)})

    def reply(text: str, **more: Any) -> dict[str, Any]:
        thought = {"reasoning_content": choose.choice(texts)} if choose.random() < thinks else {}
        return {"role": "assistant", "content": text, **thought, **more}

    for turn in range(choose.randint(2, 16 if seed % 5 == 0 else 5)):
        messages.append({"role": "user", "content": choose.choice(texts)})
        for number in range(choose.randint(1, 3) if choose.random() < calls else 0):
            id_ = f"functions.look:{turn}{number}"
            function = {"name": "look", "arguments": {"at": choose.choice(texts)}}
            messages.append(reply("", tool_calls=[{"id": id_, "type": "function", "function": function}]))
            result = {"role": "tool", "tool_call_id": id_, "name": "look", "content": choose.choice(texts)}
            messages.append(result)
        messages.append(reply(choose.choice(texts)))
    return messages, TOOLS if calls else None


def from_the_beginning(renderer: Any, messages: list[Any], tools: list[Any] | None) -> list[Example]:
    """Returns an example of each reply, rendered and encoded alone."""
    examples = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            renderer._encoder._latest = Trail()
            examples += renderer.render_conversation(
                messages[: index + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE, tools
            )
    return examples


def check(kind: str, name: str, seed: int) -> str:
    """Compares the examples of a conversation; returns "" if there is one, or the format refuses it."""
    renderers = pair(kind, name)
    messages, tools = conversation(seed)
    try:
        if isinstance(renderers, RendererError):
            raise renderers
        ours = renderers[0].render_conversation(messages, tools=tools)
    except RendererError:
        return ""
    if len(ours) == 1:
        return ""
    theirs = from_the_beginning(renderers[1], messages, tools)
    assert [one.tokens_T.tolist() for one in ours] == [one.tokens_T.tolist() for one in theirs]
    assert [one.weights_T.tolist() for one in ours] == [one.weights_T.tolist() for one in theirs]
    assert [one.num_tokens for one in ours] == [len(one.tokens_T) for one in theirs]
    for number, one in enumerate(ours[1:], 1):
        assert one.base in ours[:number]
        shared = length_of_common_start(one.base.tokens_T.tolist(), one.tokens_T.tolist())
        assert one.num_shared == shared, "all that it shares with that example"
    return "compared"


NAMES = [name for name in renderer_names() if name != "chat_template"]
TEMPLATES = [f"{path.stem}.jinja" for path in sorted(chat_formats.TEMPLATES.glob("*.jinja"))]


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_rendered_from_the_beginning(kind: str) -> None:
    found = [check(kind, name, seed) for seed, name in enumerate(NAMES * 3)]
    assert found.count("compared") >= 20, "too few conversations have several examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    slow_except(
        ["qwen3", "gpt_oss", "glm5"],
        [
            *(
                "qwen3",
                "qwen3_5",
                "glm4_5",
                "glm5",
                "nemotron3",
                "nemotron3_low_thinking",
                "kimi_k2_thinking",
            ),
            *("gpt_oss", "gemma4_thinking", "deepseekv3_thinking", "deepseekv3_1_thinking"),
        ],
    ),
)
def test_examples_of_long_conversations_are_those_rendered_from_the_beginning(name: str) -> None:
    found = [check("split", name, seed) for seed in range(5, 205, 10)]
    assert found.count("compared") >= 2


def test_a_query_that_ends_with_the_effort_is_printed_again_when_another_one_follows() -> None:
    assert check("split", "nemotron3_ultra_medium_thinking", 1435) == "compared"


@pytest.mark.slow
def test_examples_of_a_chat_template_are_those_rendered_from_the_beginning() -> None:
    found = [check("split", name, seed) for name in ("qwen3.jinja", "glm5.jinja") for seed in range(4)]
    assert found.count("compared") >= 4


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([*NAMES, *TEMPLATES]), st.integers(0, 10**6))
def test_examples_of_any_conversation_are_those_rendered_from_the_beginning(
    kind: str, name: str, seed: int
) -> None:
    check(kind, name, seed)


def test_examples_of_a_long_conversation_keep_few_tokens_of_their_own() -> None:
    renderer = pair("split", "qwen3")[0]
    sizes = []
    for num_turns in (20, 40):
        chat = [{"role": role, "content": "What is 42?"} for role in ("user", "assistant")] * num_turns
        examples = renderer.render_conversation(chat)
        assert len(examples) == num_turns
        sizes.append(sum(len(example.own_T) for example in examples))
    assert sizes[1] < 2.1 * sizes[0]
