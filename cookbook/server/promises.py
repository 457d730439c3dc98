"""The results of requests, which clients poll for."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
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

    def __init__(self, request_id: str, kind: str) -> None:
        self.request_id = request_id
        self.kind = kind
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
            self.answer = answer
            self._done.set()

    def fail(self, error: BaseException, message: str | None = None) -> None:
        """Completes it with an error, as `message` says it or the error itself."""
        if self.is_done:
            return
        is_of_user = isinstance(error, _ERRORS_OF_USERS) or isinstance(error.__cause__, _ERRORS_OF_USERS)
        if not is_of_user:
            logger.warning("%s failed: %s", self.kind, describe(error))
        self.error = error
        body = {"error": message or describe(error), "category": "user" if is_of_user else "server"}
        self.answer = ResponseBody.of_json(body)
        self._done.set()

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
    """The promises by their request ids. The ids follow from the requests, so a repeated one has the same."""

    def __init__(self, result_seconds: float) -> None:
        self._result_seconds = result_seconds
        self._found: dict[str, Promise] = {}

    def get(self, request_id: str) -> Promise | None:
        return self._found.get(request_id)

    def create(self, request_id: str, kind: str) -> Promise:
        promise = self._found[request_id] = Promise(request_id, kind)
        return promise

    def __len__(self) -> int:
        return len(self._found)

    def num_pending(self, prefix: str) -> int:
        return sum(not promise.is_done for name, promise in self._found.items() if name.startswith(prefix))

    def forget_read(self, now: float) -> None:
        """Removes the results that were read some time ago."""
        old = [
            name
            for name, promise in self._found.items()
            if promise.retrieved_at is not None and now - promise.retrieved_at > self._result_seconds
        ]
        for name in old:
            del self._found[name]

    def end(self, prefix: str, error: BaseException) -> None:
        """Fails the pending promises whose ids begin so. They are forgotten as if they had been read."""
        for name, promise in self._found.items():
            if name.startswith(prefix):
                promise.fail(error)
                promise.retrieved_at = promise.retrieved_at or time.monotonic()
