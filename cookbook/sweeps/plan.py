"""A sweep as it is asked for: its config, and the runs that come of it, all checked before any starts."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import chz
import yaml

from cookbook import cli
from cookbook.errors import ConfigError
from cookbook.recipe import Recipe, find_recipe
from cookbook.supervised import train
from cookbook.sweeps import space
from cookbook.sweeps.space import Axis, Point

RUNS = "runs"
"""The section of a sweep file that holds the recipe's keys."""


@chz.chz(typecheck=True)
class Config:
    """How the runs of a sweep are chosen, run and compared. Every other key is the recipe's."""

    recipe: str = chz.field(default="sft", doc="what is run: recipes.<recipe>, or a module with dots")
    log_path: str = chz.field(doc="folder of the sweep; each run has a folder in it")
    metric: str = chz.field(default="test/nll", doc="what runs are compared by: of their last evaluation")
    mode: Literal["min", "max"] = chz.field(default="min", doc="whether less (min) or more (max) is better")
    num_samples: int | None = chz.field(
        default=None, doc="runs drawn at random from what is varied; default: the whole grid"
    )
    sample_seed: int = chz.field(default=0, doc="seed of the draws")
    gpus_per_run: float | None = chz.field(
        default=None, doc="GPUs of a run; 0.5: two runs share one. Default: 1 where there are GPUs"
    )
    cpus_per_run: float = chz.field(default=1.0, doc="CPU cores of a run")
    asha: bool = chz.field(default=False, doc="stop runs early that are worse than others were (ASHA)")
    asha_grace_steps: int = chz.field(default=50, doc="steps before a run may be stopped")
    asha_reduction_factor: float = chz.field(
        default=3.0, doc="of the runs at a rung 1 in so many goes on, and rungs lie so many times further"
    )
    address: str | None = chz.field(
        default=None, doc="a Ray cluster, host:port; default: a Ray of its own on this machine"
    )

    @chz.validate
    def _check_values(self) -> None:
        at_least = {"num_samples": 1, "sample_seed": 0, "gpus_per_run": 0, "asha_grace_steps": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name}={value} is too small. It must be at least {least}.")
        if not self.cpus_per_run > 0:
            raise ConfigError(f"cpus_per_run={self.cpus_per_run:g} is impossible. It must be above 0.")
        if self.asha_reduction_factor <= 1:
            raise ConfigError("asha_reduction_factor must be above 1.")
        gpus = self.gpus_per_run or 0
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError(
                f"gpus_per_run={gpus:g} is impossible. A run has a part of one GPU or whole ones."
            )


@dataclass(frozen=True)
class PlannedRun:
    name: str
    point: Point
    argv: Sequence[str]
    """The settings of the run but its folder, in the order in which they count."""
    config: train.Config

    @property
    def folder(self) -> Path:
        return Path(self.config.log_path)


@dataclass(frozen=True)
class Plan:
    config: Config
    recipe: Recipe
    axes: Mapping[str, Axis]
    runs: Sequence[PlannedRun]

    @property
    def folder(self) -> Path:
        return Path(self.config.log_path)

    @property
    def varied_keys(self) -> list[str]:
        return space.varied_keys(self.axes)


def make_plan(argv: Sequence[str]) -> Plan:
    """What `argv` asks for: `sweep=<file.yaml>`, the sweep's own keys, and those of its recipe.

    Later wins, so a key on the command line replaces the file's. Raises ConfigError for a key of neither,
    a value that no run could have, and settings that no run could be made of.
    """
    given = cli.settings([argument for argument in argv if argument not in cli.HELP])
    sections = load(given.pop("sweep")) if "sweep" in given else {}
    in_file = dict(sections.pop(RUNS, None) or {})
    own_keys = chz.chz_fields(Config)
    own = {key: str(value) for key, value in sections.items() if value is not None}
    own |= {key: value for key, value in given.items() if key in own_keys}
    own.setdefault("log_path", f"runs/sweeps/{_default_name(argv, own)}")
    if any(argument in cli.HELP for argument in argv):
        cli.make_config(Config, {"log_path": "runs/sweeps/<sweep>"}, ["--help"], "recipes.sweep")
    own["log_path"] = str(Path(own["log_path"]).expanduser().absolute())
    config = cli.make_config(Config, {}, [f"{key}={value}" for key, value in own.items()], "recipes.sweep")
    recipe = find_recipe(config.recipe)
    of_runs = {key: value for key, value in given.items() if key not in own_keys}
    file = of_runs.pop("config", in_file.pop("config", None))
    base = [] if file is None else [f"config={file}"]
    if "log_path" in in_file:
        raise ConfigError(
            "log_path: each run has a folder of its own in that of the sweep. Write it above runs."
        )
    # a class that is chosen decides which keys there are
    classes = [f"{key}={value}" for key, value in {**in_file, **of_runs}.items() if _is_class(value)]

    def kind(key: str) -> Any:
        return _type_of_key(recipe, [*base, *classes], key)

    axes = {
        key: space.parse_axis(key, value, kind(key)) for key, value in in_file.items() if key not in of_runs
    }
    axes |= {key: space.parse_argument(key, value, kind(key)) for key, value in of_runs.items()}
    if not space.varied_keys(axes):
        raise ConfigError("Nothing is varied. Give a key several values, as in learning_rate=1e-4,3e-4.")
    return Plan(config, recipe, axes, _plan_runs(config, recipe, axes, base))


def _is_class(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def _type_of_key(recipe: Recipe, argv: Sequence[str], key: str) -> Any:
    near = difflib.get_close_matches(key, chz.chz_fields(Config), n=1, cutoff=0.8)
    try:
        return recipe.type_of_key(argv, key)
    except ConfigError as error:
        if near:
            raise ConfigError(f"There is no key {key!r}. Did you mean {near[0]}?") from error
        raise


def _plan_runs(
    config: Config, recipe: Recipe, axes: Mapping[str, Axis], base: Sequence[str]
) -> list[PlannedRun]:
    points = space.points(axes, config.num_samples, config.sample_seed)
    keys = space.varied_keys(axes)
    names = [space.name_of(point, keys) for point in points]
    counts = Counter(names)
    seen: Counter[str] = Counter()
    runs = []
    for name, point in zip(names, points, strict=True):
        if counts[name] > 1:  # long texts that end alike
            seen[name] += 1
            name = f"{name}-{seen[name]}"
        argv = [*base, *(f"{key}={value}" for key, value in point.items())]
        made = recipe.make_config([*argv, f"log_path={Path(config.log_path) / name}"])
        runs.append(PlannedRun(name, point, argv, made))
    return runs


def load(path: str) -> dict[str, Any]:
    """A sweep file. Raises ConfigError where it is none, or has a key that a sweep has not."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"sweep={path}: there is no such file.")
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"sweep={path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"sweep={path} cannot be read: {error}") from error
    if not isinstance(sections, dict) or not isinstance(sections.get(RUNS, {}), dict | None):
        raise ConfigError(
            f"sweep={path} is no sweep. Write `runs:`, and below it `key: [value, value]` lines."
        )
    known = [*chz.chz_fields(Config), RUNS]
    for key in sections:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"sweep={path} has the key {str(key)!r}, which a sweep has not.{hint} "
                f"Keys of the recipe go below `runs:`."
            )
    return sections


def _default_name(argv: Sequence[str], own: Mapping[str, str]) -> str:
    """The name of the sweep's file, or else of what is varied."""
    for argument in argv:
        if argument.startswith("sweep="):
            return Path(argument.partition("=")[2]).stem
    varied = [argument.partition("=")[0] for argument in argv if "," in argument]
    return re.sub(r"[^\w.-]+", "-", "-".join([own.get("recipe", "sft"), *varied]))
