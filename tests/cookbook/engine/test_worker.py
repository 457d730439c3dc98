"""Tests that every future of an engine completes, whatever is raised on its thread and however it ends."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from programs import Programs
from waiting import wait_until

from cookbook.engine.job_future import JobFuture
from cookbook.engine.worker import Engine
from cookbook.errors import ClosedError

RAISED = [ValueError("no"), MemoryError(), SystemExit(1), KeyboardInterrupt(), GeneratorExit()]


@pytest.fixture
def engine(tiny_qwen3: str) -> Iterator[Engine]:
    engine = Engine(tiny_qwen3)
    yield engine
    engine.close()


def raising(error: BaseException) -> Callable[..., Any]:
    def work(*_: object) -> Any:
        raise error

    return work


class Item:
    def __init__(self) -> None:
        self.future: Future[str] = JobFuture()


class Refusing:
    """A batcher that takes the waiting items and then fails without completing any of them."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def run(self, first: Item, take_waiting: Callable[[], list[Item]]) -> None:
        take_waiting()
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_clean_up_that_raises_fails_no_job(engine: Engine, error: BaseException) -> None:
    cleaned = []
    engine.clean_up_later(raising(error))
    engine.clean_up_later(lambda: cleaned.append("second"))
    assert engine.submit(lambda: "first").result(timeout=10) == "first"
    assert cleaned == ["second"]
    assert engine.submit(lambda: "next").result(timeout=10) == "next"


def test_a_clean_up_runs_without_a_queued_job(engine: Engine) -> None:
    cleaned = threading.Event()
    engine.clean_up_later(cleaned.set)
    assert cleaned.wait(timeout=10)


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_job_that_raises_fails_alone(engine: Engine, error: BaseException) -> None:
    failed, next_one = engine.submit(raising(error)), engine.submit(lambda: "next")
    assert failed.exception(timeout=10) is error
    assert next_one.result(timeout=10) == "next"


@pytest.mark.cases(4)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_done_callback_that_raises_does_not_stop_the_others(
    engine: Engine, error: BaseException, fails: bool
) -> None:
    go, told = threading.Event(), threading.Event()

    def work() -> str:
        go.wait(10)
        if fails:
            raise ValueError("failed")
        return "done"

    job, behind = engine.submit(work), engine.submit(lambda: "behind")
    job.add_done_callback(raising(error))
    job.add_done_callback(lambda _: told.set())
    go.set()
    assert told.wait(timeout=10)
    assert (type(job.exception()) is ValueError) if fails else job.result() == "done"
    assert behind.result(timeout=10) == "behind"


@pytest.mark.cases(3)
@pytest.mark.parametrize("error", [None, *RAISED], ids=repr)
def test_items_that_a_batcher_took_but_did_not_complete_fail(engine: Engine, error: Any) -> None:
    go = threading.Event()
    engine.submit(go.wait, 10)
    batcher, items = Refusing(error), [Item() for _ in range(3)]
    for item in items:
        engine.submit_to(batcher, item)
    behind = engine.submit(lambda: "behind")
    go.set()
    for item in items:
        found = item.future.exception(timeout=10)
        assert found is error if error is not None else "without an answer" in str(found)
    assert behind.result(timeout=10) == "behind"


@pytest.mark.parametrize("error", [SystemExit, MemoryError, KeyboardInterrupt])
def test_an_error_on_the_idle_thread_fails_no_job(engine: Engine, error: type[BaseException]) -> None:
    """The error is raised in the thread from outside, anywhere in its loop."""
    for _ in range(20):
        ident = engine._worker._thread.ident
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error))
        futures = [engine.submit(lambda: "done") for _ in range(3)]
        for future in futures:
            found = future.exception(timeout=10)
            assert isinstance(found, error) or future.result() == "done"
    engine.wait()
    assert engine.submit(lambda: "alive").result(timeout=10) == "alive"


def test_a_cancelled_job_does_not_run_and_does_not_block_others(engine: Engine) -> None:
    go, ran = threading.Event(), []
    engine.submit(go.wait, 10)
    cancelled, behind = engine.submit(ran.append, 1), engine.submit(lambda: "behind")
    assert cancelled.cancel()
    go.set()
    assert behind.result(timeout=10) == "behind"
    assert not ran


# -- how an engine ends -----------------------------------------------------------------------


def is_closed(engine: Engine) -> bool:
    try:
        engine.submit(lambda: None)
    except ClosedError:
        return True
    return False


def test_jobs_queued_when_an_engine_is_closed_run_and_later_calls_are_refused(engine: Engine) -> None:
    go = threading.Event()
    engine.submit(go.wait, 10)
    queued = [engine.submit(lambda: "ran"), engine.submit(raising(ValueError("failed")))]
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: is_closed(engine))
    with pytest.raises(ClosedError, match="Create a new ServiceClient"):
        engine.submit(lambda: "late")
    with pytest.raises(ClosedError):
        engine.submit_to(Refusing(None), Item())
    go.set()
    closing.join(timeout=10)
    assert queued[0].result(timeout=0) == "ran"
    assert str(queued[1].exception(timeout=0)) == "failed"
    engine.close()
    engine.wait()


def test_an_engine_can_be_closed_from_its_own_thread(engine: Engine) -> None:
    closing, queued = engine.submit(engine.close), None
    assert closing.result(timeout=10) is None
    with pytest.raises(ClosedError):
        queued = engine.submit(lambda: "late")
    assert queued is None


@pytest.mark.slow
def test_a_garbage_collected_engine_runs_its_queued_jobs_and_ends_its_thread(tiny_qwen3: str) -> None:
    engine = Engine(tiny_qwen3)
    thread, go = engine._worker._thread, threading.Event()
    engine.submit(go.wait, 10)
    queued = engine.submit(lambda: "ran")
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    go.set()
    assert queued.result(timeout=10) == "ran"
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_an_engine_whose_model_cannot_be_loaded_leaves_no_thread(tmp_path: Any) -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="missing"):
        Engine(str(tmp_path / "missing"))
    wait_until(lambda: threading.active_count() <= before)


AT_EXIT = """
import atexit, sys, threading
from cookbook.engine.worker import Engine
from cookbook.errors import ClosedError

def late():
    try:
        engine.submit(print, "late")
    except ClosedError:
        print("refused", flush=True)

atexit.register(late)
engine = Engine(sys.argv[1])
engine.submit(threading.main_thread().join)  # until the interpreter ends
failing, ran = engine.submit(lambda: 1 / 0), engine.submit(print, "ran", flush=True)
failing.add_done_callback(lambda future: print(repr(future.exception()), flush=True))
raise SystemExit(3)
"""


@pytest.mark.slow
def test_queued_jobs_run_at_the_exit_of_the_interpreter(tiny_qwen3: str, programs: Programs) -> None:
    ran = programs.run("-c", AT_EXIT, tiny_qwen3)
    assert ran.returncode == 3, ran.stderr
    assert ran.stdout.splitlines() == ["ZeroDivisionError('division by zero')", "ran", "refused"]


# -- memory held by failures ---------------------------------------------------------------------


def test_an_error_does_not_keep_the_variables_of_its_frames(engine: Engine) -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []

    def inner(large: Large) -> None:
        held.append(weakref.ref(large))
        raise ValueError("inner")

    def work() -> None:
        large = Large()
        try:
            inner(large)
        except ValueError as error:
            raise RuntimeError("outer") from error

    future = engine.submit(work)
    error = future.exception(timeout=10)
    assert str(error) == "outer"
    assert error is not None
    assert error.__traceback__ is not None, "the traceback is kept"
    engine.wait()
    assert held[0]() is None
