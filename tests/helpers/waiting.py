"""The one way in which tests wait for what happens elsewhere, in another thread or process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 60.0, every: float = 0.005) -> T:
    """The first true value that `condition` gives; fails the test when none came in so many seconds.

    It is for another process, or a thread that gives no signal: within a test, wait for an event instead.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting after {seconds:g} seconds: {condition}"
        pause.wait(every)
    return value
