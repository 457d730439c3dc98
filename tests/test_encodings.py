"""Every text file is opened with its encoding. This finds calls whose types ruff's PLW1514 does not know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cookbook", "renderers", "recipes", "benchmarks", "tests")


def calls_without_encoding(code: str) -> Iterator[ast.Call]:
    """Yields the calls that open a text file in the encoding of the environment."""
    if not any(word in code for word in ("open(", "_text(", "FileHandler", "TemporaryFile")):
        return  # most files are not parsed
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and _opens_text(node):
            names = {keyword.arg for keyword in node.keywords}
            if "encoding" not in names and None not in names:
                yield node


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    match name:
        case "read_text":
            return not call.args
        case "write_text":
            return len(call.args) == 1
        case "FileHandler":
            return True
        case "open":
            # open(path, mode) and path.open(mode); `open` of other modules has other arguments.
            position = 0 if isinstance(call.func, ast.Attribute) else 1
            return "b" not in _mode(call, position, "r") and not (
                position == 0 and call.args and not _is_mode(call.args[0])
            )
        case "TemporaryFile" | "NamedTemporaryFile" | "SpooledTemporaryFile":
            return "b" not in _mode(call, 0, "w+b")
    return False


def _mode(call: ast.Call, position: int, default: str) -> str:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    (value,) = [*named, *call.args[position : position + 1], ast.Constant(default)][:1]
    return str(value.value) if isinstance(value, ast.Constant) else default


def _is_mode(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Constant)
        and isinstance(value.value, str)
        and set(value.value) <= set("rwxab+t")
    )


@pytest.mark.slow  # `make check` runs it
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_is_opened_with_its_encoding(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in calls_without_encoding(path.read_text(encoding="utf-8"))
        if ast.unparse(call) not in NO_FILES
    ]
    assert not found, "\n".join(found)


NO_FILES = {"gate.open()"}


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='a')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('ab')", False),
        ("folder(name).read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("logging.FileHandler(path)", True),
        ("tempfile.TemporaryFile()", False),
        ("tempfile.TemporaryFile('w+')", True),
    ],
)
def test_the_check_distinguishes_text_from_bytes(code: str, is_found: bool) -> None:
    assert bool(list(calls_without_encoding(code))) == is_found
