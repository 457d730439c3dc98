"""Packages that are installed with an extra of this project."""

from __future__ import annotations

import importlib.util

from cookbook.errors import ConfigError


def require(package: str, extra: str, who: str) -> None:
    """Raises ConfigError, with the command that installs it, for a package that is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{who} needs {package}, which is not installed. Run pip install 'sft-cookbook[{extra}]'."
        )
