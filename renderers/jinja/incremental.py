"""Runs a chat template for many prefixes of one conversation, each message about once.

Masks are found by comparing what a template prints of a conversation and of each of its prefixes. To run it
for each takes time that grows with the square of the messages. So the template is rewritten to follow its
loops (`loop_rewriting`), and of each loop those iterations alone are run that may print something else than
for the prefix before (`loop_records`). All outside of the loops is run every time. A template that does
what cannot be traced is run unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.runtime import Context

from renderers.jinja.loop_context import NAMES_IN_LOOPS, FollowedLoop, loop_context
from renderers.jinja.loop_counts import Count, NotFollowed
from renderers.jinja.loop_records import BackwardRecord, Memory
from renderers.jinja.loop_rewriting import FOLLOW, RUN, Loop, rewritten
from renderers.jinja.loop_values import followed
from renderers.jinja.loop_visits import COMPARISONS, BackwardVisit, ForwardVisit, Run
from renderers.jinja.private import Namespace, set_loop_context
from renderers.jinja.sandbox import QuickSandbox, sandbox_like_theirs
from renderers.jinja.template_limits import spend

_REVERSE_ITERATOR: type[Iterable[Any]] = type(reversed([]))


class IncrementalTemplate:
    """A chat template whose loops can be followed."""

    def __init__(self, template: jinja2.Template, environment: _FollowingSandbox, loops: list[Loop]) -> None:
        self._template = template
        self._environment = environment
        self._loops = loops
        self.is_followed = True
        """False once the template did what cannot be followed."""

    @staticmethod
    def of(source: str) -> IncrementalTemplate | None:
        """None where there is no loop to follow, or an expression is nested too deeply to be rewritten."""
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
        """What the template prints.

        Raises what the template raises, and `NotFollowed` where it has to be run as it is.
        """
        run = Run(messages, self._environment, self._loops, memory)
        context = self._template.new_context({**variables, "messages": messages, RUN: run})
        try:
            for piece in self._template.root_render_func(context):
                spend(len(piece))
                run.pieces.append(piece)
        except NotFollowed:
            self.is_followed = False
            raise
        finally:
            if run.visit is not None:
                run.visit.end()
            memory.num_runs += 1
            memory.num_iterations += run.num_iterations
            memory.num_reused += run.num_reused
        return "".join(run.pieces)


# -- the filters that a rewritten template calls ------------------------------------------------


def _enter(iterable: Any, run: Run, number: int, *values: Any) -> Any:
    """A visit of the list that loop `number` runs over; the list itself where that cannot be followed."""
    loop = run.loops[number]
    if loop.is_reversed and isinstance(iterable, _REVERSE_ITERATOR):
        iterable = list(iterable)
    namespaces = [id(value) for value in values if isinstance(value, Namespace)]
    has_two_names_for_one = len(set(namespaces)) < len(namespaces)
    if type(iterable) not in (list, range) or has_two_names_for_one:
        return iterable
    if loop.is_reversed:
        backward = run.memory.backward_records.setdefault(number, BackwardRecord())
        run.visit = BackwardVisit(run, loop, iterable, values, backward)
    else:
        records = run.memory.records.setdefault(number, [])
        run.visit = ForwardVisit(run, loop, iterable, values, records)
    return run.visit


def _leave(_: str, run: Run) -> str:
    if run.visit is not None:
        run.visit.leave()
    run.visit = None
    return ""


def _item(listed: Any, run: Run, position: Any) -> Any:
    visit = run.visit
    if visit is not None and visit.is_followed(listed):
        if type(position) is not int:
            raise NotFollowed
        visit.note_item(listed, position)
    return run.environment.getitem(listed, position)


def _size(listed: Any, run: Run) -> Any:
    visit = run.visit
    if visit is not None and visit.is_followed(listed):
        return Count(visit, len(listed), len(listed) - len(run.messages))
    return len(listed)


def _numbers(start: Any, run: Run, listed: Any, function: Any) -> Iterable[int]:
    """The numbers from the start to the length of the list, each as it is asked for."""
    if function is not run.environment.globals["range"]:
        raise NotFollowed  # a variable of the template's own
    visit = run.visit
    if visit is None or not visit.is_followed(listed):
        return range(start, len(listed))
    if type(start) is not int:
        raise NotFollowed
    return visit.numbers(start, listed)


def _compare(left: Any, run: Run, right: Any, comparison: str, name: str, attribute: str) -> Any:
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
}


# -- the sandbox --------------------------------------------------------------------------------


class _FollowingSandbox(QuickSandbox):
    """The sandbox of a rewritten template: no placeholder value is given to anything that could tell it
    apart.
    """

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_counts(args)
        _refuse_counts(kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _refuse_counts((obj,))
        if type(obj) is FollowedLoop and attribute not in NAMES_IN_LOOPS:
            raise NotFollowed
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _refuse_counts((obj, argument))
        if type(obj) is FollowedLoop:
            raise NotFollowed
        return super().getitem(obj, argument)


def _refuse_counts(values: Any) -> None:
    for value in values:
        if type(value) is Count:
            raise NotFollowed


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    refuse = _refuse_counts_within if name in _TYPED else _refuse_counts

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        refuse(args)
        refuse(kwargs.values())
        return function(*args, **kwargs)

    return guarded


_TYPED = frozenset({"tojson"})
"""Filters that look at the type of all that is in a value."""


def _refuse_counts_within(values: Any) -> None:
    _refuse_counts(values)
    for value in values:
        if isinstance(value, dict):
            _refuse_counts_within(value.values())
        elif isinstance(value, (list, tuple)):
            _refuse_counts_within(value)


def _is_same_constant(value: Any, other: Any) -> bool:
    """The test `sameas`. Two texts that are equal may be one object in one run and two in another."""
    if not (other is None or isinstance(other, bool)):
        raise NotFollowed
    return value is other


def _sandbox(source: str) -> _FollowingSandbox:
    sandbox: Any = sandbox_like_theirs(source, _FollowingSandbox)
    sandbox.filters = {name: _guarded(name, found) for name, found in sandbox.filters.items()}
    sandbox.filters |= {f"{FOLLOW}{name}": found for name, found in _FILTERS.items()}
    sandbox.tests = {name: _guarded(name, found) for name, found in sandbox.tests.items()}
    sandbox.tests["sameas"] = _is_same_constant
    kind = sandbox.globals["namespace"]
    sandbox.globals = {**sandbox.globals, "namespace": followed(kind)}
    return sandbox
