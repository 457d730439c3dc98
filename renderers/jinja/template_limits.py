"""What one run of a chat template may cost: a limit on its time, and one on all the text that it makes.

A chat template comes with a model, so it is somebody else's program. The sandbox keeps it from reading and
writing anything; this keeps it from running without end and from filling the memory. Its compiled code
calls `tick` wherever it may repeat itself, and every operator, filter and method whose result may be much
larger than what it is given is asked for that size before it runs. The time is that of the thread's own
work, so neither a busy machine nor another thread counts, and no signals are needed. Both limits grow with
the conversation.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import islice
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import Namespace, generate_lorem_ipsum
from markupsafe import EscapeFormatter, Markup, escape

from cookbook.errors import RendererError
from renderers.jinja.traced import Traced

SECONDS = 10.0
SECONDS_OF_A_MESSAGE = 0.01
"""The time of a run: so much, and so much for each message of the conversation."""

LEAST_SECONDS = 0.25
"""After each run that was ended for its time, the same template gets half of `SECONDS`, down to this."""

CHARACTERS = 2**27
"""All the text of a run, printed or not, in characters; a run gets the size of the conversation times the
number of its messages on top."""

MAX_BITS = 2**16
"""The most bits of a whole number."""

MAX_WIDTH = 1000
"""The greatest width of one formatted value, and of an indentation."""

MAX_SLOW_CHARACTERS = 100_000
"""The longest text for a filter whose time grows with the square of the text."""

_TICKS = 64
"""So many repetitions pass between two looks at the clock."""

_ITEM = 8
"""An item of a list counts as so many characters."""

_TERMS = 6
"""A sum of so many terms is counted when it is there: it is at most so many times what was counted before."""

_NODE = 128
"""And a value in a list that is spelled with all that is in it."""


class TemplateLimitError(RendererError):
    """A chat template took more time or made more text than one run may."""


class Run:
    """The costs of one run of a template so far."""

    def __init__(self, variables: Mapping[str, Any], environment: Any) -> None:
        self._variables = variables
        self._environment = environment
        self._made = 0
        self._allowed = CHARACTERS
        self._is_scaled = False
        self._end: float | None = None

    def ticks(self) -> Iterator[None]:
        """To be asked for the next one at each repetition. Raises TemplateLimitError when the time is up."""
        while True:
            for _ in range(_TICKS):
                yield
            self._check_time()

    def _check_time(self) -> None:
        now = time.thread_time()
        if self._end is None:
            self._end = now + self._seconds()
        if now > self._end:
            seconds = self._seconds()
            self._environment.num_timeouts += 1
            _refuse(f"It ran for more than {seconds:g} s, the limit for {self._num_messages():,} messages")

    def _seconds(self) -> float:
        base = max(LEAST_SECONDS, SECONDS / 2**self._environment.num_timeouts)
        return base + SECONDS_OF_A_MESSAGE * self._num_messages()

    def _num_messages(self) -> int:
        messages = self._variables.get("messages")
        return len(messages) if isinstance(messages, list) else 0

    def spend(self, characters: int) -> None:
        """Counts text that is there, or is about to be. Raises TemplateLimitError where that is too much."""
        self._made += characters
        if self._made > self._allowed:
            self._exceed()

    def _exceed(self) -> None:
        self._scale()
        if self._made > self._allowed:
            _refuse(
                f"It made more than {self._allowed:,} characters of text, the limit for this conversation"
            )

    def _scale(self) -> None:
        """Raises the limit by what the conversation allows, which is counted when it matters."""
        if self._is_scaled:
            return
        self._is_scaled = True
        given = [self._variables.get(name) for name in ("messages", "tools")]
        self._allowed += size_of(given, sys.maxsize) * (self._num_messages() + _TICKS)

    def spend_on(self, value: Any) -> None:
        """Counts the text of a value with all that is in it, which a list may hold many times over."""
        size = size_of(value, self._allowed - self._made)
        if self._made + size > self._allowed and not self._is_scaled:
            self._scale()
            size = size_of(value, self._allowed - self._made)
        self.spend(size)


class _Running(threading.local):
    run: Run


_running = _Running()
"""The run of this thread: a template runs from its first line to its last without another in between."""


def spend(characters: int) -> None:
    """Counts text that the run of this thread makes."""
    _running.run.spend(characters)


def counted(value: Any) -> Any:
    """The value, after it is counted with all that is in it."""
    _running.run.spend_on(value)
    return value


def _refuse(what: str) -> NoReturn:
    raise TemplateLimitError(
        f"{what}{_place()}. A template that loops or doubles a text is not run to its end; give another "
        "one, or correct this."
    )


def _place() -> str:
    """Where in the template the run is."""
    frame: Any = sys._getframe()
    while frame is not None:
        template = frame.f_globals.get("__jinja_template__")
        if template is not None:
            number = template.get_corresponding_lineno(frame.f_lineno)
            line = template.environment.source.splitlines()[number - 1].strip()
            return f" in line {number} of the template: {line[:80]!r}"
        frame = frame.f_back
    return ""


def size_of(value: Any, limit: int) -> int:
    """The characters that a value takes when it is spelled, roughly; more than `limit` where it is more."""
    if isinstance(value, (str, bytes)):
        return len(value)
    size, left = 0, [value]
    while left and size <= limit:
        one = left.pop()
        size += _NODE
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, Traced):
            left.extend(one.pieces)
        elif isinstance(one, Namespace):
            left.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, _CONTAINERS):
            left.extend(one)
    return size


_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, *map(type, ({}.keys(), {}.values(), {}.items())))
_SCALARS = frozenset({int, float, bool, type(None)})


class RunContext(Context):
    """The variables of one run, with what its compiled code calls."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        self.run = _running.run = Run(parent, environment)
        self.tick = self.run.ticks().__next__

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """A scope within the same run."""
        run = self.run
        context = super().derived(locals)
        assert isinstance(context, RunContext)
        context.run = _running.run = run
        context.tick = self.tick
        return context

    def text(self, value: Any) -> str:
        """What `{{ value }}` prints."""
        if type(value) is str:
            return value
        if type(value) not in _SCALARS and not isinstance(value, (str, Undefined)):
            self.run.spend_on(value)
        return str(value)

    def escaped(self, value: Any) -> str:
        """The same where the template may have asked for HTML."""
        text = (
            value if isinstance(value, (str, Undefined)) or hasattr(value, "__html__") else self.text(value)
        )
        return escape(text) if self.eval_ctx.autoescape else str(text)

    def added(self, result: Any) -> Any:
        """The sum of a few values, counted."""
        if type(result) is str:
            self.run.spend(len(result))
        elif isinstance(result, (list, tuple)):
            self.run.spend(_ITEM * len(result))
        elif isinstance(result, (str, bytes, Traced)):
            self.run.spend_on(result)
        return result

    def joined(self, join: Callable[[Iterable[Any]], str], parts: tuple[Any, ...]) -> str:
        """What `~` makes of the parts."""
        for part in parts:
            if isinstance(part, str):
                self.run.spend(len(part))
            elif type(part) not in _SCALARS:
                self.run.spend_on(part)
        return join(parts)

    def nested(self, value: Any) -> Any:
        """A list or a mapping that the template writes, of values that may hold each other many times."""
        self.run.spend_on(value)
        return value

    def mul(self, left: Any, right: Any) -> Any:
        for many, value in ((left, right), (right, left)):
            if isinstance(many, int):
                if isinstance(value, int):
                    _check_bits(left.bit_length() + right.bit_length())
                elif isinstance(value, (str, bytes)):
                    self.run.spend(len(value) * max(0, many))
                elif isinstance(value, (list, tuple)):
                    self.run.spend(_ITEM * len(value) * max(0, many))
        return left * right

    def pow(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(0, right))
        return left**right

    def mod(self, left: Any, right: Any) -> Any:
        if isinstance(left, (str, bytes)):
            self.run.spend(_size_of_percent(left, right))
        return left % right


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        _refuse(f"It computes a whole number of more than {MAX_BITS:,} bits")


def _check_width(width: Any, most: int = MAX_WIDTH) -> None:
    """A width may be text that is repeated as often."""
    if (
        len(width) if isinstance(width, (str, bytes)) else abs(width) if isinstance(width, int) else 0
    ) > most:
        _refuse(f"It asks for a width of more than {most:,} characters")


_CONVERSION = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|[0-9]+)?(?:\.(\*|[0-9]+)?)?")


def _size_of_percent(template: str | bytes, values: Any) -> int:
    """The most characters that `template % values` makes."""
    given = list(values) if isinstance(values, tuple) else [values]
    size = size_of(given, CHARACTERS)
    text = template if isinstance(template, str) else template.decode("latin-1")
    found = _CONVERSION.findall(text)
    for width in {width for pair in found for width in pair if width}:
        for number in [one for one in given if type(one) is int] if width == "*" else [_number(width)]:
            _check_width(number)
    # Each conversion spells one of the values; by its key it may be the same one each time.
    return len(text) + len(found) * (MAX_WIDTH + (size if isinstance(values, dict) else 0)) + size


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else sys.maxsize


# -- compiled code ------------------------------------------------------------------------------


class LimitedCodeGenerator(CodeGenerator):
    """Compiles a template to code that counts what it does. Nothing is computed while it is compiled."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        repeated = node.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
        self._repeated_bodies = {id(getattr(one, "body", None)) for one in repeated}
        super().visit_Template(node, frame)

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        if id(nodes) in self._repeated_bodies:
            self.writeline("context.tick()")
        super().blockvisit(nodes, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, (nodes.TemplateData, nodes.Const)):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("context.escaped(" if _may_escape(frame) else "context.text(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        join = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"context.joined({join if _may_escape(frame) else 'str_join'}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _counted(self, name: str, node: nodes.BinExpr, frame: Frame) -> None:
        self.write(f"context.{name}(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        terms, left = [node.right], node.left
        while isinstance(left, nodes.Add) and len(terms) < _TERMS:
            terms.append(left.right)
            left = left.left
        self.write("context.added(")
        self.visit(left, frame)
        for term in reversed(terms):
            self.write(" + ")
            self.visit(term, frame)
        self.write(")")

    def visit_Mul(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._counted("mul", node, frame)

    def visit_Mod(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._counted("mod", node, frame)

    def visit_Pow(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._counted("pow", node, frame)

    def _nested(self, visit: Callable[..., None], node: nodes.Literal, frame: Frame) -> None:
        is_plain = all(isinstance(one, nodes.Const) for one in node.iter_child_nodes())
        if is_plain or getattr(node, "ctx", "load") == "store":
            visit(node, frame)
            return
        self.write("context.nested(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._nested(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._nested(super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._nested(super().visit_Dict, node, frame)


def _may_escape(frame: Frame) -> bool:
    return bool(frame.eval_ctx.volatile or frame.eval_ctx.autoescape)


def concat(pieces: Iterable[str]) -> str:
    """The text of the pieces that a template, a macro or a block printed."""
    parts, remaining = [], iter(pieces)
    while some := list(islice(remaining, 2**16)):
        _running.run.spend(sum(map(len, some)))
        parts.append("".join(some))
    return parts[0] if len(parts) == 1 else "".join(parts)


# -- methods ------------------------------------------------------------------------------------


def checked_arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call, after what a method will make of them is counted.

    Raises TemplateLimitError for too much.
    """
    owner = getattr(function, "__self__", None)
    if isinstance(owner, (str, bytes, int)):
        args = tuple(_listed(one, _running.run) if isinstance(one, Iterator) else one for one in args)
        size = _SIZES_OF_METHODS.get(getattr(function, "__name__", ""))
        if size is not None:
            spend(max(0, size(owner, *args, *kwargs.values())))
        elif isinstance(owner, (str, bytes)):
            spend(len(owner))
    elif function is generate_lorem_ipsum:
        for number in (*args, *kwargs.values()):
            _check_width(number, 100)
    return args


def _greatest(values: Iterable[Any]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def size_of_replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    return len(text) + (text.count(old) * len(new) if isinstance(new, (str, bytes)) else 0)


def _size_of_joined(separator: Any, items: Any = (), *_: Any) -> int:
    return len(separator) * (len(items) if hasattr(items, "__len__") else 1) + size_of(items, CHARACTERS)


def _size_of_translated(text: Any, table: Any = (), *_: Any) -> int:
    values = table.values() if isinstance(table, dict) else ()
    return len(text) * max((len(one) for one in values if isinstance(one, (str, bytes))), default=1)


def _widest(text: Any, *options: Any) -> int:
    return max(len(text), _greatest(options))


def _size_with_tabs(text: Any, *options: Any) -> int:
    num_tabs: int = text.count("\t" if isinstance(text, str) else b"\t")
    return len(text) + num_tabs * max(8, _greatest(options))


def _size_in_bytes(_: Any, *options: Any) -> int:
    return _greatest(options)


_SIZES_OF_METHODS: Mapping[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _widest),
    **dict.fromkeys(("split", "rsplit", "splitlines"), lambda text, *_: _ITEM * len(text)),
    "replace": size_of_replaced,
    "join": _size_of_joined,
    "translate": _size_of_translated,
    "expandtabs": _size_with_tabs,
    "to_bytes": _size_in_bytes,
    **dict.fromkeys(
        ("startswith", "endswith", "find", "rfind", "index", "rindex", "count"), lambda text, *_: 0
    ),
}
"""The size of what a method makes at most. One that is not here makes about as much as it is called on."""


def limited_format(method: Any, environment: Any) -> Callable[..., str]:
    """A bound `str.format` or `str.format_map`, sandboxed and limited."""
    text = method.__self__
    is_markup = isinstance(text, Markup)
    formatter = (
        _LimitedEscapeFormatter(environment, escape=text.escape)
        if is_markup
        else _LimitedFormatter(environment)
    )

    @wraps(method)
    def limited(*args: Any, **kwargs: Any) -> str:
        spend(len(text))
        if method.__name__ == "format_map":
            (mapping,) = args
            return type(text)(formatter.vformat(text, (), mapping))
        return type(text)(formatter.vformat(text, args, kwargs))

    return limited


def is_format(value: Any) -> bool:
    return (
        isinstance(value, (types.MethodType, types.BuiltinMethodType))
        and value.__name__ in ("format", "format_map")
        and isinstance(value.__self__, str)
    )


class _LimitedFormatter(SandboxedFormatter):
    """What `'{:>8}'.format(value)` does."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        spend(size_of(value, CHARACTERS))
        return value, first

    def format_field(self, value: Any, format_spec: str) -> Any:
        for digits in re.findall("[0-9]+", format_spec):
            _check_width(_number(digits))
        spend(MAX_WIDTH if format_spec else 0)
        return super().format_field(value, format_spec)


class _LimitedEscapeFormatter(_LimitedFormatter, EscapeFormatter):
    """The same of a text that is HTML."""


# -- filters ------------------------------------------------------------------------------------

_FREE = frozenset(
    {"default", "d", "length", "count", "first", "last", "abs", "int", "float", "attr", "random"}
)
"""Filters that make nothing new, or a number."""

_SLOW = frozenset({"striptags", "urlize", "wordwrap", "pprint", "xmlattr", "wordcount", "title"})

_SPELLING = frozenset({"string", "tojson", "pprint", "escape", "e", "forceescape", "urlencode", "format"}) | {
    *("batch", "slice", "groupby")
}
"""Filters that spell all that is in a value, or put it into lists of lists."""


def limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, asked for the size of its result before it runs."""
    if name in _FREE:
        return function
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0
    check = _CHECKS.get(name)

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        run = _running.run
        value, *options = args[num_passed:] or (None,)
        if name in _SLOW and size_of(value, MAX_SLOW_CHARACTERS) > MAX_SLOW_CHARACTERS:
            _refuse(f"Its filter `{name}` is given more than {MAX_SLOW_CHARACTERS:,} characters")
        if name in _SPELLING and type(value) is not str:
            run.spend_on(value)
        if name in _ITERATING and isinstance(value, Iterator):
            value = _listed(value, run)
            args = (*args[:num_passed], value, *options)
        if check is not None:
            run.spend(max(0, check(value, *options, **kwargs)))
        result = function(*args, **kwargs)
        if isinstance(result, (str, bytes)):
            run.spend(len(result))
        elif isinstance(result, (list, tuple)):
            run.spend(_ITEM * len(result))
        return result

    return limited


_ITERATING = frozenset({"join", "list", "sum", "sort", "unique", "reverse", "batch", "slice", "groupby"})


def _listed(items: Iterator[Any], run: Run) -> list[Any]:
    found: list[Any] = []
    while some := list(islice(items, 2**10)):
        run.spend(_ITEM * len(some))
        found += some
    return found


def _check_center(value: Any, width: Any = 80) -> int:
    return _widest("", width)


def _check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    _check_width(width)
    return len(value) + value.count("\n") * (len(width) if isinstance(width, str) else abs(width))


def _check_join(value: Any, d: Any = "", attribute: Any = None) -> int:
    num_items = len(value) if hasattr(value, "__len__") else 0
    return len(str(d)) * num_items + size_of(value, CHARACTERS)


def _check_replace(value: Any, old: Any = "", new: Any = "", count: Any = None) -> int:
    return size_of_replaced(str(value), str(old), str(new)) if isinstance(value, str) else 0


def _check_format(value: Any, *args: Any, **kwargs: Any) -> int:
    return _size_of_percent(str(value), kwargs or args)


def _check_number(value: Any, number: Any = 1, *_: Any, **kwargs: Any) -> int:
    """The size of the result of a filter that makes lists of so many items, or as many lists."""
    number = kwargs.get("linecount", kwargs.get("slices", number))
    return _ITEM * number if isinstance(number, int) else 0


def _check_list(value: Any) -> int:
    return _ITEM * len(value) if hasattr(value, "__len__") else 0


def _check_sum(value: Any, attribute: Any = None, start: Any = 0) -> int:
    """Lists are copied again at each step."""
    if isinstance(start, (int, float)):
        return 0
    return len(value) * size_of(value, CHARACTERS) if hasattr(value, "__len__") else 0


def _check_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
    _check_width(precision)
    return 0


def _check_json(value: Any, *options: Any, **kwargs: Any) -> int:
    """The text of the value is counted already; this is what stands between its parts."""
    lengths = [_check_option(one) for one in (*options, *kwargs.values())]
    return max(lengths, default=0) * size_of(value, CHARACTERS) // _ITEM


def _check_option(option: Any) -> int:
    parts = option if isinstance(option, (list, tuple)) else [option]
    for part in parts:
        _check_width(part, 100)
    return max((len(one) if isinstance(one, str) else int(one or 0) for one in parts if one), default=0)


def _check_links(value: Any, *options: Any, **kwargs: Any) -> int:
    for option in (*options, *kwargs.values()):
        _check_width(option if isinstance(option, str) else 0)
    return 0


_CHECKS: Mapping[str, Callable[..., int]] = {
    "center": _check_center,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "format": _check_format,
    "batch": _check_number,
    "slice": _check_number,
    "list": _check_list,
    "sum": _check_sum,
    "round": _check_round,
    "tojson": _check_json,
    "urlize": _check_links,
    "wordwrap": _check_links,
}
