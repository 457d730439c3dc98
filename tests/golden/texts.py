"""Writes the texts that users see to files: `--help` of every recipe, and all errors and log messages.

A change of a text is then visible in a diff. `make golden` writes the files again.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PACKAGES = ("cookbook", "renderers", "recipes")
RECIPES = (
    "chat", "distill", "dpo", "estimate", "export", "jobs", "preview", "report", "serve", "sft", "sft_loop",
    "sweep",
)  # fmt: skip
LOG_METHODS = ("debug", "info", "warning", "error", "exception")
COLUMNS = "100"


ENVIRONMENT = {"COLUMNS": COLUMNS, "NO_COLOR": "1", "HOME": "/home/user"}


def help_of(recipe: str) -> str:
    """Returns the output of `python -m recipes.<recipe> --help` at a width of 100 columns."""
    finished = subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", "--help"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return kept(finished.stdout)


def kept(printed: str) -> str:
    """Returns a printed help as the files have it, without the folder of this project in defaults."""
    lines = printed.replace(str(ROOT), "/project").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def messages() -> str:
    """Returns all texts of errors and log messages, sorted, with `{}` for values."""
    found = {
        text
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in _messages_of(ast.parse(path.read_text(encoding="utf-8")))
    }
    return "\n".join(sorted(found)) + "\n"


def _messages_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield from _line(ast.unparse(node.exc.func), node.exc.args[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in LOG_METHODS and ast.unparse(node.func.value) == "logger":
                yield from _line(node.func.attr, node.args[0])
            elif node.func.attr == "append" and ast.unparse(node.func.value) in ("problems", "faults"):
                yield from _line("problem", node.args[0])


def _line(kind: str, text: ast.expr) -> Iterator[str]:
    written = _text(text)
    if written.strip(" {}"):
        yield f"{kind}: {written}".replace("\n", "\\n").rstrip()


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(_text(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{_text(body)}|{_text(orelse)}"
        case _:
            return "{}"


def texts() -> dict[str, str]:
    """Returns the contents of all golden files, by path in this folder."""
    return {"messages.txt": messages(), **{f"help/{recipe}.txt": help_of(recipe) for recipe in RECIPES}}


if __name__ == "__main__":
    (HERE / "help").mkdir(exist_ok=True)
    for name, text in texts().items():
        (HERE / name).write_text(text, encoding="utf-8")
