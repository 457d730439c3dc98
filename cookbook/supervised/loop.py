"""The training loop.

A step is a batch, one forward_backward and one optim_step. The verbs of `run.Run` pass values to one another;
`pending` holds the steps that are queued on the engine and not yet logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console

from cookbook.config import config_files
from cookbook.engine import processes
from cookbook.loggers import logging_to, make_console
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.folder import RunFolder, holds_run
from cookbook.supervised import stop_signal
from cookbook.supervised.agreement import joined_alike
from cookbook.supervised.config import Config
from cookbook.supervised.continuation import check_length, with_recorded_format
from cookbook.supervised.notify import ending_with
from cookbook.supervised.preflight import check_before_work
from cookbook.supervised.run import PendingStep, withdraw
from cookbook.supervised.run_summary import RunSummary
from cookbook.supervised.stop_signal import StopSignal

logger = logging.getLogger(__name__)


async def main(config: Config) -> RunSummary:
    """Does what `train.main` says."""
    console = make_console(is_quiet=not processes.current().is_main)
    config = with_recorded_format(config.resolved())
    resolved = config_files.to_json(config)
    with joined_alike(resolved) as world:
        is_resumed = config.if_log_path_exists == "resume" and world.on_rank0(
            lambda: holds_run(config.log_path)
        )
        if not is_resumed:  # before a folder is created or an earlier run is deleted
            check_before_work(config)
        with (
            RunFolder(config.log_path, resolved, config.if_log_path_exists, world) as folder,
            logging_to(console, folder.log_file),
            ending_with(config.notify if world.is_main else None, config.log_path) as ending,
        ):
            checkpoints = CheckpointLog(folder.path, config.keep_checkpoints, world.on_rank0)
            check_length(config, folder, checkpoints)
            is_longer = bool(folder.length_changes or folder.patience_changes)
            if checkpoints.is_finished and not is_longer:
                return _report_finished(folder, checkpoints)
            if is_resumed:
                check_before_work(config, is_resumed)
            ending.summary = summary = await _run(config, folder, checkpoints, console)
            return summary


def run(config: Config) -> RunSummary:
    """Does what `train.run` says."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main(config))
    tasks: list[asyncio.Task[Any]] = []

    async def cancellable() -> RunSummary:
        if (task := asyncio.current_task()) is not None:
            tasks.append(task)
        return await main(config)

    with ThreadPoolExecutor(1, thread_name_prefix="run") as thread:
        result = thread.submit(asyncio.run, cancellable())
        while True:
            try:
                return result.result()
            except KeyboardInterrupt:
                if not stop_signal.interrupt():
                    for task in tasks:
                        task.get_loop().call_soon_threadsafe(task.cancel)
                    raise


async def _run(config: Config, folder: RunFolder, checkpoints: CheckpointLog, console: Console) -> RunSummary:
    """Runs the training loop.

    The order of the engine's queue determines the result: forward_backward and optim_step of a step, then
    saving and evaluating the state after it, and only then the next step.
    """
    from cookbook.supervised.start import start_run  # imports what only a run needs

    pending: deque[PendingStep] = deque()
    withdrawn: list[PendingStep] = []

    def drop_queued_steps() -> None:
        # Other processes may have begun them.
        if folder.world.is_alone and (first := withdraw(pending)) is not None:
            withdrawn.append(first)

    with (
        await start_run(config, folder, checkpoints, console) as run,
        StopSignal(folder.world, drop_queued_steps) as stop,
    ):
        step, position = run.start.step, run.start.position
        last_evaluation = None
        while (batch := await run.next_batch(step)) is not None:
            evaluation = await run.evaluate(step)
            if evaluation.is_out_of_patience:
                last_evaluation = evaluation
                break
            if stop.is_given_here:  # the step that was running when the signal came is the last one
                break
            pending.append(run.submit(step, batch, evaluation))
            step, position = step + 1, batch.next_position
            while len(pending) > config.submit_ahead:
                await run.log(pending.popleft())
            if await stop.is_given():
                break
        while pending:
            await run.log(pending.popleft())
        if withdrawn:
            step, position = withdrawn[0].step, withdrawn[0].batch.position
        if await stop.is_given():
            return await run.save_and_stop(step, position, stop.number)
        return await run.finish(step, position, last_evaluation)


def _report_finished(folder: RunFolder, checkpoints: CheckpointLog) -> RunSummary:
    last = checkpoints.last()
    assert last is not None
    logger.info(
        "This run is finished after %d steps: %s. To continue it give a larger max_steps or num_epochs; to "
        "run it again choose another log_path, or set if_log_path_exists=delete.",
        last.step,
        checkpoints.path_of(last),
    )
    return RunSummary(folder.path, True, last.step, checkpoints.path_of(last), best=checkpoints.best())
