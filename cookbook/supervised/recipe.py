"""A recipe by its name: what `python -m recipes.<name>` trains, for sweeps and jobs.

A module is a recipe where it has `DEFAULTS` and a `main` that returns a `train.RunSummary`; its config is its
`Config`, or else `train.Config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from cookbook.config import cli
from cookbook.config.config_files import Setting
from cookbook.errors import ConfigError
from cookbook.supervised import train
from cookbook.utils.nearest import did_you_mean

RECIPES = {"sft": "recipes.sft"}
"""The modules of the recipes that go by a short name. Any other is given as a module with dots."""


@dataclass(frozen=True)
class Recipe:
    module: str
    """As `python -m` takes it."""
    target: type[train.Config]
    defaults: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.module.rsplit(".", 1)[-1]

    def make_config(self, argv: Sequence[str], log_path: str | None = None) -> train.Config:
        """The config of a run with nothing left open: a learning rate of `auto` is a number.

        A `log_path` takes the place of the one in `argv`.
        """
        overrides = {} if log_path is None else {"log_path": log_path}
        made = cli.make_config(self.target, self.defaults, argv, prog=self.module, overrides=overrides)
        return made.resolved()

    def settings(self, argv: Sequence[str]) -> dict[str, Setting]:
        """Returns the settings of `argv`, in a config file or itself, by full keys. Later wins."""
        return cli.make_resolver(self.target, self.defaults, cli.read_arguments(argv)).merged()


def find_recipe(name: str) -> Recipe:
    """One of `RECIPES`, or a module of the user's own by its dotted name.

    Raises ConfigError for what is no recipe, naming those there are.
    """
    known = f"Recipes: {', '.join(RECIPES)}; your own is named by its module, as in mine.recipe."
    if name not in RECIPES and "." not in name:
        hint = did_you_mean(name, RECIPES)
        raise ConfigError(f"There is no recipe {name!r}.{hint} {known}")
    module_name = RECIPES.get(name, name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # something that the recipe itself imports
        raise ConfigError(f"There is no recipe {name!r}. {known}") from None
    if not is_recipe(module):
        raise ConfigError(f"recipe={name} is not a recipe: it has no DEFAULTS and main. {known}")
    return Recipe(module_name, getattr(module, "Config", train.Config), module.DEFAULTS)


def is_recipe(module: Any) -> bool:
    main = getattr(module, "main", None)
    return hasattr(module, "DEFAULTS") and get_type_hints(main).get("return") is train.RunSummary
