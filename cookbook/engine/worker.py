"""One thread per engine: what is submitted first runs first, and submitting returns at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from cookbook.engine.base_model import BaseModel
from cookbook.engine.device_clock import DeviceClock
from cookbook.engine.options import EngineOptions
from cookbook.trace import Recorder

P = ParamSpec("P")
R = TypeVar("R")
Item = TypeVar("Item")


class Batcher(Protocol[Item]):
    """Works on several submitted items at once, and answers each by the future it brings."""

    def run(self, first: Item, take_waiting: Callable[[], list[Item]]) -> None:
        """Answers `first` and whatever `take_waiting` gives, which may be asked as often as one likes.

        What waits behind a job of another kind is not given: the order of the queue holds.
        """


@dataclass(frozen=True)
class _Job:
    work: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@dataclass(frozen=True)
class _Item(Generic[Item]):
    batcher: Batcher[Item]
    item: Item
    step: int | None
    """That it is for, where somebody counts steps."""


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
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._queue: deque[_Job | _Item[Any]] = deque()
        self._lock = threading.Lock()
        self._clean_ups: deque[Callable[[], None]] = deque()
        self._recorder = recorder
        self._device_clock: DeviceClock | None = None
        self.base: BaseModel = self.submit(BaseModel, model_name, options, is_trained).result()
        if recorder is not None and self.base.device.type == "cuda":
            self._device_clock = self.submit(DeviceClock, self.base.device).result()

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        name, step = _name_of(work), self._step()

        def run() -> R:
            with self._recorded(name, step):
                return work(*args, **kwargs)

        self._enqueue(_Job(run, future))
        return future

    def submit_to(self, batcher: Batcher[Item], item: Item) -> None:
        """Queues an item that the batcher may take together with those behind it."""
        self._enqueue(_Item(batcher, item, self._step()))

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Runs `work` on the thread before the next job.

        Takes no lock: the garbage collector calls this, perhaps in the middle of `submit`.
        """
        self._clean_ups.append(work)

    def _enqueue(self, job: _Job | _Item[Any]) -> None:
        with self._lock:
            self._queue.append(job)
            self._thread.submit(self._run_next)

    def _run_next(self) -> None:
        while self._clean_ups:
            self._clean_ups.popleft()()
        with self._lock:
            if not self._queue:
                return  # a batcher took what this call was for
            job = self._queue.popleft()
        if isinstance(job, _Job):
            job.run()
        else:
            batcher = job.batcher
            with self._recorded("sample", job.step):
                batcher.run(job.item, lambda: self._take_waiting(batcher))

    def _take_waiting(self, batcher: Batcher[Item]) -> list[Item]:
        num_items = self._num_waiting_for(batcher)
        if self.base.is_sharded:  # the processes go through their model in step, so with the same items
            (num_items,) = self.base.mesh.agree_min(num_items)
        with self._lock:
            jobs = [self._queue.popleft() for _ in range(num_items)]
        return [job.item for job in jobs if isinstance(job, _Item)]

    def _num_waiting_for(self, batcher: Batcher[Item]) -> int:
        """At the head of the queue."""
        with self._lock:
            is_other = (
                number
                for number, job in enumerate(self._queue)
                if not isinstance(job, _Item) or job.batcher is not batcher
            )
            return next(is_other, len(self._queue))

    def _step(self) -> int | None:
        return None if self._recorder is None else self._recorder.step

    @contextmanager
    def _recorded(self, name: str, step: int | None) -> Iterator[None]:
        """The times of a job on this thread, which on CUDA only queues, and then those on the device."""
        if self._recorder is None:
            yield
            return
        clock = self._device_clock
        device_start = None if clock is None else clock.mark()
        try:
            with self._recorder.span("engine", name, step):
                yield
        finally:
            if clock is not None and device_start is not None:
                self._recorder.add_later("device", name, device_start, clock.mark(), step)

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        self._thread.shutdown(wait=True)


def _name_of(work: Callable[..., Any]) -> str:
    """Of the method that was submitted, or that the submitted function was made in."""
    qualified: str = getattr(work, "__qualname__", type(work).__qualname__)
    return qualified.split(".<locals>")[0].split(".")[-1]
