"""The sandbox that chat templates run in: transformers' own, made quick, on a day that is always the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from renderers.today import TODAY

_NAMES_OF_DICTS = frozenset(dir(dict))
_NAMES_OF_STRINGS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_NAMES_OF_LOOPS = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"}
)


class QuickSandbox(ImmutableSandboxedEnvironment):
    """The sandbox, quicker where its answer is known from the types alone.

    An entry of a dict is always open; so are these attributes of strings and of loops, and plain values
    that the template itself put into a namespace.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _NAMES_OF_DICTS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif (kind is LoopContext and attribute in _NAMES_OF_LOOPS) or (
            kind is str and attribute in _NAMES_OF_STRINGS
        ):
            return getattr(obj, attribute)
        elif isinstance(obj, Namespace) and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in (str, int, bool):
                return value
        return super().getattr(obj, attribute)


def sandbox_like_theirs(source: str, kind: type[QuickSandbox]) -> QuickSandbox:
    """A sandbox of this kind with all that transformers gives the template, but for the date."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template(source).environment
    sandbox = kind.__new__(kind)
    vars(sandbox).update(vars(theirs))
    sandbox.globals = {**theirs.globals, "strftime_now": TODAY.strftime}
    sandbox.extensions = {name: extension.bind(sandbox) for name, extension in theirs.extensions.items()}
    return sandbox


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """The template in a sandbox like transformers' own."""
    template = sandbox_like_theirs(source, QuickSandbox).from_string(source)
    template.globals = dict(template.globals)  # quicker to look up than jinja's chain of dicts
    return template
