"""All that a server holds: the engine's service, sessions and promises. It is used on one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from cookbook import models
from cookbook.errors import ClosedError, RequestError, describe
from cookbook.server.options import ServerOptions
from cookbook.server.promises import Promise, Promises, Refusal, ResponseBody
from cookbook.server.sessions import ServedModel, ServerSession
from cookbook.server.store import CheckpointStore
from cookbook.server.tinker_requests import metadata_of

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from cookbook.clients.service import ServiceClient
    from cookbook.clients.training import TrainingClient
    from cookbook.types import LoraConfig

logger = logging.getLogger(__name__)

Dispatch = Callable[[Promise], Any]
Finish = Callable[[Any], Awaitable[ResponseBody]]

_SECONDS_FOR_MISSING = 120.0
"""How long later requests of a model wait for one that has not arrived."""
_CHECK_SECONDS = 1.0
_SECONDS_BETWEEN_EXPIRIES = 30.0
_MAX_SNAPSHOTS = 16
"""How many samplers of a session are in memory. More than a program uses at a time, such as while it trains
on samples of earlier weights."""


class ServerState:
    """The sessions on one service, and the results of their requests."""

    def __init__(self, service: ServiceClient, options: ServerOptions, store: CheckpointStore) -> None:
        self.service = service
        self.options = options
        self.store = store
        self.sessions: dict[str, ServerSession] = {}
        self.promises = Promises(options.result_seconds)
        self._looked_for_expired = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._locations = {models.canonical_name(name): name for name in options.models}

    # -- base models ------------------------------------------------------------------------

    def served_model(self, name: str) -> str:
        """Returns the name by which a base model is served. Raises RequestError for any other model."""
        if name in self.options.models:
            return name
        for canonical, served in self._locations.items():
            if name in (canonical, models.model_location(served)):
                return served
        raise RequestError(
            f"This server does not serve {name!r}. It serves: {', '.join(self.options.models)}. Start it "
            f"with model_name={name} for another one."
        )

    def create_client(
        self, run_id: str, base_model: str, lora: LoraConfig, user_metadata: Mapping[str, Any] | None
    ) -> TrainingClient:
        """Waits for the engine. Returns a client that saves its checkpoints in the folder of the run."""
        return self.service.create_training_client(
            base_model, lora, metadata_of(user_metadata), checkpoint_dir=self.store.folder_of(run_id)
        )

    # -- sessions ---------------------------------------------------------------------------

    def session(self, session_id: str) -> ServerSession:
        """Returns a live session. Raises Refusal for any other."""
        session = self.sessions.get(session_id)
        if session is None:
            raise Refusal(404, self.session_has_ended(session_id))
        session.note_seen()
        return session

    def session_has_ended(self, session_id: str) -> str:
        return (
            f"There is no session {session_id!r} on this server: it was finished, it sent no heartbeat for "
            f"{self.options.session_timeout_seconds:g} seconds, or the server was restarted. Create a new "
            f"ServiceClient; saved checkpoints are still there."
        )

    def model(self, model_id: str) -> tuple[ServerSession, ServedModel]:
        session = self.session(model_id.partition(":")[0])
        if model_id not in session.models:
            raise Refusal(404, f"There is no model {model_id!r} on this server.")
        return session, session.models[model_id]

    def check_room(self, is_counted: bool = False) -> None:
        """Raises RequestError if no more adapters may be in memory. It is called on any thread.

        `is_counted` says that the new one is among the session's models already.
        """
        num_adapters = sum(session.num_adapters for session in [*self.sessions.values()]) - is_counted
        if num_adapters >= self.options.max_adapters:
            raise RequestError(
                f"{num_adapters} models and samplers are in this server's memory, and max_adapters is "
                f"{self.options.max_adapters}. Close clients that are no longer used, or start the server "
                f"with a larger max_adapters."
            )

    async def end_session(self, session_id: str) -> None:
        """Fails what is pending, and frees the session's models and samplers."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        self.promises.end(session_id, ClosedError(self.session_has_ended(session_id)))
        for model in session.models.values():
            model.turns.close()
            if model.client is not None:
                await asyncio.to_thread(model.client.close)
                model.client = None
        for sampler in session.samplers.values():
            if sampler.client is not None:
                self._release(sampler.client)

    def make_room_for_sampler(self, session: ServerSession) -> None:
        """Frees the sampler of a session that was not used for the longest time, if it has many."""
        loaded = [one for one in session.samplers.values() if one.client is not None]
        idle = sorted((one for one in loaded if not one.num_pending), key=lambda one: one.last_used)
        for sampler in idle[: max(0, len(loaded) + 1 - _MAX_SNAPSHOTS)]:
            assert sampler.client is not None
            self._release(sampler.client)
            sampler.client = None

    def _release(self, loading: asyncio.Future[SamplingClient]) -> None:
        """Closes a sampling client, once it is loaded."""

        def close(loaded: asyncio.Future[SamplingClient]) -> None:
            if not loaded.cancelled() and loaded.exception() is None:
                self.start(asyncio.to_thread(loaded.result().close))

        loading.add_done_callback(close)

    # -- requests ---------------------------------------------------------------------------

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def promise(self, request_id: str, kind: str) -> Promise | None:
        """Returns a new promise, or None if this request has arrived before. Raises Refusal for too many."""
        known = self.promises.get(request_id)
        if known is not None:
            if known.kind != kind:
                raise Refusal(400, f"{request_id} was a {known.kind} request and is now a {kind} request.")
            return None
        session_id = request_id.partition(":")[0]
        if self.promises.num_pending(session_id) >= self.options.max_pending:
            raise Refusal(429, f"{self.options.max_pending} requests of session {session_id} are pending.")
        return self.promises.create(request_id, kind)

    def in_turn(self, model: ServedModel, seq_id: int, kind: str, dispatch: Dispatch, finish: Finish) -> str:
        """Runs a request of a model when its turn comes. Returns its request id.

        `dispatch` runs on a thread, and the next request's turn comes when it returns. `finish` makes the
        answer of what it returned, meanwhile.
        """
        request_id = f"{model.model_id}:{seq_id}"
        if seq_id < model.turns.next and self.promises.get(request_id) is None:
            return request_id  # it was answered, and the answer was read
        promise = self.promise(request_id, kind)
        if promise is not None:
            try:
                model.turns.put(seq_id, promise, lambda: self._take_turn(promise, dispatch, finish))
            except RequestError as error:
                promise.fail(error)
        return request_id

    async def _take_turn(self, promise: Promise, dispatch: Dispatch, finish: Finish) -> None:
        try:
            dispatched = await asyncio.to_thread(dispatch, promise)
        except Exception as error:
            self.fail(promise, error)
        else:
            self.start(self.finish(promise, finish(dispatched)))

    async def finish(self, promise: Promise, answer: Awaitable[ResponseBody]) -> None:
        """Completes a promise."""
        try:
            promise.complete(await answer)
        except Exception as error:
            self.fail(promise, error)

    def fail(self, promise: Promise, error: BaseException) -> None:
        """Fails a promise. The message does not show where the server's folder is."""
        promise.fail(error, self.without_folder(describe(error)))

    def without_folder(self, text: str) -> str:
        return text.replace(f"{self.store.folder}/", "").replace(str(self.store.folder), "its folder")

    # -- housekeeping -----------------------------------------------------------------------

    async def keep_house(self) -> None:
        """Ends sessions that are silent, and forgets results that were read."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                await self.check_once(time.monotonic())
            except Exception:
                logger.exception("The server continues after an error in its housekeeping.")

    async def check_once(self, now: float) -> None:
        self.promises.forget_read(now)
        if now - self._looked_for_expired > _SECONDS_BETWEEN_EXPIRIES:
            self._looked_for_expired = now
            await asyncio.to_thread(self.store.remove_expired)
        for session in list(self.sessions.values()):
            if now - session.last_seen > self.options.session_timeout_seconds:
                logger.info("Session %s has ended: it sent no heartbeat.", session.session_id)
                await self.end_session(session.session_id)
                continue
            for model in session.models.values():
                if model.turns.seconds_missing(now) > _SECONDS_FOR_MISSING:
                    model.turns.give_up()

    async def close(self) -> None:
        for session_id in list(self.sessions):
            await self.end_session(session_id)
        await asyncio.gather(*self._tasks, return_exceptions=True)
