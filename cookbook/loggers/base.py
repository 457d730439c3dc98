"""What every logger answers to."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping

from cookbook.errors import ConfigError
from cookbook.utils.tables import Table

Metrics = Mapping[str, float]


class MetricLogger(ABC):
    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """`step` optimizer steps had been taken when these metrics were measured."""

    def log_table(self, step: int, name: str, table: Table) -> None:
        """A table of the weights after `step` steps. By default it is not shown."""

    def close(self) -> None:
        """Writes out what is buffered."""


def check_installed(package: str, asked_by: str) -> None:
    """Raises ConfigError where `package`, which has an extra of the same name, is missing.

    `asked_by` is the key of the config that asks for it, with its value.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{asked_by} needs the package {package}, which is not installed. "
            f"Run: pip install 'sft-cookbook[{package}]'"
        )
