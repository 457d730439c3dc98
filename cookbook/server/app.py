"""The web application: who may send a request, and how errors are answered."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cookbook.errors import CookbookError, describe
from cookbook.server.downloads import DOWNLOADS
from cookbook.server.openai_api import OpenAiApi
from cookbook.server.options import ServerOptions
from cookbook.server.promises import Refusal
from cookbook.server.rest_api import RestApi
from cookbook.server.state import ServerState
from cookbook.server.store import CheckpointStore
from cookbook.server.tinker_api import TinkerApi
from cookbook.utils.network import refusal_of_page

if TYPE_CHECKING:
    from cookbook.clients.service import ServiceClient

logger = logging.getLogger(__name__)

_NUM_THREADS = 64
"""Threads that check requests, read results and wait for the engine while it creates a client."""


def make_app(service: ServiceClient, options: ServerOptions, store: CheckpointStore) -> Starlette:
    """Returns the application. The caller closes the service and the store after it has ended."""
    state = ServerState(service, options, store)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="server")
        asyncio.get_running_loop().set_default_executor(threads)
        house = asyncio.create_task(state.keep_house())
        yield
        house.cancel()
        await state.close()

    return Starlette(
        routes=[*TinkerApi(state).routes(), *RestApi(state).routes(), *OpenAiApi(state).routes()],
        lifespan=lifespan,
        middleware=[Middleware(Guard, options=options)],
        exception_handlers={
            Refusal: _refused,
            CookbookError: _refused,
            HTTPException: _refused,
            Exception: _failed,
        },
    )


class Guard:
    """Refuses requests without the API key, and those that a web page makes a browser send.

    The latter are refused where there is no key: then the server listens on loopback.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._key = options.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_signed = self._key is not None and scope["path"].startswith(DOWNLOADS)
        problem = None if is_signed else self._problem(Headers(scope=scope))
        if problem is None:
            await self._app(scope, receive, send)
        else:
            status, message = problem
            await error_response(status, message)(scope, receive, send)

    def _problem(self, headers: Headers) -> tuple[int, str] | None:
        if self._key is not None:
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            given = headers.get("x-api-key") or bearer
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                return 401, "The API key is missing or not that of this server."
            return None
        refusal = refusal_of_page(headers.get("host", ""), headers.get("origin"))
        return None if refusal is None else (403, refusal)


def error_response(status: int, message: str) -> Response:
    """Returns an error as the SDK and OpenAI's client read it."""
    message = message.encode("utf-8", "backslashreplace").decode()  # a request may have half a character
    error = {"message": message, "type": "invalid_request_error" if status < 500 else "server_error"}
    return JSONResponse({"detail": message, "error": error}, status_code=status)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        return error_response(error.status, str(error))
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}"
        message = (
            f"This server has no {what}." if error.status_code in (404, 405) else f"{what}: {error.detail}."
        )
        # The SDK sends 409 and 5xx again for minutes, and never a 404.
        return error_response(error.status_code, message)
    return error_response(400, describe(error))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed: %s", request.method, request.url.path, describe(error), exc_info=error)
    return error_response(500, f"The server failed: {type(error).__name__}.")
