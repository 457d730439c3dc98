"""The renderers of DeepSeek V3.1, compared with the model's template."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import WORDS, Truth

from cookbook.errors import RendererError

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ASK = {"role": "user", "content": "2 + 2?"}
OTHERS = ("<｜User｜>", "<｜Assistant｜>")


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class DeepSeekTruth(Truth):
    """Gives arguments as JSON. If it `thinks`, a last reply has its block, which the template drops.

    The block continues the template's prompt for thinking; what follows it continues the prompt without.
    """

    thinks: bool = False

    def text(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        adapted = [_with_json(message) for message in messages]
        if not self.thinks or prompt or messages[-1]["role"] != "assistant":
            return super().text(adapted, tools, prompt)
        plain = Truth(self.source, {**self.options, "thinking": False})
        said = plain.text(adapted, tools).removeprefix(plain.text(adapted[:-1], tools, prompt=True))
        opening = "" if messages[-2]["role"] == "user" else "<think>"
        thought = f"{opening}{messages[-1].get('reasoning_content', '')}</think>"
        return super().text(adapted[:-1], tools, prompt=True) + thought + said


def _with_json(message: Any) -> Any:
    calls = [
        {**one, "function": {**one["function"], "arguments": _json(one["function"]["arguments"])}}
        for one in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def tokenizer_for(small_tokenizer: Any, template: str) -> Any:
    tokens = {*re.findall(r"<｜[^<> ]*?｜>", template), BOS, END, *OTHERS}
    tokenizer = small_tokenizer(template, tuple(sorted(tokens)))
    tokenizer.bos_token, tokenizer.eos_token = BOS, END
    return tokenizer


@pytest.fixture(scope="module")
def deepseek(small_tokenizer: Any) -> Any:
    return tokenizer_for(small_tokenizer, chat_formats.template("deepseek_v3_1"))


@pytest.mark.parametrize(
    "source",
    [chat_formats.template, pytest.param(chat_formats.published_template, marks=pytest.mark.published)],
    ids=["own", "published"],
)
@pytest.mark.parametrize("name", ["deepseekv3_1", "deepseekv3_1_thinking"])
def test_texts_prompts_and_trained_turns_are_those_of_the_template(
    renderer_of, small_tokenizer, name, source
):
    template, thinks = source("deepseek_v3_1"), name.endswith("thinking")
    renderer = renderer_of(name, tokenizer_for(small_tokenizer, template))
    truth = DeepSeekTruth(template, {"thinking": thinks, "bos_token": BOS}, thinks=thinks)
    rng = random.Random(name)
    num_trained = 0
    for _ in range(120):
        messages = format_truth.conversation(rng, WORDS)
        if not thinks:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        before = [message["role"] for message in messages if message["role"] != "system"]
        follows = all(
            a in ("user", "tool") for a, b in zip(["", *before], before, strict=False) if b == "assistant"
        )
        if not thinks:
            assert format_truth.check_text(renderer, truth, messages, None)
        if follows:
            assert format_truth.check_text(renderer, truth, messages, None)
            num_trained += format_truth.check_turns(renderer, truth, messages, None)
        elif thinks:
            with pytest.raises(RendererError, match="nothing prompts the model to think"):
                renderer.build_supervised_examples(messages)
    assert num_trained > 50


def test_thinking_is_trained_and_dropped_from_the_history(renderer_of, deepseek, trained_runs):
    chat = [ASK, reply("4", reasoning_content="Sum."), ASK, reply("Still 4.")]
    examples = renderer_of("deepseekv3_1_thinking", deepseek).build_supervised_examples(chat)
    assert [trained_runs(deepseek, one) for one in examples] == [
        [f"Sum.</think>4{END}"],
        [f"</think>Still 4.{END}"],
    ]
    assert "<｜Assistant｜></think>4" in deepseek.decode(examples[1][0].to_ints())
    inline = [ASK, reply("<think>Sum.</think>4")]
    (again,) = renderer_of("deepseekv3_1_thinking", deepseek).build_supervised_examples(inline)
    assert again[0].to_ints() == examples[0][0].to_ints()


def test_calls_are_read_from_replies(renderer_of, deepseek):
    calls = [call("weather", city="東京"), call()]
    for name, thought in [("deepseekv3_1", {}), ("deepseekv3_1_thinking", {"reasoning_content": "Hm."})]:
        renderer = renderer_of(name, deepseek)
        message = reply("Well.", tool_calls=calls, **thought)
        tokens = renderer.build_supervised_example([ASK, message])[0].to_ints()
        said = tokens[renderer.build_generation_prompt([ASK]).length :]
        assert renderer.parse_response(said) == (message, True)
        assert renderer.parse_response(said[:-3])[1] is False


def test_the_older_names_have_the_older_format(renderer_of, deepseek):
    texts = {
        name: deepseek.decode(renderer_of(name, deepseek).build_generation_prompt([ASK]).to_ints())
        for name in ("deepseekv3", "deepseekv3_1")
    }
    assert texts["deepseekv3_1"] == texts["deepseekv3"] + "</think>"


def test_thinking_without_a_place_is_refused(renderer_of, deepseek):
    for name, chat, error in [
        ("deepseekv3_1", [ASK, reply("4", reasoning_content="Sum.")], "use renderer `deepseekv3_1_thinking`"),
        ("deepseekv3_1_thinking", [ASK, reply("4", reasoning_content="a</think>")], "think tag of its own"),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer_of(name, deepseek).build_supervised_examples(chat)
