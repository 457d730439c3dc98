"""Parsing of replies while they are sampled."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from renderers import Delta, get_renderer
from renderers.formats.role_colon import RoleColonRenderer
from renderers.streaming import START, ResponseStream, Section

few = settings(max_examples=25, deadline=None)

FORMATS = ["qwen3", "qwen3_disable_thinking", "qwen3_instruct", "qwen2_5", "llama3", "gemma3", "phi3"]
TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|assistant|>",
    "<|end|>",
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "天"}}\n</tool_call>'

snippets = [
    "<think>",
    "\n",
    "\n\n",
    "</think>",
    CALL,
    f"\n{CALL}",
    "<tool_call>\n",
    "\n</tool_call>",
    '{"name": ',
    '{"name": "f", "parameters": {"x": 1}}',
    "<think",
    "</",
    "Hi.",
    "天気😀",
    "\ufffd",
    " ",
]
openings = st.sampled_from(["", "<think>", "<think>\nHm.\n\n", "<think>\n\n</think>\n\n", "Hi.", CALL])
replies = st.builds(lambda begin, rest: begin + "".join(rest), openings, st.lists(st.sampled_from(snippets)))
sizes = st.lists(st.integers(0, 5), max_size=40)


@pytest.fixture(params=FORMATS, scope="session")
def renderer(request, renderer_of, small_tokenizer):
    date = "{# Cutting Knowledge Date #}"  # by this the renderer recognises Llama 3.1, which has tools
    tokenizer = small_tokenizer(date, TOKENS)
    return renderer_of(request.param, tokenizer)


def tokens_of(renderer: Any, text: str, ended: bool = True) -> list[int]:
    tokens = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*tokens, *(renderer.get_stop_sequences() if ended else [])]


def fed(stream: ResponseStream, tokens: list[int], sizes: list[int] = []) -> list[Delta]:  # noqa: B006
    """Returns the deltas of the tokens, fed in chunks of these sizes and then one by one."""
    deltas: list[Delta] = []
    for size in sizes:
        deltas += stream.feed(tokens[:size])
        tokens = tokens[size:]
    for token in tokens:
        deltas += stream.feed([token])
    return deltas


def joined(deltas: list[Delta]) -> dict[str, str]:
    return {
        name: text
        for name in ("content", "reasoning_content")
        if (text := "".join(delta.text for delta in deltas if delta.field == name))
    }


def fields(message: Any) -> dict[str, str]:
    return {name: message[name] for name in ("content", "reasoning_content") if message.get(name)}


@pytest.mark.cases(2)
@few
@given(text=replies, sizes=sizes)
def test_deltas_concatenate_to_the_fields_of_the_reply_for_any_chunks(renderer, text, sizes):
    tokens = tokens_of(renderer, text)
    whole, chunked, single = (renderer.parse_stream() for _ in range(3))
    deltas = whole.feed(tokens)
    message, well_formed = whole.finish()
    assert (message, well_formed) == renderer.parse_response(tokens)
    if well_formed:
        assert joined(deltas) == fields(message)
    assert joined(fed(chunked, tokens, sizes)) == joined(deltas)
    assert joined(fed(single, tokens)) == joined(deltas)


@few
@given(data=st.data(), sizes=sizes)
def test_any_tokens_can_be_fed(renderer, data, sizes):
    ids = st.integers(-1, len(renderer.tokenizer) + 1) | st.sampled_from(renderer.get_stop_sequences())
    tokens = data.draw(st.lists(ids, max_size=40))
    whole, chunked = renderer.parse_stream(), renderer.parse_stream()
    deltas = whole.feed(tokens)
    message, well_formed = whole.finish()
    assert (message, well_formed) == renderer.parse_response(tokens)
    assert joined(fed(chunked, tokens, sizes)) == joined(deltas)
    if well_formed:
        assert joined(deltas) == fields(message)


@pytest.mark.cases(4)
@few
@given(data=st.data())
def test_bytes_that_are_not_characters_are_shown_as_decoded(renderer, data):
    halves = [i for i in range(len(renderer.tokenizer)) if "\ufffd" in renderer.tokenizer.decode([i])]
    ids = st.lists(st.sampled_from(halves) | st.integers(0, len(renderer.tokenizer) - 1), max_size=60)
    tokens = [token for token in data.draw(ids) if token not in renderer.get_stop_sequences()]
    tokens += renderer.get_stop_sequences()
    stream = renderer.parse_stream()
    deltas = fed(stream, tokens)
    message, well_formed = stream.finish()
    if well_formed:
        assert joined(deltas) == fields(message)


@pytest.mark.parametrize("half", ["\xf0", "\x80", "é"])
@pytest.mark.parametrize("times", [3, 15, 16, 17, 18, 40, 200])
def test_a_long_run_of_bytes_that_are_not_characters_is_shown_before_it_ends(
    renderer_of, small_tokenizer, half, times
):
    """The tokens are of one byte each, in the byte-level alphabet, followed by a character."""
    renderer = renderer_of("gemma3", small_tokenizer("chatml", TOKENS))
    halves = {
        "\xf0": "ð",
        "\x80": "Ģ",
        "é": "Ã",
    }  # begins a character, continues one, begins a shorter one
    half_id = renderer.tokenizer.convert_tokens_to_ids(halves[half])
    assert renderer.tokenizer.decode([half_id]) == "\ufffd"
    stream = renderer.parse_stream()
    early = fed(stream, [half_id] * times)
    tokens = tokens_of(renderer, "é😀b")
    late = fed(stream, tokens)
    assert joined(early + late) == {"content": "\ufffd" * times + "é😀b"} == fields(stream.finish()[0])
    assert bool(early) == (times > 16)


def shown(renderer: Any, *chunks: str) -> list[list[Delta]]:
    stream = renderer.parse_stream()
    return [stream.feed(tokens_of(renderer, chunk, ended=False)) for chunk in chunks]


def test_only_what_may_be_markup_is_held_back(renderer_of, small_tokenizer):
    renderer = renderer_of("qwen3", small_tokenizer())
    assert shown(
        renderer, "<thi", "nk>\n", "Hm", "\n", "\nyes\n\n</", "think>", "\n\n", "Hi", " <tool", "s>"
    ) == [
        [],
        [],
        [Delta("reasoning_content", "Hm")],
        [],
        [Delta("reasoning_content", "\n\nyes")],
        [],
        [],
        [Delta("content", "Hi")],
        [Delta("content", " ")],
        [Delta("content", "<tools>")],
    ]
    assert shown(renderer, "Hi\n", "\n", "\n<tool_call>\n", '{"name"') == [
        [Delta("content", "Hi")],
        [Delta("content", "\n")],
        [Delta("content", "\n")],
        [],
    ]
    assert shown(renderer, "a<think>b") == [[Delta("content", "a<think>b")]]


def test_the_markup_of_thinking_and_calls_is_not_shown(renderer_of, small_tokenizer):
    renderer = renderer_of("qwen3", small_tokenizer())
    tokens = tokens_of(renderer, f"<think>\nHm.\n</think>\n\nLook:\n{CALL}\n{CALL}")
    stream = renderer.parse_stream()
    assert joined(fed(stream, tokens)) == {"reasoning_content": "Hm.", "content": "Look:"}
    message, well_formed = stream.finish()
    assert well_formed
    assert len(message["tool_calls"]) == 2


LABELLED = {
    START: Section("content", begins={" ": "said"}, ends={"\n\nUser:": "over"}),
    "said": Section("content", ends={"\n\nUser:": "over"}),
    "over": Section(None),
}


class Labelled(RoleColonRenderer):
    """A format in which text ends a reply."""

    name = "labelled"
    reply_sections = LABELLED


@few
@given(text=st.lists(st.sampled_from([" ", "\n", "\n\n", "User", ":", "Hi"]), max_size=9).map("".join))
def test_a_reply_that_ends_with_a_stop_text_is_shown_up_to_it(small_tokenizer, text):
    renderer = Labelled(small_tokenizer())
    stream = renderer.parse_stream()
    deltas = fed(stream, renderer.tokenizer(f" {text}\n\nUser:")["input_ids"])
    message, well_formed = stream.finish()
    if well_formed:
        assert joined(deltas) == fields(message)


def test_part_of_a_character_is_held_back_until_it_is_complete(renderer_of, small_tokenizer):
    renderer = renderer_of("gemma3", small_tokenizer("chatml", TOKENS))
    tokens = tokens_of(renderer, "a😀b")
    stream = renderer.parse_stream()
    assert [stream.feed([token]) for token in tokens] == [
        [Delta("content", "a")],
        *[[]] * (len(tokens) - 4),
        [Delta("content", "😀")],
        [Delta("content", "b")],
        [],
    ]


PARTED = {
    START: Section(None, begins={"<|header|>deep<|text|>": "deep"}, ends={"<|text|>": "said"}),
    "deep": Section("reasoning_content", ends={"<|eot|>": START}),
    "said": Section("content"),
}


class Parted(RoleColonRenderer):
    """A format in which control tokens separate the sections."""

    name = "parted"
    frame = "<|header|><|text|><|eot|>"
    reply_sections = PARTED

    def get_stop_sequences(self):
        return [self._token_id("<|im_end|>")]

    def parse_response(self, tokens):
        return {"role": "assistant", "content": self._decode(tokens, self.get_stop_sequences())[0]}, False


def test_text_that_spells_a_control_token_is_not_a_marker(small_tokenizer):
    renderer = Parted(small_tokenizer())
    ids = renderer.tokenizer.convert_tokens_to_ids
    header, text, eot = (ids(token) for token in ("<|header|>", "<|text|>", "<|eot|>"))

    def spelled(string: str) -> list[int]:
        return renderer._encoder.encode(
            renderer._encoder.guard([{"role": "user", "content": string}])[0]["content"]
        ).ids

    tokens = [header, *spelled("deep"), text, *spelled("a<|eot|>"), text, *spelled("b"), eot]
    tokens += [header, *spelled("x"), text, *spelled("c<|text|>"), eot]
    for sizes in ([], [len(tokens)]):
        assert joined(fed(renderer.parse_stream(), tokens, sizes)) == {
            "reasoning_content": "a<|eot|><|text|>b",
            "content": "c<|text|><|eot|>",
        }


OVERLAPPING = {
    START: Section("content", ends={"<a>": "short", "<a>b": "long", "\n<a>bc": "longest"}),
    "short": Section("reasoning_content"),
    "long": Section("content", begins={"!": "short", "!!": "long"}),
    "longest": Section(None),
}


class Overlapping(Parted):
    """A format whose markers have a common prefix."""

    reply_sections = OVERLAPPING


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("x<a>c", {"content": "x", "reasoning_content": "c"}),
        ("x<a>bc", {"content": "xc"}),
        ("x<a>b!c", {"content": "x", "reasoning_content": "c"}),
        ("x<a>b!!c", {"content": "xc"}),
        ("x\n<a>bc", {"content": "x"}),
        ("x\n<a>bd", {"content": "x\nd"}),
        ("x\n<a>d", {"content": "x\n", "reasoning_content": "d"}),
    ],
)
def test_the_longest_marker_matches(small_tokenizer, text, fields):
    renderer = Overlapping(small_tokenizer())
    tokens = [renderer.tokenizer.convert_tokens_to_ids({"\n": "Ċ"}.get(char, char)) for char in text]
    for sizes in ([], [len(tokens)], [4, 1, 2]):
        assert joined(fed(renderer.parse_stream(), tokens, sizes)) == fields


@pytest.fixture(scope="session")
def pieces_tokenizer():
    """Returns a tokenizer like SentencePiece, with `▁` for a space and byte fallback."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<end_of_turn>", "<start_of_turn>"])}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: 259 + i for i, piece in enumerate(["▁", "a", "b", "▁a", "é"])}
    merges = [("▁", "a")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<end_of_turn>", "<start_of_turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@few
@given(text=st.text("ab é天😀", max_size=20), sizes=sizes)
def test_a_tokenizer_with_byte_fallback_that_drops_a_space_shows_the_same(pieces_tokenizer, text, sizes):
    renderer = get_renderer("gemma3", pieces_tokenizer)
    tokens = [*pieces_tokenizer(text, add_special_tokens=False)["input_ids"], *renderer.get_stop_sequences()]
    stream = renderer.parse_stream()
    deltas = fed(stream, tokens, sizes)
    assert stream.finish() == ({"role": "assistant", "content": text}, True)
    assert "".join(delta.text for delta in deltas) == text


@pytest.mark.parametrize("text", ["word " * 8, "\n" * 40, "<think>" * 4, "天" * 8, "\ufffd" * 16])
def test_the_time_of_a_long_reply_is_linear_in_its_length(renderer_of, small_tokenizer, text):
    """Decoded characters are counted, since timings on a busy machine are unreliable."""
    renderer = renderer_of("qwen3", small_tokenizer())
    tokens = tokens_of(renderer, "<think>\n" + text * 50, ended=False)
    stream = renderer.parse_stream()
    decode = stream._characters._decode
    decoded = 0

    def counting(window):
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    stream._characters._decode = counting
    start = time.perf_counter()
    fed(stream, tokens)
    assert decoded < 40 * len(tokens)
    assert len(stream._reader._held) < 100
    assert time.perf_counter() - start < 5
