"""Configs of this project, by name from any folder: `config=pirate_tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.errors import ConfigError
from cookbook.utils.nearest import did_you_mean

FOLDER = Path(__file__).parents[1] / "configs"
"""In a checkout a link to configs/, in an installed package a copy of it."""
_WRITTEN = "configs/"
"""How this project's documents and configs begin the path of a file in `FOLDER`."""


def find_config_file(path: str, argument: str) -> Path:
    """Returns the file that `config=` or `sweep=` names: a path, or the name of a config of this project.

    Raises ConfigError, with the nearest name, where there is no such file.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    own = FOLDER / "sweeps" if argument == "sweep" else FOLDER
    if (named := own / f"{path}.yaml").is_file() and "/" not in path:
        return named
    if path.startswith(_WRITTEN) and (named := FOLDER / path.removeprefix(_WRITTEN)).is_file():
        return named
    message = f"{argument}={path}: there is no such file."
    if "/" not in path and "." not in path:
        names = sorted(found.stem for found in own.glob("*.yaml"))
        message += f"{did_you_mean(path, names)} Named configs: {', '.join(names)}."
    raise ConfigError(message)


def with_own_files(values: Any, config: Path) -> Any:
    """Returns the values of a config file. In a config of this project, `configs/...` is a file beside it."""
    return _with_own_files(values) if config.resolve().is_relative_to(FOLDER.resolve()) else values


def _with_own_files(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_own_files(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_own_files(item) for item in value]
    if isinstance(value, str) and value.startswith(_WRITTEN) and not Path(value).exists():
        found = FOLDER / value.removeprefix(_WRITTEN)
        return str(found) if found.exists() else value
    return value
