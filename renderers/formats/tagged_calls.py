"""Tool calls whose arguments stand one by one between tags: prints and reads values, and parses the calls.

A string is printed as it is, so text does not show whether it was a string: `5` may be a number or a text.
A value is read as what is not a string only if that is printed as the same text again, so a message that was
parsed renders to the tokens that it was parsed from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from renderers.messages import Message, to_json
from renderers.streaming import Sections, with_section_behind_content
from renderers.thinking import END_THINK

ValuePrinter: TypeAlias = Callable[[Any], str]

_CONSTANTS: Mapping[str, Any] = {"True": True, "False": False, "None": None}


def print_as_json(value: Any) -> str:
    """Returns a string unchanged, and anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def print_as_python(value: Any) -> str:
    """Returns mappings and lists as JSON, and anything else as Python prints it (`True`, `None`)."""
    return to_json(value) if isinstance(value, (Mapping, list, tuple)) else str(value)


def read_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that is the text; None for any other text."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def read_value(text: str, print_value: ValuePrinter) -> Any:
    """Returns the value that `print_value` prints as the text: the text itself unless it is another's."""
    if text in _CONSTANTS and print_value(_CONSTANTS[text]) == text:
        return _CONSTANTS[text]
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=refuse_constant)
        if print_value(value) == text:
            return value
    return text


def refuse_constant(name: str) -> Any:
    """Raises ValueError for `NaN` and the infinities, which `json.loads` reads otherwise."""
    raise ValueError(f"{name} is not JSON.")


class CallTags(NamedTuple):
    """The tags of a format. A call is `begin`, any number of `argument`, and `end`."""

    mark: str
    """The text that every call begins with."""
    begin: re.Pattern[str]
    """Its group `name` is the name of the function."""
    argument: re.Pattern[str]
    """Its groups are `key` and `value`."""
    end: re.Pattern[str]

    def parse(self, text: str, print_value: ValuePrinter) -> list[dict[str, Any]] | None:
        """Returns the calls of a text that contains only calls; None for any other text."""
        calls: list[dict[str, Any]] = []
        position = 0
        while position < len(text):
            begun = self.begin.match(text, position)
            if begun is None:
                return None
            arguments: dict[str, Any] = {}
            position = begun.end()
            while argument := self.argument.match(text, position):
                if argument["key"] in arguments:
                    return None
                arguments[argument["key"]] = read_value(argument["value"], print_value)
                position = argument.end()
            ended = self.end.match(text, position)
            if ended is None:
                return None
            calls.append({"type": "function", "function": {"name": begun["name"], "arguments": arguments}})
            position = ended.end()
        return calls

    def with_calls(self, message: Message, print_value: ValuePrinter) -> tuple[Message, bool]:
        """Returns a message with the calls in its content parsed, and whether they are well-formed."""
        content = str(message["content"])
        said, mark, _ = content.partition(self.mark)
        if not mark:
            return message, True
        tool_calls = self.parse(content[len(said) :], print_value)
        if tool_calls is None:
            return message, False
        parsed: Message = {**message, "content": said.rstrip("\n"), "tool_calls": tool_calls}
        if parsed.get("reasoning_content") == "" and END_THINK not in said:
            del parsed["reasoning_content"]  # the closing tag that required it was in the calls
        return parsed, True

    def with_sections(self, sections: Sections) -> Sections:
        """Returns these sections with calls at the end of the content."""
        return with_section_behind_content(sections, "calls", [self.mark], rstrip="\n")
