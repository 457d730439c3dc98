"""Tools of Gemma 4: how they are described, and how calls and their arguments are printed and read.

Everything is printed in a notation like JSON, with the token `<|"|>` for quotes, keys without quotes, and
keys in alphabetical order. Source: the published templates (`format_parameters`, `format_argument`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from renderers.formats.tagged_calls import refuse_constant
from renderers.messages import Tool

QUOTE = '<|"|>'
CALL, END_CALL = "<|tool_call>", "<tool_call|>"

_STANDARD_KEYS = ("description", "type", "properties", "required", "nullable")
_NAME = re.compile(r"call:(?P<name>[^{]+)")
_KEY = re.compile(r"(?P<key>[^:]*):")
_LITERAL = re.compile(r"[^,\]}]+")


def print_value(value: Any, quotes_keys: bool = False) -> str:
    """Returns a value; strings are quoted, other values are printed as Python prints them."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        quote = QUOTE if quotes_keys else ""
        pairs = (
            f"{quote}{key}{quote}:{print_value(item, quotes_keys)}" for key, item in _sorted_items(value)
        )
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, Sequence):
        return f"[{','.join(print_value(item, quotes_keys) for item in value)}]"
    return str(value)


def print_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{CALL}call:{name}{print_value(arguments)}{END_CALL}"


def read_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Returns the name and the arguments of a call's text between its tags; None if it is malformed.

    In the text a quote is spelled only where it is the token.
    """
    name = _NAME.match(text)
    if name is None:
        return None
    try:
        arguments, end = _read(text, name.end())
    except (ValueError, RecursionError):
        return None
    return (name["name"], arguments) if end == len(text) and isinstance(arguments, dict) else None


def describe_tool(tool: Tool) -> str:
    """Returns the declaration of a tool, as it is printed between its tags."""
    function = tool.get("function", tool)
    text = f"declaration:{function.get('name', '')}{{description:{_quoted(function.get('description', ''))}"
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and parameters:
        text += ",parameters:{"
        if properties := parameters.get("properties"):
            text += f"properties:{{{_describe_properties(properties)}}},"
        if required := parameters.get("required"):
            text += f"required:{_quoted_list(required)},"
        if kind := parameters.get("type"):
            text += f"type:{_quoted(str(kind).upper())}}}"
    if "response" in function:
        response = function["response"] if isinstance(function["response"], Mapping) else {}
        text += ",response:{"
        if response.get("description"):
            text += f"description:{_quoted(response['description'])},"
        if str(response.get("type", "")).upper() == "OBJECT":
            text += f"type:{_quoted('OBJECT')}}}"
    return f"{text}}}".strip()


def _describe_properties(properties: Mapping[str, Any], skipped: Sequence[str] = ()) -> str:
    return ",".join(
        f"{key}:{{{','.join(_fields(value if isinstance(value, Mapping) else {}))}}}"
        for key, value in _sorted_items(properties)
        if key not in skipped
    )


def _fields(value: Mapping[str, Any]) -> Iterator[str]:
    """Yields the parts of the description of one property."""
    kind = str(value.get("type", "")).upper()
    if value.get("description"):
        yield f"description:{_quoted(value['description'])}"
    if kind == "STRING" and value.get("enum"):
        yield f"enum:{print_value(value['enum'], quotes_keys=True)}"
    items = value.get("items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        described = (_item_field(key, item) for key, item in _sorted_items(items) if item is not None)
        yield f"items:{{{','.join(described)}}}"
    if value.get("nullable"):
        yield "nullable:true"
    if kind == "OBJECT":
        properties = value.get("properties")
        has_properties = isinstance(properties, Mapping)
        inner = (
            _describe_properties(properties or {})
            if has_properties
            else _describe_properties(value, skipped=_STANDARD_KEYS)
        )
        yield f"properties:{{{inner}}}"
        if value.get("required"):
            yield f"required:{_quoted_list(value['required'])}"
    yield f"type:{_quoted(kind)}"


def _item_field(key: str, item: Any) -> str:
    if key == "properties":
        return f"properties:{{{_describe_properties(item) if isinstance(item, Mapping) else ''}}}"
    if key == "required":
        return f"required:{_quoted_list(item)}"
    if key == "type":
        item = item.upper() if isinstance(item, str) else [str(one).upper() for one in item]
    return f"{key}:{print_value(item, quotes_keys=True)}"


def _sorted_items(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the items in the order of Jinja's `dictsort`."""
    return sorted(value.items(), key=lambda item: str(item[0]).lower())


def _quoted(value: Any) -> str:
    return f"{QUOTE}{value}{QUOTE}"


def _quoted_list(values: Sequence[Any]) -> str:
    return f"[{','.join(map(_quoted, values))}]"


def _read(text: str, at: int) -> tuple[Any, int]:
    """Returns the value that begins at a position of the text, and the position behind it.

    Raises ValueError if there is none.
    """
    if text.startswith(QUOTE, at):
        start = at + len(QUOTE)
        end = text.index(QUOTE, start)
        return text[start:end], end + len(QUOTE)
    if text.startswith("{", at):
        return _read_items(text, at + 1)
    if text.startswith("[", at):
        values: list[Any] = []
        at += 1
        while not text.startswith("]", at):
            at = _behind_comma(text, at) if values else at
            value, at = _read(text, at)
            values.append(value)
        return values, at + 1
    literal = _LITERAL.match(text, at)
    if literal is None:
        raise ValueError(f"no value at {at}")
    return json.loads(literal[0], parse_constant=refuse_constant), literal.end()


def _read_items(text: str, at: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}
    while not text.startswith("}", at):
        at = _behind_comma(text, at) if items else at
        key = _KEY.match(text, at)
        if key is None or key["key"] in items:
            raise ValueError(f"no key, or a repeated one, at {at}")
        items[key["key"]], at = _read(text, key.end())
    return items, at + 1


def _behind_comma(text: str, at: int) -> int:
    if not text.startswith(",", at):
        raise ValueError(f"no comma at {at}")
    return at + 1
