"""Reads the bodies of OpenAI's API. Every field is honoured, has no effect by its nature, or is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook.server.bodies import object_in
from cookbook.server.promises import Refusal
from cookbook.types import SamplingParams

_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that do not change a reply."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "function_call": ("none",),
    "functions": ([],),
    "suffix": ("",),
    "echo": (False,),
}
"""Fields that are not supported, and the values that ask for nothing."""

_CHAT = {"messages", "tools", "tool_choice", "logprobs", "top_logprobs", "max_completion_tokens"}
_CHAT |= {"chat_template_kwargs"}
_COMPLETION = {"prompt", "logprobs", "best_of"}
_BOTH = {
    "model",
    "n",
    "stream",
    "stream_options",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
}

_MAX_CHOICES = 128
_MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingRequest:
    """What a chat request and a completion request have in common."""

    model: str
    num_choices: int
    params: SamplingParams
    """Without stop tokens of the model."""
    stop: Sequence[str]
    is_stream: bool
    includes_usage: bool
    """Whether a stream ends with the number of tokens."""
    with_logprobs: bool
    num_top: int
    """The number of most likely tokens whose log-probabilities are returned for each token."""


@dataclass(frozen=True)
class ChatRequest:
    sampling: SamplingRequest
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None


@dataclass(frozen=True)
class CompletionRequest:
    sampling: SamplingRequest
    prompts: list[str | list[int]]


def chat_request(content: bytes) -> ChatRequest:
    """Raises Refusal for a body that is not one, and for what is not supported."""
    body = _checked(content, _CHAT | _BOTH)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Refusal(400, "messages must be a list of at least one message.")
    tools = body.get("tools")
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise Refusal(
            400, f"tool_choice={choice!r} is not supported: a model is not forced to call. Use auto."
        )
    if tools is not None and not isinstance(tools, list):
        raise Refusal(400, "tools must be a list of function schemas.")
    with_logprobs = _value(body, "logprobs", bool, False)
    num_top = _value(body, "top_logprobs", int, 0)
    if num_top and not with_logprobs:
        raise Refusal(400, "top_logprobs needs logprobs=true.")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return ChatRequest(
        _sampling(body, _value(body, limit, int, None), with_logprobs, num_top),
        [_message(message) for message in messages],
        tools if tools and choice == "auto" else None,
        _value(body, "chat_template_kwargs", dict, None),
    )


def completion_request(content: bytes) -> CompletionRequest:
    """Raises Refusal for a body that is not one, and for what is not supported."""
    body = _checked(content, _COMPLETION | _BOTH)
    num_top = _value(body, "logprobs", int, None)
    request = _sampling(body, _value(body, "max_tokens", int, 16), num_top is not None, num_top or 0)
    if body.get("best_of") not in (None, request.num_choices):
        raise Refusal(400, "best_of is not supported. Use n.")
    return CompletionRequest(request, _prompts(body.get("prompt")))


def _checked(content: bytes, known: set[str]) -> dict[str, Any]:
    body = object_in(content, 400)
    for name, value in body.items():
        if name != "messages":  # the renderer says which message it is
            _check_characters(name, value)
        if name in known or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _NEUTRAL:
            raise Refusal(400, f"{name} is not supported by this server. Omit it.")
        if value not in _NEUTRAL[name]:
            raise Refusal(400, f"{name}={json.dumps(value)} is not supported by this server. Omit it.")
    return body


def _check_characters(name: str, value: Any) -> None:
    try:
        json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{name!a} has half a character. Remove it.") from error


def _sampling(
    body: Mapping[str, Any], max_tokens: int | None, with_logprobs: bool, num_top: int
) -> SamplingRequest:
    num_choices = _value(body, "n", int, 1)
    if not 1 <= num_choices <= _MAX_CHOICES:
        raise Refusal(400, f"Invalid n={num_choices}: must be 1 to {_MAX_CHOICES}.")
    if not 0 <= num_top <= _MAX_TOP_LOGPROBS:
        raise Refusal(400, f"{num_top} most likely tokens were requested. Use 0 to {_MAX_TOP_LOGPROBS}.")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise Refusal(400, f"Invalid stop={body['stop']!r}: must be a text or a list of texts.")
    options, seed = _value(body, "stream_options", dict, {}), _value(body, "seed", int, None)
    return SamplingRequest(
        model=_value(body, "model", str, ""),
        num_choices=num_choices,
        params=SamplingParams(
            max_tokens=max_tokens,
            seed=None if seed is None else seed % 2**64,  # negative ones are legal there
            temperature=_value(body, "temperature", float, 1.0),
            top_p=_value(body, "top_p", float, 1.0),
            top_k=_value(body, "top_k", int, -1),
        ),
        stop=stop,
        is_stream=_value(body, "stream", bool, False),
        includes_usage=bool(options.get("include_usage")),
        with_logprobs=with_logprobs,
        num_top=num_top,
    )


def _value(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Returns a field of the given type, or the default where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    is_number = kind is float and isinstance(value, int)
    if not (isinstance(value, kind) or is_number) or (isinstance(value, bool) and kind is not bool):
        raise Refusal(400, f"Invalid {name}={json.dumps(value)}: must be of type {kind.__name__}.")
    return value


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without the fields that a client repeats from a reply and that mean nothing."""
    empty = {"refusal", "audio", "annotations", "function_call"}
    return {
        name: value
        for name, value in message.items()
        if value is not None and not (name in empty and not value)
    }


def _prompts(given: Any) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(one, str) for one in given):
            return list(given)
        if all(type(one) is int for one in given):
            return [list(given)]
        if all(isinstance(one, list) and one and all(type(i) is int for i in one) for one in given):
            return [list(one) for one in given]
    raise Refusal(400, "prompt must be a text, a list of token ids, or a list of either.")
