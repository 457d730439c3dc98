"""The renderers of Qwen3.5, Qwen3.6 and Qwen3.8, compared with their templates."""

from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import Truth

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers import TrainOnWhat

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5_disable_thinking": ("qwen3_5", {"enable_thinking": False}),
    "qwen3_6": ("qwen3_6", {}),
    "qwen3_6_disable_thinking": ("qwen3_6", {"enable_thinking": False}),
    "qwen3_6_preserve_thinking": ("qwen3_6", {"preserve_thinking": True}),
    "qwen3_8": ("qwen3_8", {}),
    "qwen3_8_xhigh_reasoning": ("qwen3_8", {"reasoning_effort": "xhigh"}),
    "qwen3_8_medium_reasoning": ("qwen3_8", {"reasoning_effort": "medium"}),
    "qwen3_8_low_reasoning": ("qwen3_8", {"reasoning_effort": "low"}),
    "qwen3_8_disable_thinking": ("qwen3_8", {"enable_thinking": False}),
}
ASK = {"role": "user", "content": "2 + 2?"}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def qwen() -> Any:
    return chat_formats.tokenizer("qwen3")


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", FORMATS)
def test_texts_prompts_and_trained_turns_are_those_of_the_template(renderer_of, qwen, name):
    template, options = FORMATS[name]
    truth = Truth(chat_formats.template(template), options)
    num_printed, num_trained = format_truth.compare(renderer_of(name, qwen), truth, 40)
    assert num_printed > 30
    assert num_trained > (7 if "disable" in name else 25)


@pytest.mark.published
@pytest.mark.parametrize(
    ("name", "template", "options"),
    [
        *((name, *form) for name, form in FORMATS.items() if form[0] != "qwen3_8"),
        ("qwen3_5", "qwen3_5_small", {"enable_thinking": True}),
        ("qwen3_5_disable_thinking", "qwen3_5_small", {}),
    ],
)
def test_texts_prompts_and_trained_turns_are_those_of_the_published_template(
    renderer_of, name, template, options
):
    truth = Truth(chat_formats.published_template(template), options)
    renderer = renderer_of(name, chat_formats.published_tokenizer("qwen3"))
    _, num_trained = format_truth.compare(renderer, truth, 300)
    assert num_trained > 80


def test_what_follows_the_prompt_is_trained_to_the_end_of_the_turn(renderer_of, qwen, trained_runs):
    thought, silent = reply("4", reasoning_content="Two and two."), reply("4")
    for name, message, run in [
        ("qwen3_5", thought, "Two and two.\n</think>\n\n4<|im_end|>"),
        ("qwen3_5", silent, "\n</think>\n\n4<|im_end|>"),
        ("qwen3_5_disable_thinking", silent, "4<|im_end|>"),
        ("qwen3_8", silent, "\n</think>\n\n4<|im_end|>"),
        ("qwen3_8_disable_thinking", silent, "4<|im_end|>"),
    ]:
        assert trained_runs(qwen, renderer_of(name, qwen).build_supervised_example([ASK, message])) == [run]


def test_earlier_replies_lose_their_block_unless_the_format_keeps_it(renderer_of, qwen):
    chat = [ASK, reply("4", reasoning_content="Sum."), ASK, reply("4", reasoning_content="Again.")]
    for name, num_examples, block in [
        ("qwen3_5", 2, ""),
        ("qwen3_5_preserve_thinking", 1, "<think>\nSum.\n</think>\n\n"),
        ("qwen3_6_preserve_thinking", 1, "<think>\nSum.\n</think>\n\n"),
        ("qwen3_8", 1, "<think>\nSum.\n</think>\n\n"),
    ]:
        examples = renderer_of(name, qwen).build_supervised_examples(chat)
        assert len(examples) == num_examples
        text = qwen.decode(examples[-1][0].to_ints())
        assert f"assistant\n{block}4<|im_end|>" in text
        assert text.endswith("<think>\nAgain.\n</think>\n\n4<|im_end|>\n")


def test_a_value_that_is_no_string_is_printed_as_each_version_prints_it(renderer_of, qwen):
    arguments = {"a": True, "b": None, "c": 1.5, "d": [True], "e": {"f": None}, "g": "5", "h": "true"}
    chat = [ASK, reply("", tool_calls=[call(**arguments)])]
    for name, values in [
        ("qwen3_5", ["True", "None", "1.5", "[true]", '{"f": null}', "5", "true"]),
        ("qwen3_6", ["true", "null", "1.5", "[true]", '{"f": null}', "5", "true"]),
    ]:
        renderer = renderer_of(name, qwen)
        text = qwen.decode(renderer.build_supervised_example(chat)[0].to_ints())
        for key, value in zip(arguments, values, strict=True):
            assert f"<parameter={key}>\n{value}\n</parameter>\n" in text
        prompt = renderer.build_generation_prompt([ASK])
        tokens = renderer.build_supervised_example(chat)[0].to_ints()[prompt.length : -1]
        (read,) = renderer.parse_response(tokens)[0]["tool_calls"]
        # Text does not show whether a number was a string; a word is a constant only as it is printed.
        expected = {**arguments, "g": 5, "h": "true" if name == "qwen3_5" else True}
        assert read["function"]["arguments"] == expected


def test_arguments_given_as_json_are_printed_as_the_same_mapping(renderer_of, qwen):
    renderer = renderer_of("qwen3_5", qwen)
    texts = [
        qwen.decode(renderer.build_supervised_example([ASK, reply("", tool_calls=[one])])[0].to_ints())
        for one in (
            call(city="東京"),
            {"type": "function", "function": {"name": "f", "arguments": '{"city": "東京"}'}},
        )
    ]
    assert texts[0] == texts[1]
    empty = {"type": "function", "function": {"name": "f", "arguments": ""}}
    text = qwen.decode(renderer.build_supervised_example([ASK, reply("", tool_calls=[empty])])[0].to_ints())
    assert "<function=f>\n</function>" in text
    listed = {"type": "function", "function": {"name": "f", "arguments": "[1]"}}
    with pytest.raises(RendererError, match="message 2: its arguments are \\[1\\]. Give a mapping"):
        renderer.build_supervised_example([ASK, reply("", tool_calls=[listed])])


def test_what_could_not_be_read_back_is_refused(renderer_of, qwen):
    for name, chat, error in [
        ("qwen3_5", [ASK, reply("", tool_calls=[call("a>b")])], "a tool call of message 2"),
        ("qwen3_5", [ASK, reply("", tool_calls=[call(x="a\n</parameter>\n")])], "a tool call of message 2"),
        ("qwen3_5", [ASK, reply("4", reasoning_content="a </think> b")], "thinking of message 2 has a think"),
        (
            "qwen3_5",
            [ASK, reply("a<think>b</think>c</think>d")],
            "message 2: the model's template would lose",
        ),
        ("qwen3_5", [reply("4"), ASK, reply("4")], "message 1, which no user's message precedes"),
        ("qwen3_5", [ASK, {"role": "system", "content": "a"}, reply("4")], "the system message 2"),
        (
            "qwen3_5_disable_thinking",
            [ASK, reply("4", reasoning_content="Sum.")],
            "no place for the thinking of message 2",
        ),
        (
            "qwen3_5_disable_thinking",
            [ASK, reply("<think>\nSum.\n</think>\n\n4")],
            "no place for the thinking of message 2",
        ),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer_of(name, qwen).build_supervised_examples(chat)
    with pytest.raises(RendererError, match="cannot prompt for a reply: no message is a user's"):
        renderer_of("qwen3_5", qwen).build_generation_prompt([{"role": "system", "content": "a"}])


def test_a_reply_that_is_cut_short_or_malformed_is_not_whole(renderer_of, qwen):
    renderer = renderer_of("qwen3_5", qwen)

    def parsed(text: str) -> Any:
        return renderer.parse_response(qwen(text, add_special_tokens=False)["input_ids"])

    assert parsed("Sum.\n</think>\n\n4<|im_end|>") == (reply("4", reasoning_content="Sum."), True)
    assert parsed("<think>\nSum.\n</think>\n\n4<|im_end|>") == (reply("4", reasoning_content="Sum."), True)
    for text in [
        "Sum.<|im_end|>",
        "</think>\n\n<tool_call>\n<function=f>\n</tool_call><|im_end|>",
        "</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>\nmore<|im_end|>",
    ]:
        assert parsed(text) == (reply(text.removesuffix("<|im_end|>")), False)
    assert renderer.parse_response([len(qwen) + 5]) == (reply(""), False)


def test_think_tags_in_the_content_are_text_of_qwen3_8_and_counted(renderer_of, qwen):
    chat = [ASK, reply("<think>\nSum.\n</think>\n\n4")]
    with notes.collected() as found:
        example = renderer_of("qwen3_8", qwen).build_supervised_example(chat)
    assert qwen.decode(example[0].to_ints()).endswith(
        "<think>\n\n</think>\n\n<think>\nSum.\n</think>\n\n4<|im_end|>\n"
    )
    (note,) = found
    assert note.what.startswith("had think tags in the content, which Qwen3.8 prints as text")


def test_the_effort_of_qwen3_8_begins_the_system_message(renderer_of, qwen):
    system = {"role": "system", "content": " Be brief. "}
    for name, begins in [
        ("qwen3_8", "Reasoning effort is set to xhigh. Please"),
        ("qwen3_8_low_reasoning", "Reasoning effort is set to low. Keep"),
        ("qwen3_8_medium_reasoning", "Be brief.<|im_end|>"),
        ("qwen3_8_disable_thinking", "Be brief.<|im_end|>"),
    ]:
        renderer = renderer_of(name, qwen)
        text = qwen.decode(renderer.build_generation_prompt([system, ASK]).to_ints())
        assert text.startswith(f"<|im_start|>system\n{begins}")
        example = renderer.build_supervised_example(
            [system, ASK, reply("4")], TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES
        )
        assert "Be brief." in qwen.decode(
            [t for t, w in zip(example[0].to_ints(), example[1], strict=True) if w]
        )
    text = qwen.decode(renderer_of("qwen3_8_medium_reasoning", qwen).build_generation_prompt([ASK]).to_ints())
    assert text.startswith("<|im_start|>user")
