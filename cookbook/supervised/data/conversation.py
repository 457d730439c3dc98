"""A conversation, and how messages, calls and tools of any spelling become those of `renderers`.

What is refused raises DataError with the end of a sentence; whoever knows the row puts its place before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cookbook.errors import DataError
from renderers import Message

ToolCall: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What one row says: messages with the tools they may call, or plain text."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """OpenAI function schemas."""
    text: str | None = None
    """Plain text; `messages` is empty then."""


ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""What roles are called elsewhere. One that is not listed stays as it is; the renderer knows its own."""

SYSTEM_KEYS = ("system", "system_prompt")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_NAMES = ("name", "tool", "tool_name")
CALL_ARGUMENTS = ("arguments", "args", "input", "tool_input", "parameters")

_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")


# -- messages ---------------------------------------------------------------------------------


def message_of(value: Any, where: str) -> Message:
    """A message as OpenAI writes it, in one spelling.

    `content` becomes a string: text parts are put together, what a tool answered is printed as
    JSON unless it is text. Reasoning, also that of a `thinking` part, stands under
    `reasoning_content`. Calls have arguments as a dict; they also stand under the legacy
    `function_call`, or in the content of a role of that name. Keys without a value and an empty
    list of calls are dropped; other keys stay.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with role and content.")
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where} has no `role` (keys: {names(message)}).")
    message["role"] = role_of(message["role"])
    calls = calls_of(message.pop("tool_calls", None), where)
    calls += calls_of(message.pop("function_call", None), where)
    if message["role"] == "function_call":
        message["role"] = "assistant"
        calls += calls_of(message.pop("content", None), where)
    if calls:
        message["tool_calls"] = calls
    _rename_reasoning(message, where)
    if "content" in message:
        message["content"], thought = content_of(message["content"], where, message["role"] == "tool")
        if thought:
            message.setdefault("reasoning_content", thought)
    _check_training_keys(message, where)
    return message  # type: ignore[return-value]


def messages_of(values: Iterable[Any], of: str = "") -> list[Message]:
    return [message_of(value, f"message {number}{of}") for number, value in enumerate(values, 1)]


def role_of(role: str) -> str:
    return ROLES.get(role.strip().lower(), role)


def content_of(value: Any, where: str, from_tool: bool = False) -> tuple[str, str]:
    """The text of a message's content and the thoughts among its parts."""
    if isinstance(value, str):
        return value, ""
    if from_tool and not is_parts(value):
        return printed(value, where), ""
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"the content of {where} is a {type(value).__name__}, not a string or a list of parts."
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind in _TEXT_PARTS:
            found, into = _text_of_part(part), texts
        elif kind in _THINKING_PARTS:
            found, into = first(part, (*_THINKING_PARTS, "text", "value")), thoughts
        else:
            raise DataError(f"{where} has a part of type `{kind}`, and only text can be trained on.")
        if not isinstance(found, str):
            raise DataError(f"{where} has a part of type `{kind}` without text.")
        into.append(found)
    return "".join(texts), "".join(thoughts)


def _text_of_part(part: Any) -> Any:
    """A part's text: itself, or under `text` or `value`, or `{"value": ...}` under `text`."""
    found = first(part, ("text", "value")) if isinstance(part, Mapping) else part
    return found.get("value") if isinstance(found, Mapping) else found


def is_parts(value: Any) -> bool:
    """Whether this is a list of content parts rather than data that happens to be a list."""
    known = (*_TEXT_PARTS, *_THINKING_PARTS, *_OTHER_PARTS)
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(part, Mapping) and part.get("type") in known for part in value)
    )


def _rename_reasoning(message: dict[str, Any], where: str) -> None:
    """Puts the reasoning under its one name; it stands under several only if they agree."""
    found = [message.pop(key) for key in REASONING_KEYS if key in message]
    for thought in found:
        if not isinstance(thought, str):
            raise DataError(f"the reasoning of {where} is a {type(thought).__name__}, not a string.")
    if found and isinstance(message.get("content"), (list, tuple)):
        found.append(content_of(message["content"], where, message["role"] == "tool")[1])
    held = [thought for thought in found if thought]
    if any(thought != held[0] for thought in held):
        raise DataError(f"{where} has two different texts of reasoning.")
    if found:
        message["reasoning_content"] = held[0] if held else ""


def _check_training_keys(message: dict[str, Any], where: str) -> None:
    if not isinstance(message.get("trainable", True), bool):
        raise DataError(f"`trainable` of {where} is {message['trainable']!r}, not true or false.")
    if "weight" in message:
        weight = message["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
            raise DataError(f"`weight` of {where} is {repr(weight)[:20]}, not a number from 0 to a million.")


# -- calls and tools --------------------------------------------------------------------------


def calls_of(value: Any, where: str) -> list[ToolCall]:
    """The calls in one call, a list of calls, or JSON of either."""
    if isinstance(value, str):
        value = decoded(value, f"a tool call of {where}") if value.strip() else None
    if value is None:
        return []
    return [call_of(call, where) for call in (value if isinstance(value, (list, tuple)) else [value])]


def call_of(value: Any, where: str) -> ToolCall:
    """`{"id", "type", "function": {"name", "arguments"}}`, the id only where there is one."""
    if isinstance(value, str):
        value = decoded(value, f"a tool call of {where}")
    if not isinstance(value, Mapping):
        raise DataError(f"a tool call of {where} is a {type(value).__name__}, not an object.")
    inner = value.get("function")
    function = inner if isinstance(inner, Mapping) else value
    name = inner if isinstance(inner, str) else first(function, CALL_NAMES)
    if not isinstance(name, str):
        raise DataError(f"a tool call of {where} has no `name` (keys: {names(function)}).")
    arguments = _arguments_of(first(function, CALL_ARGUMENTS), f"the call of `{name}` in {where}")
    call_id = first(value, ("id", "tool_call_id"))
    return {
        **({} if call_id is None else {"id": call_id}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments_of(value: Any, where: str) -> dict[str, Any]:
    """No arguments, or a blank string, mean none."""
    if isinstance(value, str):
        value = decoded(value, f"the arguments of {where}") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"the arguments of {where} are a {type(value).__name__}, not an object.")
    return dict(value)


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row, a list or JSON of one: OpenAI's schemas, or bare functions, which are wrapped."""
    for key in ("tools", "functions"):
        tools = row.get(key)
        if isinstance(tools, str):
            tools = decoded(tools, f"`{key}`") if tools.strip() else None
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise DataError(f"`{key}` is a {type(tools).__name__}, not a list of function schemas.")
        if tools:
            return [_tool_of(tool, f"tool {number}") for number, tool in enumerate(tools, 1)]
    return None


def _tool_of(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = decoded(value, where)
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is a {type(value).__name__}, not a function schema.")
    if isinstance(value.get("function"), Mapping):
        tool = {"type": "function", **value}
    else:
        tool = {
            "type": "function",
            "function": {key: item for key, item in value.items() if key != "type"},
        }
    if not isinstance(tool["function"].get("name"), str):
        raise DataError(f"{where} has no `name` (keys: {names(tool['function'])}).")
    return tool


# -- whole conversations ----------------------------------------------------------------------


def with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the system prompt of the row, unless they bring their own or it is empty."""
    system = first(row, SYSTEM_KEYS)
    if system is not None and not isinstance(system, str):
        raise DataError(f"the system prompt is a {type(system).__name__}, not a string.")
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def linked(messages: Sequence[Message]) -> list[Message]:
    """Gives calls without an id one (call00001, ...), and results the id of the call they answer.

    A result without an id answers the first open call of its own name, else the first open one.
    """
    copies: list[dict[str, Any]] = [dict(message) for message in messages]
    taken = {str(call["id"]) for message in copies for call in message.get("tool_calls", ()) if "id" in call}
    number = 0
    waiting: list[ToolCall] = []
    answered = True
    for message in copies:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                if "id" not in call:
                    number += 1
                    while f"call{number:05d}" in taken:
                        number += 1
                    call = {"id": f"call{number:05d}", **call}
                calls.append(call)
            message["tool_calls"] = calls
            waiting = [*([] if answered else waiting), *calls]
            answered = False
        elif message["role"] == "tool":
            answered = True
            _answer(message, waiting)
        elif message["role"] != "assistant":
            waiting = []
    return copies  # type: ignore[return-value]


def _answer(message: dict[str, Any], waiting: list[ToolCall]) -> None:
    call_id, name = message.get("tool_call_id"), message.get("name")
    fits = [call for call in waiting if call_id is not None and call["id"] == call_id]
    if call_id is None and waiting:
        fits = [call for call in waiting if call["function"]["name"] == name] or waiting
        message["tool_call_id"] = fits[0]["id"]
    if fits:
        waiting.remove(fits[0])


# -- values -----------------------------------------------------------------------------------


def first(values: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first of these keys that has one."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def listed(value: Any) -> list[Any] | None:
    """A list, also one that is written as JSON in a string; None for everything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def decoded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is not JSON: {error.msg} at character {error.pos} of {text[:60]!r}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is JSON that cannot be read: {error}.") from error


def printed(value: Any, where: str) -> str:
    """JSON, in the order and the script it is in."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be printed as JSON: {error}.") from error


def names(values: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, values)) or "none"
