"""What a chat template does with a conversation, recorded once and then done without the template.

A template mostly copies. Of the text of a message it asks little (does it hold `</think>`?), and changes
little (it trims). So it is run once with `Traced` texts in place of those of the messages. Another
conversation of the same shape (the same roles, and the same keys in every message), for which every
recorded question has the recorded answer, then prints the recorded pieces with its own texts in them:
the template could not have told the two apart.

That is so because a traced text gives itself to no one. It is an object of its own kind, so nothing reads it
as a string; the filters, tests and functions of a template, which might learn something of it in another
way, are given none unless they are known here to look at its type at most.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count
from typing import Any, NoReturn

import jinja2
from jinja2.runtime import Context, Undefined

from renderers.jinja.private import (
    FORWARDED,
    CountingCodeGenerator,
    Frame,
    Namespace,
    generate_lorem_ipsum,
    is_buffered,
    may_escape,
    num_passed,
)
from renderers.jinja.sandbox import QuickSandbox, sandbox_like_theirs
from renderers.jinja.template_limits import size_of, spend
from renderers.jinja.traced import Method, Pieces, Recorder, Step, Traced, Untraceable
from renderers.messages import PlainMessage

_MOST_SHAPES = 4096
_MOST_PATHS = 16
"""How many ways to answer the template's questions are recorded for one shape."""

_TYPE_TESTS = {
    **dict.fromkeys(("defined", "string", "iterable", "sequence"), True),
    **dict.fromkeys(("undefined", "none", "mapping", "number", "boolean", "true", "false"), False),
}
"""Tests that look at the type of a value alone, and what they find of a string."""

_HOLDERS = frozenset({"default", "d"})
"""Filters that at most ask a value for its truth."""

_COUNTERS = frozenset({"length", "count", "list", "first", "last"})
"""Filters that look at no item of a list."""

_CHANCES = frozenset({"random"})

_SCALARS = frozenset({str, int, float, bool, type(None)})


class Outline:
    """What sets conversations apart for a template: their shape, and their texts."""

    __slots__ = ("num_texts", "shapes", "texts")

    def __init__(self, messages: Sequence[PlainMessage]) -> None:
        """Ends before the first message that holds more than texts."""
        self.shapes: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.num_texts = [0]
        """The number of texts in the first messages, for each number of those."""
        for message in messages:
            if {*map(type, message), *map(type, message.values())} != {str}:
                return
            self.shapes.append((message["role"], *message))
            self.texts += [value for key, value in message.items() if key != "role"]
            self.num_texts.append(len(self.texts))


class _Shape:
    """What was recorded for conversations of one shape."""

    __slots__ = ("first", "num_paths")

    def __init__(self) -> None:
        self.first = Step()
        self.num_paths = 0


class Traces:
    """What one template was seen to do."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._source = source
        self._variables = variables
        self._shapes: dict[tuple[Any, ...], _Shape | None] = {}

    def text(
        self, messages: Sequence[PlainMessage], outline: Outline, num_messages: int, prompt: bool
    ) -> str | None:
        """What the template prints of the first messages, or None where it has to be run for that.

        A shape is recorded when it comes for the second time.
        """
        if num_messages > len(outline.shapes):
            return None
        key = (prompt, *outline.shapes[:num_messages])
        shape = self._shapes.get(key)
        if shape is None:
            if key not in self._shapes:
                if len(self._shapes) >= _MOST_SHAPES:
                    self._shapes.clear()
                self._shapes[key] = None
                return None
            shape = self._shapes[key] = _Shape()
        texts = outline.texts[: outline.num_texts[num_messages]]
        last = shape.first.last_for(values := texts.copy())
        if last is None and shape.num_paths < _MOST_PATHS:
            shape.num_paths += 1
            self._record(Recorder(shape.first, texts), messages[:num_messages], prompt)
            last = shape.first.last_for(values := texts.copy())
        if last is None or last.text is None:
            return None
        form, numbers = last.text
        return form % tuple([values[number] for number in numbers])

    def _record(self, recorder: Recorder, messages: Sequence[PlainMessage], prompt: bool) -> None:
        numbers = count()
        traced = [
            {
                key: value if key == "role" else Traced(recorder, (next(numbers),))
                for key, value in message.items()
            }
            for message in messages
        ]
        context = self._template.new_context(
            {**self._variables, "messages": traced, "tools": None, "add_generation_prompt": prompt}
        )
        printed: Pieces | None = None
        with suppress(Exception):  # a template is foreign code, and whatever it raises, it will raise again
            printed = tuple(chain.from_iterable(map(_pieces_of, self._template.root_render_func(context))))
        recorder.end(printed)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        sandbox = sandbox_like_theirs(self._source, _TracingSandbox)
        sandbox.filters = {name: _guarded_filter(name, found) for name, found in sandbox.filters.items()}
        tests: dict[str, Any] = sandbox.tests
        sandbox.tests = {name: _guarded_test(name, found) for name, found in tests.items()}
        return sandbox.from_string(self._source)


def _pieces_of(text: Any) -> Pieces:
    spend(size_of(text, sys.maxsize))
    if isinstance(text, Traced):
        return text.pieces
    if type(text) is str:
        return (text,)
    raise Untraceable


# -- the sandbox of a recording -----------------------------------------------------------------


class _CodeGenerator(CountingCodeGenerator):
    """Has a template print traced texts as they are, for the recording to spell."""

    def opening_of_print(self, frame: Frame) -> str:
        if may_escape(frame):
            return "environment.refuse("
        return "context.text(" if is_buffered(frame) else "environment.printed("

    def opening_of_join(self, frame: Frame) -> str:
        return "environment.refuse(" if may_escape(frame) else "environment.joined("


class _TracingSandbox(QuickSandbox):
    """The sandbox for a template that is given traced texts."""

    code_generator_class = _CodeGenerator

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Traced):
            return obj.method(attribute)
        if isinstance(obj, Method):
            raise Untraceable
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, (Traced, Method)) or isinstance(argument, (Traced, Method)):
            raise Untraceable
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in FORWARDED}
        if isinstance(__obj, Method):
            return __obj(*args, **given)
        only_holds = isinstance(__obj, type) and issubclass(__obj, Namespace)
        if __obj is generate_lorem_ipsum or not (only_holds or (_is_plain(args) and _is_plain(given))):
            raise Untraceable
        return super().call(__context, __obj, *args, **kwargs)

    def printed(self, value: Any) -> Any:
        """What `{{ value }}` prints."""
        if isinstance(value, Traced):
            return value
        if isinstance(value, Undefined) or type(value) in _SCALARS:
            return str(value)
        raise Untraceable

    def joined(self, parts: tuple[Any, ...]) -> Any:
        """What `~` makes of the parts."""
        joined = functools.reduce(operator.add, map(self.printed, parts))
        spend(size_of(joined, sys.maxsize))
        return joined

    def refuse(self, _: object) -> NoReturn:
        raise Untraceable

    def get_or_select_template(self, *_: Any, **__: Any) -> NoReturn:
        """What `{% include %}` does with its value, not always by the means of a string."""
        raise Untraceable


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_before = num_passed(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, *options = args[num_before:]
        if isinstance(value, Traced) and not kwargs:
            if name == "trim":
                return value.method("strip")(*options)
            if name == "string" and not options:
                return value
        is_safe = name in _HOLDERS or (name in _COUNTERS and type(value) in (list, dict) and not options)
        if name in _CHANCES or not (is_safe or (_is_plain(args[num_before:]) and _is_plain(kwargs))):
            raise Untraceable
        return function(*args, **kwargs)

    return guarded


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_before = num_passed(function)

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        if name in _TYPE_TESTS:
            return _TYPE_TESTS[name] if isinstance(args[0], Traced) else function(*args)
        if not _is_plain(args[num_before:]):
            raise Untraceable
        return function(*args)

    return guarded


def _is_plain(value: Any) -> bool:
    """Whether this is JSON through and through: nothing in it is traced, or may lead to what is."""
    kind = type(value)
    if kind in (list, tuple):
        return all(map(_is_plain, value))
    if kind is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return kind in _SCALARS
