"""What a client has on the server: a session with models in training and samplers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook.errors import ClosedError, RequestError
from cookbook.server.promises import Promise

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from cookbook.clients.training import TrainingClient

_FARTHEST = 10_000
"""How far ahead of the next request of a model one may arrive."""


Work = Callable[[], Awaitable[None]]


class Turns:
    """Runs what is put here in the order of the numbers 0, 1, 2, ..., whatever order it arrives in."""

    def __init__(self) -> None:
        self.next = 0
        self._waiting: dict[int, tuple[Promise, Work]] = {}
        self._changed = asyncio.Event()
        self._missing_since = time.monotonic()
        """When the first of those that wait arrived, or the one before them had run."""
        self._task = asyncio.create_task(self._run())

    def put(self, number: int, promise: Promise, work: Work) -> None:
        """Raises RequestError for a number that is past or far ahead."""
        if not self.next <= number < self.next + _FARTHEST:
            raise RequestError(f"seq_id {number} is not one of the {_FARTHEST:,} from {self.next}.")
        if not self._waiting:
            self._missing_since = time.monotonic()
        self._waiting[number] = promise, work
        self._changed.set()

    def seconds_missing(self, now: float) -> float:
        """Returns for how long later ones have waited for the next one, which has not arrived."""
        is_missing = bool(self._waiting) and self.next not in self._waiting
        return now - self._missing_since if is_missing else 0.0

    def give_up(self) -> None:
        """Fails all that wait for one that did not arrive."""
        error = RequestError(f"Request {self.next} of this model did not arrive, and the later ones need it.")
        waiting, self._waiting = self._waiting, {}
        self.next = max(waiting) + 1
        for promise, _ in waiting.values():
            promise.fail(error)

    def close(self) -> None:
        self._task.cancel()
        self._waiting.clear()

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (found := self._waiting.pop(self.next, None)) is not None:
                self.next += 1
                await found[1]()
                self._missing_since = time.monotonic()


@dataclass
class ServedModel:
    """A model in training. Its requests are run in the order of their sequence ids."""

    model_id: str
    turns: Turns
    client: TrainingClient | None = None
    """None until it is created, and if that failed."""
    failure: BaseException | None = None
    """Why it was not created."""
    passes: list[Promise] = field(default_factory=list)
    """The passes since the last step."""

    def open_client(self) -> TrainingClient:
        if self.client is None:
            raise ClosedError(f"Model {self.model_id} was not created: {self.failure or 'it has ended'}")
        return self.client


@dataclass
class ServedSampler:
    """A sampling session: a snapshot of a model in training, a checkpoint, or a base model."""

    sampler_id: str
    base_model: str
    model_path: str | None
    client: asyncio.Future[SamplingClient] | None
    """It may still be loading. None if it was freed because others were used after it."""
    load: Callable[[], SamplingClient] | None = None
    """Loads it again. None for a snapshot, which is not saved."""
    num_pending: int = 0
    last_used: float = field(default_factory=time.monotonic)

    def loading(self) -> asyncio.Future[SamplingClient]:
        """Returns the client, which may be loading. Raises RequestError for a snapshot that was freed."""
        self.last_used = time.monotonic()
        if self.client is None and self.load is None:
            raise RequestError(
                f"The snapshot {self.sampler_id} was freed, because many newer ones were used after it. Keep "
                f"weights with save_weights_for_sampler, and sample from their path."
            )
        if self.client is None:
            assert self.load is not None
            self.client = asyncio.create_task(asyncio.to_thread(self.load))
        return self.client


class ServerSession:
    """The models and samplers of one client. They are freed when it ends."""

    def __init__(self, sdk_version: str, user_metadata: Mapping[str, Any], project_id: str | None) -> None:
        self.session_id = secrets.token_hex(8)
        self.sdk_version = sdk_version
        self.user_metadata = dict(user_metadata)
        self.project_id = project_id
        self.display_name: str | None = None
        self.models: dict[str, ServedModel] = {}
        self.samplers: dict[str, ServedSampler] = {}
        self.last_seen = time.monotonic()

    def note_seen(self) -> None:
        self.last_seen = time.monotonic()

    def metadata_of_run(self, user_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns what is recorded of a run of this session, as a ServiceClient in process records it."""
        of_session = {"project_id": self.project_id, "display_name": self.display_name}
        named = {name: value for name, value in of_session.items() if value is not None}
        return {**self.user_metadata, **named, **(user_metadata or {})}

    @property
    def num_adapters(self) -> int:
        """How many adapters are in memory. A sampler of a base model has none. It is read on any thread."""
        models = sum(one.failure is None for one in [*self.models.values()])
        samplers = [
            one for one in [*self.samplers.values()] if one.load is None or one.model_path is not None
        ]
        return models + sum(one.client is not None for one in samplers)
