"""Checks for packages that are installed with an extra of this project."""

from __future__ import annotations

import importlib.util

from cookbook.errors import ConfigError


def require(package: str, asked_by: str, extra: str | None = None) -> None:
    """Raises ConfigError, with the command that installs it, if `package` is not installed.

    `asked_by` begins the sentence: it names what needs the package, such as a key with its value. `extra` is
    the extra that installs the package; by default it has the same name.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{asked_by} needs the package {package}, which is not installed. "
            f"Run: {install_command(extra or package)}"
        )


def install_command(extra: str) -> str:
    """Returns the command that installs an extra here."""
    return f"{pip()} install 'sft-cookbook[{extra}]'"


def pip() -> str:
    """Returns the command of pip in this environment: `uv venv` makes environments without pip."""
    return "pip" if importlib.util.find_spec("pip") is not None else "uv pip"
