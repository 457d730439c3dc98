"""Borders between words, compared with tokenizers."""

import copy
import re
from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from cookbook import embedded
from cookbook.models import get_tokenizer
from renderers.borders import BORDER, parts_at_border, parts_at_lines

pieces = st.sampled_from(
    [
        BORDER,
        ": ",
        ":",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "'s",
        "'",
        "1",
        "234",
        "é",
        "e\u0301",
        "\u0301",
        "天",
        "😀",
    ]
)
texts = st.lists(pieces | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(
    params=[
        *("small", "tiny-chat", "qwen3", "llama3_1"),
        *(pytest.param(f"published {name}", marks=pytest.mark.published) for name in ("qwen3", "llama3_1")),
    ],
    scope="module",
)
def tokenizer(request: pytest.FixtureRequest, small_tokenizer: Any) -> Any:
    if request.param == "small":
        return small_tokenizer()
    if request.param == "tiny-chat":
        return get_tokenizer(embedded.MODEL_NAME)
    kind, _, name = request.param.rpartition(" ")
    return chat_formats.published_tokenizer(name) if kind else chat_formats.tokenizer(name)


def test_the_borders_of_well_known_tokenizers_are_known(tokenizer):
    assert parts_at_border(tokenizer.backend_tokenizer)


@pytest.mark.cases(1)
@settings(max_examples=200, deadline=None)
@given(before=texts, after=texts)
def test_both_sides_of_a_border_are_encoded_separately(tokenizer, before, after):
    text = f"{before}{BORDER}{after}"

    def encode(part: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids

    for border in re.finditer(BORDER, text):
        middle = border.start() + 1
        assert encode(text) == encode(text[:middle]) + encode(text[middle:])


@pytest.mark.cases(1)
@settings(max_examples=200, deadline=None)
@given(before=texts, after=texts)
def test_both_sides_of_a_line_break_are_encoded_separately_if_the_first_is_in_front_of_a_letter(
    tokenizer, before, after
):
    assert parts_at_lines(tokenizer.backend_tokenizer)
    text = f"{before}\n{after}"

    def encode(part: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids

    for line in re.finditer(r"\n(?=\S)", text):
        middle = line.end()
        assert encode(text) == encode(f"{text[:middle]}x")[:-1] + encode(text[middle:])


@pytest.mark.parametrize("changes", [{"lstrip": True}, {"content": "a\nb"}], ids=str)
def test_line_breaks_are_no_borders_if_a_token_may_hold_them(small_tokenizer, changes):
    tokenizer = copy.deepcopy(small_tokenizer())
    assert parts_at_lines(tokenizer.backend_tokenizer)
    tokenizer.add_tokens([AddedToken(**{"content": "<|y|>", "normalized": False, **changes})])
    assert not parts_at_lines(tokenizer.backend_tokenizer)


def with_words(pattern: str) -> Any:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        ("pre_tokenizer", pre_tokenizers.Metaspace()),
        ("pre_tokenizer", with_words(r": \p{L}+| ?[^\s\p{L}\p{N}]+|\s+")),
        ("pre_tokenizer", with_words(r"\s+(?!\S)|\s+| ?\p{L}+")),
        ("normalizer", normalizers.Replace(": ", ":")),
        ("added", AddedToken("Note: ")),
    ],
)
def test_a_tokenizer_that_may_join_the_two_sides_has_no_border(small_tokenizer, part, other):
    backend = copy.deepcopy(small_tokenizer().backend_tokenizer)
    assert parts_at_border(backend)
    if part == "added":
        backend.add_tokens([other])
    else:
        setattr(backend, part, other)
    assert not parts_at_border(backend)
