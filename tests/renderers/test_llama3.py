"""The renderer of Llama 3 and 3.1, against the templates of both."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cookbook.errors import RendererError
from renderers import TrainOnWhat

few = settings(max_examples=60, deadline=None)

TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|eom_id|>",
)

snippets = ["Hi.", "\n", "\n\n", " ", "  ", "天気", "😀", "é", "<think>", "ok", '"', "{"]
text = st.lists(st.sampled_from(snippets), max_size=5).map("".join)
arguments = st.dictionaries(st.sampled_from(["city", "日"]), text | st.integers() | st.none(), max_size=2)


def message(role: str, content: str | None, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> Any:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


plain = st.builds(message, st.sampled_from(["user", "assistant", "system"]), text)
tools = st.builds(message, st.just("tool"), text)
requests = st.builds(lambda a: message("assistant", None, tool_calls=[call("weather", a)]), arguments)


@pytest.fixture(params=["3", "3.1", "3.1 real"], scope="session")
def llama(request, real_tokenizer, small_tokenizer, published_template):
    if request.param == "3.1 real":
        return real_tokenizer("llama3_1")
    tokenizer = small_tokenizer(published_template("llama3" if request.param == "3" else "llama3_1"), TOKENS)
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


def conversations_for(llama: Any) -> st.SearchStrategy[list[Any]]:
    has_tools = "ipython" in llama.chat_template
    return st.lists(plain | tools | requests if has_tools else plain, min_size=1, max_size=7)


@few
@given(data=st.data())
def test_tokens_are_those_of_the_template(renderer_of, llama, template_tokens, data):
    messages = data.draw(conversations_for(llama))
    renderer = renderer_of("llama3", llama)
    assert renderer.build_supervised_example(messages)[0].to_ints() == template_tokens(llama, messages)
    prompt = renderer.build_generation_prompt(messages).to_ints()
    assert prompt == template_tokens(llama, messages, prompt=True)


@few
@given(data=st.data(), mode=st.sampled_from(TrainOnWhat))
def test_weights_are_those_the_chat_template_renderer_finds(renderer_of, llama, data, mode):
    messages = [message("user", "Hi."), *data.draw(conversations_for(llama))]
    written, found = (renderer_of(name, llama) for name in ("llama3", "chat_template"))
    (example,) = written.build_supervised_examples(messages, mode)
    (expected,) = found.build_supervised_examples(messages, mode)
    assert example[0].to_ints() == expected[0].to_ints()
    assert example[1].tolist() == expected[1].tolist()


@few
@given(said=text)
def test_the_trained_tokens_parse_back_into_the_message(renderer_of, llama, said):
    renderer = renderer_of("llama3", llama)
    tokens, weights = renderer.build_supervised_example([message("user", "a"), message("assistant", said)])
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    assert renderer.parse_response(trained) == (message("assistant", said.strip()), True)
    assert renderer.parse_response(trained[:-1]) == (message("assistant", said.strip()), False)


def test_tool_calls_parse_back_and_json_arguments_print_as_the_object_they_spell(
    renderer_of, real_tokenizer, trained_runs
):
    llama = real_tokenizer("llama3_1")
    renderer = renderer_of("llama3", llama)
    chats = [
        [message("user", "a"), message("assistant", None, tool_calls=[call("f", arguments)])]
        for arguments in ({"x": 1}, '{"x":1}')
    ]
    first, second = (renderer.build_supervised_example(chat) for chat in chats)
    assert first[0] == second[0]
    assert trained_runs(llama, first) == ['{"name": "f", "parameters": {"x": 1}}<|eot_id|>']
    trained = [token for token, weight in zip(first[0].to_ints(), first[1], strict=True) if weight]
    parsed, ended = renderer.parse_response(trained)
    assert ended
    assert parsed == {"role": "assistant", "tool_calls": [call("f", {"x": 1})]}


def test_what_the_format_has_no_place_for_is_refused(renderer_of, real_tokenizer):
    renderer = renderer_of("llama3", real_tokenizer("llama3_1"))
    for reply, error in [
        (
            message("assistant", "Let me see.", tool_calls=[call("f", {})]),
            "text beside the tool call of message 2",
        ),
        (message("assistant", "a", thinking="hm"), "thinking of message 2"),
        (message("assistant", "", tool_calls=[call("f", {}), call("g", {})]), "2 tool calls of message 2"),
        (message("assistant", "", tool_calls=[call("f", "{")]), "not JSON"),
    ]:
        with pytest.raises(RendererError, match=error):
            renderer.build_supervised_example([message("user", "a"), reply])


def test_a_tokenizer_without_its_tokens_is_refused(renderer_of, small_tokenizer):
    with pytest.raises(RendererError, match=r"`llama3` needs the token '<\|eot_id\|>'"):
        renderer_of("llama3", small_tokenizer("chatml"))
