"""Rewrites the loops of a chat template so that `loop_visits` can trace and shorten them.

Every loop that is not inside another loop, a macro or a block is rewritten:

    {% for message in messages %} ... {% endfor %}

becomes, written as a template,

    {% for message in messages | enter(run, 0, <the outer values that the body reads>) %} ... {% endfor %}
    {{ run | leave }}

and in its body, if `messages` and `ns.last` are read in no other way,

    messages[i]         becomes   messages | item(run, i)
    messages | length   becomes   messages | size(run)
    i > ns.last         becomes   i | compare(run, ns.last, 'gt', 'ns', 'last')
    {% for k in range(i, messages | length) %}
                        becomes   {% for k in i | numbers(run, messages, range) %}

A variable that the template computes from the messages, and that is read in another way, becomes

    variable            becomes   variable | outer(run, 'variable')

The filters note on which messages and variables, and how on the number of messages, an iteration depends. If
a loop over such numbers in the body contains only an `if` that does nothing once `ns.found` is set, it is
ended with a `break` at that point, which is often long before the last message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import jinja2
from jinja2 import nodes

RUN = "run_of_a_template"
"""The variable that contains the run. A template that has a variable of this name is not rewritten."""

TRACE = "trace:"
"""The prefix of the filters that a rewritten template calls."""

_OPAQUE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
"""Nodes whose content is defined elsewhere."""

_ITEM, _WHOLE = "[]", ""
"""The kinds of reads of a variable that do not read an attribute: of an item, and any other."""

_DIFFERENT = ("messages", "add_generation_prompt")
"""The variables of which one conversation's texts are made."""

_OPERATORS = {"eq", "ne", "gt", "gteq", "lt", "lteq"}


@dataclass(frozen=True)
class Loop:
    """A rewritten loop."""

    names: tuple[str, ...]
    """The outer variables that its body may read."""
    indexed: frozenset[str]
    """The outer variables of which the body reads only items and the length."""
    compared: frozenset[tuple[str, str]]
    """The names and attributes of namespaces that the body only compares, and does not set."""
    lazy: frozenset[str]
    """The outer variables that differ from run to run, each read of which is noted."""
    is_reversed: bool
    """Whether it runs over a list from the end, by `[::-1]` or `| reverse`, or over its indices."""


def rewritten(source: str, environment: jinja2.Environment) -> tuple[nodes.Template, list[Loop]]:
    """Returns the template's syntax tree with its loops rewritten, and the loops; none if it cannot be."""
    tree = environment.parse(source)
    is_plain = next(tree.find_all(_OPAQUE), None) is None
    if not is_plain or any(name.name == RUN for name in tree.find_all(nodes.Name)):
        return tree, []
    loops: list[Loop] = []
    _rewrite_loops(tree.body, _Macros(tree), _computed_from(_DIFFERENT, tree), loops)
    return tree, loops


def _computed_from(names: Iterable[str], tree: nodes.Template) -> set[str]:
    """Returns these variables and those that the template sets to a value that it computes from them."""
    found, num_before = {*names}, 0
    assigned: list[tuple[nodes.Node, list[nodes.Node]]] = [
        *((node.target, [node.node]) for node in tree.find_all(nodes.Assign)),
        *((node.target, node.body) for node in tree.find_all(nodes.AssignBlock)),
    ]
    while len(found) > num_before:
        num_before = len(found)
        for target, value in assigned:
            if not found.isdisjoint(_names_read(value)):
                found |= {node.name for node in _with_descendants([target]) if isinstance(node, nodes.Name)}
    return found


class _Macros:
    """The macros of a template."""

    def __init__(self, tree: nodes.Template) -> None:
        self.named: dict[str, list[nodes.Macro]] = {}
        for macro in tree.find_all(nodes.Macro):
            self.named.setdefault(macro.name, []).append(macro)
        top = {node.name for node in tree.body if isinstance(node, nodes.Macro)}
        assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        self.constant = {name for name in top - assigned if len(self.named[name]) == 1}
        """The names that refer to the same macro in every run."""

    def called_by(self, body: Iterable[nodes.Node]) -> list[nodes.Macro]:
        """Returns the macros that are named in the body, directly or in another such macro."""
        called: dict[str, list[nodes.Macro]] = {}
        waiting = list(body)
        while waiting:
            for node in list(_with_descendants([waiting.pop()])):
                if isinstance(node, nodes.Name) and node.name in self.named and node.name not in called:
                    called[node.name] = self.named[node.name]
                    waiting += called[node.name]
        return [macro for macros in called.values() for macro in macros]


def _rewrite_loops(body: list[nodes.Node], macros: _Macros, different: set[str], loops: list[Loop]) -> None:
    for place in reversed(range(len(body))):
        node = body[place]
        if isinstance(node, nodes.If):
            for part in (node.body, node.else_, *(branch.body for branch in node.elif_)):
                _rewrite_loops(part, macros, different, loops)
        elif isinstance(node, nodes.For) and not (node.test or node.else_ or node.recursive):
            loop = _reads_of(node, macros, different)
            _Rewriting(loop).rewrite(node.body)
            values: list[nodes.Expr] = [nodes.Name(name, "load", lineno=node.lineno) for name in loop.names]
            number = nodes.Const(len(loops), lineno=node.lineno)
            node.iter = _filter("enter", node.iter, [number, *values])
            left = _filter("leave", nodes.Const("", lineno=node.lineno), [])
            body.insert(place + 1, nodes.Output([left], lineno=node.lineno))
            loops.append(loop)


def _filter(name: str, value: nodes.Node, arguments: list[nodes.Expr]) -> nodes.Filter:
    run = nodes.Name(RUN, "load", lineno=value.lineno)
    return nodes.Filter(
        cast(nodes.Expr, value), f"{TRACE}{name}", [run, *arguments], [], None, None, lineno=value.lineno
    )


def _reads_of(loop: nodes.For, macros: _Macros, different: set[str]) -> Loop:
    """Returns what the body of a loop reads of outer variables, including the macros that it may call.

    `different` are the variables that differ from run to run.
    """
    called = macros.called_by(loop.body)
    own = {name.name for name in _with_descendants([loop.target]) if isinstance(name, nodes.Name)} | {"loop"}
    by_macros = _names_read(called)  # a macro cannot see the loop's own variables
    names = (_names_read(loop.body) - own) | by_macros
    is_reversed = _is_reversed(loop.iter)
    compared: set[tuple[str, str]] = set()
    others = {*_other_reads(called, None), *_other_reads(loop.body, compared)}
    indexed = frozenset(name for name in names if not _kinds_of(name, others) - {_ITEM})
    with_attributes = {name for name, _ in compared} | {
        name for name, kind in others if kind not in (_ITEM, _WHOLE)
    }
    lazy = (names & different) - indexed - by_macros - with_attributes
    return Loop(
        names=tuple(sorted(names - macros.constant)),
        indexed=indexed,
        compared=frozenset(
            (name, attribute)
            for name, attribute in compared
            if not _kinds_of(name, others) & {_WHOLE, _ITEM, attribute}
        ),
        lazy=frozenset() if is_reversed else frozenset(lazy),
        is_reversed=is_reversed,
    )


def _names_read(body: Iterable[nodes.Node]) -> set[str]:
    return {
        node.name
        for node in _with_descendants(body)
        if isinstance(node, (nodes.Name, nodes.NSRef)) and getattr(node, "ctx", "load") != "store"
    }


def _kinds_of(name: str, reads: set[tuple[str, str]]) -> set[str]:
    return {kind for read, kind in reads if read == name}


def _with_descendants(found: Iterable[nodes.Node]) -> Iterator[nodes.Node]:
    for node in found:
        yield node
        yield from node.find_all(nodes.Node)


def _is_reversed(iterated: nodes.Node) -> bool:
    if isinstance(iterated, nodes.Filter):
        return iterated.name == "reverse"
    if isinstance(iterated, nodes.Call) and len(iterated.args) == 3:  # range(messages | length - 1, -1, -1)
        is_range = isinstance(iterated.node, nodes.Name) and iterated.node.name == "range"
        return is_range and [_constant(bound) for bound in iterated.args[1:]] == [-1, -1]
    if not isinstance(iterated, nodes.Getitem) or not isinstance(iterated.arg, nodes.Slice):
        return False
    bounds = iterated.arg
    return bounds.start is None and bounds.stop is None and _constant(bounds.step) == -1


def _constant(node: nodes.Node | None) -> object:
    if isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const):
        return -node.node.value
    return node.value if isinstance(node, nodes.Const) else None


def _item_of(node: nodes.Node) -> nodes.Name | None:
    """Returns the variable of which this reads an item, unless its index is negative; else None."""
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name):
        position = _constant(node.arg)
        from_end = isinstance(position, int) and position < 0
        return None if from_end or isinstance(node.arg, nodes.Slice) else node.node
    return None


def _size_of(node: nodes.Node) -> nodes.Name | None:
    """Returns the variable of which this is the length, else None."""
    if not isinstance(node, nodes.Filter) or node.name not in ("length", "count"):
        return None
    if node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
        return None
    return node.node if isinstance(node.node, nodes.Name) else None


def _numbers_up_to(node: nodes.Node) -> tuple[nodes.Name, nodes.Expr, nodes.Name] | None:
    """Returns the function `range`, its start, and the list at whose length it ends; None for other calls."""
    if not isinstance(node, nodes.Call) or node.kwargs or node.dyn_args or node.dyn_kwargs:
        return None
    if not isinstance(node.node, nodes.Name) or node.node.name != "range" or len(node.args) != 2:
        return None
    listed = _size_of(node.args[1])
    return None if listed is None else (node.node, node.args[0], listed)


def _done(loop: nodes.For) -> nodes.Getattr | None:
    """Returns the attribute that, once true, makes all remaining iterations of a loop over numbers empty."""
    body = [node for node in loop.body if not _is_empty(node)]
    if len(body) != 1 or not isinstance(body[0], nodes.If) or loop.else_ or loop.recursive or loop.test:
        return None
    if not isinstance(loop.iter, nodes.Filter) or loop.iter.name != f"{TRACE}numbers":
        return None  # another iterator may be read further after the loop
    condition = body[0]
    test, done = condition.test, None
    if not condition.elif_ and not condition.else_:
        while isinstance(test, nodes.And):
            test = test.left
        if isinstance(test, nodes.Not):
            done = _attribute(test.node)
    elif all(map(_is_empty, condition.body)):
        done = _attribute(condition.test)
    if done is None or not isinstance(loop.target, nodes.Name):
        return None
    assert isinstance(done.node, nodes.Name)
    return None if done.node.name == loop.target.name else done


def _attribute(node: nodes.Node) -> nodes.Getattr | None:
    """Returns the node if it is an attribute of a variable other than `loop`, else None."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name != "loop":
        return node
    return None


def _is_empty(node: nodes.Node) -> bool:
    """Returns whether the node does nothing except print an empty text."""
    if not isinstance(node, nodes.Output):
        return False
    return all(isinstance(part, nodes.TemplateData) and not part.data for part in node.nodes)


def _compared(node: nodes.Node) -> tuple[nodes.Expr, str, nodes.Getattr] | None:
    """Returns `(left side, operator, attribute)` if this is a comparison with an attribute, else None."""
    if not isinstance(node, nodes.Compare) or len(node.ops) != 1 or node.ops[0].op not in _OPERATORS:
        return None
    right = _attribute(node.ops[0].expr)
    return None if right is None else (node.expr, node.ops[0].op, right)


def _other_reads(
    body: Iterable[nodes.Node], compared: set[tuple[str, str]] | None
) -> Iterator[tuple[str, str]]:
    """Yields how variables are read and set: `(name, attribute)`, `(name, _ITEM)` or `(name, _WHOLE)`.

    Reads of the length are skipped. Attributes that are compared are added to `compared` instead. Macros
    (`compared` is None) are not rewritten, so in them every read that is not of an attribute is `_WHOLE`.
    """
    for node in body:
        children = list(node.iter_child_nodes())
        if isinstance(node, nodes.NSRef):
            yield node.name, node.attr
        elif isinstance(node, nodes.Name):
            if node.ctx == "load":
                yield node.name, _WHOLE
        elif isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            yield node.node.name, node.attr
            children = []
        elif compared is not None and (comparison := _compared(node)) is not None:
            left, _, attribute = comparison
            assert isinstance(attribute.node, nodes.Name)
            compared.add((attribute.node.name, attribute.attr))
            children = [left]
        elif compared is not None and (listed := _item_of(node) or _size_of(node)) is not None:
            children.remove(listed)
            if isinstance(node, nodes.Getitem):
                position = _constant(node.arg)
                yield listed.name, position if isinstance(position, str) else _ITEM
        yield from _other_reads(children, compared)


class _Rewriting:
    """Inserts the filters that trace reads into the body of one loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def rewrite(self, body: list[nodes.Node]) -> None:
        for node in body:
            self._new(node)
            for loop in _with_descendants([node]):
                if isinstance(loop, nodes.For) and (done := _done(loop)) is not None:
                    end = nodes.If(done, [nodes.Break(lineno=loop.lineno)], [], [], lineno=loop.lineno)
                    loop.body.insert(0, end)

    def _rewrite_children(self, node: nodes.Node) -> None:
        for name, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, name, [self._new(child) for child in value])
            else:
                setattr(node, name, self._new(value))

    def _new(self, node: object) -> object:
        if not isinstance(node, nodes.Node):
            return node
        if isinstance(node, nodes.Name) and node.ctx == "load" and node.name in self._loop.lazy:
            return _filter("outer", node, [nodes.Const(node.name, lineno=node.lineno)])
        numbers = _numbers_up_to(node.iter) if isinstance(node, nodes.For) else None
        if isinstance(node, nodes.For) and numbers is not None and numbers[2].name in self._loop.indexed:
            function, start, growing = numbers
            node.iter = _filter("numbers", start, [growing, function])
        self._rewrite_children(node)
        if (listed := _item_of(node)) is not None and listed.name in self._loop.indexed:
            assert isinstance(node, nodes.Getitem)
            return _filter("item", listed, [node.arg])
        if (listed := _size_of(node)) is not None and listed.name in self._loop.indexed:
            return _filter("size", listed, [])
        if (comparison := _compared(node)) is not None:
            left, operator, attribute = comparison
            assert isinstance(attribute.node, nodes.Name)
            key = (attribute.node.name, attribute.attr)
            if key in self._loop.compared:
                constants: list[nodes.Expr] = [
                    nodes.Const(part, lineno=node.lineno) for part in (operator, *key)
                ]
                return _filter("compare", left, [attribute, *constants])
        return node
