"""The sandbox that chat templates run in: that of transformers with shortcuts, limits and a fixed date."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cookbook.errors import RendererError
from renderers.jinja import call_limits, template_limits
from renderers.jinja.private import (
    PASSED_TO_CALLS,
    CountingCodeGenerator,
    LoopContext,
    Namespace,
    attributes_of,
    environment_of_transformers,
)
from renderers.jinja.template_limits import LIMITS, Limits
from renderers.jinja.today import TODAY

_NAMES_OF_DICTS = frozenset(dir(dict))
_NAMES_OF_STRINGS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_NAMES_OF_LOOPS = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"}
)
_PLAIN = frozenset((str, int, bool))
_Method: Any = type("".strip)
_COSTS_OF_METHODS = {
    **dict.fromkeys(("startswith", "endswith"), 0),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), 1),
    "split": call_limits.ITEM,
}
"""The most characters of a result for each character of the string, by method."""


class QuickSandbox(ImmutableSandboxedEnvironment):
    """A sandbox with shortcuts for attributes that are safe by their types, and limits on the costs of a run.

    Safe are entries of a dict, the attributes of strings and loops listed above, and plain values that the
    template itself put into a namespace. A method that templates often call is called directly. The limits
    are in `template_limits`.
    """

    code_generator_class = CountingCodeGenerator
    context_class = template_limits.CountingContext
    concat = staticmethod(template_limits.concat)
    source: str
    limits: Limits
    namespace: Callable[..., Any]
    """What a template makes a namespace with."""
    num_timeouts: int
    """The number of runs that exceeded the time limit."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is _Method and type(__obj.__self__) is str and kwargs.keys() <= PASSED_TO_CALLS:
            cost = _COSTS_OF_METHODS.get(__obj.__name__)
            if cost is not None and all(type(one) is str for one in args):
                template_limits.spend(cost * len(__obj.__self__))
                return __obj(*args)
        if __obj is __self.namespace:
            for name in PASSED_TO_CALLS:
                kwargs.pop(name, None)
            return __self.namespace(*args, **kwargs)
        args = call_limits.checked_arguments(__obj, args, kwargs)
        made = super().call(__context, __obj, *args, **kwargs)
        return template_limits.counted(made) if type(made) is dict else made

    def wrap_str_format(self, value: Any) -> Any:
        return call_limits.limited_format(value, self) if call_limits.is_format(value) else None

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _NAMES_OF_DICTS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif (kind is LoopContext and attribute in _NAMES_OF_LOOPS) or (
            kind is str and attribute in _NAMES_OF_STRINGS
        ):
            return getattr(obj, attribute)
        elif issubclass(kind, Namespace) and not attribute.startswith("_"):
            attributes = attributes_of(obj)
            if attribute in attributes and type(value := attributes[attribute]) in _PLAIN:
                return value
        return super().getattr(obj, attribute)


def sandbox_like_theirs(source: str, kind: type[QuickSandbox], limits: Limits = LIMITS) -> QuickSandbox:
    """Returns a sandbox of this kind with everything that transformers provides, except for the date.

    An error in a run quotes the line of the source that was running.
    """
    theirs = environment_of_transformers()  # compiling the template there would compute its constants
    sandbox = kind.__new__(kind)
    vars(sandbox).update(vars(theirs))
    sandbox.optimized = False
    sandbox.source, sandbox.limits, sandbox.num_timeouts = source, limits, 0
    sandbox.filters = {
        name: call_limits.limited_filter(name, found) for name, found in theirs.filters.items()
    }
    sandbox.globals = {**theirs.globals, "strftime_now": TODAY.strftime}
    sandbox.namespace = theirs.globals["namespace"]  # type: ignore[assignment]
    sandbox.extensions = {name: extension.bind(sandbox) for name, extension in theirs.extensions.items()}
    return sandbox


@lru_cache(maxsize=64)
def compiled(source: str, limits: Limits = LIMITS) -> jinja2.Template:
    """Returns the template in a sandbox like transformers' own. Raises RendererError if it is not valid."""
    try:
        template = sandbox_like_theirs(source, QuickSandbox, limits).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RendererError(
            f"The chat template is not valid Jinja: {error.message}, in line {error.lineno} of it. Correct "
            f"it, or choose another renderer."
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:
        # Python's compiler raises these for the code that jinja2 generates.
        raise RendererError(
            f"The chat template cannot be compiled: it is nested too deeply ({error})."
        ) from error
    template.globals = dict(template.globals)  # lookups are faster than in jinja2's chain of dicts
    return template
