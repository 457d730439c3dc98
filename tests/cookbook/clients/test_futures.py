"""Tests of APIFuture, which is read with `.result()` or `await` from any thread or loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cookbook.clients.futures import APIFuture


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool


def failed(error: BaseException) -> APIFuture[Any]:
    job: Future[Any] = Future()
    job.set_exception(error)
    return APIFuture(job)


def test_results_have_the_order_of_the_work_however_they_are_read(worker: ThreadPoolExecutor) -> None:
    ran: list[int] = []

    def work(number: int) -> int:
        ran.append(number)
        return number * 10

    futures = [APIFuture(worker.submit(work, number)) for number in range(5)]
    assert [future.result() for future in reversed(futures)] == [40, 30, 20, 10, 0]
    assert ran == [0, 1, 2, 3, 4]


def test_a_result_is_computed_once_and_returned_often() -> None:
    reads: list[str] = []

    def read(raw: str) -> list[str]:
        reads.append(raw)
        return [raw]

    job: Future[str] = Future()
    future = APIFuture(job, read)
    assert not future.done()
    job.set_result("raw")
    assert reads == []
    assert future.result() is future.result()
    assert asyncio.run(future.result_async()) is future.result()
    assert reads == ["raw"]


def test_two_threads_that_read_at_the_same_time_share_one_result() -> None:
    reads: list[str] = []
    reading, go, all_there = threading.Event(), threading.Event(), threading.Barrier(4)

    def read(raw: str) -> object:
        reads.append(raw)
        reading.set()
        go.wait(10)
        return object()

    job: Future[str] = Future()
    future = APIFuture(job, read)

    def wait_for_result() -> object:
        all_there.wait(10)
        return future.result()

    with ThreadPoolExecutor(max_workers=4) as readers:
        waiting = [readers.submit(wait_for_result) for _ in range(4)]
        job.set_result("raw")
        assert reading.wait(10)
        go.set()
        values = [reader.result() for reader in waiting]
    assert reads == ["raw"]
    assert all(value is values[0] for value in values)


def test_a_completed_future_returns_its_value_at_once() -> None:
    future = APIFuture.completed(None)
    assert future.done()
    assert future.result(timeout=0) is None
    assert future.exception() is None


def test_a_timeout_raises_timeout_error_and_the_result_can_be_read_later() -> None:
    job: Future[int] = Future()
    future = APIFuture(job)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(timeout=0.01))
    assert not future.failure_was_seen
    job.set_result(1)
    assert future.result(timeout=0) == 1


def test_an_error_is_raised_by_every_call_of_result() -> None:
    error = ValueError("no")
    future = failed(error)
    for _ in range(2):
        with pytest.raises(ValueError, match="no") as caught:
            future.result()
        assert caught.value is error
        with pytest.raises(ValueError, match="no"):
            asyncio.run(future.result_async())
    assert future.exception() is error


def test_a_timeout_error_of_the_work_itself_is_a_failure() -> None:
    future = failed(TimeoutError("the device did not answer"))
    with pytest.raises(TimeoutError, match="the device did not answer"):
        future.result(timeout=1.0)
    assert future.failure_was_seen


def test_every_way_of_reading_marks_the_failure_as_seen() -> None:
    by_result, by_await, by_exception, unread = (failed(ValueError("no")) for _ in range(4))
    with pytest.raises(ValueError, match="no"):
        by_result.result()
    with pytest.raises(ValueError, match="no"):
        asyncio.run(by_await.result_async())
    by_exception.exception()
    assert by_result.failure_was_seen
    assert by_await.failure_was_seen
    assert by_exception.failure_was_seen
    assert unread.done()
    assert not unread.failure_was_seen
    succeeded = APIFuture.completed(1)
    succeeded.exception()
    succeeded.result()
    assert not succeeded.failure_was_seen


def test_an_interrupted_wait_has_not_seen_the_failure_that_comes_later() -> None:
    class Interrupted(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            if not self.done():
                raise KeyboardInterrupt
            return super().result(timeout)

    job = Interrupted()
    future = APIFuture(job)
    with pytest.raises(KeyboardInterrupt):
        future.result()
    job.set_exception(ValueError("no"))
    assert not future.failure_was_seen


def test_many_futures_are_gathered_while_the_loop_runs(worker: ThreadPoolExecutor) -> None:
    release = threading.Event()
    ticks = []

    async def tick() -> None:
        for _ in range(5):
            ticks.append(len(ticks))
            await asyncio.sleep(0)
        release.set()

    async def main() -> list[int]:
        worker.submit(release.wait, 10)
        futures = [APIFuture(worker.submit(pow, number, 2), lambda raw: raw + 1) for number in range(200)]

        async def read(future: APIFuture[int]) -> int:
            return await future

        *squares, _ = await asyncio.gather(*(read(future) for future in futures), tick())
        return squares

    assert asyncio.run(main()) == [number**2 + 1 for number in range(200)]
    assert len(ticks) == 5


def test_gather_accepts_futures_by_result_async(worker: ThreadPoolExecutor) -> None:
    async def main() -> list[Any]:
        futures = [APIFuture(worker.submit(int, text)) for text in ("1", "x", "3")]
        return await asyncio.gather(*(future.result_async() for future in futures), return_exceptions=True)

    one, error, three = asyncio.run(main())
    assert (one, three) == (1, 3)
    assert isinstance(error, ValueError)


def test_cancelling_a_task_that_waits_does_not_cancel_the_work(worker: ThreadPoolExecutor) -> None:
    """Neither while the work runs nor while it is queued: a queued step must be taken."""
    release = threading.Event()
    ran: list[str] = []

    def work(name: str) -> str:
        release.wait(10)
        ran.append(name)
        return name

    running, queued = APIFuture(worker.submit(work, "running")), APIFuture(worker.submit(work, "queued"))

    async def main() -> None:
        async def wait_for(future: APIFuture[str]) -> str:
            return await future

        tasks = [asyncio.create_task(wait_for(future)) for future in (running, queued)]
        await asyncio.sleep(0)  # both are waiting now
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queued.result_async(), timeout=0.01)

    asyncio.run(main())
    release.set()
    assert running.result(timeout=10) == "running"
    assert queued.result(timeout=10) == "queued"
    assert ran == ["running", "queued"]
    assert not running.failure_was_seen


@pytest.mark.slow
def test_a_timed_out_waiter_logs_no_warning_when_the_work_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio logs errors that were not retrieved when they are garbage-collected."""

    async def main() -> None:
        job: Future[int] = Future()
        future = APIFuture(job)
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future.result_async(), timeout=0.01)
        job.set_exception(ValueError("no"))
        await asyncio.sleep(0)  # run what the failure scheduled
        assert not future.failure_was_seen
        del job, future
        gc.collect()

    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        asyncio.run(main())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_future_can_be_awaited_in_several_loops(worker: ThreadPoolExecutor) -> None:
    release = threading.Event()
    future = APIFuture(worker.submit(release.wait, 10))
    with pytest.raises(TimeoutError):
        asyncio.run(future.result_async(timeout=0.01))
    release.set()
    assert asyncio.run(future.result_async()) is True
