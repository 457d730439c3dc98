"""Renders many prefixes of one conversation with a chat template, and runs it about once per message.

Masks are found by comparing what a template prints for a conversation and for each of its prefixes. Running
it for each prefix takes time that grows with the square of the number of messages. The template is therefore
rewritten to trace its loops (`loop_rewriting`), and of each loop only the iterations are run that may print
something different than for the previous prefix (`loop_records`). Everything outside the loops is run every
time. A template that does something that cannot be traced is run unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.runtime import Context

from renderers.jinja.loop_context import NAMES_IN_LOOPS, TracedLoop, loop_context
from renderers.jinja.loop_counts import Count, NotTraceable
from renderers.jinja.loop_records import BackwardRecord, LoopCounts, Memory
from renderers.jinja.loop_rewriting import RUN, TRACE, Loop, rewritten
from renderers.jinja.loop_values import traced_namespace
from renderers.jinja.loop_visits import COMPARISONS, BackwardVisit, ForwardVisit, TemplateRun
from renderers.jinja.private import Namespace, set_loop_context
from renderers.jinja.sandbox import QuickSandbox, sandbox_like_theirs
from renderers.jinja.template_limits import spend

_REVERSE_ITERATOR: type[Iterable[Any]] = type(reversed([]))


class IncrementalTemplate:
    """A chat template whose loops can be traced."""

    def __init__(self, template: jinja2.Template, environment: _TracingSandbox, loops: list[Loop]) -> None:
        self._template = template
        self._environment = environment
        self._loops = loops
        self.is_traceable = True
        """False once the template did something that cannot be traced."""

    @staticmethod
    def of(source: str) -> IncrementalTemplate | None:
        """Returns the template of this source; None if it has no loop or is nested too deeply to rewrite."""
        environment = _sandbox(source)
        try:
            tree, loops = rewritten(source, environment)
            code = environment.compile(tree)
        except RecursionError:
            return None
        if not loops:
            return None
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        set_loop_context(template, loop_context)
        return IncrementalTemplate(template, environment, loops)

    def text(self, messages: Sequence[Any], variables: Mapping[str, Any], memory: Memory) -> str:
        """Returns what the template prints.

        Raises any error of the template, and `NotTraceable` if the template must be run unchanged.
        """
        run = TemplateRun(messages, self._environment, self._loops, memory)
        context = self._template.new_context({**variables, "messages": messages, RUN: run})
        try:
            for piece in self._template.root_render_func(context):
                spend(len(piece))
                run.pieces.append(piece)
        except NotTraceable:
            self.is_traceable = False
            raise
        finally:
            if run.visit is not None:
                run.visit.end()
            memory.num_runs += 1
        return "".join(run.pieces)


# -- the filters that a rewritten template calls ------------------------------------------------


def _enter(iterable: Any, run: TemplateRun, number: int, *values: Any) -> Any:
    """Returns a visit of the list that loop `number` iterates over, or the list if it cannot be traced."""
    loop = run.loops[number]
    if loop.is_reversed and isinstance(iterable, _REVERSE_ITERATOR):
        iterable = list(iterable)
    namespaces = [id(value) for value in values if isinstance(value, Namespace)]
    has_two_names_for_one = len(set(namespaces)) < len(namespaces)
    counts = run.memory.loops.setdefault(number, LoopCounts())
    if type(iterable) not in (list, range) or has_two_names_for_one or not counts.is_of_use:
        return iterable
    if loop.is_reversed:
        backward = run.memory.backward_records.setdefault(number, BackwardRecord())
        run.visit = BackwardVisit(run, loop, iterable, values, backward, counts)
    else:
        records = run.memory.records.setdefault(number, [])
        run.visit = ForwardVisit(run, loop, iterable, values, records, counts)
    return run.visit


def _leave(_: str, run: TemplateRun) -> str:
    if run.visit is not None:
        run.visit.leave()
    run.visit = None
    return ""


def _item(listed: Any, run: TemplateRun, position: Any) -> Any:
    visit = run.visit
    if visit is not None and visit.is_traced(listed):
        if type(position) is not int:
            raise NotTraceable
        visit.note_item(listed, position)
    return run.environment.getitem(listed, position)


def _size(listed: Any, run: TemplateRun) -> Any:
    visit = run.visit
    if visit is not None and visit.is_traced(listed):
        return Count(visit, len(listed), len(listed) - len(visit.messages))
    return len(listed)


def _numbers(start: Any, run: TemplateRun, listed: Any, function: Any) -> Iterable[int]:
    """Returns the numbers from `start` to the length of the list; each is noted when it is read."""
    if function is not run.environment.globals["range"]:
        raise NotTraceable  # a variable of the template
    visit = run.visit
    if visit is None or not visit.is_traced(listed):
        return range(start, len(listed))
    if type(start) is not int:
        raise NotTraceable
    return visit.numbers(start, listed)


def _outer(value: Any, run: TemplateRun, name: str) -> Any:
    if run.visit is not None:
        run.visit.note_outer(name)
    return value


def _compare(left: Any, run: TemplateRun, right: Any, comparison: str, name: str, attribute: str) -> Any:
    if run.visit is not None:
        run.visit.note_comparison((name, attribute), left, comparison, right)
    return COMPARISONS[comparison](left, right)


_FILTERS: dict[str, Callable[..., Any]] = {
    "enter": _enter,
    "leave": _leave,
    "item": _item,
    "size": _size,
    "numbers": _numbers,
    "compare": _compare,
    "outer": _outer,
}


# -- the sandbox --------------------------------------------------------------------------------


class _TracingSandbox(QuickSandbox):
    """The sandbox of a rewritten template. Raises NotTraceable if the template could detect a `Count`."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_counts(args)
        _refuse_counts(kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _refuse_counts((obj,))
        if type(obj) is TracedLoop and attribute not in NAMES_IN_LOOPS:
            raise NotTraceable
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _refuse_counts((obj, argument))
        if type(obj) is TracedLoop:
            raise NotTraceable
        return super().getitem(obj, argument)


def _refuse_counts(values: Any) -> None:
    for value in values:
        if type(value) is Count:
            raise NotTraceable


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    refuse = _refuse_counts_within if name in _TYPED else _refuse_counts

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        refuse(args)
        refuse(kwargs.values())
        return function(*args, **kwargs)

    return guarded


_TYPED = frozenset({"tojson"})
"""Filters that depend on the types of all values in a value."""


def _refuse_counts_within(values: Any) -> None:
    _refuse_counts(values)
    for value in values:
        if isinstance(value, dict):
            _refuse_counts_within(value.values())
        elif isinstance(value, (list, tuple)):
            _refuse_counts_within(value)


def _is_same_constant(value: Any, other: Any) -> bool:
    """The test `sameas`, for constants only: equal texts may be one object in one run and two in another."""
    if not (other is None or isinstance(other, bool)):
        raise NotTraceable
    return value is other


def _sandbox(source: str) -> _TracingSandbox:
    sandbox: Any = sandbox_like_theirs(source, _TracingSandbox)
    sandbox.filters = {name: _guarded(name, found) for name, found in sandbox.filters.items()}
    sandbox.filters |= {f"{TRACE}{name}": found for name, found in _FILTERS.items()}
    sandbox.tests = {name: _guarded(name, found) for name, found in sandbox.tests.items()}
    sandbox.tests["sameas"] = _is_same_constant
    sandbox.namespace = traced_namespace(sandbox.namespace)
    sandbox.globals = {**sandbox.globals, "namespace": sandbox.namespace}
    return sandbox
