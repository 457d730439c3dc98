"""The endpoints of the Tinker protocol, as the SDK's clients use them.

A request that takes time is answered with its id, and the client polls for the result. The ids follow from
the ids that the client gives (`seq_id`), so a request that is sent again is run once. JSON bodies are checked
against the SDK's own request classes, which refuse unknown fields; what this server does not do is refused by
its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pydantic
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types as wire_types

from cookbook import models
from cookbook.clients.futures import APIFuture
from cookbook.clients.recorded import RECORDED
from cookbook.engine import checkpoint
from cookbook.errors import CookbookError, RequestError
from cookbook.server import tinker_requests, wire
from cookbook.server.bodies import object_in, read_body
from cookbook.server.promises import PROTOBUF, Promise, Refusal, ResponseBody
from cookbook.server.sessions import ServedModel, ServedSampler, ServerSession, Turns
from cookbook.server.state import Finish, ServerState
from cookbook.server.tinker_requests import TESTED_SDK, check_sdk, minor, tested
from cookbook.types import LossFnType, check_optimizer

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from cookbook.clients.training import TrainingClient

_MAX_SAMPLES = 4096

Body = TypeVar("Body", bound=pydantic.BaseModel)


class TinkerApi:
    """The handlers of the protocol's requests."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "client/config": self.client_config,
            "client/dynamic_config": self.dynamic_config,
            "create_session": self.create_session,
            "session_heartbeat": self.session_heartbeat,
            "sessions/{session_id}/finish": self.finish_session,
            "telemetry": self.telemetry,
            "create_model": self.create_model,
            "load_weights": self.load_weights,
            "get_info": self.get_info,
            "forward_backward": self.forward_backward,
            "optim_step": self.optim_step,
            "save_weights": self.save_weights,
            "save_weights_for_sampler": self.save_weights_for_sampler,
            "save_weights_external": self.save_weights_external,
            "create_sampling_session": self.create_sampling_session,
            "asample": self.asample,
            "retrieve_future": self.retrieve_future,
        }
        gets = {
            "healthz": self.health,
            "get_server_capabilities": self.get_server_capabilities,
            "samplers/{sampler_id}": self.get_sampler,
        }
        return [
            *(Route(f"/api/v1/{path}", handler, methods=["POST"]) for path, handler in posts.items()),
            *(Route(f"/api/v1/{path}", handler, methods=["GET"]) for path, handler in gets.items()),
        ]

    # -- connecting -------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def client_config(self, request: Request) -> Response:
        check_sdk((await self._parse(request, wire_types.ClientConfigRequest)).sdk_version)
        return JSONResponse(
            {
                "pjwt_auth_enabled": False,
                "parallel_fwdbwd_chunks": False,
                "proto_compress_fwdbwd": False,
                "use_pyqwest_transport": False,
                "custom_loss_server_side": False,
                "sample_use_retrieve_futures": False,
                "sample_join_sampling_session": False,
            }
        )

    async def dynamic_config(self, request: Request) -> Response:
        check_sdk((await self._parse(request, wire_types.ClientConfigRequest)).sdk_version)
        return JSONResponse({"sample_cancel_enabled": False})

    async def create_session(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.CreateSessionRequest)
        check_sdk(body.sdk_version)
        session = ServerSession(body.sdk_version, body.user_metadata or {}, body.project_id)
        session.display_name = body.display_name
        self._state.sessions[session.session_id] = session
        answer = {"session_id": session.session_id, "info_message": f"This server was {tested()}."}
        if minor(body.sdk_version) != minor(TESTED_SDK):
            answer["warning_message"] = f"This server was {tested()}, and this is {body.sdk_version}."
        return JSONResponse(answer)

    async def session_heartbeat(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.SessionHeartbeatRequest)
        session = self._state.sessions.get(body.session_id)
        if session is None:
            raise Refusal(410, self._state.session_has_ended(body.session_id))
        session.note_seen()
        return JSONResponse({})

    async def finish_session(self, request: Request) -> Response:
        await self._read(request)
        await self._state.end_session(request.path_params["session_id"])
        return Response(status_code=204)

    async def telemetry(self, request: Request) -> Response:
        await self._read(request)  # nothing of it is kept
        return JSONResponse({"status": "accepted"})

    async def get_server_capabilities(self, request: Request) -> Response:
        found = [
            {
                "model_name": name,
                "max_context_length": await asyncio.to_thread(models.context_length, name),
                "trainable": True,
                "sampleable": True,
            }
            for name in self._state.options.models
        ]
        return JSONResponse({"supported_models": found})

    # -- models in training -----------------------------------------------------------------

    async def create_model(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.CreateModelRequest)
        session = self._state.session(body.session_id)
        return self._create(
            session, body.model_seq_id, "create_model", partial(self._new_model, session, body)
        )

    def _create(
        self,
        session: ServerSession,
        model_seq_id: int,
        kind: str,
        create: Callable[[str], TrainingClient],
    ) -> Response:
        """Starts to create a model, as the first of its requests."""
        model_id = f"{session.session_id}:train:{model_seq_id}"
        if (model := session.models.get(model_id)) is None:
            model = session.models[model_id] = ServedModel(model_id, Turns())

        def dispatch(promise: Promise) -> None:
            try:
                self._state.check_room(is_counted=True)
                model.client = create(model_id)
            except Exception as error:
                model.failure = error
                raise

        return self._in_turn(model, 0, kind, dispatch, _json(lambda _: {"model_id": model_id, "type": kind}))

    def _new_model(
        self, session: ServerSession, body: wire_types.CreateModelRequest, model_id: str
    ) -> TrainingClient:
        check_optimizer(body.optimizer_config)
        base_model = self._state.served_model(body.base_model)
        metadata = session.metadata_of_run(body.user_metadata)
        return self._state.create_client(
            model_id, base_model, tinker_requests.lora_of(body.lora_config), metadata
        )

    async def load_weights(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.LoadWeightsRequest)
        if body.session_id is not None and body.model_seq_id is not None and body.model_id is None:
            session = self._state.session(body.session_id)
            return self._create(
                session, body.model_seq_id, "load_weights", partial(self._loaded, session, body)
            )
        model, seq_id = self._model(body.model_id, body.seq_id)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            self._check_loading(body)
            model.passes.clear()
            client, path = model.open_client(), self._state.store.path_of(body.path)
            return client.load_state_with_optimizer(path) if body.optimizer else client.load_state(path)

        answer = {"path": body.path, "model_id": model.model_id, "type": "load_weights"}
        return self._in_turn(model, seq_id, "load_weights", dispatch, _json(lambda _: answer))

    def _loaded(
        self, session: ServerSession, body: wire_types.LoadWeightsRequest, model_id: str
    ) -> TrainingClient:
        """Returns a new client with the weights of a checkpoint."""
        self._check_loading(body)
        path = self._state.store.path_of(body.path)
        info = checkpoint.read_info(path)
        base_model = self._state.served_model(body.base_model or info.base_model)
        metadata = session.metadata_of_run(body.user_metadata or info.user_metadata)
        client = self._state.create_client(model_id, base_model, info.lora, metadata)
        load = client.load_state_with_optimizer if body.optimizer else client.load_state
        load(path).result()
        return client

    def _check_loading(self, body: wire_types.LoadWeightsRequest) -> None:
        check_optimizer(body.optimizer_config)
        if body.weights_access_token is not None:
            raise RequestError("weights_access_token is not supported: this server has one owner. Omit it.")

    async def get_info(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.GetInfoRequest)
        _, model = self._state.model(body.model_id)
        info = await asyncio.to_thread(model.open_client().get_info)
        base_model = self._state.served_model(info.model_name)
        return JSONResponse(
            {
                "type": "get_info",
                "model_id": model.model_id,
                "model_name": base_model,
                "model_data": {
                    "arch": info.model_data.arch,
                    "model_name": base_model,
                    "tokenizer_id": models.model_location(base_model),
                },
                "optimizer_config": {"type": "adamw"},
                "is_lora": True,
                "lora_rank": info.lora_rank,
            }
        )

    # -- steps ------------------------------------------------------------------------------

    async def forward_backward(self, request: Request) -> Response:
        if request.headers.get("content-type") != PROTOBUF:
            raise Refusal(
                415, f"forward_backward takes {PROTOBUF}, as tinker {TESTED_SDK} sends it. Update the SDK."
            )
        content = await self._read(request)
        try:
            message = await asyncio.to_thread(wire.parse_forward_backward, content)
        except RequestError as error:
            raise Refusal(400, str(error)) from error
        model, seq_id = self._model(message.model_id, message.seq_id or None)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            client = model.open_client()
            if not message.forward_only:
                model.passes.append(promise)
            data, config = wire.data_of(message), wire.loss_config(message)
            run = client.forward if message.forward_only else client.forward_backward
            return run(data, cast(LossFnType, message.loss_fn), config)  # an unknown loss is refused there

        kind = "forward" if message.forward_only else "forward_backward"
        return self._in_turn(model, seq_id, kind, dispatch, _proto(wire.forward_backward_output))

    async def optim_step(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.OptimStepRequest)
        model, seq_id = self._model(body.model_id, body.seq_id)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            client, passes = model.open_client(), list(model.passes)
            model.passes.clear()
            for one in passes:
                # The SDK may poll for the failure before the program, which has sent this step, sees it.
                if one.error is not None:
                    client.note_failed_pass(one.error)
            return client.optim_step(tinker_requests.adam_params(body.optim_params))

        finish = _json(lambda result: {"metrics": result.metrics})
        return self._in_turn(model, seq_id, "optim_step", dispatch, finish)

    # -- checkpoints ------------------------------------------------------------------------

    async def save_weights(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.SaveWeightsRequest)
        model, seq_id = self._model(body.model_id, body.seq_id)
        with self._refusing(model, seq_id):
            name = _name(body.path)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            self._state.store.place_of(model.model_id, "training", name)
            return model.open_client().save_state(
                name, body.ttl_seconds, body.overwrite, tinker_requests.metadata_of(body.user_metadata)
            )

        path = self._state.store.tinker_path(model.model_id, "training", name)
        finish = _json(lambda _: {"path": path, "type": "save_weights"})
        return self._in_turn(model, seq_id, "save_weights", dispatch, finish)

    async def save_weights_for_sampler(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.SaveWeightsForSamplerRequest)
        session, _ = self._state.model(body.model_id)
        model, seq_id = self._model(body.model_id, body.seq_id)
        if body.path is None:
            with self._refusing(model, seq_id):
                return self._snapshot(session, model, seq_id, body)
        name = _name(body.path)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            self._state.store.place_of(model.model_id, "sampler", name)
            metadata = tinker_requests.metadata_of(body.user_metadata)
            return model.open_client().save_weights_for_sampler(name, body.ttl_seconds, metadata)

        path = self._state.store.tinker_path(model.model_id, "sampler", name)
        finish = _json(lambda _: {"path": path, "type": "save_weights_for_sampler"})
        return self._in_turn(model, seq_id, "save_weights_for_sampler", dispatch, finish)

    async def save_weights_external(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.SaveWeightsExternalRequest)
        model, seq_id = self._model(body.model_id, body.seq_id)

        def dispatch(promise: Promise) -> APIFuture[Any]:
            self._state.store.place_of(model.model_id, "external", body.path)
            recipients = body.age_encryption_recipients
            return model.open_client().save_weights_external(body.path, body.ttl_seconds, recipients)

        path = self._state.store.tinker_path(model.model_id, "external", body.path)
        finish = _json(lambda _: {"path": path, "type": "save_weights_external"})
        return self._in_turn(model, seq_id, "save_weights_external", dispatch, finish)

    def _snapshot(
        self,
        session: ServerSession,
        model: ServedModel,
        seq_id: int,
        body: wire_types.SaveWeightsForSamplerRequest,
    ) -> Response:
        """Makes a sampler of the model's weights, which is not saved."""
        if body.sampling_session_seq_id is None:
            raise Refusal(422, "save_weights_for_sampler needs a path or a sampling_session_seq_id.")
        for field in ("ttl_seconds", "user_metadata"):
            if getattr(body, field) is not None:
                raise Refusal(422, f"{field} needs a path: a snapshot is kept until its session ends.")
        sampler_id = f"{session.session_id}:sample:{body.sampling_session_seq_id}"

        def dispatch(promise: Promise) -> SamplingClient:
            self._state.check_room()
            return model.open_client().save_weights_and_get_sampling_client(kind=body.kind)

        async def finish(client: SamplingClient) -> ResponseBody:
            loaded: asyncio.Future[SamplingClient] = asyncio.get_running_loop().create_future()
            loaded.set_result(client)
            base_model = self._state.served_model(model.open_client().get_info().model_name)
            self._state.make_room_for_sampler(session)
            session.samplers[sampler_id] = ServedSampler(sampler_id, base_model, None, loaded)
            return ResponseBody.of_json(
                {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
            )

        return self._in_turn(model, seq_id, "save_weights_for_sampler", dispatch, finish)

    # -- sampling ---------------------------------------------------------------------------

    async def create_sampling_session(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.CreateSamplingSessionRequest)
        session = self._state.session(body.session_id)
        sampler_id = f"{session.session_id}:sample:{body.sampling_session_seq_id}"
        if sampler_id not in session.samplers:
            try:
                base_model, path = await asyncio.to_thread(self._weights_of, body)
            except CookbookError as error:
                raise Refusal(404, self._state.without_folder(str(error))) from error
            if sampler_id not in session.samplers:  # the request may have been sent again meanwhile
                self._state.make_room_for_sampler(session)
                load = partial(self._state.service.create_sampling_client, path, base_model)
                sampler = ServedSampler(sampler_id, base_model, body.model_path, None, load)
                session.samplers[sampler_id] = sampler
                sampler.loading()
        return JSONResponse({"sampling_session_id": sampler_id, "type": "create_sampling_session"})

    def _weights_of(self, body: wire_types.CreateSamplingSessionRequest) -> tuple[str, Path | None]:
        """Returns the base model and the folder of the weights to sample with, which are loaded later."""
        if body.model_path is None:
            if body.base_model is None:
                raise RequestError("Give model_path (a saved checkpoint) or base_model (a model's name).")
            return self._state.served_model(body.base_model), None
        self._state.check_room()
        path = self._state.store.path_of(body.model_path)
        return self._state.served_model(checkpoint.read_info(path).base_model), path

    async def asample(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.SampleRequest)
        if body.sampling_session_id is None or body.seq_id is None:
            raise Refusal(422, "asample needs sampling_session_id and seq_id; base_model is not read here.")
        session = self._state.session(body.sampling_session_id.partition(":")[0])
        if (sampler := session.samplers.get(body.sampling_session_id)) is None:
            raise Refusal(404, f"There is no sampling session {body.sampling_session_id!r} on this server.")
        request_id = f"{sampler.sampler_id}:{body.seq_id}"
        ids = [f"{request_id}:{number}" for number in range(min(body.num_samples, _MAX_SAMPLES))]
        if len(ids) < body.num_samples:
            raise Refusal(422, f"Invalid num_samples={body.num_samples}: must be at most {_MAX_SAMPLES}.")
        promise = self._state.promise(request_id, "sample")
        if promise is not None:
            self._state.start(self._state.finish(promise, self._sample(sampler, body, ids)))
        return JSONResponse({"request_id": request_id, "sample_sequence_ids": ids})

    async def _sample(
        self, sampler: ServedSampler, body: wire_types.SampleRequest, ids: Sequence[str]
    ) -> ResponseBody:
        sampler.num_pending += 1
        try:
            client = await asyncio.shield(sampler.loading())
            arguments = tinker_requests.sample_arguments(body)
            response = await (await asyncio.to_thread(partial(client.sample, **arguments)))
        finally:
            sampler.num_pending -= 1
        named = [
            replace(sequence, sequence_id=name)
            for name, sequence in zip(ids, response.sequences, strict=True)
        ]
        if body.record_stability_info:
            RECORDED.add(named)
        content = await asyncio.to_thread(wire.sample_response, replace(response, sequences=named))
        return ResponseBody(content, PROTOBUF)

    async def get_sampler(self, request: Request) -> Response:
        sampler_id = request.path_params["sampler_id"]
        sampler = self._state.session(sampler_id.partition(":")[0]).samplers.get(sampler_id)
        if sampler is None:
            raise Refusal(404, f"There is no sampling session {sampler_id!r} on this server.")
        location = models.model_location(sampler.base_model)  # the SDK loads the tokenizer by this name
        found = {"sampler_id": sampler_id, "base_model": location, "model_path": sampler.model_path}
        return JSONResponse(found)

    # -- results ----------------------------------------------------------------------------

    async def retrieve_future(self, request: Request) -> Response:
        body = await self._parse(request, wire_types.FutureRetrieveRequest)
        session_id = body.request_id.partition(":")[0]
        if (session := self._state.sessions.get(session_id)) is not None:
            session.note_seen()
        promise = self._state.promises.get(body.request_id)
        if promise is None:
            if session is not None:
                raise Refusal(410, f"The result of {body.request_id} was read, and is no longer kept.")
            ended = {"error": self._state.session_has_ended(session_id), "category": "user"}
            return JSONResponse(ended)
        answer = await promise.wait(self._state.options.poll_seconds)
        if answer is None:
            return JSONResponse({"type": "try_again", "queue_state": "active"}, status_code=408)
        return Response(answer.content, media_type=answer.media_type)

    # -- parts of handlers ------------------------------------------------------------------

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self._state.options.max_request_mib)

    async def _parse(self, request: Request, kind: type[Body]) -> Body:
        content = await self._read(request)
        try:
            return kind.model_validate_json(content)
        except pydantic.ValidationError as error:
            given = object_in(content, 422)
            self._pass_over(given.get("model_id"), given.get("seq_id"))
            raise Refusal(422, tinker_requests.problems(kind, error)) from error

    def _pass_over(self, model_id: Any, seq_id: Any) -> None:
        """Lets the later requests of a model run, of which this one is refused."""
        session = self._state.sessions.get(str(model_id).partition(":")[0])
        model = None if session is None else session.models.get(str(model_id))
        if model is not None and type(seq_id) is int and seq_id >= model.turns.next:
            self._state.in_turn(model, seq_id, "refused", lambda _: None, _json(lambda _: {}))

    @contextmanager
    def _refusing(self, model: ServedModel, seq_id: int) -> Iterator[None]:
        try:
            yield
        except Refusal:
            self._pass_over(model.model_id, seq_id)
            raise

    def _model(self, model_id: str | None, seq_id: int | None) -> tuple[ServedModel, int]:
        if model_id is None or seq_id is None or seq_id < 1:
            raise Refusal(422, "The request needs a model_id, and a seq_id from 1 on.")
        return self._state.model(model_id)[1], seq_id

    def _in_turn(
        self,
        model: ServedModel,
        seq_id: int,
        kind: str,
        dispatch: Callable[[Promise], Any],
        finish: Finish,
    ) -> Response:
        request_id = self._state.in_turn(model, seq_id, kind, dispatch, finish)
        return JSONResponse({"request_id": request_id, "model_id": model.model_id})


def _json(of: Callable[[Any], dict[str, Any]]) -> Finish:
    """Returns what makes a JSON answer of the result of a client's call."""

    async def finish(dispatched: APIFuture[Any] | None) -> ResponseBody:
        return ResponseBody.of_json(of(None if dispatched is None else await dispatched))

    return finish


def _proto(of: Callable[[Any], bytes]) -> Finish:
    """Returns what makes a protobuf answer of the result of a client's call."""

    async def finish(dispatched: APIFuture[Any]) -> ResponseBody:
        return ResponseBody(await asyncio.to_thread(of, await dispatched), PROTOBUF)

    return finish


def _name(path: str | None) -> str:
    if path is None:
        raise Refusal(422, "The request has no path: give the checkpoint a name.")
    return path
