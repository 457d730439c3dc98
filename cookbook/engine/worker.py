"""One thread per engine: what is submitted first runs first, and submitting returns at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from cookbook.engine.base_model import BaseModel
from cookbook.engine.options import EngineOptions

P = ParamSpec("P")
R = TypeVar("R")


class Engine:
    """A base model and the thread that everything on it runs on."""

    def __init__(self, model_name: str, options: EngineOptions | None = None) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._clean_ups: deque[Callable[[], None]] = deque()
        self.base: BaseModel = self.submit(BaseModel, model_name, options).result()

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        return self._thread.submit(self._run, lambda: work(*args, **kwargs))

    def clean_up_later(self, work: Callable[[], None]) -> None:
        """Runs `work` on the thread before the next job.

        Takes no lock: the garbage collector calls this, perhaps in the middle of `submit`.
        """
        self._clean_ups.append(work)

    def _run(self, work: Callable[[], R]) -> R:
        while self._clean_ups:
            self._clean_ups.popleft()()
        return work()

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        self._thread.shutdown(wait=True)
