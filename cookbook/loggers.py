"""Where the metrics of a run go: a file, the terminal, Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cookbook import jsonl
from cookbook.errors import ConfigError
from cookbook.tables import Table

Metrics = Mapping[str, float]


class MetricLogger(ABC):
    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """`step` optimizer steps had been taken when these metrics were measured."""

    def log_table(self, step: int, name: str, table: Table) -> None:
        """A table of the weights after `step` steps. By default it is not shown."""

    def close(self) -> None:
        """Writes out what is buffered."""


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


class ConsoleLogger(MetricLogger):
    """A progress bar on a terminal, otherwise a plain line every so often."""

    def __init__(self, console: Console, total_steps: int | None, first_step: int) -> None:
        """`total_steps` of None: nobody knows."""
        self._console = console
        self._total_steps = total_steps
        self._lines_every = 20 if total_steps is None else max(1, total_steps // 20)
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")
            self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        for line in _evaluation_lines(step, metrics):
            self._console.print(line, highlight=False)
        if "train/nll" not in metrics:
            return
        status = f"nll {metrics['train/nll']:.3f}  {metrics['perf/tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, status=status)
        elif (step + 1) % self._lines_every == 0 or step + 1 == self._total_steps:
            of_all, left = "", ""
            if self._total_steps is not None:
                of_all, left = f"/{self._total_steps}", f"  {metrics['perf/seconds_left']:,.0f} s left"
            line = f"step {step + 1}{of_all}  {status}{left}"
            self._console.print(line, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


OF_EVERY_STEP = ("epoch", "train", "optim", "data", "perf")
"""What the paths of metrics begin with that no evaluator measured."""


def _evaluation_lines(step: int, metrics: Metrics) -> list[str]:
    """What evaluators found, a line for each beginning of a path. Turns and sources of a metric stay out."""
    shown: dict[str, list[str]] = {}
    for path, value in metrics.items():
        first, last = path.split("/")[0], path.split("/")[-1]
        is_part = path.count("/") > 1 and f"{first}/{last}" in metrics
        if first not in OF_EVERY_STEP and not is_part:
            shown.setdefault(first, []).append(f"{path} {value:.4f}")
    return [f"step {step}: {'  '.join(parts)}" for parts in shown.values()]


class WandbLogger(MetricLogger):
    """Weights & Biases, with its own client. A resumed run goes on under the same run id."""

    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=id_file.read_text().strip(),
                resume="allow",
                config=dict(config),
                dir=str(folder),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}, but Weights & Biases cannot start: {error}\n"
                f"Log in with `wandb login`, work without a network with WANDB_MODE=offline, or leave "
                f"wandb_project out."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, table: Table) -> None:
        import wandb

        shown = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()


def make_console(is_quiet: bool = False) -> Console:
    """Writes to standard output; lines are wrapped for a terminal and left whole for anything else."""
    return Console(soft_wrap=not sys.stdout.isatty(), quiet=is_quiet)


class _ConsoleHandler(logging.Handler):
    """Log records as plain text above the progress bar; tracebacks are left to train.log."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(record.getMessage(), style=style, markup=False, highlight=False)


@contextlib.contextmanager
def logging_to(console: Console, path: Path) -> Iterator[None]:
    """Sends this project's log to the console and to a file."""
    in_file = logging.FileHandler(path, encoding="utf-8")
    in_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [_ConsoleHandler(console), in_file]
    root = logging.getLogger("cookbook")
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
