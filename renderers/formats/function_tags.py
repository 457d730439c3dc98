"""Tool calls in `<function=name>` and `<parameter=name>` tags, as Qwen3.5 and Nemotron 3 print them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from renderers.formats.tagged_calls import CallTags, ValuePrinter

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

FUNCTION_TAGS = CallTags(
    mark="<tool_call>\n<function=",
    begin=re.compile(r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>"),
    argument=re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>", re.DOTALL),
    end=re.compile(r"\s*</function>\s*</tool_call>\s*"),
)


def print_call(name: str, arguments: Mapping[str, Any], print_value: ValuePrinter) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{print_value(value)}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"{FUNCTION_TAGS.mark}{name}>\n{parameters}</function>\n</tool_call>"
