"""Encoding of texts, compared with the tokenizer itself."""

import copy
import re
from typing import Any

import chat_formats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from renderers.encoder import ESCAPE, Encoder, any_of
from renderers.tokens import Trail

pieces = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|x|>", "user\n", "a", " ", "\n", "天", "Hi: ", "1"])
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.mark.cases(3)
@pytest.mark.parametrize("flag", ["none", "lstrip", "rstrip", "single_word", "normalized"])
@settings(max_examples=40, deadline=None)
@given(series=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), beginning=texts)
def test_the_encoding_of_a_text_does_not_depend_on_earlier_texts(small_tokenizer, flag, series, beginning):
    tokenizer = small_tokenizer() if flag == "none" else flagged(small_tokenizer(), flag)
    encoder = Encoder(tokenizer)
    for middle, end in series:
        beginning += middle
        text = beginning + end
        assert encoder.encode(text).ids.tolist() == Encoder(tokenizer).encode(text).ids.tolist()
        if flag == "none":
            assert encoder.encode(text).ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


replies = st.lists(
    st.sampled_from(
        ["Well, then", " so", "\n", "\n\n", " ", "- 1", "天", "e\u0301", "<think>", ": ", "x", "'s"]
    )
    | st.text(max_size=3),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["small", "qwen3"])
@settings(max_examples=150, deadline=None)
@given(said=st.lists(replies, min_size=1, max_size=3), thought=st.sampled_from(["\n\n", "\nHm.\n", "\n \n"]))
def test_a_reply_that_stands_elsewhere_in_the_next_text_has_the_same_tokens(
    small_tokenizer, name, said, thought
):
    """As in formats that show a reply behind its thinking first, and without it in the history."""
    tokenizer = small_tokenizer() if name == "small" else chat_formats.tokenizer(name)
    encoder, trail, history = Encoder(tokenizer, "<|im_start|><|im_end|><think></think>"), Trail(), ""
    ids: list[int] = []
    for reply in said:
        history += "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
        text = f"{history}<think>{thought}</think>\n\n{reply}<|im_end|>\n"
        tokens = encoder.encode(text, [len(history)], trail=trail)
        ids[tokens.num_shared :] = tokens.ids.tolist()
        fresh = Encoder(tokenizer, "<|im_start|><|im_end|><think></think>")
        assert ids == fresh.encode(text, [len(history)]).ids.tolist()
        history += f"{reply}<|im_end|>\n"


def test_a_repeated_reply_is_not_encoded_again(small_tokenizer):
    encoder, begin = Encoder(small_tokenizer()), "<|im_start|>assistant\n"
    reply = "The quick brown fox jumps over a lazy dog.\n<|im_end|>"
    encoder.encode(f"{begin}Thinking.\n\n{reply}")
    found = encoder._repeated(encoder._latest, f"{begin}{reply} more", len("<|im_start|>"), len(begin))
    assert found is not None
    assert (found.start, found.end) == (len(begin), len(begin) + len(reply))
    assert found.ids == small_tokenizer()(reply, add_special_tokens=False)["input_ids"]


_flagged: dict[str, Any] = {}


def flagged(tokenizer: Any, flag: str) -> Any:
    if flag not in _flagged:
        _flagged[flag] = copy.deepcopy(tokenizer)
        _flagged[flag].add_tokens([AddedToken("<|x|>", special=True, **{"normalized": False, flag: True})])
    return _flagged[flag]


def test_changing_the_tokens_of_one_text_does_not_change_the_next(small_tokenizer):
    encoder = Encoder(small_tokenizer())
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>"
    first = encoder.encode(text).ids
    expected = first.tolist()
    first[:] = 0
    assert encoder.encode(text).ids.tolist() == expected


words = st.text("ab|<", min_size=1, max_size=4)


@given(options=st.lists(words, max_size=6), text=st.text("ab|<", max_size=12))
def test_any_of_matches_the_longest_text(options, text):
    longest_first = sorted(options, key=len, reverse=True)
    plain = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    assert any_of(options).findall(text) == plain.findall(text)


@pytest.mark.slow
@pytest.mark.parametrize("lstrip", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_encoded_in_stretches_has_the_same_tokens(small_tokenizer, lstrip, data):
    tokenizer = small_tokenizer("chatml")
    if lstrip:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken("<|x|>", special=True, lstrip=True, normalized=False)])
    encoder, whole = Encoder(tokenizer), Encoder(tokenizer)
    whole._splits_apart = False  # the copy then encodes the text at once
    scraps = [
        "<|im_start|>",
        "<|im_end|>",
        "<|x|>",
        "\n",
        " ",
        "user",
        "hello",
        ESCAPE + "1;",
        "<think>",
        "天",
    ]
    pieces = data.draw(st.lists(st.sampled_from(scraps), min_size=1, max_size=12))
    text = "".join(pieces)
    cuts = sorted({len("".join(pieces[:n])) for n in data.draw(st.sets(st.integers(1, len(pieces))))})
    ours, theirs = (one._encode_apart(text, cuts, 0, 0) for one in (encoder, whole))
    assert ours.ids == theirs.ids
    assert ours.tokens.starts == theirs.tokens.starts
