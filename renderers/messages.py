"""Messages in the OpenAI shape, and what every renderer asks of them.

Errors count messages from 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Required, TypeAlias, TypedDict

from cookbook.errors import RendererError


class ContentPart(TypedDict, total=False):
    """`{"type": "text", "text": ...}`, or in a reply `{"type": "thinking", "thinking": ...}`."""

    type: Required[str]
    text: str
    thinking: str


class Message(TypedDict, total=False):
    """One turn of a conversation.

    A list of parts reads as the concatenation of its texts, its thinking as `reasoning_content`, for
    which `thinking` is another name. `trainable` is read by `TrainOnWhat.CUSTOMIZED` alone.
    `weight`, 1 where it is missing, scales the loss of the message's tokens; at 0 it is not trained.
    Other keys reach the chat template as they are.
    """

    role: Required[str]
    content: str | list[ContentPart] | None
    reasoning_content: str | None
    thinking: str | None
    tool_calls: list[dict[str, Any]] | None
    tool_call_id: str
    name: str
    trainable: bool
    weight: float


PlainMessage: TypeAlias = dict[str, Any]
"""A checked message: `content` is a string or absent, no value is None, and none of `thinking`,
`trainable` and `weight` is left."""

Tool: TypeAlias = Mapping[str, Any]
"""A tool as OpenAI describes it: `type` is `function`, `function` has `name`, `description`, `parameters`."""

_OURS = ("thinking", "trainable", "weight")
ROLES = ("system", "developer", "user", "assistant", "tool")


def normalize(messages: Sequence[Message], renderer: str, roles: Sequence[str]) -> list[PlainMessage]:
    """Check the messages and write them in one way, leaving the caller's alone."""
    if not messages:
        raise RendererError(f"Renderer `{renderer}` was given no messages. Pass at least one.")
    return [_normalize_one(message, number, renderer, roles) for number, message in enumerate(messages, 1)]


def _normalize_one(message: Message, number: int, renderer: str, roles: Sequence[str]) -> PlainMessage:
    if not isinstance(message, Mapping):
        raise RendererError(
            f"Message {number} is a {type(message).__name__}. Use a mapping with `role` and `content`."
        )
    role = message.get("role")
    if role not in roles:
        raise RendererError(
            f"Renderer `{renderer}` cannot render role `{role}` (message {number}). "
            f"Supported: {', '.join(roles)}."
        )
    plain = {key: value for key, value in message.items() if value is not None and key not in _OURS}
    if (thinking := message.get("thinking")) is not None:
        plain.setdefault("reasoning_content", thinking)
    if "content" in plain:
        content, thought = _text_of(plain["content"], number, renderer)
        plain["content"] = _encodable(content, number)
        if thought:
            plain.setdefault("reasoning_content", thought)
    replies = [key for key in ("reasoning_content", "tool_calls") if plain.get(key)]
    for key in replies:
        if role != "assistant":
            raise RendererError(
                f"Message {number} (role `{role}`) has `{key}`, which only a reply can have. Remove it."
            )
        map_strings(partial(_encodable, number=number), plain[key])
    if "content" not in plain and not replies:
        raise RendererError(f"Message {number} (role `{role}`) has no content. Give it a string.")
    return plain


def _text_of(content: object, number: int, renderer: str) -> tuple[str, str]:
    """What the content says, and what it thinks."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, Sequence):
        raise RendererError(
            f"The content of message {number} is a {type(content).__name__}. "
            "Use a string or a list of text parts."
        )
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in texts or not isinstance(part.get(kind), str):
            raise RendererError(
                f"Renderer `{renderer}` cannot render a part of type `{kind}` (message {number}). "
                "Supported: text, with a string under `text` (and thinking likewise)."
            )
        texts[kind].append(part[kind])
    return "".join(texts["text"]), "".join(texts["thinking"])


def _encodable(text: str, number: int, what: str = "Message") -> str:
    """JSON can spell half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RendererError(
            f"{what} {number} has half a character, {text[error.start]!r}, at position {error.start}. "
            "Remove it."
        ) from error
    return text


def check_tools(tools: Sequence[Tool] | None) -> None:
    if tools is not None and (
        isinstance(tools, (str, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise RendererError("`tools` must be a list of function schemas, each a mapping.")
    for number, tool in enumerate(tools or (), 1):
        map_strings(partial(_encodable, number=number, what="Tool"), tool)


def function_of(tool_call: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The `{"name", "arguments"}` of a tool call, nested under `function` or not."""
    function = tool_call.get("function") or tool_call
    if not isinstance(function.get("name"), str) or "arguments" not in function:
        raise RendererError(
            f"A tool call of message {number} needs `name` and `arguments`; it has {', '.join(function)}."
        )
    return function


def to_json(value: object) -> str:
    """JSON as chat templates print it."""
    return json.dumps(value, ensure_ascii=False)


def map_strings(change: Callable[[str], str], value: Any) -> Any:
    """The same value with every string in it, keys included, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(change, key): map_strings(change, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(change, item) for item in value]
    return value
