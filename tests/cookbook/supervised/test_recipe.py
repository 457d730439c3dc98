"""Recipes are found by their short names and by the names of their modules."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import recipes
from cookbook.errors import ConfigError
from cookbook.supervised import train
from cookbook.supervised.recipe import ENTRY_POINTS, find_recipe, is_recipe, registered_recipes

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed package, which comes before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registered_recipes.cache_clear()
    yield tmp_path
    registered_recipes.cache_clear()


def install(folder: Path, name: str, entry_points: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def test_every_recipe_of_the_project_is_registered_under_its_short_name() -> None:
    names = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    found = {name for name in names if is_recipe(importlib.import_module(f"recipes.{name}"))}
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    assert {name: f"recipes.{name}" for name in found} == project["entry-points"][ENTRY_POINTS]
    assert registered_recipes() == project["entry-points"][ENTRY_POINTS]


def test_a_recipe_of_another_package_is_found_by_its_short_name(installed: Path) -> None:
    install(installed, "other", f"[{ENTRY_POINTS}]\nours = recipes.sft\n")
    assert find_recipe("ours").module == "recipes.sft"
    with pytest.raises(ConfigError, match=r"no recipe 'our'. Did you mean `ours`\? Recipes: .*ours"):
        find_recipe("our")


def test_an_installation_without_registered_recipes_says_how_to_get_them(installed: Path) -> None:
    install(installed, "sft_cookbook", "")
    with pytest.raises(ConfigError, match=r"There is no recipe 'sft'. .* install it again: make setup"):
        find_recipe("sft")
    assert find_recipe("recipes.sft").name == "sft"


def test_a_users_module_is_a_recipe_if_its_main_returns_a_run_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text(
        "from cookbook.supervised import train\n"
        "DEFAULTS = {'log_path': 'runs/mine'}\n"
        "def main() -> train.RunSummary: ...\n",
        encoding="utf-8",
    )
    (tmp_path / "mine" / "other.py").write_text("DEFAULTS = {}\ndef main() -> None: ...\n", encoding="utf-8")
    (tmp_path / "mine" / "broken.py").write_text("import surely_not_installed\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_recipe("mine.recipe")
    assert (found.module, found.name, found.target) == ("mine.recipe", "recipe", train.Config)
    assert found.defaults == {"log_path": "runs/mine"}
    with pytest.raises(
        ConfigError, match=r"recipe=mine.other is not a recipe: .* Recipes: dpo, sft; your own"
    ):
        find_recipe("mine.other")
    with pytest.raises(ConfigError, match=r"There is no recipe 'mine.nothing'. Recipes: dpo, sft"):
        find_recipe("mine.nothing")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        find_recipe("mine.broken")
