"""The chat in the browser: its completions over HTTP, and its page in a headless Chromium."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cookbook.chat.session import ChatSession
from cookbook.chat.web import PAGE, ChatServer
from cookbook.errors import TrainingError
from cookbook.types import ModelInput, SampledSequence, SamplingParams
from renderers import Message, get_renderer
from renderers.formats.role_colon import RoleColonRenderer


class PreparedStream:
    def __init__(self, tokens: Sequence[int], seconds: float) -> None:
        self._tokens, self._seconds = tokens, seconds
        self.is_closed = False
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            if self.is_closed:
                return
            time.sleep(self._seconds)
            yield token
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        self.is_closed = True

    def result(self) -> SampledSequence:
        return SampledSequence([*self._tokens], [0.0] * len(self._tokens), "stop")


class PreparedClient:
    """A model whose replies are prepared."""

    def __init__(self, tokenizer: Any, reply: str, seconds: float = 0.0) -> None:
        self._tokenizer, self.reply, self._seconds = tokenizer, reply, seconds
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.streams: list[PreparedStream] = []
        self.error: Exception | None = None

    def stream(self, prompt: ModelInput, params: SamplingParams) -> PreparedStream:
        self.prompts.append(self._tokenizer.decode(prompt.to_ints()))
        self.params.append(params)
        tokens = self._tokenizer.encode(self.reply, add_special_tokens=False)
        self.streams.append(PreparedStream(tokens, self._seconds))
        self.streams[-1].error = self.error
        return self.streams[-1]


class CallingRenderer(RoleColonRenderer):
    """Reads every reply as the call of a tool."""

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}, True


@pytest.fixture
def clients() -> dict[str, PreparedClient]:
    from cookbook import embedded, models

    tokenizer = models.get_tokenizer(embedded.MODEL_NAME)
    return {
        "first": PreparedClient(tokenizer, "Ahoy <b>there</b>!"),
        "second": PreparedClient(tokenizer, "No."),
    }


@pytest.fixture
def server(clients: dict[str, PreparedClient]) -> Iterator[ChatServer]:
    sessions = {
        label: ChatSession(
            client,  # type: ignore[arg-type]
            get_renderer("role_colon", client._tokenizer),
            SamplingParams(max_tokens=64, temperature=0.5),
            2048,
        )
        for label, client in clients.items()
    }
    with ChatServer("a model", sessions) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def post(server: ChatServer, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{server.address}v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


ASKED = {"model": "first", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.slow
def test_a_whole_reply_and_a_streamed_one_are_the_same(
    server: ChatServer, clients: dict[str, PreparedClient]
) -> None:
    status, whole = post(server, {**ASKED, "temperature": 0, "max_tokens": 9})
    (choice,) = json.loads(whole)["choices"]
    assert (status, choice["message"]["content"]) == (200, "Ahoy <b>there</b>!")
    assert (clients["first"].params[0].temperature, clients["first"].params[0].max_tokens) == (0, 9)
    _, streamed = post(server, {**ASKED, "stream": True})
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == choice["message"]["content"]
    assert len(deltas) > 2


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({**ASKED, "model": "third"}, {}, 400),
        ({"model": "first"}, {}, 400),
        (ASKED, {"Origin": "https://elsewhere.example"}, 403),
        (ASKED, {"Host": "elsewhere.example"}, 403),
        (ASKED, {"Content-Type": "text/plain"}, 400),
    ],
)
def test_other_requests_are_refused(
    server: ChatServer, body: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    found, text = post(server, body, **headers)
    assert found == status
    assert json.loads(text)["error"]["message"]


@pytest.mark.slow
def test_an_error_in_the_middle_of_a_reply_is_answered(
    server: ChatServer, clients: dict[str, PreparedClient]
) -> None:
    clients["first"].error = TrainingError("The memory is full.")
    for body in (ASKED, {**ASKED, "stream": True}):
        assert "The memory is full." in post(server, body)[1]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "src=" not in text
    assert "innerHTML" not in text


@pytest.mark.cases(1)
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_two_models_reply_side_by_side_in_a_browser(
    server: ChatServer,
    clients: dict[str, PreparedClient],
    browser: Any,
    width: int,
    dark: bool,
    tmp_path: Path,
) -> None:
    browser.open(server.address, width=width, dark=dark)
    wait(browser, "document.querySelectorAll('section').length == 2")
    ask(browser, "Hello there")
    wait(browser, "!document.getElementById('send').disabled")
    texts = browser.evaluate("[...document.querySelectorAll('.message')].map(one => one.textContent)")
    assert texts == ["Hello there", "Ahoy <b>there</b>!", "Hello there", "No."]
    assert browser.evaluate("document.querySelector('h2').textContent") == "first temperature 0.5"
    ask(browser, "Again")
    wait(browser, "document.querySelectorAll('.message').length == 8")
    assert "Hello there" in clients["second"].prompts[-1]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert {url for url in browser.requests if not url.startswith(server.address)} == set()
    assert browser.errors == []


@pytest.mark.slow
def test_a_reply_streams_and_stops(
    server: ChatServer, clients: dict[str, PreparedClient], browser: Any
) -> None:
    for client in clients.values():
        client.reply, client._seconds = "word " * 400, 0.02
    browser.open(server.address)
    wait(browser, "document.querySelectorAll('section').length == 2")
    ask(browser, "Talk")
    wait(browser, "document.querySelectorAll('.assistant').length == 2")
    assert browser.evaluate("document.getElementById('send').disabled")
    browser.evaluate("document.getElementById('stop').click()")
    wait(browser, "!document.getElementById('send').disabled")
    length = browser.evaluate("document.querySelector('.assistant').textContent.length")
    assert 0 < length < 2000


@pytest.mark.slow
def test_calls_of_tools_are_shown(
    server: ChatServer, clients: dict[str, PreparedClient], browser: Any
) -> None:
    client = clients["first"]
    client.reply = ""
    session = server.models["first"]
    session.renderer = CallingRenderer(client._tokenizer)
    browser.open(server.address)
    wait(browser, "document.querySelectorAll('section').length == 2")
    ask(browser, "What is 1 plus 1?")
    wait(browser, "document.querySelectorAll('.call').length == 1")
    assert browser.evaluate("document.querySelector('.call').textContent") == 'add({"a": 1})'
    status, whole = post(server, ASKED)
    assert (status, json.loads(whole)["choices"][0]["finish_reason"]) == (200, "tool_calls")


def ask(browser: Any, text: str) -> None:
    browser.evaluate(
        f"document.getElementById('text').value = {json.dumps(text)};"
        "document.getElementById('ask').requestSubmit()"
    )


def wait(browser: Any, condition: str) -> None:
    for _ in range(600):
        if browser.evaluate(condition):
            return
        time.sleep(0.02)
    raise AssertionError(f"{condition} stayed false")
