"""Futures and streams of results: the one place where asynchrony lives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
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


class TokenStream(APIFuture[T]):
    """A result that can be watched while it comes: `for token in stream` or `async for token in stream`.

    Tokens are there to be read once. Leaving the loop early does not stop the work; `close` does.
    """

    def __init__(self, job: Future[Any], read: Callable[[Any], T], abandon: Callable[[], None]) -> None:
        """The worker hands tokens to `put`; `abandon` tells it that nobody reads on."""
        super().__init__(job, read)
        self._abandon = abandon
        self._arrived: deque[int] = deque()
        self._changed = threading.Condition()
        self._readers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._is_over = False
        job.add_done_callback(lambda _: self._notify(over=True))

    def put(self, token: int) -> None:
        self._arrived.append(token)
        self._notify()

    def close(self) -> None:
        """Ends the work after the token that it is at. Its result is what there is by then."""
        self._abandon()

    def __iter__(self) -> Iterator[int]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._is_over)
            if not self._arrived:
                self.result()  # raises the error that ended it
                return
            yield self._arrived.popleft()

    async def __aiter__(self) -> AsyncIterator[int]:
        changed = asyncio.Event()
        reader = (asyncio.get_running_loop(), changed)
        with self._changed:
            self._readers.append(reader)
        try:
            while True:
                while self._arrived:
                    yield self._arrived.popleft()
                if self._is_over and not self._arrived:
                    await self.result_async()
                    return
                await changed.wait()
                changed.clear()
        finally:
            with self._changed:
                self._readers.remove(reader)

    def _notify(self, over: bool = False) -> None:
        with self._changed:
            self._is_over |= over
            self._changed.notify_all()
            for loop, event in self._readers:
                with contextlib.suppress(RuntimeError):  # its loop is closed, so there is no reader any more
                    loop.call_soon_threadsafe(event.set)
