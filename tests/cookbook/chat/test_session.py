"""Chat sessions: history, streaming, and a full context."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from cookbook import ServiceClient, models
from cookbook.chat.session import ChatSession
from cookbook.clients.sampling import SamplingClient
from cookbook.errors import RequestError
from cookbook.types import SamplingParams
from renderers import Renderer, get_renderer

MODEL = "cookbook/tiny-chat"


@pytest.fixture(scope="module")
def client() -> SamplingClient:
    return ServiceClient(device="cpu").create_sampling_client(base_model=MODEL)


@pytest.fixture
def renderer() -> Renderer:
    return get_renderer("chat_template", models.get_tokenizer(MODEL))


@pytest.fixture
def start(client: SamplingClient, renderer: Renderer) -> Callable[..., ChatSession]:
    def start(context_length: int = 512, **params: object) -> ChatSession:
        settings = {"temperature": 0.0, "max_tokens": 64, **params}
        return ChatSession(client, renderer, SamplingParams(**settings), context_length)  # type: ignore[arg-type]

    return start


def said(session: ChatSession, text: str) -> str:
    turn = session.ask(text)
    shown = "".join(delta.text for delta in turn)
    return shown + turn.conclude().rest


@pytest.mark.slow
def test_a_reply_equals_a_sample_for_the_complete_conversation(
    start: Callable[..., ChatSession], client: SamplingClient, renderer: Renderer
) -> None:
    session = start()
    questions = ["What is the capital of Japan?", "How many legs has a spider?"]
    replies = [said(session, question) for question in questions]
    history: list[dict[str, str]] = []
    for question, reply in zip(questions, replies, strict=True):
        history.append({"role": "user", "content": question})
        prompt = renderer.build_generation_prompt(history)
        params = SamplingParams(max_tokens=64, temperature=0.0, stop=list(renderer.get_stop_sequences()))
        message, _ = renderer.parse_response(client.sample(prompt, 1, params).sequences[0].tokens)
        assert reply == message["content"]
        history.append({"role": "assistant", "content": reply})
    assert session.messages == history
    assert "Tokyo" in replies[0]
    session.reset()
    assert said(session, questions[0]) == replies[0]


def test_text_is_streamed_while_it_is_sampled(start: Callable[..., ChatSession]) -> None:
    turn = start().ask("How do I make a cup of tea?")
    pieces = [delta.text for delta in turn]
    assert len(pieces) > 5
    assert turn.conclude().message["content"] == "".join(pieces)


@pytest.mark.slow
def test_a_seed_makes_a_conversation_reproducible_with_different_turns(
    start: Callable[..., ChatSession],
) -> None:
    def talk(seed: int | None) -> list[str]:
        session = start(temperature=2.5, seed=seed, max_tokens=12)
        replies = []
        for _ in range(2):
            replies.append(said(session, "Tell me a story."))
            session.reset()
        return replies

    first, again = talk(7), talk(7)
    assert first == again
    assert first[0] != first[1]
    assert talk(8) != first


@pytest.mark.slow
def test_the_oldest_exchanges_are_dropped_when_the_context_is_full(
    start: Callable[..., ChatSession], renderer: Renderer
) -> None:
    session = start(context_length=120, max_tokens=30)
    num_dropped = 0
    for number in range(8):
        before = list(session.messages)
        turn = session.ask(f"What is {number} and how many legs has a spider?")
        num_dropped += turn.num_dropped
        kept = turn._messages
        assert kept[:-1] == before[turn.num_dropped :]
        assert kept[0]["role"] == "user", "a whole exchange goes"
        prompt = renderer.build_generation_prompt(kept)
        assert len(prompt) <= 120 - 30
        if turn.num_dropped:  # no more messages than needed
            assert len(renderer.build_generation_prompt([*before[turn.num_dropped - 2 :], kept[-1]])) > 90
        for _ in turn:
            pass
        turn.conclude()
    assert num_dropped >= 2


def test_a_message_longer_than_the_context_is_refused_and_not_kept(
    start: Callable[..., ChatSession],
) -> None:
    session = start(context_length=60)
    said(session, "Hello.")
    before = list(session.messages)
    with pytest.raises(
        RequestError, match=r"results in a prompt of \d+ tokens, and the context length is 60"
    ):
        session.ask("word " * 100)
    assert session.messages == before


@pytest.mark.slow
def test_a_reply_says_what_truncated_it(start: Callable[..., ChatSession]) -> None:
    turn = start(max_tokens=3).ask("How do I make a cup of tea?")
    list(turn)
    assert turn.conclude().stop_reason == "length"
    turn = start(context_length=50, max_tokens=64, temperature=20.0, seed=0).ask("Tell me a story.")
    list(turn)
    assert turn.conclude().stop_reason == "context"


def test_an_interrupted_reply_is_kept_up_to_the_interruption(start: Callable[..., ChatSession]) -> None:
    session = start(max_tokens=400, temperature=3.0, seed=0)
    turn = session.ask("Tell me a story.")
    shown = "".join(delta.text for delta in itertools.islice(turn, 3))
    reply = turn.conclude(interrupted=True)
    assert reply.stop_reason == "interrupted"
    assert session.messages[-1]["role"] == "assistant"
    assert str(session.messages[-1]["content"]).startswith(shown)
    assert reply.num_tokens < 50
    assert turn._stream.result(timeout=60).tokens, "the engine stopped too"
    assert len(turn._stream.result().tokens) < 400


def test_a_question_with_an_empty_interrupted_reply_is_not_kept(start: Callable[..., ChatSession]) -> None:
    session = start()
    session.ask("Hello.").conclude(interrupted=True)
    assert session.messages == []


def test_the_prompt_contains_the_system_prompt(
    start: Callable[..., ChatSession], client: SamplingClient, renderer: Renderer
) -> None:
    session = start()
    plain = session.renderer.build_generation_prompt([{"role": "user", "content": "Hi."}]).to_ints()
    renderer.system_prompt = "Talk like a pirate."
    _, prompt = session._fit([{"role": "user", "content": "Hi."}])
    assert len(prompt) > len(plain)
    said(session, "Hi.")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
