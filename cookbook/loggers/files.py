"""metrics.jsonl and tables.jsonl."""

from __future__ import annotations

from pathlib import Path

from cookbook import jsonl
from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.tables import Table


class JsonlLogger(MetricLogger):
    """One row a step in metrics.jsonl, one row of a table in tables.jsonl."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Rows from `first_step` on are dropped: a resumed run measures them again."""
        self._metrics, self._tables = folder / "metrics.jsonl", folder / "tables.jsonl"
        for path in (self._metrics, self._tables):
            jsonl.rewrite(path, [row for row in jsonl.read(path) if row["step"] < first_step])

    def log(self, step: int, metrics: Metrics) -> None:
        jsonl.append(self._metrics, {"step": step, **metrics})

    def log_table(self, step: int, name: str, table: Table) -> None:
        for record in table.records():
            jsonl.append(self._tables, {"step": step, "table": name, "row": record})
