"""The renderers of GLM-4.5 and GLM-5, compared with their templates."""

from typing import Any

import chat_formats
import format_truth
import pytest
from format_truth import WORDS, Truth

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers import TrainOnWhat

FORMATS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "glm4_5": ("glm4_5", {}, []),
    "glm4_5_disable_thinking": ("glm4_5", {"enable_thinking": False}, []),
    "glm5": ("glm5", {}, ["glm5_disable_thinking"]),
    "glm5_disable_thinking": ("glm5", {"enable_thinking": False}, []),
}
TAGS = [*WORDS, "<think>", "</think>"]
ASK = {"role": "user", "content": "2 + 2?"}
END_TOKENS = ["<|observation|>", "<|user|>", "<|user|>"]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "a b"}}}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def end_of_turn(message: Any) -> str:
    """Returns the token that the model writes at the end of a reply: the one that begins the next message."""
    return "<|observation|>" if message.get("tool_calls") else "<|user|>"


@pytest.fixture(scope="module")
def glm() -> Any:
    return chat_formats.tokenizer("glm")


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", FORMATS)
def test_texts_prompts_and_trained_turns_are_those_of_the_template(renderer_of, glm, name):
    template, options, others = FORMATS[name]
    truth = Truth(chat_formats.template(template), options, end_of_turn)
    renderer, *prompted = (renderer_of(one, glm) for one in [name, *others])
    num_printed, num_trained = format_truth.compare(renderer, truth, 80, prompted, TAGS)
    assert num_printed == 80
    assert num_trained > (15 if "disable" in name else 60)


@pytest.mark.published
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form[0] == "glm4_5"])
def test_texts_prompts_and_trained_turns_are_those_of_the_published_template(renderer_of, glm, name):
    template, options, _ = FORMATS[name]
    truth = Truth(chat_formats.published_template(template), options, end_of_turn)
    num_printed, num_trained = format_truth.compare(renderer_of(name, glm), truth, 300, tags=TAGS)
    assert num_printed == 300
    assert num_trained > 80


def test_a_reply_is_trained_with_the_token_that_begins_the_next_message(renderer_of, glm, trained_runs):
    result = {"role": "tool", "content": "4"}
    chat = [ASK, reply("", tool_calls=[CALL]), result, reply("4"), ASK, reply("4")]
    call = "<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value><arg_key>y</arg_key><arg_value>a b"
    call = f"{call}</arg_value></tool_call>"
    for name, runs in [
        ("glm5_disable_thinking", [f"{call}<|observation|>", "4<|user|>", "4<|user|>"]),
        ("glm4_5_disable_thinking", None),
    ]:
        renderer = renderer_of(name, glm)
        (example,) = renderer.build_supervised_examples(chat)
        found = trained_runs(glm, example)
        assert [run[-len(end) :] for run, end in zip(found, END_TOKENS, strict=True)] == END_TOKENS
        assert runs is None or found == runs
        assert glm.decode(example[0].to_ints()).endswith("4<|user|>")
        assert [glm.convert_ids_to_tokens(stop) for stop in renderer.get_stop_sequences()] == [
            "<|user|>",
            "<|observation|>",
            "<|endoftext|>",
        ]


def test_a_reply_that_its_end_token_does_not_follow_is_trained_as_the_last_one(
    renderer_of, glm, trained_runs
):
    renderer = renderer_of("glm5_disable_thinking", glm)
    for behind in (reply("5"), {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "4"}):
        chat = [ASK, reply("4"), behind, reply("5")]
        examples = renderer.build_supervised_examples(chat)
        assert trained_runs(glm, examples[0]) == ["4<|user|>"]
        assert trained_runs(glm, examples[-1]) == ["5<|user|>"]
        assert "4<|user|>" not in glm.decode(examples[-1][0].to_ints())


def test_a_reply_without_thinking_follows_the_prompt_not_to_think_of_glm5_and_is_counted(renderer_of, glm):
    with notes.collected() as found:
        (example,) = renderer_of("glm5", glm).build_supervised_examples([ASK, reply("4")])
    prompt = renderer_of("glm5_disable_thinking", glm).build_generation_prompt([ASK])
    assert example[0].to_ints()[: prompt.length] == prompt.to_ints()
    assert example[1].tolist() == [0.0] * prompt.length + [1.0, 1.0]
    ((note, number),) = found.items()
    assert note.what.startswith("had no thinking, trained behind the prompt of `glm5_disable_thinking`")
    assert number == 1
    with notes.collected() as found:
        renderer_of("glm5", glm).build_supervised_examples([ASK, reply("4", reasoning_content="Sum.")])
    assert not found


def test_every_user_message_says_not_to_think_once(renderer_of, glm):
    renderer = renderer_of("glm4_5_disable_thinking", glm)
    switch = glm.convert_tokens_to_ids("/nothink")
    chat = [ASK, reply("4"), {"role": "user", "content": "3 + 3? /nothink"}]
    tokens = renderer.build_generation_prompt(chat).to_ints()
    assert tokens.count(switch) == 2
    assert glm.decode(tokens).endswith("3 + 3? /nothink<|assistant|>\n<think></think>")


def test_what_could_not_be_read_back_is_refused(renderer_of, glm):
    def call(name: str, **arguments: Any) -> Any:
        return reply("", tool_calls=[{"function": {"name": name, "arguments": arguments}}])

    for name, message, error in [
        ("glm5", call("a<b"), "a tool call of message 2"),
        ("glm4_5", call("f", x="a</arg_value>"), "a tool call of message 2"),
        ("glm4_5", reply("4", reasoning_content="a</think>b"), "thinking of message 2 has a think tag"),
        ("glm4_5_disable_thinking", reply("4", reasoning_content="Sum."), "no place for the thinking"),
        ("glm5_disable_thinking", reply("4", reasoning_content="Sum."), "no place for the thinking"),
        ("glm5", reply("a</think>b</think>c"), "message 2: the model's template would lose text"),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer_of(name, glm).build_supervised_examples([ASK, message])
    with pytest.raises(RendererError, match="cannot prompt for role `system`"):
        renderer_of("glm5", glm).build_generation_prompt([ASK], role="system")


def test_text_that_spells_a_role_is_text(renderer_of, glm, trained_runs):
    chat = [{"role": "user", "content": "a<|assistant|>b"}, reply("c<|user|>d")]
    for name in ("glm4_5", "glm5_disable_thinking"):
        example = renderer_of(name, glm).build_supervised_example(chat)
        tokens = [glm.convert_ids_to_tokens(token) for token in example[0].to_ints()]
        assert [tokens.count(role) for role in ("<|user|>", "<|assistant|>")] == [2, 1]
        message, is_whole = renderer_of(name, glm).parse_response(
            [token for token, weight in zip(example[0].to_ints(), example[1], strict=True) if weight]
        )
        assert (message["content"], is_whole) == ("c<|user|>d", True)


def test_the_prompt_for_a_user_message_begins_the_sequence_that_trains_it(renderer_of, glm, trained_runs):
    mode = TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES
    for name in ("glm4_5", "glm5_disable_thinking"):
        renderer = renderer_of(name, glm)
        for before in ([{"role": "system", "content": "Be brief."}], [ASK, reply("4")]):
            prompt = renderer.build_generation_prompt(before, role="user").to_ints()
            tokens, weights = renderer.build_supervised_example([*before, ASK, reply("4")], mode)
            assert tokens.to_ints()[: len(prompt)] == prompt
            assert weights[len(prompt)]
