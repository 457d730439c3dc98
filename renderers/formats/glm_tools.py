"""Tool calls of GLM: `<arg_key>` and `<arg_value>` tags in `<tool_call>` tags.

GLM-4.5 puts each tag on a line of its own, later models print nothing between them: `between` is a newline or
empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from renderers.formats.tagged_calls import CallTags, print_as_json
from renderers.messages import Tool, to_json

GLM_TAGS = CallTags(
    mark="<tool_call>",
    begin=re.compile(r"\s*<tool_call>(?P<name>[^<\n]+)"),
    argument=re.compile(
        r"\s*<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
    ),
    end=re.compile(r"\s*</tool_call>\s*"),
)


def describe_tools(tools: Sequence[Tool], between: str) -> str:
    """Returns the text of the system message that describes the tools."""
    schemas = "".join(f"{to_json(tool)}\n" for tool in tools)
    pairs = (
        f"<arg_key>{{arg-key-{n}}}</arg_key>{between}<arg_value>{{arg-value-{n}}}</arg_value>" for n in (1, 2)
    )
    call = between.join([f"{GLM_TAGS.mark}{{function-name}}", *pairs, "...", "</tool_call>"])
    return (
        "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{schemas}"
        "</tools>\n\nFor each function call, output the function name and arguments within the following XML "
        f"format:\n{call}"
    )


def print_call(name: str, arguments: Mapping[str, Any], between: str) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>{between}<arg_value>{print_as_json(value)}</arg_value>{between}"
        for key, value in arguments.items()
    )
    return f"{GLM_TAGS.mark}{name}{between}{pairs}</tool_call>"
