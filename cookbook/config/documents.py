"""YAML and JSON files with the line of every key, which errors name as the place."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from cookbook.config.named import find_config_file, with_own_files
from cookbook.errors import ConfigError
from cookbook.utils.json_files import MAX_DEPTH

KeyPath: TypeAlias = tuple[str, ...]
"""The keys and list indices that lead to a value."""


@dataclass
class Document:
    name: str
    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """The line of each key and each list item, from 1."""
    repeated: list[str] = field(default_factory=list)
    """One sentence for each key that occurs twice in a mapping, which neither format allows."""
    _repeated: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> str:
        """Returns the place of a key, such as `configs/x.yaml line 3`, or of the nearest key above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name} line {self.lines[path]}" if path else self.name

    def _add(self, path: KeyPath, line: int) -> None:
        if path in self.lines and not any(path[:end] in self._repeated for end in range(len(path))):
            self._repeated.add(path)
            key = ".".join(path)
            self.repeated.append(
                f"{self.name} line {line}: {key} is already given in line {self.lines[path]}."
            )
        self.lines[path] = line


def read_document(path: str, argument: str = "config") -> Document:
    """Returns the document in a file, as JSON if its name ends in .json, else YAML.

    `path` may be the name of a config of this project, and `argument` is the key that named it. Raises
    ConfigError if the file is missing or cannot be read.
    """
    file = find_config_file(path, argument)
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{argument}={path} has {size:,} bytes, and a config has at most {MAX_BYTES:,}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        document = _read_json(path, text) if file.suffix == ".json" else _read_yaml(path, text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{argument}={path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except RecursionError:
        raise ConfigError(f"{argument}={path} cannot be read: {_TOO_DEEP}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{argument}={path} cannot be read: {error}") from error
    deepest = max(document.lines, key=len, default=())
    if len(deepest) > MAX_DEPTH:
        raise ConfigError(f"{document.place(deepest)} cannot be read: {_TOO_DEEP}")
    document.values = with_own_files(document.values, file)
    return document


MAX_BYTES = 2**22
MAX_DIGITS = 4300
"""The largest number of digits of a whole number that Python prints."""
MAX_VALUES = 100_000
_TOO_DEEP = f"its values are nested in more than {MAX_DEPTH} levels, and a config has a few."


class _Loader(yaml.SafeLoader):
    """Adds the line to the error of a value that its tag or form does not allow, such as 2026-02-30."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                raise ValueError(f"it has more than {MAX_DIGITS:,} characters")
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # settings are text, and Python prints no number of more than 4,300 digits
            return value
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            problem = f"{_excerpt(node.value)} cannot be read as {kind} ({error}). Put text in quotes."
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _excerpt(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(text: str) -> Any:
    """Returns the value of a YAML text. Raises YAMLError or ValueError for invalid text, and
    RecursionError for text that is nested too deeply."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_BYTES:,} are read")
    return _read_yaml("", text, with_lines=False).values


def _read_yaml(name: str, text: str, with_lines: bool = True) -> Document:
    document = Document(name)
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is not None:
        if _num_values(node, {}) > MAX_VALUES:
            raise ValueError(
                f"it has more than {MAX_VALUES:,} values once aliases (*name) are expanded, or an alias "
                "refers to a value that contains it."
            )
        if with_lines:
            _add_yaml_lines(document, node, ())
        document.values = loader.construct_document(node)
    return document


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Returns the number of values in a node with expanded aliases; infinity if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while its own values are counted
        if isinstance(node, yaml.MappingNode):
            below = [one for pair in node.value for one in pair]
        else:
            below = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_num_values(one, known) for one in below)
    return known[id(node)]


def _add_yaml_lines(document: Document, node: yaml.Node, path: KeyPath) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document._add((*path, str(index)), item.start_mark.line + 1)
            _add_yaml_lines(document, item, (*path, str(index)))
    elif isinstance(node, yaml.MappingNode):
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                document._add((*path, str(key.value)), key.start_mark.line + 1)
                _add_yaml_lines(document, value, (*path, str(key.value)))
        for one in merged:  # `<<: *anchor`, whose keys apply unless the mapping itself has them
            for mapping in one.value if isinstance(one, yaml.SequenceNode) else [one]:
                below = Document(document.name)
                _add_yaml_lines(below, mapping, path)
                document.lines = {**below.lines, **document.lines}


def _read_json(name: str, text: str) -> Document:
    document = Document(name, json.loads(text))
    starts = [match.end() for match in re.finditer("\n", text)]
    for path, offset in _json_offsets(text):
        document._add(path, bisect_right(starts, offset) + 1)
    return document


def _json_offsets(text: str) -> Generator[tuple[KeyPath, int], None, None]:
    """Yields the offset of each key and each item in text that is known to be JSON."""
    decode = json.JSONDecoder().raw_decode
    skip_space = re.compile(r"[ \t\n\r]*").match

    def after_space(offset: int) -> int:
        match = skip_space(text, offset)
        assert match is not None
        return match.end()

    def walk(offset: int, path: KeyPath) -> Generator[tuple[KeyPath, int], None, int]:
        """Returns the offset at which the value ends."""
        if text[offset] not in "{[":
            return decode(text, offset)[1]
        is_mapping, index = text[offset] == "{", 0
        offset = after_space(offset + 1)
        while text[offset] not in "}]":
            begins, below = offset, (*path, str(index))
            if is_mapping:
                key, offset = decode(text, offset)
                below = (*path, key)
                offset = after_space(after_space(offset) + 1)
            yield below, begins
            offset = after_space((yield from walk(offset, below)))
            if text[offset] == ",":
                offset = after_space(offset + 1)
            index += 1
        return offset + 1

    yield from walk(after_space(0), ())
