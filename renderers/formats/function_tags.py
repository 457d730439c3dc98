"""Tool calls in `<function=name>` and `<parameter=name>` tags, as Qwen3.5 and Nemotron 3 print them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from renderers.formats.argument_values import ValuePrinter, read_value
from renderers.messages import Message
from renderers.streaming import Section, Sections
from renderers.thinking import END_THINK

INTRODUCTION = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
"""What the description of the tools begins with."""

INSTRUCTIONS = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n"
    "multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be "
    "nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function "
    "call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge "
    "and do not tell the user about function calls\n</IMPORTANT>"
)
"""What it ends with."""

_OPEN = "<tool_call>\n<function="
_CALL = re.compile(
    r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>(?P<body>.*?)</function>\s*</tool_call>\s*", re.DOTALL
)
_PARAMETER = re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>\s*", re.DOTALL)


def print_call(name: str, arguments: Mapping[str, Any], print_value: ValuePrinter) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{print_value(value)}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"{_OPEN}{name}>\n{parameters}</function>\n</tool_call>"


def parse_calls(text: str, print_value: ValuePrinter) -> list[dict[str, Any]] | None:
    """Returns the calls of a text that contains only calls; None for any other text.

    White space between the tags is not read.
    """
    calls: list[dict[str, Any]] = []
    position = 0
    while position < len(text):
        call = _CALL.match(text, position)
        arguments = None if call is None else _arguments(call["body"], print_value)
        if call is None or arguments is None:
            return None
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
        position = call.end()
    return calls


def _arguments(body: str, print_value: ValuePrinter) -> dict[str, Any] | None:
    arguments: dict[str, Any] = {}
    position = 0
    while body[position:].strip():
        parameter = _PARAMETER.match(body, position)
        if parameter is None or parameter["key"] in arguments:
            return None
        arguments[parameter["key"]] = read_value(parameter["value"], print_value)
        position = parameter.end()
    return arguments


def with_calls(message: Message, print_value: ValuePrinter) -> tuple[Message, bool]:
    """Returns a message with the calls in its content parsed, and whether they are well-formed."""
    content = str(message["content"])
    said, mark, _ = content.partition(_OPEN)
    if not mark:
        return message, True
    tool_calls = parse_calls(content[len(said) :], print_value)
    if tool_calls is None:
        return message, False
    parsed: Message = {**message, "content": said.rstrip("\n"), "tool_calls": tool_calls}
    if parsed.get("reasoning_content") == "" and END_THINK not in said:
        del parsed["reasoning_content"]  # the closing tag that required it was in the calls
    return parsed, True


def with_call_sections(sections: Sections) -> Sections:
    """Returns these sections with calls at the end of the content."""
    calling = {
        name: replace(section, ends={**section.ends, _OPEN: "calls"}, rstrip="\n")
        if section.field == "content"
        else section
        for name, section in sections.items()
    }
    return {**calling, "calls": Section(None)}
