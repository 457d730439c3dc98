"""The endpoints with which the SDK's RestClient lists, describes and removes what is on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cookbook.clients.futures import APIFuture
from cookbook.errors import CheckpointError, CookbookError
from cookbook.server.bodies import object_in, read_body
from cookbook.server.downloads import DOWNLOADS, Signatures
from cookbook.server.promises import Refusal
from cookbook.server.state import ServerState
from cookbook.types import ExternalWeightsUrlsResponse
from cookbook.types.values import Value

_T = TypeVar("_T")
_RUN = "/api/v1/training_runs/{run_id}"
_MAX_COPIES = 1000
_CHECKPOINT = _RUN + "/checkpoints/{kind}/{name}"


class RestApi:
    """The handlers of the RestClient's requests."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._rest = state.store.rest
        self._signatures = Signatures()
        self._copies: dict[str, asyncio.Task[str]] = {}
        """The copies by the keys of their requests, which the SDK repeats if an answer was lost."""

    def routes(self) -> list[Route]:
        return [
            Route("/api/v1/training_runs", self.list_runs, methods=["GET"]),
            Route(_RUN, self.get_run, methods=["GET"]),
            Route(_RUN + "/checkpoints", self.list_checkpoints, methods=["GET"]),
            Route(_CHECKPOINT, self.delete_checkpoint, methods=["DELETE"]),
            Route(_CHECKPOINT + "/ttl", self.set_ttl, methods=["PUT"]),
            Route(_CHECKPOINT + "/external_weights_urls", self.external_weights_urls, methods=["GET"]),
            Route(DOWNLOADS + "{run_id}/{kind}/{name}/{file:path}", self.download, methods=["GET"]),
            Route("/api/v1/checkpoints", self.list_all_checkpoints, methods=["GET"]),
            Route("/api/v1/copy_weights", self.copy_weights, methods=["POST"]),
            Route("/api/v1/weights_info", self.weights_info, methods=["POST"]),
            Route("/api/v1/sessions", self.list_sessions, methods=["GET"]),
            Route("/api/v1/sessions/{session_id}", self.get_session, methods=["GET"]),
        ]

    async def list_runs(self, request: Request) -> Response:
        limit, offset = _page(request, 20)
        project_id = request.query_params.get("project_id")
        return await self._found(lambda: self._rest.list_training_runs(limit, offset, project_id=project_id))

    async def get_run(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]
        return await self._found(lambda: self._rest.get_training_run(run_id))

    async def list_checkpoints(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]
        return await self._found(lambda: self._rest.list_checkpoints(run_id))

    async def list_all_checkpoints(self, request: Request) -> Response:
        limit, offset = _page(request, 100)
        return await self._found(lambda: self._rest.list_user_checkpoints(limit, offset))

    async def delete_checkpoint(self, request: Request) -> Response:
        run_id, checkpoint_id = _checkpoint(request)
        return await self._found(lambda: self._rest.delete_checkpoint(run_id, checkpoint_id))

    async def set_ttl(self, request: Request) -> Response:
        run_id, checkpoint_id = _checkpoint(request)
        body = await self._body(request)
        path, seconds = f"tinker://{run_id}/{checkpoint_id}", body.get("ttl_seconds")
        return await self._found(lambda: self._rest.set_checkpoint_ttl_from_tinker_path(path, seconds))

    async def copy_weights(self, request: Request) -> Response:
        body, key = await self._body(request), request.headers.get("x-idempotency-key")
        token = request.headers.get("x-tinker-weights-access-token") or body.pop("weights_access_token", None)
        source, project_id = str(body.pop("source_path", "")), body.pop("destination_project_id", None)
        ttl_seconds = body.pop("ttl_seconds", None)
        if body:
            raise Refusal(422, f"copy_weights does not support {', '.join(body)}. Name a project instead.")
        if project_id is not None and not isinstance(project_id, str):
            raise Refusal(422, "destination_project_id must be a text.")

        def copied() -> APIFuture[str]:
            return self._rest.copy_weights(
                source, project_id, ttl_seconds=ttl_seconds, weights_access_token=token
            )

        if key is None:
            return JSONResponse({"tinker_path": await self._result(copied)})
        if key not in self._copies:
            self._copies[key] = asyncio.create_task(self._result(copied))
            for old in [*self._copies][:-_MAX_COPIES]:
                del self._copies[old]
        return JSONResponse({"tinker_path": await asyncio.shield(self._copies[key])})

    async def external_weights_urls(self, request: Request) -> Response:
        """Answers with a signed URL of this server for each file of a checkpoint."""
        checkpoint = "/".join(_checkpoint(request))
        found = await self._result(lambda: self._rest.get_external_weights_urls(f"tinker://{checkpoint}"))
        urls = {}
        for file in found.urls:
            url = request.url.replace(path=DOWNLOADS + quote(f"{checkpoint}/{file}", safe="/:"))
            urls[file] = str(url.replace(query=self._signatures.query(f"{checkpoint}/{file}", found.expires)))
        answer = ExternalWeightsUrlsResponse(urls=urls, expires=found.expires)
        return JSONResponse(answer.model_dump(mode="json"))

    async def download(self, request: Request) -> Response:
        checkpoint, file = "/".join(_checkpoint(request)), request.path_params["file"]
        asked = request.query_params
        self._signatures.check(f"{checkpoint}/{file}", asked.get("expires", ""), asked.get("signature", ""))
        found = await self._result(lambda: self._rest.get_external_weights_urls(f"tinker://{checkpoint}"))
        if file not in found.urls:
            raise Refusal(404, f"The checkpoint has no file {file!r}.")
        return FileResponse(url2pathname(urlsplit(found.urls[file]).path))

    async def weights_info(self, request: Request) -> Response:
        path = str((await self._body(request)).get("tinker_path"))
        return await self._found(lambda: self._rest.get_weights_info_by_tinker_path(path))

    async def list_sessions(self, request: Request) -> Response:
        limit, offset = _page(request, 20)
        return JSONResponse({"sessions": [*self._state.sessions][offset : offset + limit]})

    async def get_session(self, request: Request) -> Response:
        session = self._state.session(request.path_params["session_id"])
        return JSONResponse(
            {
                "training_run_ids": [*session.models],
                "sampler_ids": [*session.samplers],
                "user_metadata": session.user_metadata,
                "display_name": session.display_name,
            }
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        content = await read_body(request, self._state.options.max_request_mib)
        return object_in(content, 422)

    async def _found(self, call: Callable[[], APIFuture[Any]]) -> Response:
        """Returns what a call of the client in process finds, as JSON."""
        found = await self._result(call)
        return (
            JSONResponse(found.model_dump(mode="json"))
            if isinstance(found, Value)
            else Response(status_code=204)
        )

    async def _result(self, call: Callable[[], APIFuture[_T]]) -> _T:
        """Returns what a call of the client in process finds. What does not exist is answered with 404."""
        try:
            return await asyncio.to_thread(lambda: call().result())
        except CookbookError as error:
            status = 404 if isinstance(error, CheckpointError) else 422
            raise Refusal(status, self._state.without_folder(str(error))) from error


def _page(request: Request, default: int) -> tuple[int, int]:
    """Returns the largest number of entries and the first one."""
    try:
        limit = int(request.query_params.get("limit", default))
        offset = int(request.query_params.get("offset", 0))
    except ValueError as error:
        raise Refusal(422, f"limit and offset must be whole numbers: {error}.") from error
    return max(0, min(limit, 1000)), max(0, offset)


def _checkpoint(request: Request) -> tuple[str, str]:
    found = request.path_params
    return found["run_id"], f"{found['kind']}/{found['name']}"
