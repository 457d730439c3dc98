"""Reads from the source which modules of the project import which, including lazy imports."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("cookbook", "renderers", "recipes")


def covers(part: str, module: str) -> bool:
    return module == part or module.startswith(part + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
"""The file of every module of the project; for a package its `__init__`."""


@functools.cache
def imports(source: str, module: str) -> list[str]:
    """Returns the full name of every module that `source` imports: at the top, lazily, or only for types.

    A name imported from a package counts as the package, unless it is a module.
    """
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                home = ".".join([*above, *([home] if home else [])])
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                found.append(whole if whole in MODULES else home)
    return found


def imports_by_name(source: str, module: str) -> Iterator[str]:
    """Yields what `imports` yields, and the modules that `source` imports by a name in a string.

    The string may be an argument of `import_module` or `__import__`. In a file that imports modules by
    computed names, every string that names a recipe's module also counts, so that a table of recipes is seen.
    """
    yield from imports(source, module)
    if not any(word in source for word in ("import_module", "__import__")):
        return
    tree = ast.parse(source)
    has_computed_names = False
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="import_module" | "__import__")
                | ast.Name(id="import_module" | "__import__"),
                args=[argument, *_],
            ):
                match argument:
                    case ast.Constant(value=str(name)):
                        yield name
                    case _:
                        has_computed_names = True
    if has_computed_names:
        for node in ast.walk(tree):
            match node:
                case ast.Constant(value=str(name)) if name in MODULES and name.startswith("recipes."):
                    yield name


def graph() -> dict[str, set[str]]:
    """Returns the modules of the project that each module imports.

    An import of `a.b` also runs `a/__init__`, which does not count: a package that re-exports its own modules
    is in a circle with them only if one of them imports from the package instead of its sibling.
    """
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = set(imports_by_name(path.read_text(encoding="utf-8"), module))
        found[module] = {name for name in names if name in MODULES and name != module}
    return found


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Returns the groups of at least two modules that all reach each other, the largest first."""
    reached = {module: _reached(module, edges) for module in edges}
    groups = {
        tuple(sorted({one for one in reached[module] if module in reached.get(one, ())} | {module}))
        for module in edges
    }
    return sorted((list(group) for group in groups if len(group) > 1), key=lambda group: (-len(group), group))


def _reached(module: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(edges[module])
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting.extend(edges.get(one, ()))
    return found
