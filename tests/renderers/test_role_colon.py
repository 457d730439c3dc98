"""The plain-text format of base models."""

from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cookbook.errors import RendererError
from renderers import TrainOnWhat

few = settings(max_examples=50, deadline=None)

text = st.lists(st.sampled_from(["Hi.", "\n", " ", "天気", "😀", "é", "User", ":"]), max_size=5).map("".join)
text = text.filter(lambda s: "\n\nUser:" not in s)


def message(role: str, content: str) -> Any:
    return {"role": role, "content": content}


@pytest.fixture(params=["small", "qwen3", "llama3_1"], scope="session")
def tokenizer(request, small_tokenizer):
    return small_tokenizer() if request.param == "small" else chat_formats.tokenizer(request.param)


@pytest.mark.cases(1)
@few
@given(turns=st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_replies_are_trained_up_to_the_label_of_the_next_user(renderer_of, tokenizer, trained_runs, turns):
    chat = [m for a, b in turns for m in (message("user", a), message("assistant", b))]
    renderer = renderer_of("role_colon", tokenizer)
    (example,) = renderer.build_supervised_examples(chat)
    expected = "".join(f"User: {a}\n\nAssistant: {b}\n\n" for a, b in turns)
    expected = f"{tokenizer.bos_token or ''}{expected}User:"
    assert tokenizer.decode(example[0].to_ints()) == expected
    assert trained_runs(tokenizer, example) == [f" {b}\n\nUser:" for _, b in turns]
    for turn in range(1, len(chat), 2):
        prompt = renderer.build_generation_prompt(chat[:turn]).to_ints()
        assert example[0].to_ints()[: len(prompt)] == prompt


@pytest.mark.cases(1)
@few
@given(said=text)
def test_the_trained_tokens_parse_to_the_message(renderer_of, tokenizer, said):
    renderer = renderer_of("role_colon", tokenizer)
    tokens, weights = renderer.build_supervised_example([message("user", "a"), message("assistant", said)])
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    assert renderer.parse_response(trained) == (message("assistant", said), True)
    assert renderer.parse_response(trained[:-1])[1] is False
    assert renderer.get_stop_sequences() == ["\n\nUser:"]


def test_a_conversation_begins_with_bos_if_the_tokenizer_has_it(renderer_of, small_tokenizer):
    tokenizer = small_tokenizer()
    prompt = renderer_of("role_colon", tokenizer).build_generation_prompt([message("user", "a")]).to_ints()
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt) == "<bos>User: a\n\nAssistant:"


def test_other_messages_are_trained_without_their_labels(renderer_of, small_tokenizer, trained_runs):
    tokenizer = small_tokenizer()
    chat = [
        message("system", "Be kind"),
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
    ]
    example = renderer_of("role_colon", tokenizer).build_supervised_example(chat, TrainOnWhat.ALL_MESSAGES)
    assert tokenizer.decode(example[0].to_ints()) == (
        "<bos>System: Be kind\n\nUser: a\n\nAssistant: b\n\nUser: c"
    )
    assert trained_runs(tokenizer, example) == [" Be kind", " a", " b\n\nUser: c"]


@pytest.mark.parametrize(
    ("chat", "error"),
    [
        ([message("user", "a\n\nAssistant: b")], "'Assistant:', which end a turn"),
        (
            [message("user", "a"), message("assistant", "b"), message("assistant", "c")],
            "right after the assistant",
        ),
        ([message("tool", "a")], r"role `tool` \(message 1\)"),
        (
            [message("user", "a"), {**message("assistant", "b"), "thinking": "c"}],
            "cannot render `reasoning_content`",
        ),
    ],
)
def test_messages_that_the_format_does_not_support_are_refused(renderer_of, small_tokenizer, chat, error):
    with pytest.raises(RendererError, match=error):
        renderer_of("role_colon", small_tokenizer()).build_supervised_example(chat)
