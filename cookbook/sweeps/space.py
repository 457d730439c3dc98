"""The search space of a sweep, and the settings of each of its runs.

A grid contains every combination of the alternatives; a random search draws some of them. Each point is run
with every seed, so that the runs of a point differ only in their seeds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cookbook.config.field_types import is_mapping
from cookbook.errors import ConfigError

SEED = "seed"
Point = dict[str, str]
"""The value of every key, as text on a command line."""


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    def draw(self, rng: np.random.Generator) -> str:
        return self.values[rng.integers(len(self.values))]


@dataclass(frozen=True)
class Uniform:
    """A uniform or log-uniform distribution from `low` to `high`."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, rng: np.random.Generator) -> str:
        if self.is_log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return str(round(value)) if self.is_whole else f"{value:.3g}"


Axis = Choice | Uniform
DISTRIBUTIONS = ("choice", "uniform", "loguniform")
MAX_RUNS = 10_000
"""The largest number of runs. More are probably a mistake, and all are planned before the first starts."""


def parse_axis(key: str, value: Any, kind: Any) -> Axis:
    """Returns the axis of `key: value` in a sweep file; `kind` is the type of the key's field.

    A single value is an axis of length one. If the field itself is a list, a list is its value and a list of
    lists are alternatives. Raises ConfigError if `value` is not a list, a value or a distribution.
    """
    if isinstance(value, Mapping):
        return _parse_distribution(key, value, kind)
    is_list = takes_list(kind)
    if isinstance(value, list) and (not is_list or all(isinstance(one, list) for one in value)):
        if not value:
            raise ConfigError(f"{key}: an empty list leaves nothing to run. Give it a value.")
        texts = [_text(key, one) for one in value]
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{key}: {', '.join(texts)} has a value twice. Each would be the same run.")
        return Choice(tuple(texts))
    return Choice((_text(key, value),))


def parse_argument(key: str, text: str, kind: Any) -> Axis:
    r"""Returns the axis of `key=a,b` on the command line.

    A comma separates alternatives, `\,` is a comma. If the field itself is a list, commas belong to its
    value, and it can only be varied in a sweep file. So do those of a mapping in braces.
    """
    if takes_list(kind) or (is_mapping(kind) and text.lstrip().startswith("{")):
        return Choice((text,))
    values = [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]
    if "" in values and len(values) > 1:
        raise ConfigError(
            f"{key}={text} has an empty value between commas. Write a comma within a text as \\,"
        )
    return parse_axis(key, values, kind)


def takes_list(kind: Any) -> bool:
    return "list[" in str(kind)


def _parse_distribution(key: str, value: Mapping[str, Any], kind: Any) -> Axis:
    if len(value) != 1 or next(iter(value)) not in DISTRIBUTIONS:
        raise ConfigError(
            f"{key}: {dict(value)} is not a distribution. Write one of "
            "{choice: [a, b]}, {uniform: [low, high]} or {loguniform: [low, high]}."
        )
    ((name, numbers),) = value.items()
    if name == "choice":
        return parse_axis(key, numbers if isinstance(numbers, list) else [numbers], kind)
    try:
        low, high = (float(number) for number in numbers)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (low < high < math.inf and (name == "uniform" or low > 0)):
        above = ", above 0" if name == "loguniform" else ""
        raise ConfigError(f"{key}: {name}: Invalid {numbers}: it takes [low, high]{above}.")
    return Uniform(low, high, name == "loguniform", is_whole=kind is int or kind == int | None)


def _text(key: str, value: Any) -> str:
    """Returns a value as text on the command line."""
    if isinstance(value, list):
        if any("," in str(one) for one in value):
            raise ConfigError(
                f"{key}: {value} has a comma in a value, and commas separate the values of a list."
            )
        return ",".join(str(one) for one in value)
    if isinstance(value, Mapping):
        raise ConfigError(f"{key}: {dict(value)} is not a value. A nested key is written a.b: value.")
    return str(value)


def points(axes: Mapping[str, Axis], num_samples: int | None, sample_seed: int) -> list[Point]:
    """Returns the settings of every run, in a deterministic order.

    Without `num_samples` they are the grid, else `num_samples` distinct draws, or all points if there are
    fewer, each with every seed. Raises ConfigError for a distribution in a grid.
    """
    seeds = axes.get(SEED)
    searched = {key: axis for key, axis in axes.items() if key != SEED}
    if isinstance(seeds, Uniform):
        raise ConfigError("seed: seeds are listed, as in seed: [0, 1, 2].")
    grid_size = math.prod(
        len(axis.values) if isinstance(axis, Choice) else math.inf for axis in searched.values()
    )
    num_points = grid_size if num_samples is None else min(grid_size, num_samples)
    if MAX_RUNS < num_points < math.inf:
        of_what = "The grid" if num_samples is None else f"num_samples={num_samples}"
        raise ConfigError(
            f"{of_what} asks for {num_points:,} runs, and a sweep has at most {MAX_RUNS:,}. Vary less, or "
            "draw fewer with num_samples."
        )
    found = _grid(searched) if num_samples is None else _draws(searched, num_samples, grid_size, sample_seed)
    if seeds is None:
        return found
    return [{**point, SEED: seed} for point in found for seed in seeds.values]


def _grid(axes: Mapping[str, Axis]) -> list[Point]:
    alternatives = []
    for key, axis in axes.items():
        if isinstance(axis, Uniform):
            raise ConfigError(
                f"{key} is drawn from a distribution: give the number of draws, as in num_samples: 8."
            )
        alternatives.append(axis.values)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*alternatives)]


def _draws(axes: Mapping[str, Axis], num_samples: int, grid_size: float, sample_seed: int) -> list[Point]:
    rng = np.random.default_rng(sample_seed)
    wanted = min(num_samples, grid_size)
    found: dict[tuple[str, ...], None] = {}  # in the order of the draws
    for _ in range(100 * num_samples):  # integers of a range may run out of new points
        found.setdefault(tuple(axis.draw(rng) for axis in axes.values()))
        if len(found) == wanted:
            break
    return [dict(zip(axes, values, strict=True)) for values in found]


def varied_keys(axes: Mapping[str, Axis]) -> list[str]:
    """Returns the keys in which the runs differ."""
    return [key for key, axis in axes.items() if isinstance(axis, Uniform) or len(axis.values) > 1]


def name_of(point: Point, keys: Sequence[str]) -> str:
    """Returns the folder name of a run, such as learning_rate=0.0001,lora_rank=8."""
    last_parts = [key.rsplit(".", 1)[-1] for key in keys]
    short = {
        key: part if last_parts.count(part) == 1 else key for key, part in zip(keys, last_parts, strict=True)
    }
    return ",".join(f"{short[key]}={_in_a_name(point[key])}" for key in keys) or "run"


def _in_a_name(text: str) -> str:
    """Returns a number in its shortest form, or a text in characters that suit a folder's name."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return re.sub(r"[^\w.+-]+", "-", text)[-40:].strip("-.") or "empty"
