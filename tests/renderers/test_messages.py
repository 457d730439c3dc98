"""Messages: one way to write them, and errors that say which one is wrong."""

import pytest

from cookbook.errors import RendererError
from renderers.messages import ROLES, normalize


def test_messages_are_written_in_one_way_and_the_callers_are_left_alone():
    given = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Ann",
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"name": "f", "arguments": {}}],
            "trainable": True,
        },
        {"role": "assistant", "content": "c", "thinking": "hm", "tool_calls": None},
    ]
    copy = [dict(message) for message in given]
    assert normalize(given, "some", ROLES) == [
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm"},
    ]
    assert given == copy


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"role": "critic", "content": "a"},
            "Renderer `some` cannot render role `critic` (message 2). "
            "Supported: system, developer, user, assistant, tool.",
        ),
        ({"role": "user"}, "Message 2 (role `user`) has no content. Give it a string."),
        (
            {"role": "assistant", "content": None},
            "Message 2 (role `assistant`) has no content. Give it a string.",
        ),
        (
            {"role": "user", "content": 3},
            "The content of message 2 is a int. Use a string or a list of text parts.",
        ),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "Renderer `some` cannot render a part of type `image_url` (message 2). "
            "Supported: text, with a string under `text` (and thinking likewise).",
        ),
        ("hello", "Message 2 is a str. Use a mapping with `role` and `content`."),
    ],
)
def test_a_wrong_message_is_named_by_its_number(message, error):
    with pytest.raises(RendererError) as caught:
        normalize([{"role": "user", "content": "a"}, message], "some", ROLES)
    assert str(caught.value) == error


def test_a_conversation_without_messages_is_refused():
    with pytest.raises(RendererError, match="no messages"):
        normalize([], "some", ROLES)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": "a", "thinking": "hm"}, "has `reasoning_content`, which only a reply"),
        ({"role": "tool", "content": "a", "tool_calls": [{}]}, "has `tool_calls`, which only a reply"),
        ({"role": "assistant", "content": "a", "thinking": "\ud800"}, "has half a character"),
        ({"role": "assistant", "tool_calls": [{"name": "\ud800"}]}, "has half a character"),
    ],
)
def test_what_only_a_reply_may_hold_is_checked_too(message, error):
    with pytest.raises(RendererError, match=error):
        normalize([{"role": "user", "content": "a"}, message], "some", ROLES)


def test_tools_are_checked(renderer_of, small_tokenizer):
    renderer = renderer_of("role_colon", small_tokenizer("chatml"))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools, error in [("f", "list of function schemas"), ([{"name": "\ud800"}], "Tool 1 has half")]:
        with pytest.raises(RendererError, match=error):
            renderer.build_supervised_example(chat, tools=tools)
    with pytest.raises(RendererError, match="no place for tools"):
        renderer.build_supervised_example(chat, tools=[{"name": "f"}])
