"""One thread per engine, which runs jobs in the order of submission. Submitting a job returns at once.

Every future completes, whatever is raised on the thread. Jobs that are queued when an engine is closed or
freed, or when the interpreter exits, still run.
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
    """A user of an engine, which closes it when the engine is closed."""

    def close(self) -> None: ...


class BatchItem(Protocol):
    """A work item for a batcher, which sets the item's future."""

    @property
    def future(self) -> Future[Any]: ...


Item = TypeVar("Item", bound=BatchItem)


class Batcher(Protocol[Item]):
    """Processes several submitted items at once, and completes the future of each."""

    def run(self, first: Item, take_waiting: Callable[[], list[Item]]) -> None:
        """Completes `first` and all items that calls of `take_waiting` return.

        `take_waiting` returns no item that was queued after a job of another kind, so the order of the queue
        holds. The engine fails the items that are not complete when this method returns or raises.
        """


class _Task:
    """A job with its own future."""

    def __init__(
        self, work: functools.partial[Any], future: Future[Any], recorded: AbstractContextManager[None]
    ) -> None:
        self.work = work
        self.futures = [future]
        """The futures that `run` has to complete."""
        self.recorded = recorded

    def run(self) -> None:
        (future,) = self.futures
        if not future.set_running_or_notify_cancel():
            return
        with self.recorded:
            result = self.work()
        future.set_result(result)


class _Item(Generic[Item]):
    """An item for a batcher. When it runs, the batcher may also take the items that are queued after it."""

    def __init__(
        self,
        worker: _Worker,
        batcher: Batcher[Item],
        item: Item,
        recorded: AbstractContextManager[None],
        base: BaseModel,
    ) -> None:
        self.worker = worker
        self.batcher = batcher
        self.item = item
        self.futures: list[Future[Any]] = [item.future]
        self.recorded = recorded
        self.base = base

    def run(self) -> None:
        with self.recorded:
            self.batcher.run(self.item, self.take_waiting)

    def take_waiting(self) -> list[Item]:
        """Removes from the queue, and returns, the items for the same batcher at its head.

        All processes take equally many: they gather weights together.
        """
        worker = self.worker
        with worker.lock:
            is_other = (
                number
                for number, job in enumerate(worker.queue)
                if not isinstance(job, _Item) or job.batcher is not self.batcher
            )
            num_items = next(is_other, len(worker.queue))
        if self.base.is_sharded:
            (num_items,) = self.base.world.all_reduce_min(num_items)
        with worker.lock:
            jobs = [worker.queue.popleft() for _ in range(num_items)]
        items: list[Item] = [job.item for job in jobs if isinstance(job, _Item)]
        self.futures += [item.future for item in items]
        return items


def _fail(futures: list[Future[Any]], error: BaseException) -> bool:
    """Fails the futures that have not completed. Returns whether there was one."""
    open_futures = [
        future
        for future in futures
        if not future.done() and (future.running() or future.set_running_or_notify_cancel())
    ]
    for future in open_futures:
        future.set_exception(error)
    return bool(open_futures)


class _Worker:
    """The thread of an engine and its queue. It holds no reference to the engine, which can thus be freed."""

    def __init__(self) -> None:
        self.queue: deque[_Task | _Item[Any]] = deque()
        self.lock = threading.Lock()
        self._clean_ups: deque[Callable[[], None]] = deque()
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Has an entry while the thread has work to do. Its `put` is reentrant."""
        self._is_ending = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        _running.add(self)
        # Exit handlers run in reverse order of registration: this one has to run before the processes part.
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)

    def enqueue(self, job: _Task | _Item[Any]) -> None:
        """Queues a job. Raises ClosedError if the thread has ended or is about to."""
        with self.lock:
            if self._is_ending or self._has_ended or not self._thread.is_alive():
                raise ClosedError(_CLOSED)
            self.queue.append(job)
        self._signal.put(None)

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Runs `work` on the thread before the next job.

        This takes no lock, because the garbage collector may call it during `enqueue`.

        Once the thread has ended this does nothing: the memory is freed with the model, which `work` may
        reference.
        """
        self._clean_ups.append(work)
        if self._has_ended:
            self._clean_ups.clear()
        self._signal.put(None)

    def end_later(self) -> None:
        """Ends the thread after the queued jobs. Takes no lock."""
        self._is_ending = True
        self._signal.put(None)

    def end(self) -> None:
        """Runs the queued jobs, then ends the thread, which may be the calling one."""
        with self.lock:
            self._is_ending = True
        self._signal.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def wait(self) -> None:
        """Returns when all jobs and clean-ups queued so far have run, or at once on the thread itself."""
        if threading.current_thread() is self._thread:
            return
        reached: Future[None] = JobFuture()
        try:
            self.enqueue(_Task(functools.partial(lambda: None), reached, nullcontext()))
        except ClosedError:
            self._thread.join()
        else:
            reached.result()

    # -- on the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._has_ended:
                try:
                    self._run_next()
                except BaseException:
                    logger.exception("The engine's thread continues after an error outside of any job.")
        finally:
            self._fail_queued()

    def _run_next(self) -> None:
        while self._clean_ups:
            try:
                self._clean_ups.popleft()()
            except BaseException:
                logger.exception("Memory could not be freed. Jobs in the queue are not affected.")
        with self.lock:
            job = self.queue.popleft() if self.queue else None
            self._has_ended = self._is_ending and job is None and not self._clean_ups
        if job is None:
            if not self._is_ending:
                self._signal.get()
            return
        try:
            job.run()
        except BaseException as error:
            if not _fail(job.futures, error):
                raise
        finally:
            _fail(job.futures, TrainingError("The work ended without an answer."))
            vars(job).clear()  # a frame of an error refers to the frame that called it, and so to the job

    def _fail_queued(self) -> None:
        with self.lock:
            self._has_ended = True
            left = [*self.queue]
            self.queue.clear()
        self._clean_ups.clear()
        for job in left:
            _fail(job.futures, ClosedError(_CLOSED))


_running: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _finish_all() -> None:
    """Runs queued jobs at the interpreter's exit, as for threads that are not daemons."""
    for worker in list(_running):
        worker.end()


class Engine:
    """A base model and the thread that all its work runs on."""

    def __init__(
        self,
        model_name: str,
        options: EngineOptions | None = None,
        is_trained: bool = False,
        recorder: Recorder | None = None,
        add_tokens: tuple[str, ...] = (),
    ) -> None:
        """`is_trained` says that the model's own weights are trained, `add_tokens` what its tokenizer lacks.

        `recorder` records every job.
        """
        self.is_closed = False
        self.clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self._worker = _Worker()
        weakref.finalize(self, self._worker.end_later).atexit = False
        self._recorder = recorder
        self._device_clock: DeviceClock | None = None
        try:
            self.base: BaseModel = self.submit(
                BaseModel, model_name, options, is_trained, add_tokens
            ).result()
            if recorder is not None and self.base.device.type == "cuda":
                self._device_clock = self.submit(DeviceClock, self.base.device).result()
        except BaseException:
            self._worker.end_later()
            raise

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Queues `work` and returns its future. Raises ClosedError after `close`."""
        future: Future[R] = JobFuture()
        job = _Task(functools.partial(work, *args, **kwargs), future, self._recorded(work))
        self._worker.enqueue(job)
        return future

    def submit_to(self, batcher: Batcher[Item], item: Item) -> None:
        """Queues an item, which the batcher may take together with those after it."""
        self._worker.enqueue(_Item(self._worker, batcher, item, self._recorded("sample"), self.base))

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Runs `work` on the thread before the next job. May be called during garbage collection."""
        self._worker.clean_up_later(work)

    def wait(self) -> None:
        """Returns when all jobs queued so far have run. On the thread itself it returns at once."""
        self._worker.wait()

    def close(self) -> None:
        """Runs the queued jobs, closes the clients, and ends the thread. A second call does nothing."""
        self.is_closed = True
        for client in list(self.clients):
            client.close()  # while the thread can still remove their adapters from the model
        self._worker.end()

    def _recorded(self, work: Callable[..., Any] | str) -> AbstractContextManager[None]:
        """Records the job under the given name, or under the name of the method or the function around it."""
        if self._recorder is None:
            return nullcontext()
        if not isinstance(work, str):
            work = work.func if isinstance(work, functools.partial) else work
            qualified: str = getattr(work, "__qualname__", type(work).__qualname__)
            work = qualified.split(".<locals>")[0].split(".")[-1].lstrip("_")
        return _recorded(self._recorder, self._device_clock, work, self._recorder.step)


@contextmanager
def _recorded(recorder: Recorder, clock: DeviceClock | None, name: str, step: int | None) -> Iterator[None]:
    """Records the times of a job on this thread and, on CUDA, also on the device that it queues work on."""
    device_start = None if clock is None else clock.mark()
    try:
        with recorder.span("engine", name, step):
            yield
    finally:
        if clock is not None and device_start is not None:
            recorder.add_later("device", name, device_start, clock.mark(), step)
