"""One thread per engine: what is submitted first runs first, and submitting returns at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from cookbook.engine.base_model import BaseModel

P = ParamSpec("P")
R = TypeVar("R")


class Engine:
    """A base model and the thread that everything on it runs on."""

    def __init__(self, model_name: str, device: str = "auto", dtype: str = "auto") -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.base: BaseModel = self.submit(BaseModel, model_name, device, dtype).result()

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        return self._thread.submit(work, *args, **kwargs)

    def submit_if_open(self, work: Callable[[], object]) -> None:
        """For cleaning up: a closed engine has nothing left to clean."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(work)

    def close(self) -> None:
        """Runs what is queued, then ends the thread."""
        self._thread.shutdown(wait=True)
