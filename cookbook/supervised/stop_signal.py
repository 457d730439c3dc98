"""SIGINT and SIGTERM as a request to stop after the step."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, the first signal sets `received`; a second one does what it did before.

    Outside the main thread signals are left to whoever owns them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._earlier[number] = signal.getsignal(number)
                asyncio.get_running_loop().add_signal_handler(number, self._receive, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _receive(self, number: signal.Signals) -> None:
        self.received = number
        self._let_go()
        logger.info("%s: stopping after this step. Once more to stop at once.", number.name)

    def _let_go(self) -> None:
        while self._earlier:
            number, handler = self._earlier.popitem()
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
