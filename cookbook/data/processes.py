"""Maps a function over many inputs, in order, with several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from cookbook.errors import DataError

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

SECONDS_ALONE = 3.0
"""The time that one process works alone before others are started, if their number is not given."""

_function: Callable[[Any], Any] | None = None
"""The function that the processes run. They are forked, so it need not be picklable."""


def map_in_order(
    function: Callable[[T], R],
    inputs: Iterable[T],
    num_proc: int | None = None,
    seconds_alone: float = SECONDS_ALONE,
) -> Iterator[R]:
    """Yields `function(input)` for each input, in order, with only a few inputs and results in memory.

    Inputs and results are pickled between processes. With `num_proc=None` this process works alone for
    `seconds_alone`, and then one process per core takes the remaining inputs. Raises DataError if a process
    is killed.
    """
    remaining = iter(inputs)
    if num_proc is None:
        deadline = time.perf_counter() + seconds_alone
        for item in remaining:
            yield function(item)
            if time.perf_counter() > deadline:
                break
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_proc == 1:
        yield from map(function, remaining)
    else:
        yield from _map_with_processes(function, remaining, num_proc)


def _map_with_processes(function: Callable[[T], R], inputs: Iterator[T], num_proc: int) -> Iterator[R]:
    first = next(inputs, None)
    if first is None:
        return
    # what one process alone does not need
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    global _function
    _function = function
    try:
        with ProcessPoolExecutor(
            num_proc, mp_context=multiprocessing.get_context("fork"), initializer=_begin
        ) as pool:
            pending: deque[Future[R]] = deque([_submit(pool, first)])
            try:
                for item in inputs:
                    pending.append(_submit(pool, item))
                    if len(pending) >= 4 * num_proc:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that renders was killed, probably because memory ran out. Render with fewer: "
            "num_proc=1."
        ) from error
    finally:
        _function = None


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    with warnings.catch_warnings():
        # Python warns about forking a process with threads. The children only run the function, which takes
        # no lock that another thread of this process could hold.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        return pool.submit(_call, item)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)


def _begin() -> None:
    """Prepares a new process: it ignores Ctrl-C, which the parent handles, and exits when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)
