"""The page of a run, kept up to date while it trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cookbook.loggers import MetricLogger, Metrics
from cookbook.report.run_page import write_report
from cookbook.runs.metrics import MetricsReader

logger = logging.getLogger(__name__)

MIN_PAUSE_SECONDS = 2.0
MAX_SHARE = 0.01
"""The largest share of a run's time that its page may take."""


class ReportLogger(MetricLogger):
    """Writes report.html from what the other loggers wrote: come after them.

    A thread writes it, so no step waits, and it rests until what it took is a hundredth of the time
    that went by. The last page, and the picture of the curves, are written on closing: when the run ends, is
    stopped or fails. A page that cannot be written is a warning.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, bool, MetricsReader], object] = write_report,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._write_report, self._clock = write, clock
        self._metrics = MetricsReader(folder)
        self._thread: threading.Thread | None = None
        self._next_time = clock()
        self._has_warned = False

    def log(self, step: int, metrics: Metrics) -> None:
        is_writing = self._thread is not None and self._thread.is_alive()
        if not is_writing and self._clock() >= self._next_time:
            self._thread = threading.Thread(target=self._write, name="report", daemon=True)
            self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._write(with_curves=True)

    def _write(self, with_curves: bool = False) -> None:
        start = self._clock()
        try:
            self._write_report(self._folder, with_curves, self._metrics)
        except Exception as error:  # no error of the page may end the training
            if not self._has_warned:
                logger.warning("report.html could not be written: %s: %s", type(error).__name__, error)
            self._has_warned = True
        now = self._clock()
        self._next_time = now + max(MIN_PAUSE_SECONDS, (now - start) / MAX_SHARE)
