"""OpenAI's own client chats and completes with a base model, and with checkpoints by their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker

import cookbook
from cookbook import embedded
from cookbook.chat.remote import RemoteSession
from cookbook.clients.sampling import SamplingClient
from cookbook.clients.service import ServiceClient
from cookbook.errors import RequestError
from cookbook.server.choices import ChatChoice
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving
from renderers import Renderer, get_renderer

MODEL = embedded.MODEL_NAME
CHAT: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ADDITION: list[Any] = [{"role": "user", "content": "Add 1 and 2."}]
ADD: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}},
}
SYSTEM = "You are brief."


@pytest.fixture(scope="module")
def tuned(service: ServiceClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat format and a system prompt of its own, in the folder that is served."""
    client = service.create_training_client(
        MODEL,
        cookbook.LoraConfig(rank=2, seed=1),
        {"renderer_name": "qwen3", "system_prompt": SYSTEM},
        checkpoint_dir=tmp_path_factory.mktemp("runs"),
    )
    return Path(client.save_state("tuned").result().path)


@pytest.fixture(scope="module")
def address(service: ServiceClient, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ServerOptions([MODEL], runs=[tuned.parent], folder=tmp_path_factory.mktemp("s"), port=0)
    with serving(options, service) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def base(service: ServiceClient) -> tuple[SamplingClient, Renderer]:
    client = service.create_sampling_client(base_model=MODEL)
    return client, get_renderer("chat_template", client.get_tokenizer())


@pytest.mark.slow
def test_models_are_listed_by_name_and_an_unknown_one_is_refused(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    for name in ("other", "../tuned", "tuned/../tuned", "/etc", "tinker://../weights/x"):
        with pytest.raises(openai.NotFoundError, match="no model|no training run|Invalid tinker path"):
            client.chat.completions.create(model=name, messages=CHAT)


def test_a_reply_is_what_the_clients_in_process_sample_from_the_rendered_prompt(
    client: openai.OpenAI, base: tuple[SamplingClient, Renderer]
) -> None:
    sampler, renderer = base
    prompt = renderer.build_generation_prompt(CHAT)
    params = cookbook.SamplingParams(
        max_tokens=12, temperature=0.8, top_p=0.9, seed=3, stop=renderer.get_stop_sequences()
    )
    expected = sampler.sample(prompt, 2, params).result().sequences
    options: Any = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 3, "n": 2}
    reply = client.chat.completions.create(model=MODEL, messages=CHAT, logprobs=True, **options)
    for choice, sequence in zip(reply.choices, expected, strict=True):
        message, _ = renderer.parse_response(sequence.tokens)
        assert choice.message.content == message["content"]
        assert choice.finish_reason == sequence.stop_reason
        assert choice.logprobs is not None
        scores = [one.logprob for one in choice.logprobs.content or ()]
        num_shown = len(sequence.tokens) - (sequence.stop_reason == "stop")
        assert scores == pytest.approx((sequence.logprobs or [])[:num_shown], abs=1e-4)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == sum(len(one.tokens) for one in expected)

    streamed = ["", ""]
    finished: list[str | None] = [None, None]
    num_scores = [0, 0]
    usage = None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    ):
        usage = chunk.usage or usage
        for one in chunk.choices:
            streamed[one.index] += one.delta.content or ""
            finished[one.index] = one.finish_reason or finished[one.index]
            num_scores[one.index] += len(one.logprobs.content or ()) if one.logprobs else 0
    assert streamed == [choice.message.content for choice in reply.choices]
    assert finished == [choice.finish_reason for choice in reply.choices]
    assert num_scores == [len(choice.logprobs.content or ()) for choice in reply.choices if choice.logprobs]
    assert usage == reply.usage


def test_a_reply_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0).choices[0]
    text = whole.message.content or ""
    stop = text[len(text) // 2 :][:3]
    options: Any = {"model": MODEL, "messages": CHAT, "temperature": 0, "stop": [stop, "never"]}
    cut = client.chat.completions.create(**options).choices[0]
    assert cut.message.content == text[: text.find(stop)]
    assert cut.finish_reason == "stop"
    pieces = client.chat.completions.create(**options, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == cut.message.content


@pytest.mark.slow
def test_a_checkpoint_is_prompted_in_its_own_format_with_its_system_prompt_and_tools(
    client: openai.OpenAI, base: tuple[SamplingClient, Renderer]
) -> None:
    sampler, _ = base  # the adapter of the checkpoint is new, and changes nothing
    renderer = get_renderer("qwen3", sampler.get_tokenizer(), SYSTEM)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    history: list[Any] = [
        *ADDITION,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    prompt = renderer.build_generation_prompt(
        [*ADDITION, {"role": "assistant", "tool_calls": [call]}, history[2]], tools=[ADD]
    )
    params = cookbook.SamplingParams(max_tokens=8, temperature=0, stop=renderer.get_stop_sequences())
    (sequence,) = sampler.sample(prompt, 1, params).result().sequences
    reply = client.chat.completions.create(
        model="tuned", messages=history, tools=[ADD], temperature=0, max_tokens=8
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    message, _ = renderer.parse_response(sequence.tokens)
    assert reply.choices[0].message.content == message["content"]


def test_a_tool_call_is_returned_whole_and_at_the_end_of_a_stream(
    base: tuple[SamplingClient, Renderer],
) -> None:
    tokenizer = base[0].get_tokenizer()
    renderer = get_renderer("qwen3", tokenizer)
    text = 'Wait.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    sequence = cookbook.SampledSequence(tokens, [-0.5] * len(tokens), "stop")
    choice = ChatChoice(0, renderer, [], False, 0)
    pieces = [piece for token in tokens for piece in choice.feed(token, -0.5)] + choice.end(sequence)
    assert "".join(piece["delta"].get("content") or "" for piece in pieces).strip() == "Wait."
    (streamed,) = [call for piece in pieces for call in piece["delta"].get("tool_calls", ())]
    whole = ChatChoice(0, renderer, [], False, 0).whole(sequence)
    (call,) = whole["message"]["tool_calls"]
    for one in (streamed, call):
        assert one["type"] == "function"
        assert one["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert whole["finish_reason"] == pieces[-1]["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Wait."


def test_the_chat_in_the_terminal_talks_to_the_server(client: openai.OpenAI, address: str) -> None:
    params = cookbook.SamplingParams(max_tokens=12, temperature=0)
    session = RemoteSession(f"{address}/v1", None, params, system_prompt=None)
    assert session.model == MODEL
    for _ in range(2):
        turn = session.ask(CHAT[0]["content"])
        text = "".join(delta.text for delta in turn)
        messages: Any = session.messages
        expected = client.chat.completions.create(
            model=MODEL, messages=[*messages, *CHAT], max_tokens=12, temperature=0
        )
        assert turn.conclude().message["content"] == text == expected.choices[0].message.content
    assert len(session.messages) == 4
    with pytest.raises(RequestError, match="no model 'other'"):
        list(RemoteSession(f"{address}/v1", "other", params, None).ask("Hi"))


@pytest.mark.slow
def test_completions_continue_texts_and_tokens(
    client: openai.OpenAI, base: tuple[SamplingClient, Renderer]
) -> None:
    sampler, _ = base
    tokenizer = sampler.get_tokenizer()
    tokens = tokenizer("The capital of")["input_ids"]
    params = cookbook.SamplingParams(max_tokens=8, temperature=0)
    (sequence,) = sampler.sample(cookbook.ModelInput.from_ints(tokens), 1, params).result().sequences
    options: Any = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    reply = client.completions.create(prompt=["The capital of", "One two"], logprobs=0, **options)
    assert reply.choices[0].text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    assert client.completions.create(prompt=tokens, **options).choices[0].text == reply.choices[0].text
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert "".join(scores.tokens or ()) == reply.choices[0].text
    num_shown = len(sequence.tokens) - (sequence.stop_reason == "stop")
    assert scores.token_logprobs == pytest.approx((sequence.logprobs or [])[:num_shown], abs=1e-4)
    texts = ["", ""]
    for chunk in client.completions.create(prompt=["The capital of", "One two"], stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("reasoning_effort", "high"),
        ("an_unknown_field", 1),
        ("n", 0),
        ("seed", "one"),
        ("temperature", -1),
        ("max_tokens", 10**6),
        ("stop", [""]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        client.chat.completions.create(model=MODEL, messages=CHAT, extra_body={field: value})


def test_a_checkpoint_that_was_saved_over_http_is_chatted_with(
    client: openai.OpenAI, address: str, connect: Callable[[str], tinker.ServiceClient]
) -> None:
    trained = connect(address).create_lora_training_client(MODEL, rank=2, seed=1).result()
    path = trained.save_weights_for_sampler("one").result().path
    assert path in [model.id for model in client.models.list()]
    options: Any = {"messages": CHAT, "temperature": 0}
    texts = [
        client.chat.completions.create(model=name, **options).choices[0].message.content
        for name in (path, MODEL)
    ]
    assert texts[0] == texts[1]  # a new adapter changes nothing


def test_half_a_character_is_refused_wherever_it_is(address: str) -> None:
    half = "\ud800 hi"
    chat = {"model": MODEL, "messages": CHAT, "max_tokens": 2}
    bodies: list[tuple[str, Any]] = [
        ("completions", {"model": MODEL, "prompt": half}),
        ("completions", {"model": MODEL, "prompt": ["a", half]}),
        ("completions", {"model": half, "prompt": "a"}),
        ("completions", {"model": MODEL, "prompt": "a", half: 1}),
        ("chat/completions", {**chat, "stop": [half]}),
        ("chat/completions", {**chat, "messages": [{"role": "user", "content": half}]}),
        ("chat/completions", {**chat, "messages": [{"role": half, "content": "a"}]}),
    ]
    for path, body in bodies:
        answer = httpx.post(f"{address}/v1/{path}", content=json.dumps(body), timeout=60)
        assert answer.status_code == 400, body
        assert "half a character" in answer.text or r"\\ud800" in answer.text


@pytest.mark.slow
def test_a_seed_repeats_a_reply_also_if_it_is_negative(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CHAT, "temperature": 1.5, "max_tokens": 12}
    texts = [
        client.chat.completions.create(**options, seed=seed).choices[0].message.content
        for seed in (-5, -5, -6)
    ]
    assert texts[0] == texts[1] != texts[2]
