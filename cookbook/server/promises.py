"""The results of requests, which clients poll for."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cookbook.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    FileError,
    ModelError,
    RendererError,
    RequestError,
    describe,
)

logger = logging.getLogger(__name__)

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
_ERRORS_OF_USERS = (
    RequestError, ConfigError, CheckpointError, ModelError, RendererError, FileError, ClosedError,
)  # fmt: skip


class Refusal(Exception):
    """A request that is answered with an HTTP error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ResponseBody:
    """The body of a response."""

    content: bytes
    media_type: str = JSON

    @classmethod
    def of_json(cls, value: Any) -> ResponseBody:
        return cls(json.dumps(value, separators=(",", ":")).encode())


class Promise:
    """The result of one request: pending, complete or failed."""

    def __init__(self, kind: str, note_done: Callable[[], None]) -> None:
        """`note_done` is called once, when it is complete or has failed."""
        self.kind = kind
        self._note_done = note_done
        self.answer: ResponseBody | None = None
        self.error: BaseException | None = None
        self.retrieved_at: float | None = None
        """When a client first read the result."""
        self._done = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def complete(self, answer: ResponseBody) -> None:
        if not self.is_done:
            self._set(answer)

    def fail(self, error: BaseException, message: str | None = None) -> None:
        """Completes it with an error, as `message` says it or the error itself."""
        if self.is_done:
            return
        is_of_user = isinstance(error, _ERRORS_OF_USERS) or isinstance(error.__cause__, _ERRORS_OF_USERS)
        if not is_of_user:
            logger.warning("%s failed: %s", self.kind, describe(error))
        self.error = error
        body = {"error": message or describe(error), "category": "user" if is_of_user else "server"}
        self._set(ResponseBody.of_json(body))

    def _set(self, answer: ResponseBody) -> None:
        self.answer = answer
        self._done.set()
        self._note_done()

    async def wait(self, seconds: float) -> ResponseBody | None:
        """Returns the result, or None if it is still pending after so many seconds."""
        try:
            await asyncio.wait_for(self._done.wait(), seconds)
        except TimeoutError:
            return None
        if self.retrieved_at is None:
            self.retrieved_at = time.monotonic()
        return self.answer


class Promises:
    """The promises by their request ids. The ids follow from the requests, so a repeated one has the same.

    An id begins with that of the session, before a colon.
    """

    def __init__(self, result_seconds: float) -> None:
        self._result_seconds = result_seconds
        self._found: dict[str, Promise] = {}
        self._num_pending: Counter[str] = Counter()
        """How many of each session are not done."""

    def get(self, request_id: str) -> Promise | None:
        return self._found.get(request_id)

    def create(self, request_id: str, kind: str) -> Promise:
        session_id = request_id.partition(":")[0]
        self._num_pending[session_id] += 1
        promise = self._found[request_id] = Promise(kind, partial(self._note_done, session_id))
        return promise

    def _note_done(self, session_id: str) -> None:
        self._num_pending[session_id] -= 1
        if not self._num_pending[session_id]:
            del self._num_pending[session_id]

    def num_pending(self, session_id: str) -> int:
        return self._num_pending[session_id]

    def forget_read(self, now: float) -> None:
        """Removes the results that were read some time ago."""
        old = [
            name
            for name, promise in self._found.items()
            if promise.retrieved_at is not None and now - promise.retrieved_at > self._result_seconds
        ]
        for name in old:
            del self._found[name]

    def end(self, session_id: str, error: BaseException) -> None:
        """Fails a session's pending promises. They are forgotten as if they had been read."""
        for name, promise in self._found.items():
            if name.startswith(f"{session_id}:"):
                promise.fail(error)
                promise.retrieved_at = promise.retrieved_at or time.monotonic()
