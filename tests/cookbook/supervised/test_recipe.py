"""Recipes by their names."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import recipes
from cookbook.errors import ConfigError
from cookbook.supervised import train
from cookbook.supervised.recipe import RECIPES, find_recipe, is_recipe


def test_every_recipe_of_the_project_goes_by_its_short_name() -> None:
    names = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    found = {name for name in names if is_recipe(importlib.import_module(f"recipes.{name}"))}
    assert {name: f"recipes.{name}" for name in found} == RECIPES


def test_a_module_of_the_users_own_is_a_recipe_where_it_trains(
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
    with pytest.raises(ConfigError, match=r"recipe=mine.other is not a recipe: .* Recipes: sft; your own"):
        find_recipe("mine.other")
    with pytest.raises(ConfigError, match=r"There is no recipe 'mine.nothing'. Recipes: sft"):
        find_recipe("mine.nothing")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        find_recipe("mine.broken")
