"""Tests of the error for a missing package, which names an existing extra."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import outside_world
import pytest

from cookbook.errors import ConfigError
from cookbook.utils import extras

REPOSITORY = Path(__file__).parents[3]


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    extras.require("numpy", "An array")
    with pytest.raises(ConfigError) as caught:
        extras.require("no_such_package", "An array", extra="arrays")
    assert str(caught.value) == (
        "An array needs the package no_such_package, which is not installed. "
        "Run: pip install 'sft-cookbook[arrays]'"
    )


def test_an_environment_without_pip_is_told_to_use_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uv venv` makes such environments; a `pip` on the path then installs into another one."""
    assert extras.install_command("ray") == "pip install 'sft-cookbook[ray]'"
    outside_world.remove_package(monkeypatch, "pip")
    assert extras.install_command("ray") == "uv pip install 'sft-cookbook[ray]'"


def test_every_required_package_is_in_the_extra_that_is_named() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {
        extra: {re.split(r"[^\w-]", line)[0] for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    required = set()
    for path in (REPOSITORY / "cookbook").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        if "extras.require" not in code:
            continue
        loops: dict[str, tuple[str, ...]] = {}
        for node in ast.walk(ast.parse(code)):  # a loop comes before the calls in it
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                names = [one.value for one in node.iter.elts if isinstance(one, ast.Constant)]
                loops[ast.unparse(node.target)] = tuple(map(str, names))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "extras.require":
                named = [ast.literal_eval(one.value) for one in node.keywords if one.arg == "extra"]
                argument = node.args[0]
                is_looped = isinstance(argument, ast.Name)
                packages_of = loops[argument.id] if is_looped else (ast.literal_eval(argument),)
                required |= {(one.replace("_", "-"), *(named or [one])) for one in packages_of}
    # what `hybrid` and `cuda` have is used where it is installed, and not required
    others = {"bench", "cuda", "dev", "docs", "hybrid", "wandb"}
    assert {extra for _, extra in required} == set(packages) - others
    assert [pair for pair in required if not packages[pair[1]] & {pair[0], f"{pair[0]}-skinny"}] == []
