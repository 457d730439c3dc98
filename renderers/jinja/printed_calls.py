"""Finds how a chat template prints tool calls, so that calls can be parsed out of replies.

A template is tried on calls whose names, ids and arguments are known. What it prints between them is its
markup. The forms that are looked for are those of `call_forms`. One counts only if the calls that it was
found from are parsed from what the template prints for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from renderers.formats.tagged_calls import print_as_json, print_as_python
from renderers.jinja.call_forms import (
    ARGUMENTS,
    DECODER,
    ID,
    NAME,
    Call,
    Form,
    Notation,
    PrintedCalls,
    Sentinel,
    Tags,
    python_call,
)

Print = Callable[[str, Sequence[Call]], str | None]
"""Returns what a template prints for a reply with this text and these calls; None if it refuses them."""

TEXT = "Said"
_NAMES, _KEYS = ("alfa", "bravo", "delta"), ("kone", "ktwo")


def find(print_reply: Print) -> PrintedCalls | None:
    """Returns how a template prints calls, or None if that is in no form that can be parsed."""
    found = _find(print_reply)
    if found is None:
        return None
    for text, number in ((TEXT, 2), ("", 3), ("", 1)):
        if text and not found.has_text:
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


def _find(print_reply: Print) -> PrintedCalls | None:
    """Returns the form of calls alone and of calls beside a text, which may be printed otherwise."""
    alone = _form(lambda calls: print_reply("", calls))
    printed = print_reply(TEXT, _calls(1))
    if alone is None or printed is None or TEXT not in printed:
        return PrintedCalls(alone) if alone is not None else None
    before, _, rest = printed.partition(TEXT)
    if _NAMES[0] in before:
        ahead = _form(lambda calls: _until(f"{TEXT}{rest}", print_reply(TEXT, calls)))
        return PrintedCalls(alone, ahead=ahead) if ahead is not None and not rest else None
    spaces = rest[: len(rest) - len(rest.lstrip())]
    behind = _form(lambda calls: _without(f"{before}{TEXT}{spaces}", print_reply(TEXT, calls)))
    return PrintedCalls(alone, behind, before, spaces) if behind is not None else None


def _without(before: str, printed: str | None) -> str | None:
    return printed[len(before) :] if printed is not None and printed.startswith(before) else None


def _until(behind: str, printed: str | None) -> str | None:
    return printed.removesuffix(behind) if printed is not None and printed.endswith(behind) else None


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


# -- finding a form ---------------------------------------------------------------------------


def _form(printed_for: Callable[[Sequence[Call]], str | None]) -> Form | None:
    """Returns the form of calls that stand alone."""
    one, two = (printed_for(_calls(number)) for number in (1, 2))
    if one is None:
        return None
    for find_form in (_json_form, _field_form, _notation_form, _tag_form, _python_form):
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
            value, end = DECODER.raw_decode(text, match.start())
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
    return Sentinel("number")


def _has_name(value: Any) -> bool:
    return any(f'"{name}"' in json.dumps(value) for name in _NAMES)


def _model(value: Any, call: Call) -> Any:
    """Returns a JSON value with sentinels in the places of the call's fields; None if it has no name."""
    fields: set[str] = set()

    def replaced(part: Any) -> Any:
        function = call["function"]
        if part == function["name"]:
            fields.add(NAME)
            return Sentinel(NAME)
        if part == call["id"]:
            return Sentinel(ID)
        if isinstance(part, Sentinel):
            return part
        if part == function["arguments"] or (
            isinstance(part, str) and _is_json_of(part, function["arguments"])
        ):
            fields.add(ARGUMENTS)
            return Sentinel(ARGUMENTS)
        if isinstance(part, dict):
            return {replaced(key): replaced(each) for key, each in part.items()}
        return part

    found = replaced(value) if isinstance(value, dict) else None
    return found if fields == {NAME, ARGUMENTS} else None


def _is_json_of(text: str, value: Any) -> bool:
    with suppress(ValueError):
        return bool(json.loads(text) == value)
    return False


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
        places.append((ID, at, in_id.end()))
    else:
        places.append((NAME, before.index(name), before.index(name) + len(name)))
        if call["id"] in before:
            places.append((ID, before.index(call["id"]), before.index(call["id"]) + len(call["id"])))
        places.sort(key=lambda place: place[1])
    places.append((ARGUMENTS, start - position, end - position))
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
    form = Form(first, "", last, (NAME, ARGUMENTS), (middle,), tags=tags)
    if two is None:
        return form
    # `last` ends the last call and all calls; what is between two calls shows how much of it ends a call.
    body = f"{before_key}{_KEYS[0]}{before_text}{values[0]}{behind_value}{before_key}{_KEYS[1]}{before_other}"
    head = f"{first}{name}{middle}{body}{values[1]}{behind_value}"
    if not two.startswith(head):
        return None
    return form._replace(between=two[len(head) : two.index(_NAMES[1])])


def _notation_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    """Returns the form of a name and of an object with bare keys."""
    first, _, rest = one.partition(_NAMES[0])
    opening, _, rest = rest.partition(_KEYS[0])
    before_text, _, rest = rest.partition(f"v{_NAMES[0]}")
    between, _, rest = rest.partition(_KEYS[1])
    colon, _, rest = rest.partition("70")
    literal, quote = opening.removesuffix("{"), before_text.removeprefix(colon)
    separated = re.fullmatch(r"(\S+)(,\s*)", between)
    if separated is None or not quote or literal == opening or not colon.strip() or rest[:1] != "}":
        return None
    notation = Notation(quote, separated[1], colon, separated[2])
    form = Form(first, "", rest[1:], (NAME, ARGUMENTS), (literal,), tags=notation)
    arguments = {_KEYS[0]: 'a "b"\\\n{c}', _KEYS[1]: [True, None, {_KEYS[0]: ["d", {}]}, -1.5]}
    typed = printed_for(_calls(1, arguments))
    parsed = form.parse(typed) if typed is not None else None
    if parsed is None or parsed[0]["function"]["arguments"] != arguments:
        return None
    if two is None:
        return form
    ended = notation.read(two, two.index("{", two.index(_NAMES[0])))[1]
    return form._replace(between=two[ended : two.index(_NAMES[1])])


def _python_form(one: str, two: str | None, printed_for: Any) -> Form | None:
    """Returns the form of calls as in Python."""
    start = one.index(f"{_NAMES[0]}(")
    end = python_call(one, start)[1]
    between = ""
    if two is not None:
        between = two[python_call(two, two.index(f"{_NAMES[0]}("))[1] : two.index(f"{_NAMES[1]}(")]
    return Form(one[:start], between, one[end:], (), (), is_python=True)


def _common_suffix(one: str, other: str) -> str:
    number = 0
    while number < min(len(one), len(other)) and one[-1 - number] == other[-1 - number]:
        number += 1
    return one[len(one) - number :]
