"""Prints and parses tool calls of DeepSeek V3 and R1: a fenced block of JSON between special tokens."""

from __future__ import annotations

import json
from typing import Any

from renderers.encoder import Encoder
from renderers.messages import PlainMessage, function_of, to_json

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
CALL_TOKENS = CALLS + END_CALLS + CALL + SEP + END_CALL

_JSON, _END_JSON = "\n```json\n", f"\n```{END_CALL}"


def print_calls(message: PlainMessage, number: int) -> str:
    """Returns the calls of a message without CALLS and END_CALLS around them; "" if there are none."""
    printed: list[str] = []
    for call in message.get("tool_calls", []):
        function = function_of(call, number)
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else to_json(arguments)
        kind = call.get("type", "function")
        printed.append(f"{CALL}{kind}{SEP}{function['name']}\n```json\n{text}\n```{END_CALL}")
    return "\n".join(printed)


def parse_calls(marked: str, encoder: Encoder) -> list[dict[str, Any]] | None:
    """Returns the calls in the marked text of a reply after CALLS; None if it is malformed."""
    body, _, behind = marked.partition(END_CALLS)
    before, *parts = body.split(CALL)
    if before or behind or not parts or not marked.endswith(END_CALLS):
        return None
    calls: list[dict[str, Any]] = []
    for position, part in enumerate(parts, 1):
        between = "" if position == len(parts) else "\n"
        kind, is_call, rest = part.removesuffix(between).partition(SEP)
        name, has_json, arguments = rest.partition(_JSON)
        is_whole = bool(is_call and name and has_json) and arguments.endswith(_END_JSON)
        found = (kind, name, arguments.removesuffix(_END_JSON))
        if (
            not is_whole
            or "\n" in kind + name
            or not part.endswith(between)
            or any(map(encoder.control.search, found))
        ):
            return None
        kind, name, arguments = encoder.unguard(found)
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
        if not isinstance(parsed, dict):
            return None
        calls.append({"type": kind, "function": {"name": name, "arguments": parsed}})
    return calls
