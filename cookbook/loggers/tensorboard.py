"""TensorBoard event files, by torch's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.tables import Cell, Table

FOLDER = "tensorboard"


class TensorBoardLogger(MetricLogger):
    """Scalars, and tables as text, in `folder`/tensorboard.

    A resumed run adds a file that begins by taking back the steps it measures again, so a reader
    shows each step once. Every step is written out at once: what a kill left unwritten below the
    step it resumes at would never be measured again.
    """

    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=first_step)
        if first_step == 0:
            indented = json.dumps(config, indent=2, ensure_ascii=False).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {indented}", 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for path, value in metrics.items():
            self._writer.add_scalar(path, value, step)
        self._writer.flush()

    def log_table(self, step: int, name: str, table: Table) -> None:
        self._writer.add_text(name, in_markdown(table), step)

    def close(self) -> None:
        self._writer.close()


def in_markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(_in_a_cell, line))} |" for line in lines)


def _in_a_cell(cell: Cell) -> str:
    """Text as it is: TensorBoard shows Markdown, and drops HTML it does not know."""
    text = "" if cell is None else str(cell)
    for character in "\\`*_[]|<>":
        text = text.replace(character, f"&#{ord(character)};")
    return text.replace("\n", "<br>")
