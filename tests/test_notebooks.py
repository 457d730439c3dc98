"""The notebooks of examples/ run from their first cell to their last, and hold no output."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run_cells(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Returns the namespace after all cells, and the value of the last expression of each."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in cells_of(path):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), scope)
        if last is not None:
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), scope))
    return scope, values


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_first_fine_tune_trains_and_answers(capsys: pytest.CaptureFixture) -> None:
    scope, _ = run_cells(FOLDER / "first_fine_tune.ipynb")
    assert scope["summary"].is_finished
    assert "Paris" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_the_own_builder_and_evaluator_are_used() -> None:
    scope, values = run_cells(FOLDER / "own_data_and_evaluator.ipynb")
    assert scope["summary"].is_finished
    assert 0 <= values[-1]["sums/right"] <= 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path: Path) -> None:
    """Quick, since the cells of the longer notebook run in `make test-slow` only."""
    cells = ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"]
    imports = [
        node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)
    ]
    assert imports
    for node in imports:
        exec(compile(ast.Module([node], []), path.name, "exec"), {})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_its_output(path: Path) -> None:
    for cell in cells_of(path):
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
