"""One thread per engine: what is submitted first runs first, and submitting returns at once.

Every future completes, whatever raises on the thread. What is queued when an engine is closed, when it is
garbage or when the interpreter exits still runs.
"""

from __future__ import annotations

import atexit
import functools
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from cookbook.engine.device_clock import DeviceClock
from cookbook.engine.job_future import JobFuture
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.errors import ClosedError, TrainingError
from cookbook.trace import Recorder

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


_CLOSED = (
    "The engine of this client has ended: its service was closed, the interpreter is exiting, or this "
    "process is a fork of the one that created it. Create a new ServiceClient."
)


class Client(Protocol):
    """What uses an engine, and can use it no more when that is closed."""

    def close(self) -> None: ...


class BatchItem(Protocol):
    """Work for a batcher, which is answered by its future."""

    @property
    def future(self) -> Future[Any]: ...


Item = TypeVar("Item", bound=BatchItem)


class Batcher(Protocol[Item]):
    """Works on several submitted items at once, and answers each by the future it brings."""

    def run(self, first: Item, take_waiting: Callable[[], list[Item]]) -> None:
        """Answers `first` and whatever `take_waiting` gives, which may be asked as often as one likes.

        Where it raises, or leaves something without an answer, the engine fails what is left.

        What waits behind a job of another kind is not given: the order of the queue holds.
        """


@dataclass
class _Job:
    """One piece of work with a future of its own."""

    work: functools.partial[Any]
    future: Future[Any]
    recorded: AbstractContextManager[None] = field(default_factory=nullcontext)

    def run(self, worker: _Worker) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        with self.recorded:
            result = self.work()
        self.future.set_result(result)

    def fail(self, error: BaseException) -> bool:
        """Completes what has not completed. Whether there was anything."""
        return _fail(self.future, error)

    def release(self) -> None:
        """Once it has run. An error's frames hold the frame that called them, and so this."""
        del self.work


@dataclass
class _Item(Generic[Item]):
    """A part of what a batcher works on. One that is run takes those waiting behind it along."""

    batcher: Batcher[Item]
    item: Item
    recorded: AbstractContextManager[None]
    agree_on_number: Callable[[int], int]
    """How many of the waiting items all processes take."""
    taken: list[Item] = field(default_factory=list)

    def run(self, worker: _Worker) -> None:
        with self.recorded:
            self.batcher.run(self.item, functools.partial(self._take_waiting, worker))

    def _take_waiting(self, worker: _Worker) -> list[Item]:
        items = worker.take_items(self.batcher, self.agree_on_number)
        self.taken.extend(items)
        return items

    def fail(self, error: BaseException) -> bool:
        """Completes what has not completed. Whether there was anything."""
        completed = [_fail(item.future, error) for item in (self.item, *self.taken)]
        return any(completed)

    def release(self) -> None:
        """Once it has run."""
        del self.batcher, self.item, self.taken


def _fail(future: Future[Any], error: BaseException) -> bool:
    """Completes a future, unless it has completed."""
    if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
        return False
    future.set_exception(error)
    return True


class _Worker:
    """The thread of an engine and its queue. It holds no engine, so that one without references is freed."""

    def __init__(self) -> None:
        self._queue: deque[_Job | _Item[Any]] = deque()
        self._lock = threading.Lock()
        self._clean_ups: deque[Callable[[], None]] = deque()
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Has something in it while the thread has something to look at. Its `put` may interrupt itself."""
        self._is_ending = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        _running.add(self)
        # What was registered last runs first: before the processes of a run part.
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)

    def enqueue(self, job: _Job | _Item[Any]) -> None:
        """Raises ClosedError where nothing runs any more."""
        with self._lock:
            if self._is_ending or self._has_ended or not self._thread.is_alive():
                raise ClosedError(_CLOSED)
            self._queue.append(job)
        self._signal.put(None)

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Takes no lock: the garbage collector calls this, perhaps in the middle of `enqueue`.

        Once the thread has ended it does nothing: what there was to free goes with the model, which `work`
        may hold.
        """
        self._clean_ups.append(work)
        if self._has_ended:
            self._clean_ups.clear()
        self._signal.put(None)

    def end_later(self) -> None:
        """Ends the thread after what is queued. Takes no lock either."""
        self._is_ending = True
        self._signal.put(None)

    def end(self) -> None:
        """Runs what is queued, then ends the thread, which may be the one that calls this."""
        with self._lock:
            self._is_ending = True
        self._signal.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def wait(self) -> None:
        """Returns when all that is queued now has run, and what cleans up. On the thread: at once."""
        if threading.current_thread() is self._thread:
            return
        reached: Future[None] = JobFuture()
        try:
            self.enqueue(_Job(functools.partial(_do_nothing), reached))
        except ClosedError:
            self._thread.join()
        else:
            reached.result()

    def take_items(self, batcher: Batcher[Item], agree_on_number: Callable[[int], int]) -> list[Item]:
        """The items for `batcher` at the head of the queue."""
        with self._lock:
            is_other = (
                number
                for number, job in enumerate(self._queue)
                if not isinstance(job, _Item) or job.batcher is not batcher
            )
            num_items = next(is_other, len(self._queue))
        num_items = agree_on_number(num_items)
        with self._lock:
            jobs = [self._queue.popleft() for _ in range(num_items)]
        return [job.item for job in jobs if isinstance(job, _Item)]

    # -- on the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_over():
                try:
                    self._run_next()
                except BaseException:
                    logger.exception("The engine's thread continues after an error outside of any job.")
        finally:
            self._fail_what_is_left()

    def _is_over(self) -> bool:
        with self._lock:
            self._has_ended = self._is_ending and not self._queue and not self._clean_ups
            return self._has_ended

    def _run_next(self) -> None:
        while self._clean_ups:
            _clean_up(self._clean_ups.popleft())
        with self._lock:
            job = self._queue.popleft() if self._queue else None
        if job is None:
            if not self._is_ending:
                self._signal.get()
            return
        try:
            job.run(self)
        except BaseException as error:
            if not job.fail(error):
                raise
        finally:
            job.fail(TrainingError("The work ended without an answer."))
            job.release()

    def _fail_what_is_left(self) -> None:
        with self._lock:
            self._has_ended = True
            left = [*self._queue]
            self._queue.clear()
        self._clean_ups.clear()
        for job in left:
            job.fail(ClosedError(_CLOSED))


_running: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _finish_all() -> None:
    """At the interpreter's exit: what is queued runs, as other threads finish too."""
    for worker in list(_running):
        worker.end()


def _do_nothing() -> None:
    pass


def _clean_up(work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException:
        logger.exception("Memory could not be freed, which takes nothing from what is queued.")


class Engine:
    """A base model and the thread that everything on it runs on."""

    def __init__(
        self,
        model_name: str,
        options: EngineOptions | None = None,
        is_trained: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        """`is_trained`: the model's own weights are to be. `recorder` is told of every job."""
        self.is_closed = False
        self.clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self._worker = _Worker()
        weakref.finalize(self, self._worker.end_later).atexit = False
        self._recorder = recorder
        self._device_clock: DeviceClock | None = None
        try:
            self.base: BaseModel = self.submit(BaseModel, model_name, options, is_trained).result()
            if recorder is not None and self.base.device.type == "cuda":
                self._device_clock = self.submit(DeviceClock, self.base.device).result()
        except BaseException:
            self._worker.end_later()
            raise

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Raises ClosedError after `close`."""
        future: Future[R] = JobFuture()
        recorded = self._recorded(_name_of(work), self._step())
        self._worker.enqueue(_Job(functools.partial(work, *args, **kwargs), future, recorded))
        return future

    def submit_to(self, batcher: Batcher[Item], item: Item) -> None:
        """Queues an item that the batcher may take together with those behind it."""
        recorded = self._recorded("sample", self._step())
        self._worker.enqueue(_Item(batcher, item, recorded, functools.partial(_agree_on_number, self.base)))

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Runs `work` on the thread before the next job. May be called while garbage is collected."""
        self._worker.clean_up_later(work)

    def wait(self) -> None:
        """Returns when all that is queued now has run. On the thread itself it returns at once."""
        self._worker.wait()

    def close(self) -> None:
        """Runs what is queued, closes the clients, and ends the thread. A second time it does nothing."""
        self.is_closed = True
        for client in list(self.clients):
            client.close()  # while the thread can still take their adapters out of the model
        self._worker.end()

    def _step(self) -> int | None:
        return None if self._recorder is None else self._recorder.step

    def _recorded(self, name: str, step: int | None) -> AbstractContextManager[None]:
        if self._recorder is None:
            return nullcontext()
        return _recorded(self._recorder, self._device_clock, name, step)


def _agree_on_number(base: BaseModel, number: int) -> int:
    """The processes go through sharded weights in step, so with the same items."""
    if base.is_sharded:
        (number,) = base.world.all_reduce_min(number)
    return number


@contextmanager
def _recorded(recorder: Recorder, clock: DeviceClock | None, name: str, step: int | None) -> Iterator[None]:
    """The times of a job on this thread, which on CUDA only queues, and then those on the device."""
    device_start = None if clock is None else clock.mark()
    try:
        with recorder.span("engine", name, step):
            yield
    finally:
        if clock is not None and device_start is not None:
            recorder.add_later("device", name, device_start, clock.mark(), step)


def _name_of(work: Callable[..., Any]) -> str:
    """The method that was submitted, or that the submitted function was made in."""
    work = work.func if isinstance(work, functools.partial) else work
    qualified: str = getattr(work, "__qualname__", type(work).__qualname__)
    return qualified.split(".<locals>")[0].split(".")[-1].lstrip("_")
