"""Hermes tool calls: tools are described in the system message, and called as JSON in `<tool_call>` tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cookbook.errors import RendererError
from renderers.messages import Message, PlainMessage, Tool, function_of, to_json
from renderers.streaming import Sections, with_section_behind_content
from renderers.thinking import END_THINK

_OPEN, _CLOSE = "<tool_call>\n", "\n</tool_call>"


def describe_tools(tools: Sequence[Tool]) -> str:
    """Returns the description of the tools, which follows the text of the system message and a blank line."""
    schemas = "".join(f"\n{to_json(tool)}" for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        f"{schemas}\n</tools>\n\nFor each function call, return a json object with function name and "
        f'arguments within <tool_call></tool_call> XML tags:\n{_OPEN}{{"name": <function-name>, "arguments": '
        f"<args-json-object>}}{_CLOSE}"
    )


def print_calls(message: PlainMessage, number: int, said: str, quotes_strings: bool = False) -> str:
    """Returns the calls of a message, each on its own lines, as they follow its text `said`.

    Arguments given as a string are printed unchanged, or with `quotes_strings` as a JSON string.
    """
    text = ""
    for position, tool_call in enumerate(message.get("tool_calls", [])):
        function = function_of(tool_call, number)
        arguments = function["arguments"]
        as_it_is = isinstance(arguments, str) and not quotes_strings
        printed = arguments if as_it_is else to_json(arguments)
        text += "\n" if said or position > 0 else ""
        text += f'{_OPEN}{{"name": "{function["name"]}", "arguments": {printed}}}{_CLOSE}'
    return text


def check_calls(renderer: str, message: PlainMessage, number: int) -> None:
    """Raises RendererError for calls that could not be parsed if the model wrote them."""
    for tool_call in message.get("tool_calls", []):
        one = print_calls({"tool_calls": [tool_call]}, number, said="")
        function = function_of(tool_call, number)
        if parse_calls(one) != [{"type": "function", "function": _meant(function)}]:
            raise RendererError(
                f"Renderer `{renderer}` cannot train the tool call of message {number}: its name "
                f"{function['name']!r} and arguments {function['arguments']!r} do not make a JSON object "
                "that reads as the same call. Give a name without quotes and arguments that are a mapping "
                "with strings as keys, or remove the message."
            )


def _meant(function: Mapping[str, Any]) -> dict[str, Any] | None:
    arguments = function["arguments"]
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {"name": function["name"], "arguments": arguments}
    return None


def with_calls(message: Message) -> tuple[Message, bool]:
    """Returns a message with the calls in its content parsed, and whether they are well-formed."""
    content = str(message["content"])
    said, mark, _ = content.partition(_OPEN)
    if not mark:
        return message, True
    tool_calls = parse_calls(content[len(said) :])
    if tool_calls is None:
        return message, False
    parsed: Message = {**message, "content": said.removesuffix("\n"), "tool_calls": tool_calls}
    if parsed.get("reasoning_content") == "" and END_THINK not in said:
        del parsed["reasoning_content"]  # the closing tag that required it was in the calls
    return parsed, True


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """Returns the calls of a text that contains only calls; None for any other text."""
    *bodies, rest = text.split(_CLOSE)
    calls = [_parse_call(body.removeprefix("\n")) for body in bodies]
    known = [call for call in calls if call is not None]
    return known if bodies and not rest and len(known) == len(calls) else None


def _parse_call(text: str) -> dict[str, Any] | None:
    if not text.startswith(_OPEN):
        return None
    try:
        function = json.loads(text.removeprefix(_OPEN))
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and len(function) == 2):
        return None
    if not isinstance(arguments, dict):
        return None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def with_call_sections(sections: Sections) -> Sections:
    """Returns these sections with calls at the end of the content."""
    return with_section_behind_content(sections, "calls", [f"\n{_OPEN}", _OPEN])
