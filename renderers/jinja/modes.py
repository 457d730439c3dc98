"""Finds the modes of a chat template: values of its own variables that change how it prints a reply.

Templates of models that may think read a variable such as `enable_thinking` or `reasoning_effort`. The names
and values are read off the template's code, and each is tried on a few short conversations. Values that print
nothing new are dropped, so what is left is a mode of the template, whatever its name is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice, product
from typing import Any

from jinja2 import nodes

from cookbook.errors import RendererError
from cookbook.utils import notes
from cookbook.utils.notes import Note
from renderers.jinja.template import Template
from renderers.messages import PlainMessage, to_json

_USER: PlainMessage = {"role": "user", "content": "x"}
_REPLY: PlainMessage = {"role": "assistant", "content": "y"}
_THOUGHT: PlainMessage = {**_REPLY, "reasoning_content": "z"}
_INLINE: PlainMessage = {**_REPLY, "content": "<think>\nz\n</think>\n\ny"}
_PROBES: tuple[tuple[list[PlainMessage], bool], ...] = (
    ([_USER], True),
    ([_USER, _REPLY], False),
    ([_USER, _THOUGHT], False),
    ([_USER, _THOUGHT, _USER, _REPLY], False),
    ([_USER, _INLINE], False),
)
_NO_MODES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_MOST_VARIABLES, _MOST_TRIED, _MOST_MODES = 12, 256, 16
_OF_THINKING = re.compile("think|thought|reason|effort|budget")
"""Parts of the names of variables that are tried together, as all combinations may be too many."""


def modes_of(template: Template) -> list[Template]:
    """Returns the template with each setting of its variables that prints something else, given ones kept.

    A setting has one variable, or two or three of those that print something else alone or are named like
    thinking: a template may print a thought only if several are set, none of which changes anything alone.
    The order depends on the template alone.
    """
    usual = _printed(template)
    seen = {usual}
    modes: list[Template] = []

    def tried(settings: Iterable[dict[str, Any]]) -> None:
        for setting in settings:
            mode = template.with_kwargs(setting)
            printed = _printed(mode)
            if printed not in seen and _is_mode(setting, printed, usual):
                seen.add(printed)
                modes.append(mode)

    values = dict(islice(values_of_variables(template).items(), _MOST_VARIABLES))
    tried({name: value} for name in values for value in values[name])
    of_use = {name for mode in modes for name in mode.chosen}
    names = [name for name in values if name in of_use or _OF_THINKING.search(name)]
    together = [
        dict(zip(chosen, given, strict=True))
        for number in (2, 3)
        for chosen in combinations(names, number)
        for given in product(*(values[name] for name in chosen))
    ]
    tried(islice(together, _MOST_TRIED))
    return modes[:_MOST_MODES]


def _printed(template: Template) -> tuple[str | None, ...]:
    """Returns what the template prints for each probe; None for one that it refuses."""
    printed: list[str | None] = []
    for messages, prompt in _PROBES:
        try:
            printed.append(template.trial([template.adapted(one) for one in messages], prompt=prompt))
        except RendererError:
            printed.append(None)
    return tuple(printed)


def _is_mode(setting: Mapping[str, Any], printed: Sequence[str | None], usual: Sequence[str | None]) -> bool:
    """Returns whether the setting prints every probe that is usually printed, and does not print a flag.

    A template prints a flag where it expects a text, such as a date or a name.
    """
    flags = [str(value) for value in setting.values() if isinstance(value, bool)]
    for text, before in zip(printed, usual, strict=True):
        if text is None and before is not None:
            return False
        if any((text or "").count(flag) > (before or "").count(flag) for flag in flags):
            return False
    return True


# -- the variables in a template's code ----------------------------------------------------------


def values_of_variables(template: Template) -> dict[str, list[Any]]:
    """Returns the values to try for each variable that the template reads and does not set itself.

    They are the words and numbers that it compares the variable with, also under another name that it gives
    it; for one that it compares with none, true and false.
    """
    trees = template.syntax_trees()
    names = own_variables(template)
    constants: dict[str, list[Any]] = {name: [] for name in sorted(names)}
    for tree in trees:
        aliases = _aliases(tree, names)
        for node in tree.find_all(nodes.Compare):
            for name, values in _compared(node):
                for variable in aliases.get(name, ()):
                    constants[variable] += [value for value in values if _is_setting(value)]
    flags = [True, False]
    return {
        name: flags if set(map(type, values)) <= {bool} else list(dict.fromkeys(values))
        for name, values in constants.items()
    }


def own_variables(template: Template) -> frozenset[str]:
    """Returns the variables that the template reads and does not set itself, and that are not given to it."""
    trees = template.syntax_trees()
    names = template.variables_read - template.variable_names - _NO_MODES
    return frozenset(name for name in names if all(_may_be_given(name, tree) for tree in trees))


def _is_setting(value: Any) -> bool:
    return isinstance(value, (bool, int)) or (
        isinstance(value, str) and re.fullmatch(r"\w[\w.-]{0,19}", value) is not None
    )


def _may_be_given(name: str, tree: nodes.Template) -> bool:
    """Returns whether the template sets the name only where it was not given, or not at all."""
    is_set = any(node.name == name and node.ctx != "load" for node in tree.find_all(nodes.Name))
    if not is_set:
        return True
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined", "none") and _key(test.node) == name:
            return True
    return any(
        filtered.name in ("default", "d") and filtered.node is not None and _key(filtered.node) == name
        for filtered in tree.find_all(nodes.Filter)
    )


def _key(node: nodes.Node) -> str | None:
    """Returns the name of a variable, or of an attribute of a namespace."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return None


def _aliases(tree: nodes.Template, names: Iterable[str]) -> dict[str, set[str]]:
    """Returns the variables behind each name: those that the template computes it from."""
    behind: dict[str, set[str]] = {name: {name} for name in names}
    for assignment in tree.find_all(nodes.Assign):
        target, value = _key(assignment.target), assignment.node
        computed = [(target, value)]
        if isinstance(value, nodes.Call) and _key(value.node) == "namespace":
            computed = [(f"{target}.{given.key}", given.value) for given in value.kwargs]
        for name, node in computed:
            read: set[str] = set()
            for inner in _with_inner(node):
                read |= behind.get(_key(inner) or "", set())
            if name is not None and read:
                behind[name] = behind.get(name, set()) | read
    return behind


def _with_inner(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _compared(node: nodes.Compare) -> Iterator[tuple[str, list[Any]]]:
    """Yields each name of a comparison, with the constants that it is compared with."""
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    for one, other in product(sides, sides):
        inner: nodes.Node | None = one
        while isinstance(inner, nodes.Filter):
            inner = inner.node
        name = _key(inner) if inner is not None else None
        if name is None or one is other:
            continue
        if isinstance(other, nodes.Const):
            yield name, [other.value]
        elif isinstance(other, (nodes.List, nodes.Tuple)):
            yield name, [item.value for item in other.items if isinstance(item, nodes.Const)]


# -- the modes of the replies that are trained ---------------------------------------------------

PROMPTS = (
    "Prompts of trained replies, by template_kwargs (a run samples with that of all its replies, or, if they "
    "differ, as usual; set template_kwargs to choose)"
)


def note_prompt(mode: Template, has_variables: bool) -> None:
    """Counts the prompt of a trained reply, by the variables of the template that it was made with."""
    read = {name: value for name, value in mode.kwargs.items() if name in mode.variables_read}
    if read or has_variables:
        notes.count("turn", PROMPTS, to_json(read) if read else notes.USUAL)


def mode_of_all(found: Iterable[Note]) -> dict[str, Any] | None:
    """Returns the variables of the template that all prompts were counted with; None for the usual ones.

    Also returns None if they differ, or if they are too long for a note.
    """
    items = {note.item for note in found if note.what == PROMPTS}
    item = items.pop() if len(items) == 1 else notes.USUAL
    return json.loads(item) if item.endswith("}") else None
