"""Prints and reads the value of one argument of a call, for formats that print each between tags of its own.

A string is printed as it is, so text does not show whether it was a string: `5` may be a number or a text.
A value is read as what is not a string only if that is printed as the same text again, so a message that was
parsed renders to the tokens that it was parsed from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from renderers.messages import to_json

ValuePrinter: TypeAlias = Callable[[Any], str]

_CONSTANTS: Mapping[str, Any] = {"True": True, "False": False, "None": None}


def print_as_json(value: Any) -> str:
    """Returns a string unchanged, and anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def print_as_python(value: Any) -> str:
    """Returns mappings and lists as JSON, and anything else as Python prints it (`True`, `None`)."""
    return to_json(value) if isinstance(value, (Mapping, list, tuple)) else str(value)


def read_value(text: str, print_value: ValuePrinter) -> Any:
    """Returns the value that `print_value` prints as the text: the text itself unless it is another's."""
    if text in _CONSTANTS and print_value(_CONSTANTS[text]) == text:
        return _CONSTANTS[text]
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=_refuse_constant)
        if print_value(value) == text:
            return value
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON.")
