"""APIFuture: the one place where asynchrony lives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class APIFuture(Generic[T]):
    """A result that is being worked on. Read it with `.result()` or `await`.

    `read` turns what the worker left into the value the caller sees. It runs once, in the
    thread of the first reader: on a GPU the worker only enqueues kernels and copies, and the
    reader is the one that waits for them.
    """

    def __init__(self, job: Future[Any], read: Callable[[Any], T] | None = None) -> None:
        self._job = job
        self._read = read
        self._lock = threading.Lock()
        self._value: T | None = None
        self._is_read = False
        self._failure_was_seen = False

    @classmethod
    def completed(cls, value: T) -> APIFuture[T]:
        job: Future[T] = Future()
        job.set_result(value)
        return cls(job)

    def result(self, timeout: float | None = None) -> T:
        """Waits `timeout` seconds at most (None: as long as it takes), then raises TimeoutError.

        An error of the worker is raised here, as often as the result is asked for.
        """
        try:
            raw = self._job.result(timeout)
        except BaseException as error:
            # The wait itself may end too: by its timeout, or by Ctrl-C.
            self._failure_was_seen |= self._job.done() and self._job.exception() is error
            raise
        with self._lock:
            if not self._is_read:
                self._value = cast(T, raw) if self._read is None else self._read(raw)
                self._is_read = True
        return cast(T, self._value)

    async def result_async(self, timeout: float | None = None) -> T:
        if not self._job.done():
            waiting = asyncio.wrap_future(self._job)
            # Whoever gives up waiting shall not have asyncio complain of an error nobody fetched.
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait({waiting}, timeout=timeout)
        if self._is_read or not self._job.done():
            return self.result(timeout=0)
        return await asyncio.to_thread(self.result)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def done(self) -> bool:
        return self._job.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = self._job.exception(timeout)
        self._failure_was_seen |= error is not None
        return error

    @property
    def failure_was_seen(self) -> bool:
        """Whether a reader of this future has been told that the work failed."""
        return self._failure_was_seen
