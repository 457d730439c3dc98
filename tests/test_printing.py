"""Only own text, or text made visible and plain (`consoles.py`, `rich_console.py` in utils), is printed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cookbook", "renderers", "recipes")
HOMES = [ROOT / "cookbook" / "utils" / name for name in ("consoles.py", "rich_console.py")]

VISIBLE = {"visible", "visible_line", "visible_entry"}
PLAIN = {"plain", "plain_line"}
ONLY_IN_CONSOLES = {"Console", "StreamHandler", "Formatter", "RichHandler"}
"""Functions that would print text unchanged."""
RICH = {"rich.cells", "rich.console", "rich.panel", "rich.progress", "rich.table", "rich.text"}
"""The permitted parts of Rich. Others, such as prompts and tracebacks, interpret markup."""
OURS = {
    "console.print(table)",
    "make_console().print(table)",
    "console.print(_panel(number, example, has_colour, brackets, spelled))",
    "input(prompt)",
    "swanlab.Text(in_markdown(table))",
}
"""Calls whose arguments consist of plain texts."""


def unsafe(code: str) -> Iterator[ast.stmt | ast.expr]:
    """Yields calls that print text that was not made visible, or pass it to Rich, and forbidden imports."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names) if any(_is_of_rich(name.name) for name in names):
                yield node
            case ast.ImportFrom(module=str(module)) if _is_of_rich(module) and module not in RICH:
                yield node
            case ast.Call() if not _is_safe(node) and ast.unparse(node) not in OURS:
                yield node


def _is_of_rich(module: str) -> bool:
    return module.split(".")[0] == "rich"


def _is_safe(call: ast.Call) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    match name:
        case "print" if is_method:
            return all(_is_made_by(PLAIN, argument) for argument in call.args)
        case "print" | "input":
            return all(_is_made_by(VISIBLE, argument) for argument in call.args)
        case "write" if ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write"):
            return all(_is_made_by(VISIBLE, argument) for argument in call.args)
        case "add_row":
            return all(_is_made_by(PLAIN, argument) for argument in call.args)
        case "add_column":
            return all(_is_made_by(PLAIN, argument) for argument in call.args[:1])
        case "Text":
            return all(isinstance(argument, ast.Constant) for argument in call.args)
        case "from_markup" | "render_markup":
            return False
        case "TextColumn":
            is_ours = isinstance(call.args[0], ast.Constant) and "{" not in str(call.args[0].value)
            return is_ours or any(ast.unparse(keyword) == "markup=False" for keyword in call.keywords)
        case _:
            return name not in ONLY_IN_CONSOLES


def _is_made_by(functions: set[str], argument: ast.expr) -> bool:
    match argument:
        case ast.Constant() | ast.Name(id="__doc__"):
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in functions
        case ast.Starred(value=ast.Call(func=ast.Name(id="map"), args=[ast.Name(id=name), *_])):
            return name in functions
    return False


@pytest.mark.slow  # `make check` runs it
@pytest.mark.parametrize("folder", FOLDERS)
def test_printed_text_is_visible_and_plain(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path not in HOMES
        for node in unsafe(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("print('a constant')", False),
        ("print(name)", True),
        ("print(f'{name}')", True),
        ("print(visible(name), file=sys.stderr)", False),
        ("input(f'{path}? ')", True),
        ("sys.stderr.write(message)", True),
        ("console.print('one')", False),
        ("console.print(name, markup=False)", True),
        ("console.print(plain(name))", False),
        ("console.print(visible(name))", True),
        ("table.add_row('a', name)", True),
        ("table.add_row(*map(plain_line, cells))", False),
        ("table.add_column(name)", True),
        ("Console()", True),
        ("logging.StreamHandler()", True),
        ("Text(name)", True),
        ("Text.from_markup(name)", True),
        ("TextColumn('{task.description}')", True),
        ("TextColumn('{task.description}', markup=False)", False),
        ("import rich", True),
        ("from rich import print", True),
        ("from rich.prompt import Prompt", True),
        ("from rich.table import Table", False),
    ],
)
def test_the_check_distinguishes_own_text_from_other_text(code: str, is_found: bool) -> None:
    assert bool(list(unsafe(code))) == is_found
