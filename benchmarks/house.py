"""Prints figures about the code: its size, its imports, and the number of functions that a value passes.

    python -m benchmarks.house [--list]

files, lines     Python files of `cookbook`, `renderers` and `recipes`, and their lines
modules          modules in `cookbook/` itself, beside the rooms, including `__init__`
circles          groups of files that import each other (`benchmarks.import_graph`)
arrows up        imports that a room's rule does not allow (`tests/test_import_direction.py`), also by name
shared names     names of more than one class, without leading underscores; each recipe may have a `Config`
walks            functions that a row passes on its way to `metrics.jsonl`, that `learning_rate` passes on its
                 way to the optimizer, and that decode one token (`benchmarks.walks`)

`--list` prints the circles, the arrows and every function of each walk.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from collections.abc import Sequence

from benchmarks import import_graph
from tests.test_import_direction import violations


def modules_beside_rooms() -> list[str]:
    return sorted(path.name for path in (import_graph.ROOT / "cookbook").glob("*.py"))


def circles() -> list[list[str]]:
    return import_graph.circles(import_graph.graph())


def arrows_up() -> list[str]:
    return [
        found
        for module, path in import_graph.MODULES.items()
        for found in violations(path.read_text(encoding="utf-8"), module, import_graph.imports_by_name)
    ]


PROMISED_NAMES = {"Config", "Checkpoint"}
"""Names that programs import: a recipe's `Config`, and the Tinker API's `Checkpoint` beside that of a run."""


def shared_class_names() -> list[str]:
    """Returns a line for each name that several classes have, with the files of the classes."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for package in (*import_graph.PACKAGES, "benchmarks"):
        for path in sorted((import_graph.ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    files[node.name.lstrip("_")].append(str(path.relative_to(import_graph.ROOT)))
    return [
        f"{name}: {', '.join(paths)}"
        for name, paths in sorted(files.items())
        if len(paths) > 1 and name not in PROMISED_NAMES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print what is counted, not only how many")
    arguments = parser.parse_args()
    from benchmarks import walks  # it loads torch

    sources = [path.read_text(encoding="utf-8") for path in import_graph.MODULES.values()]
    figures: list[tuple[str, int, str, Sequence[str]]] = [
        ("files", len(sources), "", ()),
        ("lines", sum(len(source.splitlines()) for source in sources), "", ()),
        ("modules beside rooms", len(modules_beside_rooms()), "<= 6", modules_beside_rooms()),
        ("circles of files", len(circles()), "0", [" ".join(circle) for circle in circles()]),
        ("arrows up", len(arrows_up()), "0", arrows_up()),
        ("shared class names", len(shared_class_names()), "0", shared_class_names()),
        ("walk of a row", len(row := walks.row_walk()), "<= 60", row),
        ("walk of learning_rate", len(key := walks.key_walk()), "", key),
        ("walk of a token", len(token := walks.token_walk()), "<= 20", token),
    ]
    print(f"{'':24}{'now':>8}{'aim':>8}")
    for name, number, aim, _ in figures:
        print(f"{name:24}{number:8,}{aim:>8}")
    if arguments.list:
        for name, number, _, items in figures:
            if items:
                print("", f"{name}: {number}", *(f"  {item}" for item in items), sep="\n")


if __name__ == "__main__":
    main()
