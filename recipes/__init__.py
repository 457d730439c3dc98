"""Runnable recipes: `sft-cookbook <name> key=value ...`, or `python -m recipes.<name>`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

try:
    import cookbook  # noqa: F401
except ImportError as another:
    if another.name != "renderers":
        raise
    sys.exit(str(another))  # another package of that name: the sentence says what helps, a traceback does not


def summaries() -> dict[str, str]:
    """Returns the first line of every recipe's docstring, by the recipe's name. Imports none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0]
    return found
