"""The type of a field: a description of its values, and whether a value fits."""

from __future__ import annotations

import ast
import enum
import json
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

import chz
from chz.blueprint import Castable

from cookbook.config.chz_private import Param, can_be_cast, class_named, is_subtype_instance
from cookbook.config.config_files import MappingValue, WrittenValue, current_name, is_own
from cookbook.errors import ConfigError
from cookbook.utils import json_files
from cookbook.utils.json_files import JsonOrigin

INDEX = re.compile("0|[1-9][0-9]{0,4}")
"""The index of a list item."""
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)
CLASS_NAME = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_][\w.]*)?")


def alternatives(kind: Any) -> Sequence[Any]:
    """Returns the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def item_type(kind: Any) -> Any | None:
    """Returns the type of the items of a list or of a mapping's values, also if it is optional; else None."""
    for one in alternatives(kind):
        container = get_origin(one) or one
        if container in _LISTS or container in _MAPPINGS:
            return (get_args(one) or (Any,))[0 if container in _LISTS else -1]
    return None


def is_list(kind: Any) -> bool:
    return any((get_origin(one) or one) in _LISTS for one in alternatives(kind))


def is_mapping(kind: Any) -> bool:
    return any((get_origin(one) or one) in _MAPPINGS for one in alternatives(kind))


def is_plain_mapping(kind: Any) -> bool:
    """Returns whether a field takes a mapping of any JSON values, such as the variables of a template."""
    return is_mapping(kind) and item_type(kind) is Any


def takes_item(kind: Any, item: str) -> bool:
    return kind is Any or is_mapping(kind) or (is_list(kind) and INDEX.fullmatch(item) is not None)


def holds_classes(kind: Any) -> bool:
    """Returns whether a field takes objects with fields of their own, or a list of them."""
    if (item := item_type(kind)) is not None:
        return holds_classes(item)
    return any(isinstance(one, type) and chz.is_chz(one) for one in alternatives(kind))


def takes_objects(kind: Any) -> bool:
    """Returns whether a field takes only objects, which code has to create, and no scalar or choice."""
    if (item := item_type(kind)) is not None:
        return takes_objects(item)
    return not all(
        get_origin(one) is Literal
        or one in (str, int, float, bool, type(None), Any)
        or (isinstance(one, type) and issubclass(one, enum.Enum))
        for one in alternatives(kind)
    )


def is_own_class(param: Param, name: str) -> bool:
    """Returns whether a name is that of a class of this project."""
    found = class_named(param, current_name(name))
    return isinstance(found, type) and is_own(found.__module__)


def choices(kind: Any) -> list[Any]:
    """Returns the values of a Literal or of an Enum; [] for any other type."""
    found: list[Any] = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            found += get_args(one)
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            found += [member.value for member in one]
    return found


def fits(param: Param, value: Any) -> bool:
    """Returns whether the value of a setting can be the value of a field."""
    kinds = alternatives(param.type)
    value = to_chz_value(value, param.type)
    if param.type is Any and not isinstance(value, Castable):
        return True
    if value is None or isinstance(value, bool):
        is_no_number = value is None or bool in kinds or not {int, float}.intersection(kinds)
        return is_no_number and is_subtype_instance(value, param.type)
    if isinstance(value, list | tuple):
        return is_list(param.type)
    if isinstance(value, Mapping):
        return is_mapping(param.type) or (holds_classes(param.type) and not is_list(param.type))
    if not holds_classes(param.type) or is_list(param.type):
        if can_be_cast(param, value.value):
            return True
        return takes_objects(param.type) and ":" in value.value and _names_a_class(param, value.value)
    is_none = value.value == "None" and type(None) in kinds
    return is_none or _names_a_class(param, value.value)


def _names_a_class(param: Param, name: str) -> bool:
    """Returns whether a name is that of a class or function that creates a value of the field."""
    return CLASS_NAME.fullmatch(name) is not None and class_named(param, name) is not None


def to_chz_value(value: Any, kind: Any) -> Any:
    """Returns a value in the form that chz takes.

    A list becomes an empty list or tuple, because its items have keys of their own. YAML reads `on` and `off`
    as bools; if a field takes these words, the bools become text again.
    """
    if isinstance(value, MappingValue):
        return dict(value.items)
    if isinstance(value, bool) and bool not in alternatives(kind) and {"on", "off"} <= set(choices(kind)):
        return Castable("on" if value else "off")
    if isinstance(value, Castable) and takes_objects(kind):
        value = type(value)(current_name(value.value))
    is_empty = isinstance(value, Castable) and value.value.strip() == "[]"
    if isinstance(value, list) or (is_empty and is_list(kind)):
        return () if any((get_origin(one) or one) is tuple for one in alternatives(kind)) else []
    if isinstance(value, Castable) and not value.value.strip() and is_list(kind) and holds_classes(kind):
        return []
    return value


def plain_value(value: Any) -> Any:
    """Returns a value of a plain mapping: as a file has it, or read from text as JSON or as Python writes it.

    Text that is neither is itself the value.
    """
    if isinstance(value, WrittenValue):
        return value.written
    if not isinstance(value, Castable):
        return value
    text = value.value.strip()
    origin = JsonOrigin("the value", ConfigError, "")
    with suppress(ConfigError):
        return json_files.value_of(text, origin)
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, ConfigError):
        return json_files.value_of(json.dumps(ast.literal_eval(text)), origin)
    return value.value


def nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns the mapping with these plain values at these paths; [] is before the items of a list."""
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, value in values.items():
        below.setdefault(path[0], {})[path[1:]] = value

    def joined(parts: dict[tuple[str, ...], Any]) -> Any:
        is_list = parts.get(()) == []
        deeper = {path: value for path, value in parts.items() if path}
        if not deeper:
            return parts[()]
        items = nested(deeper)
        return [items[index] for index in sorted(items, key=int)] if is_list else items

    return {name: joined(parts) for name, parts in below.items()}


def describe_classes(kind: Any) -> str:
    """Returns a description of the classes that a field takes."""
    names = [one.__name__ for one in alternatives(kind) if isinstance(one, type) and chz.is_chz(one)]
    return f"a class of {' or '.join(names)}"


def describe_type(kind: Any) -> str:
    """Returns a description of the values that a field takes, to follow `it takes`."""
    if get_origin(kind) is Literal:
        values = [str(value) for value in get_args(kind)]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if (get_origin(kind) or kind) in _LISTS:
        return f"{describe_type(item_type(kind)).removeprefix('a ')}s with commas between them"
    if is_plain_mapping(kind):
        return 'names with values, as in {"name": true}' + (
            " or None" if type(None) in get_args(kind) else ""
        )
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in get_args(kind))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        type(None): "None",
        Any: "any value",
    }
    return names.get(kind) or f"module:Class, a {getattr(kind, '__name__', kind)}"
