"""Chat templates that print every message by itself, and their text of a long conversation's beginnings.

Masks are found by comparing what a template prints of a conversation and of each of its beginnings. To
run it for each takes time that grows with the square of the messages. Where its source shows that the
text of a message depends on that message, its number and the first messages alone, one run gives the
text of every beginning: what stands before the loop over the messages, the parts of the first of them,
and what stands behind the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import jinja2
from jinja2 import nodes

from renderers.encoder import SENTINEL

_OF_THE_PAST = frozenset({"index", "index0", "first"})
"""What a loop knows of itself that does not depend on what comes after the message."""

_OPAQUE = (
    *(
        nodes.NSRef,
        nodes.CallBlock,
        nodes.Include,
        nodes.Import,
        nodes.FromImport,
        nodes.Extends,
        nodes.Block,
    ),
    *(nodes.Break, nodes.ExtensionAttribute, nodes.ImportedName),
)
"""What remembers, ends a loop early, or is defined elsewhere."""


class Beginnings:
    """The text of the first messages of one conversation, for each number of them."""

    def __init__(self, printed: str, num_messages: int, least: int) -> None:
        """`printed` is the text of all messages, with a mark before that of each and one behind the last."""
        self.least = least
        """The number of messages from which on the text is known."""
        self._before, *parts, self._behind = printed.split(SENTINEL)
        self._parts = "".join(parts)
        self._ends = list(accumulate(map(len, parts), initial=0))
        self._num_skipped = num_messages - len(parts)

    def text(self, num_messages: int) -> str:
        end = self._ends[max(0, num_messages - self._num_skipped)]
        return f"{self._before}{self._parts[:end]}{self._behind}"


class LocalTemplate:
    """A template that prints every message by itself, with marks between the messages."""

    def __init__(self, marked: jinja2.Template, num_first: int) -> None:
        self._marked = marked
        self.num_first = num_first
        """The number of first messages that the whole text may depend on."""

    def beginnings(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> Beginnings:
        """Raises whatever the template raises."""
        printed = self._marked.render(variables, messages=list(messages))
        return Beginnings(printed, len(messages), self.num_first)


def local_template(source: str, environment: jinja2.Environment) -> LocalTemplate | None:
    """The template, compiled with marks; None where it may not print every message by itself."""
    tree = environment.parse(source)
    reading = _Reading(tree)
    if reading.loop is None:
        return None
    loop, holder = reading.loop
    place = next(index for index, node in enumerate(holder) if node is loop)
    loop.body.insert(0, _mark(loop))
    holder.insert(place + 1, _mark(loop))
    code = environment.compile(tree)
    marked = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    return LocalTemplate(marked, reading.num_first)


def _mark(beside: nodes.Node) -> nodes.Output:
    data = nodes.TemplateData(SENTINEL, lineno=beside.lineno)
    return nodes.Output([data], lineno=beside.lineno)


class _Reading:
    """What the source of a template says of how it reads the messages.

    `loop` is the only loop over them and the list that holds it, where nothing makes the text of one
    message depend on a later one, or on what was printed before.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self.num_first = 1
        self._names = {"messages"}
        """The names of the list of messages, or of that without the first one."""
        self._naming: list[nodes.Node] = []
        """The assignments that give it another name, or drop the first message."""
        loops = list(self._loops(tree.body))
        self.loop = (
            loops[0] if len(loops) == 1 and self._is_local(tree, None, loops[0][0], "outside") else None
        )

    def _loops(self, body: list[nodes.Node]) -> Iterator[tuple[nodes.For, list[nodes.Node]]]:
        """The loops over the messages that stand in no other loop or macro."""
        for node in body:
            if isinstance(node, nodes.If):
                for part in (node.body, node.else_, *(branch.body for branch in node.elif_)):
                    yield from self._loops(part)
            elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
                if self._is_messages(node.node):
                    self._names.add(node.target.name)
                    self._naming += [node, node.node]
            elif isinstance(node, nodes.For) and self._is_messages(node.iter):
                self._naming += [node, node.iter]
                yield node, body

    def _is_messages(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            start, stop, step = node.arg.start, node.arg.stop, node.arg.step
            is_tail = isinstance(start, nodes.Const) and start.value == 1 and stop is None and step is None
            return is_tail and isinstance(node.node, nodes.Name) and node.node.name == "messages"
        return isinstance(node, nodes.Name) and node.name in self._names

    def _is_local(self, node: nodes.Node, parent: nodes.Node | None, loop: nodes.For, place: str) -> bool:
        """Whether nothing in this node looks at later messages, or remembers earlier ones.

        `place` is `outside` of the loop over the messages, `inside` of it, or in a loop `within` it.
        """
        if isinstance(node, _OPAQUE):
            return False
        if node is loop and (loop.else_ or loop.test is not None or loop.recursive):
            return False
        if isinstance(node, nodes.Name) and not self._is_harmless(node, parent, place):
            return False
        return all(
            self._is_local(child, node, loop, _place_of(child, node, loop, place))
            for child in node.iter_child_nodes()
        )

    def _is_harmless(self, name: nodes.Name, parent: nodes.Node | None, place: str) -> bool:
        if name.name == "namespace":
            return False
        if name.name == "loop" and place == "inside":
            return isinstance(parent, nodes.Getattr) and parent.attr in _OF_THE_PAST
        if name.name not in self._names or any(parent is node for node in self._naming):
            return True
        if not isinstance(parent, nodes.Getitem) or not isinstance(parent.arg, nodes.Const):
            return False
        position = parent.arg.value
        if type(position) is not int or position < 0:
            return False
        self.num_first = max(self.num_first, position + 2)  # the first one may have been dropped
        return True


def _place_of(child: nodes.Node, node: nodes.Node, loop: nodes.For, place: str) -> str:
    if node is loop and child is not loop.iter:
        return "inside"
    is_nested_body = isinstance(node, nodes.For) and place == "inside" and child is not node.iter
    return "within" if is_nested_body else place
