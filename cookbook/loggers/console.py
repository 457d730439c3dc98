"""Shows metrics and log messages on the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.runs.rows import STEP_METRIC_PREFIXES
from cookbook.utils import files
from cookbook.utils.consoles import VisibleFormatter
from cookbook.utils.control_characters import visible_entry
from cookbook.utils.rich_console import PlainConsole, plain, plain_line

MAX_SECONDS_OF_SILENCE = 60.0
"""Where there is no bar, a line is printed at least this often."""


def has_bar(console: Console) -> bool:
    """Returns whether a progress bar can be shown: on a terminal that moves its cursor, or in a notebook."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


class _TimeLeft(ProgressColumn):
    """Shows the time left by the median of the last steps, also during a step that takes minutes."""

    def render(self, task: Task) -> Text:
        left, per_step, since = (task.fields[key] for key in ("left", "per_step", "since"))
        if left is None:
            return Text("-:--:--")
        seconds = left - min(time.monotonic() - since, per_step)
        return plain_line(timedelta(seconds=max(0, round(seconds))))


class ConsoleLogger(MetricLogger):
    """Shows a progress bar on a terminal or in a notebook, otherwise prints a plain line at least once a
    minute."""

    def __init__(self, console: Console, total_steps: int | None, first_step: int) -> None:
        """`total_steps` is None if it is unknown."""
        self._console = console
        self._total_steps = total_steps
        self._lines_every = 20 if total_steps is None else max(1, total_steps // 20)
        self._progress: Progress | None = None
        self._printed_at = time.monotonic()
        self._say_what_runs(first_step)
        if has_bar(console):
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                _TimeLeft(),
                console=console,
            )
            fields: dict[str, Any] = {"status": "", "left": None, "per_step": 0.0, "since": 0.0}
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, **fields)
            self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        for line in _evaluation_lines(step, metrics):
            self._print(line)
        losses = _losses_of(metrics)
        if not losses:
            return
        status = f"{losses}  {metrics['perf/tokens_per_second']:,.0f} tokens/s"
        if (memory := metrics.get("perf/memory_peak_gib")) is not None:
            status += f"  {memory:.1f} GiB"
        left = metrics.get("perf/seconds_left")
        now = time.monotonic()
        self._say_what_runs(step + 1)
        if self._progress is not None:
            steps_left = 1 if self._total_steps is None else max(1, self._total_steps - step - 1)
            of_time: dict[str, Any] = {"left": left, "per_step": (left or 0.0) / steps_left, "since": now}
            self._progress.update(self._task, completed=step + 1, status=status, **of_time)
            return
        is_due = (step + 1) % self._lines_every == 0 or step + 1 == self._total_steps
        if is_due or now - self._printed_at > MAX_SECONDS_OF_SILENCE / 2:
            of_all = "" if self._total_steps is None else f"/{self._total_steps}"
            until_end = "" if left is None else f"  {left:,.0f} s left"
            self._print(f"step {step + 1}{of_all}  {status}{until_end}")
            self._printed_at = now

    def _say_what_runs(self, num_done: int) -> None:
        """Tells the console what to print if nothing is printed for a while."""
        if isinstance(self._console, PlainConsole):
            of_all = "" if self._total_steps is None else f" of {self._total_steps}"
            is_last = num_done == self._total_steps
            self._console.activity = "the last evaluation" if is_last else f"step {num_done + 1}{of_all}"

    def _print(self, line: str) -> None:
        # A failing terminal must not end the run; other loggers have the metrics.
        with contextlib.suppress(OSError):
            self._console.print(plain_line(line))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _losses_of(metrics: Metrics) -> str:
    """Returns the loss of a step, and what else is logged as one, such as `dpo_loss 0.640  nll 2.112`."""
    names = [name for name in metrics if name.startswith("train/") and name.endswith(("loss", "nll"))]
    return "  ".join(f"{name.removeprefix('train/')} {metrics[name]:.3f}" for name in names)


def _evaluation_lines(step: int, metrics: Metrics) -> list[str]:
    """Returns evaluation results, a line per first part of the path, without values per turn or source."""
    shown: dict[str, list[str]] = {}
    for path, value in metrics.items():
        first, last = path.split("/")[0], path.split("/")[-1]
        is_part = path.count("/") > 1 and f"{first}/{last}" in metrics
        if first not in STEP_METRIC_PREFIXES and not is_part:
            shown.setdefault(first, []).append(f"{path} {value:.4f}")
    return [f"step {step}: {'  '.join(parts)}" for parts in shown.values()]


class _Heartbeat:
    """A context manager that prints a line whenever the console has been silent for a minute."""

    def __init__(self, console: Console, max_seconds: float = MAX_SECONDS_OF_SILENCE) -> None:
        self._console = console if isinstance(console, PlainConsole) and not has_bar(console) else None
        self._max_seconds = max_seconds
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        if self._console is not None:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        if self._console is not None:
            self._thread.join()

    def _run(self) -> None:
        console = self._console
        assert console is not None
        started, activity = time.monotonic(), console.activity
        while True:
            now = time.monotonic()
            if activity != console.activity:
                started, activity = now, console.activity
            silent = now - console.printed_at
            if silent >= self._max_seconds:
                with contextlib.suppress(OSError):  # a failing terminal must not end the run
                    console.print(plain_line(f"still running: {activity}, {now - started:,.0f} s so far"))
                silent = 0.0
            if self._has_ended.wait(max(0.05, self._max_seconds - silent)):
                return


class _ConsoleHandler(logging.Handler):
    """Prints log records as plain text above the progress bar, without tracebacks (train.log has them)."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        try:
            self._console.print(plain(visible_entry(record.getMessage()), style))
        except OSError:  # a failing terminal must not end the run
            self.handleError(record)


class _FileHandler(logging.StreamHandler[TextIO]):
    """Appends log records to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.TextIOWrapper(files.appending(path), encoding="utf-8", errors="backslashreplace"))

    def close(self) -> None:
        self.stream.close()
        super().close()


@contextlib.contextmanager
def logging_to(console: Console, path: Path) -> Iterator[None]:
    """Sends log records of this project to the console and to a file."""
    in_file = _FileHandler(path)
    in_file.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [_ConsoleHandler(console), in_file]
    root = logging.getLogger("cookbook")
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        with _Heartbeat(console):
            yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
