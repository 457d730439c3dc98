"""The future of work on an engine's thread."""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

R = TypeVar("R")

logger = logging.getLogger(__name__)


class JobFuture(Future[R]):
    """Completes for everybody who waits, whatever a done callback raises, and holds no memory of a failure.

    An error keeps its traceback, but not the local variables of the frames in it: a pass that fails would
    otherwise keep its activations for as long as somebody has the error.
    """

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        super().add_done_callback(functools.partial(_call, fn))

    def set_exception(self, exception: BaseException | None) -> None:
        if exception is not None:
            _clear_frames(exception)
        super().set_exception(exception)


def _call(fn: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    """An Exception is logged by the future. Others would keep what follows from being told."""
    try:
        fn(future)
    except Exception:
        raise
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            raise  # Ctrl-C is meant for the program
        logger.exception("A done callback raised.")


def _clear_frames(error: BaseException) -> None:
    """Drops the local variables of the frames that `error` and what led to it went through."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
