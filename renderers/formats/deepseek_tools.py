"""Prints and parses tool calls of DeepSeek V3 and R1: a fenced block of JSON between special tokens."""

from __future__ import annotations

from typing import Any

from renderers.encoder import Encoder
from renderers.formats.tagged_calls import print_as_json, read_object
from renderers.messages import PlainMessage, function_of

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
CALL_TOKENS = CALLS + END_CALLS + CALL + SEP + END_CALL

_JSON, _END_JSON = "\n```json\n", f"\n```{END_CALL}"


def print_calls(message: PlainMessage, number: int) -> str:
    """Returns the calls of a message without CALLS and END_CALLS around them; "" if there are none."""
    printed: list[str] = []
    for call in message.get("tool_calls", []):
        function = function_of(call, number)
        text = print_as_json(function["arguments"])
        kind = call.get("type", "function")
        printed.append(f"{CALL}{kind}{SEP}{function['name']}\n```json\n{text}\n```{END_CALL}")
    return "\n".join(printed)


def split_calls(marked: str) -> list[str]:
    """Returns the text of each call in the marked text of a reply after CALLS; none if it is malformed."""
    body, _, behind = marked.partition(END_CALLS)
    before, *parts = body.split(CALL)
    return [] if before or behind or not marked.endswith(END_CALLS) else parts


def parse_calls(marked: str, encoder: Encoder) -> list[dict[str, Any]] | None:
    """Returns the calls in the marked text of a reply after CALLS; None if it is malformed."""
    parts = split_calls(marked)
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
        parsed = read_object(arguments)
        if parsed is None:
            return None
        calls.append({"type": kind, "function": {"name": name, "arguments": parsed}})
    return calls or None
