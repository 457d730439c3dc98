"""The interface of all loggers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

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
