"""The undocumented parts of jinja2 that this package needs.

No other file of this project uses private parts of jinja2, or of transformers' code around it.
`tests/renderers/test_private.py` compares them with those of jinja2 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import LoopContext
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import Namespace, generate_lorem_ipsum

__all__ = [
    "PASSED_TO_CALLS",
    "CountingCodeGenerator",
    "Frame",
    "LoopContext",
    "Namespace",
    "SandboxedFormatter",
    "attributes_of",
    "environment_of_transformers",
    "generate_lorem_ipsum",
    "num_passed",
    "set_attributes",
    "set_loop_context",
    "template_of",
]

PASSED_TO_CALLS = frozenset(("_loop_vars", "_block_vars"))
"""The arguments that compiled code adds to every call within a loop or a block."""


def attributes_of(namespace: Namespace) -> Any:
    """Returns the dict of a namespace's attributes, without calling methods that its class overrides."""
    return object.__getattribute__(namespace, "_Namespace__attrs")


def set_attributes(namespace: Any, attributes: dict[str, Any]) -> None:
    """Replaces the dict of a namespace's attributes."""
    namespace._Namespace__attrs = attributes


def num_passed(function: Callable[..., Any]) -> int:
    """Returns the number of arguments (such as the context) that a filter or test gets before its value."""
    return 1 if hasattr(function, "jinja_pass_arg") else 0


def template_of(frame: FrameType) -> jinja2.Template | None:
    """Returns the template whose compiled code runs in the frame; None for any other code."""
    template: jinja2.Template | None = frame.f_globals.get("__jinja_template__")
    return template


def set_loop_context(template: jinja2.Template, loop_context: Callable[..., Any]) -> None:
    """Makes the template's compiled code create each `loop` variable with this function."""
    template.root_render_func.__globals__["LoopContext"] = loop_context


def environment_of_transformers() -> jinja2.Environment:
    """Returns the environment in which transformers compiles chat templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: jinja2.Environment = _compile_jinja_template("").environment
    return environment


# -- compiled code ------------------------------------------------------------------------------


def _may_escape(frame: Frame) -> bool:
    """Returns whether the template may have enabled escaping of HTML where this code runs."""
    return bool(frame.eval_ctx.volatile or frame.eval_ctx.autoescape)


_TERMS = 6
"""The number of terms whose sum is counted after it is computed. It is at most that many times as large as
what was already counted."""

_METHODS = frozenset((*dir(dict), *dir(str)))


class CountingCodeGenerator(CodeGenerator):
    """Compiles a template to code that counts its costs by calls to `template_limits.CountingContext`.

    No constant expression is computed at compile time.
    """

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
        # Most printed values are strings already, and a call for each would cost more than printing it.
        self.write("context.escaped(" if _may_escape(frame) else "(printed if type(printed := (")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")" if _may_escape(frame) else ")) is str else context.text(printed))")

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

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:
        if node.attr in _METHODS:
            super().visit_Getattr(node, frame)
            return
        # Most are entries of a message, which are safe, and a call for each would cost more than reading it.
        self.write(f"(found[{node.attr!r}] if type(found := (")
        self.visit(node.node, frame)
        self.write(f")) is dict and {node.attr!r} in found else environment.getattr(found, {node.attr!r}))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._nested(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._nested(super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._nested(super().visit_Dict, node, frame)
