"""The renderer of Qwen3-VL Instruct for text, compared with its template."""

import copy
import random
from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import TOOLS, WORDS, Truth

from cookbook.errors import RendererError
from renderers import get_renderer


@pytest.fixture(scope="module")
def qwen() -> Any:
    tokenizer = copy.deepcopy(chat_formats.tokenizer("qwen3"))
    tokenizer.chat_template = chat_formats.template("qwen3_vl")
    return tokenizer


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_instruct"])
def test_texts_prompts_and_trained_turns_are_those_of_the_template(renderer_of, qwen, name):
    truth = Truth(qwen.chat_template)
    rng = random.Random(name)
    num_trained = 0
    for _ in range(60):
        messages = format_truth.conversation(rng, [*WORDS, "<think>", "</think>"])
        for message in messages:
            message.pop("reasoning_content", None)
        tools = rng.choice([None, TOOLS, TOOLS[:1]])
        assert format_truth.check_text(renderer_of(name, qwen), truth, messages, tools)
        num_trained += format_truth.check_turns(renderer_of(name, qwen), truth, messages, tools)
    assert num_trained > 50


def test_what_the_template_does_not_print_is_refused(renderer_of, qwen):
    ask, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    reply = {"role": "assistant", "content": "c"}
    renderer = renderer_of("qwen3_vl", qwen)
    with pytest.raises(RendererError, match="cannot render the system message 2"):
        renderer.build_supervised_example([ask, system, reply])
    with pytest.raises(RendererError, match="no place for the thinking of message 2"):
        renderer.build_supervised_example([ask, {**reply, "reasoning_content": "d"}])
    with pytest.raises(RendererError, match="is for Qwen3-VL Instruct, but this tokenizer's chat template"):
        get_renderer("qwen3_vl", chat_formats.tokenizer("qwen3"))
