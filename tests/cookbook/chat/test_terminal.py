"""The output of the terminal, with a model of prepared replies."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from outside_world import type_at_prompt

from cookbook.chat.session import ChatSession
from cookbook.chat.terminal import Speaker, Terminal
from cookbook.errors import RequestError
from cookbook.types import ModelInput, SampledSequence, SamplingParams
from renderers import Message, get_renderer
from renderers.jinja.chat_template import ChatTemplateRenderer
from renderers.thinking import THINKING, parse_thinking


class Stream:
    """Prepared tokens; None stands for Ctrl-C."""

    def __init__(self, tokens: Sequence[int | None]) -> None:
        self._tokens = tokens
        self.is_closed = False

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            if token is None:
                raise KeyboardInterrupt
            yield token

    def close(self) -> None:
        self.is_closed = True

    def result(self) -> SampledSequence:
        tokens = [token for token in self._tokens if token is not None]
        return SampledSequence(tokens, [0.0] * len(tokens), "length" if self._tokens[-1] != 2 else "stop")


class Client:
    """Returns one prepared reply after another."""

    def __init__(self, tokenizer: Any, replies: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._replies = list(replies)
        self.prompts: list[str] = []
        self.streams: list[Stream] = []

    def stream(self, prompt: ModelInput, params: SamplingParams) -> Stream:
        self.prompts.append(self._tokenizer.decode(prompt.to_ints()))
        tokens: list[int | None] = []
        for index, part in enumerate(self._replies.pop(0).split("^C")):
            tokens += [None] * bool(index) + self._tokenizer.encode(part, add_special_tokens=False)
        self.streams.append(Stream(tokens[: params.max_tokens]))
        return self.streams[-1]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class ThinkingRenderer(ChatTemplateRenderer):
    """Parses thinking in replies, though the template has none."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.reply_sections = THINKING

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        return parse_thinking(self.tokenizer.decode([token for token in tokens if token != 2]))


@pytest.fixture
def talk(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that types lines and returns the output, of a terminal unless `piped`."""

    def talk(
        replies: Sequence[str], *lines: str, piped: bool = False, colour: bool = False, labels: str = "tuned"
    ) -> tuple[str, str, list[Client]]:
        typed = iter(lines)

        def answer(prompt: str) -> str:
            out.write(prompt)
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        type_at_prompt(monkeypatch, answer)
        monkeypatch.setenv("NO_COLOR", "" if colour else "1")
        clients = [Client(tiny_tokenizer, replies) for _ in labels.split()]
        thinks = any("<think>" in reply for reply in replies)
        renderer = (ThinkingRenderer if thinks else ChatTemplateRenderer)(tiny_tokenizer)
        speakers = [
            Speaker(label, ChatSession(client, renderer, SamplingParams(max_tokens=60), 256))  # type: ignore[arg-type]
            for label, client in zip(labels.split(), clients, strict=True)
        ]
        out: io.StringIO = io.StringIO() if piped else Tty()
        err = io.StringIO()
        typed_in = io.StringIO("\n".join(lines) + "\n") if piped else Tty()
        Terminal(typed_in, out, err).talk("A model", speakers)
        return out.getvalue(), err.getvalue(), clients

    return talk


def test_questions_and_replies_alternate(talk: Any) -> None:
    out, err, (client,) = talk(["one two<|im_end|>", "three<|im_end|>"], "ten?", "  ", "nine?")
    assert out == (
        "A model\n/help names the commands, Ctrl-D leaves.\n\n"
        "you> tuned> one two\n\nyou> you> tuned> three\n\nyou> \n"
    )
    assert err == ""
    assert client.prompts[1].count("one two") == 1, "the history"


def test_a_pipe_gets_only_the_replies(talk: Any) -> None:
    out, err, _ = talk(["one<|im_end|>", "two<|im_end|>"], "ten?", "", "/reset", "nine?", piped=True)
    assert out == "one\ntwo\n"
    assert err == "[The conversation is empty now.]\n"


def test_two_models_reply_with_separate_histories(talk: Any) -> None:
    out, _, (base, tuned) = talk(
        ["one<|im_end|>", "two<|im_end|>"], "ten?", "nine?", labels="base tuned", piped=True
    )
    assert out == "base> one\ntuned> one\nbase> two\ntuned> two\n"
    assert base.prompts == tuned.prompts


def test_thinking_is_dimmed_or_in_parentheses_and_not_piped(talk: Any) -> None:
    reply = "<think>\none two\n</think>\n\nthree<|im_end|>"
    assert "tuned> (thinking: one two)\nthree\n" in talk([reply], "ten?")[0]
    assert "\033[2mone two\033[0m\nthree\n" in talk([reply], "ten?", colour=True)[0]
    assert talk([reply], "ten?", piped=True)[0] == "three\n"


def test_control_characters_are_made_visible(talk: Any) -> None:
    assert talk(["one \033[31m two\a<|im_end|>"], "ten?", piped=True)[0] == "one ␛[31m two␇\n"


def test_no_control_or_invisible_character_of_a_model_or_a_user_reaches_the_terminal(talk: Any) -> None:
    reply = "a\x9b2J\u202eb\u200b\U000e0041\r [/INST] سلام می\u200cخواهم"
    shown = "a<U+009B>2J<U+202E>b<U+200B><U+E0041>␍ [/INST] سلام می\u200cخواهم"
    out, _, _ = talk([f"{reply}<|im_end|>"], f"/system {reply}", "ten?", "/save /nowhere/\u202e")
    assert out.count(shown) == 2
    assert not set("\x9b\u202e\u200b\U000e0041\r") & set(out)
    assert talk([f"{reply}<|im_end|>"], "ten?", piped=True)[0] == f"{shown}\n"


def test_invisible_characters_in_thinking_are_made_visible_too(talk: Any) -> None:
    out, _, _ = talk(["<think>\na\x9bb\n</think>\n\nthree\u202e<|im_end|>"], "ten?")
    assert "(thinking: a<U+009B>b)\nthree<U+202E>\n" in out


def test_a_title_is_one_visible_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Tty()
    type_at_prompt(monkeypatch, lambda prompt: "/exit")
    Terminal(Tty(), out, io.StringIO()).talk("runs/\x1b]0;a\x07\nyou> hm", [])
    assert out.getvalue().splitlines()[0] == "runs/␛]0;a␇␊you> hm"


def test_characters_of_several_tokens_are_printed_complete(talk: Any) -> None:
    assert talk(["日本 🦜 ok<|im_end|>"], "ten?", piped=True)[0] == "日本 🦜 ok\n"


def test_ctrl_c_stops_only_the_reply(talk: Any) -> None:
    out, _, (client,) = talk(["one two^C three<|im_end|>", "four<|im_end|>"], "ten?", "nine?", "^C")
    assert "tuned> one two\n[stopped]\nyou> tuned> four\n" in out
    assert "Ctrl-D or /exit leaves." in out
    assert "one two<|im_end|>" in client.prompts[1]
    assert "three" not in client.prompts[1]
    assert [stream.is_closed for stream in client.streams] == [True, False], "the engine samples no further"


def test_ctrl_c_in_a_pipe_ends_the_program(talk: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(["one^C two<|im_end|>"], "ten?", piped=True)


def test_a_truncated_reply_is_reported(talk: Any, tiny_tokenizer: Any) -> None:
    assert "[truncated at max_tokens=60]" in talk(["one two " * 60], "ten?")[0]
    renderer, question = get_renderer("chat_template", tiny_tokenizer), "three"
    while len(renderer.build_generation_prompt([{"role": "user", "content": question}])) < 230:
        question += " three"
    assert "[truncated: the context is full]" in talk(["one two " * 60], question)[0]


def test_a_full_context_is_reported(talk: Any) -> None:
    long = "one two three four five six seven eight nine ten " * 5
    out, _, (client,) = talk(["one<|im_end|>"] * 4, long, long, long, long)
    assert "[The context is full: the oldest 2 messages were dropped.]" in out
    assert client.prompts[-1].count("<|im_start|>user") < 4


def test_commands_work_as_help_describes(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    out, _, (client,) = talk(
        ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"],
        "/help", "/system", "ten?", f"/save {file}", "/system system user", "nine?", f"/save {file}",
        '/system ""', "eight?", "/exit", "never?",
    )  # fmt: skip
    assert "/reset          remove" in out
    assert "[No system prompt.]" in out
    assert "[System prompt: system user The conversation restarts.]" in out
    saved = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [message["content"] for message in saved[0]["messages"]] == ["ten?", "one"]
    assert [message["content"] for message in saved[1]["messages"]] == ["system user", "nine?", "two"]
    assert "system user" in client.prompts[1]
    assert "ten?" not in client.prompts[1]
    assert "system user" not in client.prompts[2]
    assert len(client.prompts) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "Unknown command /rest. Commands: /reset /system"),
        ("/save", "/save needs a file"),
        ("/save chat.jsonl", "nothing to save"),
        ("word " * 300, "Shorten it"),
    ],
)
def test_a_mistake_is_reported_and_the_chat_continues(line: str, message: str, talk: Any) -> None:
    out, _, _ = talk(["one<|im_end|>"], line, "ten?")
    assert message in out
    assert "tuned> one\n" in out
    with pytest.raises((RequestError, OSError)):
        talk(["one<|im_end|>"], line, piped=True)


def test_a_conversation_that_cannot_be_saved_continues(talk: Any) -> None:
    out, _, _ = talk(["one<|im_end|>", "two<|im_end|>"], "ten?", "/save /nowhere/chat.jsonl", "nine?")
    assert "No such file or directory: '/nowhere/chat.jsonl'" in out
    assert "tuned> two\n" in out


def test_a_path_is_a_question_and_not_a_command(talk: Any) -> None:
    assert talk(["one<|im_end|>"], "/etc/hosts has what?", piped=True)[0] == "one\n"


def test_a_saved_conversation_is_loaded_again(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    talk(["one<|im_end|>"], "/system Be brief.", "ten?", f"/save {path}")
    out, _, (client,) = talk(["two<|im_end|>"], f"/load {path}", "nine?")
    assert "[Continuing a conversation of 2 messages.]" in out
    assert all(part in client.prompts[0] for part in ("Be brief.", "ten?", "one", "nine?"))
    assert "There is no file" in talk([], f"/load {tmp_path / 'none.jsonl'}")[0]


def test_the_base_model_joins_with_the_conversation_so_far(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speaker(label: str, *replies: str) -> tuple[Speaker, Client]:
        client = Client(tiny_tokenizer, replies)
        params = SamplingParams(max_tokens=60)
        session = ChatSession(client, ChatTemplateRenderer(tiny_tokenizer), params, 256)  # type: ignore[arg-type]
        return Speaker(label, session), client

    tuned, _ = speaker("tuned", "one<|im_end|>", "three<|im_end|>", "four<|im_end|>")
    base, client = speaker("base", "two<|im_end|>")
    typed = iter(["ten?", "/base", "nine?", "/base", "eight?", "/exit"])
    type_at_prompt(monkeypatch, lambda prompt: next(typed))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Tty()
    Terminal(Tty(), out, io.StringIO()).talk("A model", [tuned], lambda: base)
    text = out.getvalue()
    assert "base> two\ntuned> three\n" in text
    assert text.count("base> ") == 1
    assert all(part in client.prompts[0] for part in ("ten?", "one", "nine?"))


def test_long_replies_break_between_words(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out, _, _ = talk(["one two three four five six seven eight nine ten<|im_end|>"], "ten?")
    assert "tuned> one two three four five\nsix seven eight nine ten\n" in out
