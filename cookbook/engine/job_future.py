"""The future of work on an engine's thread."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

R = TypeVar("R")

logger = logging.getLogger(__name__)


class JobFuture(Future[R]):
    """Completes for everybody who waits, whatever a done callback raises, and holds no memory of a failure.

    An error keeps its traceback, but not the local variables of the frames in it: a pass that fails would
    otherwise keep its activations, and its client's weights, for as long as somebody has the error.
    """

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        super().add_done_callback(functools.partial(_call, fn))

    def set_exception(self, exception: BaseException | None) -> None:
        if exception is not None:
            _drop_variables(exception)
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


_IS_DONE = "_has_no_variables"


def _drop_variables(error: BaseException) -> None:
    """Drops the local variables of the frames that `error`, and what led to it, went through.

    Frames that are still running are taken out of the traceback. What a nested function found in the scope
    around it is kept: what runs on an engine's thread is given arguments.
    """
    running = set(_outwards(inspect.currentframe()))
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or hasattr(each, _IS_DONE):
            continue  # who has read it since has frames of his own in it
        with contextlib.suppress(AttributeError):
            setattr(each, _IS_DONE, True)
        while each.__traceback__ is not None and each.__traceback__.tb_frame in running:
            each.__traceback__ = each.__traceback__.tb_next
        part = each.__traceback__
        while part is not None:
            if not _may_be_suspended(part.tb_frame):
                with contextlib.suppress(RuntimeError):  # it is running on another thread
                    part.tb_frame.clear()
            part = part.tb_next
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


def _may_be_suspended(frame: FrameType) -> bool:
    """Whether clearing the frame could end a generator or coroutine of a caller, which continues later."""
    flags = frame.f_code.co_flags
    is_own = frame.f_globals.get("__name__", "").partition(".")[0] in ("cookbook", "contextlib")
    is_generator = bool(flags & inspect.CO_GENERATOR) and not is_own
    return is_generator or bool(flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, what called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back
