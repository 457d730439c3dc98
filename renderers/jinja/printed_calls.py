"""Finds how a chat template prints tool calls, so that calls can be parsed out of replies.

A template is tried on calls whose names, ids and arguments are known. What it prints between them is its
markup. These forms are known, each with any markup around it:

- a JSON list of all calls, `[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]`;
- a JSON object for each call, with these or other keys, or with the name as its only key;
- the name, the id, or both, and the arguments as a JSON object: `<function=f>{"k": 1}</function>`;
- the name, and each argument between tags of its own: `<function=f><parameter=k>1</parameter></function>`;
- calls as in Python, with values as in JSON or Python: `[f(k="v", n=1), g()]`.

A form counts only if the calls that it was found from are parsed from what the template prints for them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

from renderers.formats.tagged_calls import (
    ValuePrinter,
    print_as_json,
    print_as_python,
    read_value,
    refuse_constant,
)

Call = dict[str, Any]
Print = Callable[[str, Sequence[Call]], str | None]
"""Returns what a template prints for a reply with this text and these calls; None if it refuses them."""

TEXT = "Said"
_NAMES, _KEYS = ("alfa", "bravo", "delta"), ("kone", "ktwo")
_NAME_IN_ID = re.compile(r"(?:functions\.)?(?P<name>[^\s:]+)(?::\d+)?")
_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
_NAME, _ID, _ARGUMENTS = "name", "id", "arguments"


class Tags(NamedTuple):
    """What surrounds arguments that stand one by one."""

    before_key: str
    before_text: str
    before_other: str
    """What stands between a key and its value, which may show whether that is a string."""
    behind_value: str
    print_value: ValuePrinter


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
    tags: Tags | None = None
    opening: str = ""
    """What a JSON value begins with, up to the name of the first call."""
    is_python: bool = False

    def parse(self, text: str) -> list[Call] | None:
        """Returns the calls of a text that has only calls; None for any other text."""
        if not text.startswith(self.first):
            return None
        try:
            calls, position = self._calls(text, len(self.first))
        except (ValueError, RecursionError):
            return None
        return calls if calls and text[position:] == self.last else None

    def _calls(self, text: str, position: int) -> tuple[list[Call], int]:
        if self.is_list:
            values, position = _DECODER.raw_decode(text, position)
            return [self._read(value) for value in values] if isinstance(values, list) else [], position
        calls: list[Call] = []
        while True:
            call, position = self._call(text, position)
            calls.append(call)
            behind = text[position:]
            if not self.between or not behind.startswith(self.between) or behind == self.last:
                return calls, position
            position += len(self.between)

    def _read(self, value: Any) -> Call:
        """Returns the call in a JSON value. Raises ValueError for one of another form."""
        found: dict[str, Any] = {}
        _match(self.model, value, found)
        return _made(found)

    def _call(self, text: str, position: int) -> tuple[Call, int]:
        """Returns a call and where it ends. Raises ValueError if there is none."""
        if self.is_python:
            return _python_call(text, position)
        if self.model is not None:
            value, position = _DECODER.raw_decode(text, position)
            return self._read(value), position
        found: dict[str, Any] = {}
        for field, literal in zip(self.fields, (*self.literals, ""), strict=True):
            if field == _ARGUMENTS:
                read = self._read_tagged if self.tags else _DECODER.raw_decode
                found[field], position = read(text, position)
            else:
                end = self._end_of_name(text, position, literal)
                found[field], position = text[position:end], end
                if not found[field] or re.search(r"[\s<>{}\[\]\"]", found[field]):
                    raise ValueError("no name")
            if not text.startswith(literal, position):
                raise ValueError("other markup")
            position += len(literal)
        return _made(found), position

    def _end_of_name(self, text: str, position: int, literal: str) -> int:
        if literal:
            return text.index(literal, position)
        end = re.compile(r"[\s<>{}\[\]\"]").search(text, position)  # arguments follow at once
        return end.start() if end else len(text)

    def _read_tagged(self, text: str, position: int) -> tuple[dict[str, Any], int]:
        assert self.tags is not None
        before_key, before_text, before_other, behind_value, print_value = self.tags
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


class PrintedCalls(NamedTuple):
    """The form of a template's calls alone, and behind the text of a reply, if it prints both."""

    alone: Form
    behind: Form | None
    spaces: str
    """What stands between the text and the markup of calls behind it."""

    @property
    def marks(self) -> list[str]:
        """How calls begin behind a text; empty if only a whole reply is calls."""
        return [mark for mark in [self.behind.first if self.behind else self.alone.first] if mark.strip()]

    def parse(self, text: str) -> tuple[str, list[Call]] | None:
        """Returns the text before the calls of a reply, and the calls; None if it has none of this form."""
        if calls := self.alone.parse(text):
            return "", calls
        for mark in self.marks:
            at = text.find(mark)
            while at >= 0:
                if calls := (self.behind or self.alone).parse(text[at:]):
                    return text[:at].removesuffix(self.spaces), calls
                at = text.find(mark, at + 1)
        return None


def find(print_reply: Print) -> PrintedCalls | None:
    """Returns how a template prints calls, or None if that is in no form that can be parsed."""
    alone = _form(lambda calls: print_reply("", calls))
    if alone is None:
        return None
    printed = print_reply(TEXT, _calls(1))
    behind, spaces = None, ""
    if printed is not None and TEXT in printed and not printed.startswith(TEXT):
        return None
    if printed is not None and TEXT in printed:
        rest = printed[len(TEXT) :]
        spaces = rest[: len(rest) - len(rest.lstrip())]
        behind = _form(lambda calls: _without(f"{TEXT}{spaces}", print_reply(TEXT, calls)))
        if behind is None:
            return None
    found = PrintedCalls(alone, behind, spaces)
    for text, number in ((TEXT, 2), ("", 3), ("", 1)):
        if text and behind is None:
            continue
        calls = _calls(number)
        printed = print_reply(text, calls)
        if printed is None:
            if number == 1:
                return None
            continue
        parsed = found.parse(printed)
        if parsed is None or parsed[0] != text or list(map(_bare, parsed[1])) != list(map(_bare, calls)):
            return None
    return found


def _without(before: str, printed: str | None) -> str | None:
    return printed[len(before) :] if printed is not None and printed.startswith(before) else None


def _calls(number: int, arguments: Any = None) -> list[Call]:
    """Returns so many calls with known names, ids and arguments."""
    return [
        {
            "id": f"call{place:05}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": {_KEYS[0]: f"v{name}", _KEYS[1]: 70 + place} if arguments is None else arguments,
            },
        }
        for place, name in enumerate(_NAMES[:number])
    ]


def _bare(call: Call) -> tuple[Any, Any]:
    return call["function"]["name"], call["function"]["arguments"]


def _made(found: dict[str, Any]) -> Call:
    """Returns the call of these fields. Raises ValueError if they make none."""
    name, arguments = found.get(_NAME), found.get(_ARGUMENTS)
    if name is None and isinstance(found.get(_ID), str):
        in_id = _NAME_IN_ID.fullmatch(found[_ID])
        name = in_id["name"] if in_id else None
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    call: Call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": found[_ID]} if isinstance(found.get(_ID), str) else call


def _read(text: str, print_value: ValuePrinter) -> Any:
    """Returns the value that is printed as the text; lists and mappings may be printed as Python does."""
    if print_value is str and text[:1] in ("[", "{"):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(text)
            return value if str(value) == text else text
    return read_value(text, print_value)


# -- finding a form ---------------------------------------------------------------------------


def _form(printed_for: Callable[[Sequence[Call]], str | None]) -> Form | None:
    """Returns the form of calls that stand alone."""
    one, two = (printed_for(_calls(number)) for number in (1, 2))
    if one is None:
        return None
    for find_form in (_json_form, _field_form, _tag_form, _python_form):
        with suppress(ValueError, IndexError, RecursionError):
            form = find_form(one, two, printed_for)
            if form is not None:
                return form
    return None


def _json_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    call = _calls(1)[0]
    for value, start, end in _json_values(one):
        is_list = isinstance(value, list) and len(value) == 1
        model = _model(value[0] if is_list else value, call)
        if model is None:
            continue
        if two is not None:
            second = _all_calls(two)[1]
            model = _common(model, _model(second, _calls(2)[1]))
        opening = one[start : one.index(_NAMES[0], start)]
        if is_list:
            return Form(one[:start], "", one[end:], (), (), model, True, None, opening)
        between = ""
        if two is not None:
            spans = [span for span in _json_values(two) if _has_name(span[0])]
            if len(spans) != 2:
                return None
            between = two[spans[0][2] : spans[1][1]]
        return Form(one[:start], between, one[end:], (), (), model, False, None, opening)
    return None


def _json_values(text: str) -> Iterator[tuple[Any, int, int]]:
    """Yields the JSON lists and objects of a text that are in no other, with their places."""
    position = 0
    while match := re.compile(r"[\[{]").search(text, position):
        try:
            value, end = _DECODER.raw_decode(text, match.start())
        except ValueError:
            position = match.end()
            continue
        yield value, match.start(), end
        position = end


def _all_calls(text: str) -> list[Any]:
    """Returns the JSON values of the calls in a text."""
    values = [value for value, _, _ in _json_values(text) if _has_name(value)]
    return values[0] if isinstance(values[0], list) else values


def _common(model: Any, other: Any) -> Any:
    """Returns the model of two calls: what differs is a number of the call, which may be anything."""
    if model == other:
        return model
    if isinstance(model, dict) and isinstance(other, dict) and model.keys() == other.keys():
        return {key: _common(part, other[key]) for key, part in model.items()}
    return _Sentinel("number")


def _has_name(value: Any) -> bool:
    return any(f'"{name}"' in json.dumps(value) for name in _NAMES)


class _Sentinel(NamedTuple):
    field: str


def _model(value: Any, call: Call) -> Any:
    """Returns a JSON value with sentinels in the places of the call's fields; None if it has no name."""
    fields: set[str] = set()

    def replaced(part: Any) -> Any:
        function = call["function"]
        if part == function["name"]:
            fields.add(_NAME)
            return _Sentinel(_NAME)
        if part == call["id"]:
            return _Sentinel(_ID)
        if isinstance(part, _Sentinel):
            return part
        if part == function["arguments"] or (
            isinstance(part, str) and _is_json_of(part, function["arguments"])
        ):
            fields.add(_ARGUMENTS)
            return _Sentinel(_ARGUMENTS)
        if isinstance(part, dict):
            return {replaced(key): replaced(each) for key, each in part.items()}
        return part

    found = replaced(value) if isinstance(value, dict) else None
    return found if fields == {_NAME, _ARGUMENTS} else None


def _is_json_of(text: str, value: Any) -> bool:
    with suppress(ValueError):
        return bool(json.loads(text) == value)
    return False


def _match(model: Any, value: Any, found: dict[str, Any]) -> None:
    """Puts the parts of `value` at the model's sentinels into `found`. Raises ValueError if they differ."""
    if isinstance(model, _Sentinel):
        found[model.field] = value
        return
    if not isinstance(model, dict):
        if model != value:
            raise ValueError("another value")
        return
    if not isinstance(value, dict) or len(value) != len(model):
        raise ValueError("another value")
    for key, part in model.items():
        if isinstance(key, _Sentinel):  # the only key
            (own_key,) = value
            found[key.field] = own_key
            _match(part, value[own_key], found)
        elif key in value:
            _match(part, value[key], found)
        else:
            raise ValueError("another key")


def _field_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    """Returns the form of names and JSON arguments that are printed apart."""
    first, fields, literals, end = _fields(one, _calls(1)[0], 0)
    between = ""
    if two is not None:
        ended = _fields(two, _calls(2)[0], 0)[3]
        start = len(_fields(two, _calls(2)[1], ended)[0])
        between = two[ended : ended + start]
    return Form(first, between, one[end:], fields, literals)


def _fields(text: str, call: Call, position: int) -> tuple[str, tuple[str, ...], tuple[str, ...], int]:
    """Returns what stands before a call, its fields, the literals between them, and where the call ends.

    Raises ValueError if its name and arguments are not there in this order.
    """
    arguments = next(
        (start, end)
        for value, start, end in (*_json_values(text[position:]), (None, 0, 0))
        if value == call["function"]["arguments"] or value is None
    )
    if arguments == (0, 0):
        raise ValueError("no arguments")
    start, end = arguments[0] + position, arguments[1] + position
    name = call["function"]["name"]
    before = text[position:start]
    places = []
    in_id = re.search(rf"\S*?functions\.{name}:\d+", before)
    if in_id is not None:
        at = before.index(f"functions.{name}:")
        places.append((_ID, at, in_id.end()))
    else:
        places.append((_NAME, before.index(name), before.index(name) + len(name)))
        if call["id"] in before:
            places.append((_ID, before.index(call["id"]), before.index(call["id"]) + len(call["id"])))
        places.sort(key=lambda place: place[1])
    places.append((_ARGUMENTS, start - position, end - position))
    literals = [before[one[2] : other[1]] for one, other in pairwise(places)]
    return before[: places[0][1]], tuple(p[0] for p in places), tuple(literals), end


def _tag_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    """Returns the form of a name and of arguments between tags."""
    none, empty = printed_for(_calls(1, {})), "{}"
    typed = printed_for(_calls(1, {_KEYS[0]: True, _KEYS[1]: [1, "a"]}))
    if none is None or typed is None or empty in none:
        return None
    name, values = _NAMES[0], (f"v{_NAMES[0]}", "70")
    first, rest = one[: one.index(name)], one[one.index(name) + len(name) :]
    literals = []
    for part in (_KEYS[0], values[0], _KEYS[1], values[1]):
        literal, _, rest = rest.partition(part)
        literals.append(literal)
    behind_name, before_text, between, before_other = literals
    before_key = _common_suffix(behind_name, between)
    behind_value, middle = between.removesuffix(before_key), behind_name.removesuffix(before_key)
    if not before_key.strip() or not behind_value or not before_text or not rest.startswith(behind_value):
        return None
    last = rest.removeprefix(behind_value)
    if none != f"{first}{name}{middle}{last}":
        return None
    printers = (print_as_json, print_as_python, str)
    expected = [
        f"{first}{name}{middle}"
        + "".join(
            f"{before_key}{key}{before_other}{print_value(value)}{behind_value}"
            for key, value in ((_KEYS[0], True), (_KEYS[1], [1, "a"]))
        )
        + last
        for print_value in printers
    ]
    if typed not in expected:
        return None
    tags = Tags(before_key, before_text, before_other, behind_value, printers[expected.index(typed)])
    form = Form(first, "", last, (_NAME, _ARGUMENTS), (middle,), tags=tags)
    if two is None:
        return form
    # `last` ends the last call and all calls; what is between two calls shows how much of it ends a call.
    body = f"{before_key}{_KEYS[0]}{before_text}{values[0]}{behind_value}{before_key}{_KEYS[1]}{before_other}"
    head = f"{first}{name}{middle}{body}{values[1]}{behind_value}"
    if not two.startswith(head):
        return None
    return form._replace(between=two[len(head) : two.index(_NAMES[1])])


def _python_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    """Returns the form of calls as in Python."""
    start = one.index(f"{_NAMES[0]}(")
    end = _python_call(one, start)[1]
    between = ""
    if two is not None:
        between = two[_python_call(two, two.index(f"{_NAMES[0]}("))[1] : two.index(f"{_NAMES[1]}(")]
    return Form(one[:start], between, one[end:], (), (), is_python=True)


_PYTHON_NAME = re.compile(r"[A-Za-z_][\w.\-]*(?=\()")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def _python_call(text: str, position: int) -> tuple[Call, int]:
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
        return _made({_NAME: name[0], _ARGUMENTS: arguments}), end
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


def _common_suffix(one: str, other: str) -> str:
    number = 0
    while number < min(len(one), len(other)) and one[-1 - number] == other[-1 - number]:
        number += 1
    return one[len(one) - number :]
