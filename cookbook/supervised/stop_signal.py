"""Handles SIGINT and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cookbook.engine.processes import ALONE, World

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


_active: list[StopSignal] = []
"""The runs that can be stopped, in this process."""


def interrupt() -> bool:
    """Asks the runs that other threads run to stop, as Ctrl-C does. Returns False if one was asked before."""
    waiting = [stop for stop in _active if stop.received is None]
    for stop in waiting:
        stop._loop.call_soon_threadsafe(stop._receive, signal.SIGINT)
    return bool(waiting)


class StopSignal:
    """A context manager in which the first signal sets `received`, and a second one has its usual effect.

    Outside the main thread it handles no signals. It suffices that one of several processes receives a
    signal: `is_given` returns the same on all of them.
    """

    def __init__(self, world: World = ALONE, on_first: Callable[[], object] = lambda: None) -> None:
        """`on_first` is called in the event loop when the first signal arrives."""
        self._on_first = on_first
        self.received: signal.Signals | None = None
        self._world = world
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._loop = asyncio.get_running_loop()
        _active.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._earlier[number] = signal.getsignal(number)
                asyncio.get_running_loop().add_signal_handler(number, self._receive, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        self._restore_handlers()

    @property
    def number(self) -> signal.Signals:
        """The number of the signal; only valid if `is_given`."""
        assert self.received is not None
        return self.received

    @property
    def is_given_here(self) -> bool:
        """Whether to stop, where no other process has to agree."""
        return self._world.is_alone and self.received is not None

    async def is_given(self) -> bool:
        """Returns whether to stop. Processes agree over sockets, so the device need not wait."""
        number = self.received or 0
        if not self._world.is_alone:
            (number,) = await asyncio.to_thread(self._world.all_reduce_max, number)
        if number:  # a signal that arrived during the exchange counts at the next call
            self.received = signal.Signals(number)
        return number != 0

    def _receive(self, number: signal.Signals) -> None:
        self.received = number
        self._restore_handlers()
        logger.info("%s: stopping after this step. Once more to stop at once.", number.name)
        self._on_first()

    def _restore_handlers(self) -> None:
        while self._earlier:
            number, handler = self._earlier.popitem()
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
