"""Reads tool calls out of replies, in the forms in which chat templates print them.

These forms are known, each with any markup around it:

- a JSON list of all calls, `[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]`;
- a JSON object for each call, with these or other keys, or with the name as its only key;
- the name, the id, or both, and the arguments as a JSON object: `<function=f>{"k": 1}</function>`;
- the name, and an object with bare keys and strings between quotes of any kind: `call:f{k:<|"|>v<|"|>,n:1}`;
- the name, and each argument between tags of its own: `<function=f><parameter=k>1</parameter></function>`;
- calls as in Python, with values as in JSON or Python: `[f(k="v", n=1), g()]`.

`printed_calls` finds out which of them a template has.
"""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress
from typing import Any, NamedTuple

from renderers.formats.tagged_calls import ValuePrinter, read_value, refuse_constant

Call = dict[str, Any]
NAME, ID, ARGUMENTS = "name", "id", "arguments"
DECODER = json.JSONDecoder(parse_constant=refuse_constant)
_NAME_IN_ID = re.compile(r"(?:functions\.)?(?P<name>[^\s:]+)(?::\d+)?")


class Sentinel(NamedTuple):
    """Stands for a field of a call in a JSON value."""

    field: str


class Tags(NamedTuple):
    """What surrounds arguments that stand one by one."""

    before_key: str
    before_text: str
    before_other: str
    """What stands between a key and its value, which may show whether that is a string."""
    behind_value: str
    print_value: ValuePrinter

    def read(self, text: str, position: int) -> tuple[dict[str, Any], int]:
        """Returns the arguments at a position of a text, and where they end. Raises ValueError for others."""
        before_key, before_text, before_other, behind_value, print_value = self
        shows_kind = before_text != before_other
        arguments: dict[str, Any] = {}
        while text.startswith(before_key, position):
            start = position + len(before_key)
            found = re.compile(f"{re.escape(before_text)}|{re.escape(before_other)}").search(text, start)
            if found is None or text[start : found.start()] in arguments:
                raise ValueError("no key")
            key, start = text[start : found.start()], found.end()
            if re.search(r"[\n<>]", key):
                raise ValueError("no key")
            end = text.index(behind_value, start)
            printed = text[start:end]
            if shows_kind:
                is_text = found[0] == before_text
                arguments[key] = printed if is_text else json.loads(printed, parse_constant=refuse_constant)
            else:
                arguments[key] = _read(printed, print_value)
            position = end + len(behind_value)
        return arguments, position


class Notation(NamedTuple):
    """How an object is printed whose keys are bare: `{k:<|"|>v<|"|>,n:[1,true]}`."""

    quote: str
    end_quote: str
    """What stands before and behind a string, which is printed as it is."""
    colon: str
    comma: str

    def read(self, text: str, position: int) -> tuple[dict[str, Any], int]:
        """Returns the object at a position of a text, and where it ends. Raises ValueError if it is none."""
        if not text.startswith("{", position):
            raise ValueError("no object")
        return self._read_object(text, position)

    def _read_object(self, text: str, position: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        position += 1
        while not text.startswith("}", position):
            if found:
                position = _behind(self.comma, text, position)
            if text.startswith(self.quote, position):
                key, position = self._read_string(text, position)
                position = _behind(self.colon, text, position)
            else:
                end = text.index(self.colon, position)
                key, position = text[position:end], end + len(self.colon)
            if not key or key in found or re.search(r"[\n{}\[\],]", key):
                raise ValueError("no key")
            found[key], position = self._read_value(text, position)
        return found, position + 1

    def _read_value(self, text: str, position: int) -> tuple[Any, int]:
        if text.startswith(self.quote, position):
            return self._read_string(text, position)
        if text.startswith("{", position):
            return self._read_object(text, position)
        if not text.startswith("[", position):
            return DECODER.raw_decode(text, position)
        items: list[Any] = []
        position += 1
        while not text.startswith("]", position):
            if items:
                position = _behind(self.comma, text, position)
            item, position = self._read_value(text, position)
            items.append(item)
        return items, position + 1

    def _read_string(self, text: str, position: int) -> tuple[str, int]:
        if self.quote == '"':
            string, position = DECODER.raw_decode(text, position)
            return string, position
        start = position + len(self.quote)
        end = text.index(self.end_quote, start)
        return text[start:end], end + len(self.end_quote)


def _behind(literal: str, text: str, position: int) -> int:
    """Returns where a literal ends that stands at a position. Raises ValueError if it does not."""
    if not text.startswith(literal, position):
        raise ValueError("other markup")
    return position + len(literal)


class Form(NamedTuple):
    """How calls are printed: `first`, fields and literals of a call in turns, `between` calls, and `last`."""

    first: str
    between: str
    last: str
    fields: tuple[str, ...]
    """The variable parts of a call in their order; none if it is a JSON value."""
    literals: tuple[str, ...]
    """What follows each field within a call but the last one."""
    model: Any = None
    """The JSON value of a call with sentinels; None if the fields are printed apart."""
    is_list: bool = False
    """Whether all calls are one JSON list."""
    tags: Tags | Notation | None = None
    """How arguments are printed that are not a JSON object."""
    opening: str = ""
    """What a JSON value begins with, up to the name of the first call."""
    is_python: bool = False

    def parse(self, text: str) -> list[Call] | None:
        """Returns the calls of a text that has only calls; None for any other text."""
        found = self.parse_beginning(text)
        return found[0] if found is not None and found[1] == len(text) else None

    def parse_beginning(self, text: str) -> tuple[list[Call], int] | None:
        """Returns the calls that a text begins with, and where their markup ends; None if there are none."""
        if not text.startswith(self.first):
            return None
        try:
            calls, position = self._calls(text, len(self.first))
        except (ValueError, RecursionError):
            return None
        return (calls, position + len(self.last)) if calls and text.startswith(self.last, position) else None

    def _calls(self, text: str, position: int) -> tuple[list[Call], int]:
        if self.is_list:
            values, position = DECODER.raw_decode(text, position)
            return [self._read(value) for value in values] if isinstance(values, list) else [], position
        call, position = self._call(text, position)
        calls = [call]
        while self._goes_on(text, position):
            try:
                call, position = self._call(text, position + len(self.between))
            except (ValueError, RecursionError):
                if self.between:
                    raise
                break  # text follows
            calls.append(call)
        return calls, position

    def _goes_on(self, text: str, position: int) -> bool:
        """Returns whether another call follows. Of `between` and `last` one may begin with the other."""
        if len(self.last) > len(self.between) and text.startswith(self.last, position):
            return False
        return text.startswith(self.between, position) and text[position:] not in ("", self.last)

    def _read(self, value: Any) -> Call:
        """Returns the call in a JSON value. Raises ValueError for one of another form."""
        found: dict[str, Any] = {}
        match_model(self.model, value, found)
        return made_call(found)

    def _call(self, text: str, position: int) -> tuple[Call, int]:
        """Returns a call and where it ends. Raises ValueError if there is none."""
        if self.is_python:
            return python_call(text, position)
        if self.model is not None:
            value, position = DECODER.raw_decode(text, position)
            return self._read(value), position
        found: dict[str, Any] = {}
        for field, literal in zip(self.fields, (*self.literals, ""), strict=True):
            if field == ARGUMENTS:
                read = self.tags.read if self.tags else DECODER.raw_decode
                found[field], position = read(text, position)
            else:
                end = self._end_of_name(text, position, literal)
                found[field], position = text[position:end], end
                if not found[field] or re.search(r"[\s<>{}\[\]\"]", found[field]):
                    raise ValueError("no name")
            if not text.startswith(literal, position):
                raise ValueError("other markup")
            position += len(literal)
        return made_call(found), position

    def _end_of_name(self, text: str, position: int, literal: str) -> int:
        if literal:
            return text.index(literal, position)
        end = re.compile(r"[\s<>{}\[\]\"]").search(text, position)  # arguments follow at once
        return end.start() if end else len(text)


class PrintedCalls(NamedTuple):
    """The form of a template's calls alone, and beside the text of a reply, if it prints both."""

    alone: Form
    behind: Form | None = None
    """The form of calls behind the text."""
    before: str = ""
    """What stands before the text then."""
    spaces: str = ""
    """What stands between the text and the markup of calls behind it."""
    ahead: Form | None = None
    """The form of calls in front of the text."""

    @property
    def has_text(self) -> bool:
        return self.behind is not None or self.ahead is not None

    @property
    def marks(self) -> list[str]:
        """How calls begin in a text; empty if only a whole reply is calls."""
        form = self.behind or self.ahead or self.alone
        return [form.first] if form.first.strip() else []

    @property
    def markups(self) -> list[str]:
        """All markup of each form."""
        forms = [form for form in (self.alone, self.behind, self.ahead) if form is not None]
        return [" ".join((form.first, *form.literals, form.last)) for form in forms]

    def parse(self, text: str) -> tuple[str, list[Call]] | None:
        """Returns the text beside the calls of a reply, and the calls; None if it has none of this form."""
        if calls := self.alone.parse(text):
            return "", calls
        if self.ahead is not None:
            found = self.ahead.parse_beginning(text)
            return (text[found[1] :], found[0]) if found is not None else None
        if not text.startswith(self.before):
            return None
        for mark in self.marks:
            at = text.find(mark, len(self.before))
            while at >= 0:
                if calls := (self.behind or self.alone).parse(text[at:]):
                    return text[len(self.before) : at].removesuffix(self.spaces), calls
                at = text.find(mark, at + 1)
        return None


def made_call(found: dict[str, Any]) -> Call:
    """Returns the call of these fields. Raises ValueError if they make none."""
    name, arguments = found.get(NAME), found.get(ARGUMENTS)
    if name is None and isinstance(found.get(ID), str):
        in_id = _NAME_IN_ID.fullmatch(found[ID])
        name = in_id["name"] if in_id else None
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    call: Call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": found[ID]} if isinstance(found.get(ID), str) else call


def _read(text: str, print_value: ValuePrinter) -> Any:
    """Returns the value that is printed as the text; lists and mappings may be printed as Python does."""
    if print_value is str and text[:1] in ("[", "{"):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(text)
            return value if str(value) == text else text
    return read_value(text, print_value)


def match_model(model: Any, value: Any, found: dict[str, Any]) -> None:
    """Puts the parts of `value` at the model's sentinels into `found`. Raises ValueError if they differ."""
    if isinstance(model, Sentinel):
        found[model.field] = value
        return
    if not isinstance(model, dict):
        if model != value:
            raise ValueError("another value")
        return
    if not isinstance(value, dict) or len(value) != len(model):
        raise ValueError("another value")
    for key, part in model.items():
        if isinstance(key, Sentinel):  # the only key
            (own_key,) = value
            found[key.field] = own_key
            match_model(part, value[own_key], found)
        elif key in value:
            match_model(part, value[key], found)
        else:
            raise ValueError("another key")


_PYTHON_NAME = re.compile(r"[A-Za-z_][\w.\-]*(?=\()")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def python_call(text: str, position: int) -> tuple[Call, int]:
    """Returns the call at a position of a text, and where it ends. Raises ValueError if there is none."""
    name = _PYTHON_NAME.match(text, position)
    end = name.end() if name else -1
    while name and (end := text.find(")", end) + 1):
        try:
            call = ast.parse(f"f{text[name.end() : end]}", mode="eval").body
        except (SyntaxError, ValueError, MemoryError):
            continue
        if not isinstance(call, ast.Call) or call.args or any(each.arg is None for each in call.keywords):
            break
        arguments = {str(each.arg): _python_value(each.value) for each in call.keywords}
        return made_call({NAME: name[0], ARGUMENTS: arguments}), end
    raise ValueError("no call")


def _python_value(node: ast.expr) -> Any:
    """Returns the value of an expression that holds no names but those of JSON's constants."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List):
        return [_python_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_python_value, node.values), strict=True))
    value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError("no value of JSON")
    return value
