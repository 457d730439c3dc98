"""Futures and streams of results, which hold all of the asynchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar, cast

T = TypeVar("T")


class APIFuture(Generic[T]):
    """A result that is being computed. Read it with `.result()` or `await`.

    `read` turns the worker's result into the value that the caller gets. It runs once, in the thread of the
    first reader: on a GPU the worker only queues kernels and copies, and the reader waits for them.
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

    @classmethod
    def failed(cls, error: BaseException) -> APIFuture[T]:
        job: Future[T] = Future()
        job.set_exception(error)
        return cls(job)

    def result(self, timeout: float | None = None) -> T:
        """Returns the result. Raises TimeoutError if it takes longer than `timeout` seconds (None: no limit).

        Every call raises the worker's error, if there was one.
        """
        try:
            raw = self._job.result(timeout)
        except BaseException as error:
            # The wait itself may fail too, by its timeout or by Ctrl-C.
            self._failure_was_seen |= self._job.done() and self._job.exception() is error
            raise
        with self._lock:
            if not self._is_read:
                self._value = cast(T, raw) if self._read is None else self._read(raw)
                self._is_read = True
        return cast(T, self._value)

    async def result_async(self, timeout: float | None = None) -> T:
        """Returns the result without blocking the event loop. Errors are those of `result`."""
        if not self._job.done():
            waiting = asyncio.wrap_future(self._job)
            # After a timeout asyncio would warn about an error that was not retrieved.
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait({waiting}, timeout=timeout)
        if self._is_read or not self._job.done():
            return self.result(timeout=0)
        return await asyncio.to_thread(self.result)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def coroutine(self) -> Coroutine[Any, Any, T]:
        """Returns a coroutine of the result, for functions of asyncio that take one."""
        return self.result_async()

    def future(self) -> Future[T]:
        """Returns a future of `concurrent.futures` with the result, which a thread of its own waits for."""
        read: Future[T] = Future()
        read.set_running_or_notify_cancel()

        def copy_result() -> None:
            try:
                read.set_result(self.result())
            except BaseException as error:
                read.set_exception(error)

        def start(_: object) -> None:  # the worker's thread must not wait for the device
            threading.Thread(target=copy_result, daemon=True).start()

        self._job.add_done_callback(start)
        return read

    def done(self) -> bool:
        """Returns whether the work has ended, with a result or with an error."""
        return self._job.done()

    def cancel(self) -> bool:
        """Removes the work from the queue. Returns False if it has begun or ended, which changes nothing."""
        return self._job.cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Returns the error of the worker, or None. Raises TimeoutError after `timeout` seconds."""
        error = self._job.exception(timeout)
        self._failure_was_seen |= error is not None
        return error

    @property
    def failure_was_seen(self) -> bool:
        """Whether a reader of this future has seen that the work failed."""
        return self._failure_was_seen


class ClientFuture(APIFuture[Any]):
    """A client, which is also the completed future of itself, as clients are in the Tinker SDK."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def future(self) -> Future[Self]:
        done: Future[Self] = Future()
        done.set_result(self)
        return done

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False

    def exception(self, timeout: float | None = None) -> None:
        return None

    @property
    def failure_was_seen(self) -> bool:
        return False


class TokenStream(APIFuture[T]):
    """A result whose tokens can be read while they are sampled: `for token in stream`, or `async for`.

    Each token can be read once. Leaving the loop early does not stop the work; `close` does.
    """

    def __init__(self, job: Future[Any], read: Callable[[Any], T], abandon: Callable[[], None]) -> None:
        """The worker calls `put` with each token. `abandon` stops the worker early."""
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
        """Stops the work after the current token. The result holds the tokens sampled by then."""
        self._abandon()

    def __iter__(self) -> Iterator[int]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._is_over)
            if not self._arrived:
                self.result()  # raises the error that ended the work
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
                with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
                    loop.call_soon_threadsafe(event.set)
