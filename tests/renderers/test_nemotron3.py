"""The renderers of Nemotron 3, compared with their template."""

from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import WORDS, Truth

from cookbook.errors import RendererError
from cookbook.utils import notes

FORMATS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nemotron3": ({}, ["nemotron3_disable_thinking"]),
    "nemotron3_disable_thinking": ({"enable_thinking": False}, []),
    "nemotron3_preserve_thinking": ({"truncate_history_thinking": False}, []),
}
TAGS = [*WORDS, "<think>", "</think>"]
MARKUP = tuple(f"<{mark}{tag}>" for tag in ("think", "tool_call", "tool_response") for mark in ("", "/"))
ASK = {"role": "user", "content": "2 + 2?"}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(params=["tags are words", "tags are special"], scope="module")
def nemotron(request: pytest.FixtureRequest, small_tokenizer: Any) -> Any:
    if request.param == "tags are words":
        return chat_formats.tokenizer("qwen3")
    return small_tokenizer(chat_formats.template("nemotron3_nano"), MARKUP)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", FORMATS)
def test_texts_prompts_and_trained_turns_are_those_of_the_template(renderer_of, nemotron, name):
    options, others = FORMATS[name]
    truth = Truth(chat_formats.template("nemotron3_nano"), options)
    renderer, *prompted = (renderer_of(one, nemotron) for one in [name, *others])
    tag = nemotron.convert_tokens_to_ids("<think>")
    has_special_tags = nemotron.added_tokens_decoder[tag].special
    tags = WORDS if has_special_tags else TAGS
    num_printed, num_trained = format_truth.compare(renderer, truth, 60, prompted, tags)
    assert num_printed == 60
    assert num_trained > (40 if name == "nemotron3" else 8)


@pytest.mark.published
@pytest.mark.parametrize("name", FORMATS)
def test_texts_prompts_and_trained_turns_are_those_of_the_published_template(renderer_of, name):
    options, others = FORMATS[name]
    truth = Truth(chat_formats.published_template("nemotron3_nano"), options)
    tokenizer = chat_formats.published_tokenizer("qwen3")
    renderer, *prompted = (renderer_of(one, tokenizer) for one in [name, *others])
    num_printed, num_trained = format_truth.compare(renderer, truth, 300, prompted, TAGS)
    assert num_printed == 300
    assert num_trained > 20


def test_a_reply_follows_the_prompt_of_its_mode(renderer_of, nemotron, trained_runs):
    renderer = renderer_of("nemotron3", nemotron)
    chat = [ASK, reply("4", reasoning_content="Sum."), ASK, reply("4")]
    with notes.collected() as found:
        examples = renderer.build_supervised_examples(chat)
    assert [trained_runs(nemotron, example) for example in examples] == [
        ["Sum.\n</think>\n4<|im_end|>"],
        ["4<|im_end|>"],
    ]
    for example, name, turn in zip(
        examples, ["nemotron3", "nemotron3_disable_thinking"], [1, 3], strict=True
    ):
        prompt = renderer_of(name, nemotron).build_generation_prompt(chat[:turn])
        assert example[0].to_ints()[: prompt.length] == prompt.to_ints()
    ((note, number),) = found.items()
    assert note.what.startswith("had no thinking, trained behind the prompt of `nemotron3_disable_thinking`")
    assert number == 1


def test_a_think_block_in_the_content_is_thinking_if_the_template_prints_it_the_same(renderer_of, nemotron):
    renderer = renderer_of("nemotron3", nemotron)
    apart = [ASK, reply("4", reasoning_content="Sum.")]
    inline = [ASK, reply("<think>\nSum.\n</think>\n4")]
    examples = [renderer.build_supervised_example(chat)[0].to_ints() for chat in (apart, inline)]
    assert examples[0] == examples[1]
    empty = [ASK, reply("<think></think>4")]
    assert (
        renderer.build_supervised_example(empty)[0].to_ints()
        == renderer.build_supervised_example([ASK, reply("4")])[0].to_ints()
    )
    for content in ("<think>Sum.</think>4", "Sum.</think>4", "<think>\nSum."):
        with pytest.raises(RendererError, match="message 2: the model's template prints the think tags"):
            renderer.build_supervised_example([ASK, reply(content)])


def test_modes_without_a_prompt_for_a_reply_refuse_it(renderer_of, nemotron):
    for name, message, error in [
        ("nemotron3_disable_thinking", reply("4", reasoning_content="Sum."), "no place for the thinking of"),
        ("nemotron3_low_thinking", reply("4"), "message 2 has no thinking. Use renderer `nemotron3_dis"),
        ("nemotron3_preserve_thinking", reply("4"), "message 2 has no thinking"),
        ("nemotron3", reply("4", reasoning_content="a</think>b"), "thinking of message 2 has a think tag"),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer_of(name, nemotron).build_supervised_example([ASK, message])


def test_ultra_prints_no_newlines_around_the_closing_tag(renderer_of, nemotron, trained_runs):
    chat = [ASK, reply("4", reasoning_content="Sum.")]
    renderer = renderer_of("nemotron3_ultra", nemotron)
    example = renderer.build_supervised_example(chat)
    assert trained_runs(nemotron, example) == ["Sum.</think>4<|im_end|>"]
    trained = [token for token, weight in zip(example[0].to_ints(), example[1], strict=True) if weight]
    assert renderer.parse_response(trained) == (chat[1], True)


def test_the_effort_stands_behind_the_last_user_message_alone(renderer_of, nemotron):
    chat = [ASK, reply("4", reasoning_content="Sum."), ASK, reply("5", reasoning_content="Sum.")]
    for name, effort in [
        ("nemotron3_low_thinking", "{reasoning effort: low}"),
        ("nemotron3_ultra_medium_thinking", "{reasoning effort: efficient}"),
    ]:
        examples = renderer_of(name, nemotron).build_supervised_examples(chat)
        texts = [nemotron.decode(example[0].to_ints()) for example in examples]
        assert [text.count(f"2 + 2?\n\n{effort}<|im_end|>") for text in texts] == [1, 1]
        assert [text.count("2 + 2?<|im_end|>") for text in texts] == [0, 1]
