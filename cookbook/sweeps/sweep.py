"""Runs a sweep, from its plan to its table of results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from cookbook.config import config_files
from cookbook.errors import ConfigError
from cookbook.runs.folder import RunFolder
from cookbook.supervised.notify import refuse
from cookbook.sweeps import results
from cookbook.sweeps.plan import Plan, PlannedRun
from cookbook.sweeps.results import PointResult
from cookbook.sweeps.run_process import Progress
from cookbook.utils import files
from cookbook.utils.control_characters import visible_entry
from cookbook.utils.rich_console import make_console, plain, plain_line

OnEnd = Callable[[PlannedRun, Progress], None]
Execute = Callable[[Plan, Sequence[PlannedRun], Sequence[PlannedRun], OnEnd], bool]


class WritePage(Protocol):
    """Writes a page that compares the runs in `folders` to the file `to`, and returns its path."""

    def __call__(self, folders: Sequence[Path], to: Path, title: str) -> Path: ...


def run_sweep(
    plan: Plan, execute: Execute | None = None, *, write_page: WritePage | None = None
) -> list[PointResult]:
    """Executes the remaining runs of a sweep, then writes, prints and returns all results, the best first.

    Runs that an earlier call finished or stopped early are kept, interrupted ones are resumed, and failed
    ones are retried. Raises ConfigError, before any run starts, if a folder holds a run with another config.
    `execute` executes the runs, by default `execution.execute` on Ray. `write_page` writes a page that
    compares them, such as `cookbook.report.compare`; by default none is written.
    """
    console = make_console()
    files.make_folder(plan.folder, may_be_link=True)
    files.remove_abandoned(plan.folder)
    _claim_folders(plan.runs)
    before = results.progress_of(plan)
    over = [run for run in plan.runs if before[run.name].state in ("finished", "stopped")]
    left = [run for run in plan.runs if run not in over]
    of_them = f", {len(over)} of them done" if over else ""
    console.print(plain_line(f"{len(plan.runs)} runs of {plan.recipe.name}{of_them}, in {plan.folder}."))
    is_complete = _run(plan, left, over, execute, console) if left else True
    ranked = results.ranked(plan, results.progress_of(plan))
    written = _write_files(plan, ranked, write_page)
    console.print()
    results.print_table(plan, ranked, console)
    console.print()
    for line in written:
        console.print(plain_line(line))
    if not is_complete:
        console.print(plain_line("Interrupted. Run the same command again to continue."))
        raise KeyboardInterrupt
    return ranked


def _claim_folders(runs: Sequence[PlannedRun]) -> None:
    """Writes the config of every run to its folder, from which the run is started."""
    for run in runs:
        refuse(run.config.notify, "A run of a sweep")
        config = config_files.to_json(run.config)
        files.refuse_link(run.folder)
        try:
            with RunFolder(run.config.log_path, config, run.config.if_log_path_exists):
                pass
        except ConfigError as error:
            error.add_note("Give a sweep with other settings another log_path.")
            raise


def _run(
    plan: Plan,
    left: Sequence[PlannedRun],
    over: Sequence[PlannedRun],
    execute: Execute | None,
    console: Console,
) -> bool:
    from cookbook.sweeps import execution

    ended = len(over)

    def tell(run: PlannedRun, progress: Progress) -> None:
        nonlocal ended
        ended += 1
        results.record(plan, run, progress)
        line = _line(plan, run, progress, f"{ended}/{len(plan.runs)}")
        # The run is recorded already. If the terminal fails, printing the final table raises the error.
        with contextlib.suppress(OSError):
            console.print(plain(visible_entry(line)))

    return (execute or execution.execute)(plan, left, over, tell)


def _line(plan: Plan, run: PlannedRun, progress: Progress, count: str) -> str:
    if progress.state == "failed":
        return f"{count}  {run.name}: failed.\n  " + progress.error.replace("\n", "\n  ")
    value = f"{plan.config.metric} {progress.value:.4f}"
    return f"{count}  {run.name}: {value}, {progress.state} at step {progress.step}"


def _write_files(plan: Plan, ranked: Sequence[PointResult], write_page: WritePage | None) -> list[str]:
    """Writes the table, the page and the best settings, and returns the lines to print about them."""
    lines = [f"Table: {results.write_csv(plan, ranked)}"]
    begun = [
        run.folder
        for result in ranked
        for run, one in zip(result.runs, result.progress, strict=True)
        if one.step
    ]
    if begun and write_page is not None:
        page = write_page(begun, plan.folder / results.REPORT, title=f"Sweep {plan.folder.name}")
        lines.append(f"Report: {page}")
    if ranked[0].state == "finished":
        best = results.write_best(plan, ranked[0])
        lines.append(f"Best: python -m {plan.recipe.module} config={best}")
    return lines
