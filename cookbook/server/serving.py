"""Starts a server, and runs it until it is stopped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import uvicorn

from cookbook.clients.service import ServiceClient
from cookbook.engine.options import EngineOptions
from cookbook.server.app import make_app
from cookbook.server.options import ServerOptions
from cookbook.server.store import CheckpointStore
from cookbook.server.tinker_requests import tested
from cookbook.utils.control_characters import visible_line
from cookbook.utils.network import check_can_listen

_SECONDS_TO_FINISH = 5


async def serve(options: ServerOptions, device: str = "auto", dtype: str = "auto") -> None:
    """Loads the first model, listens, and returns when the process is told to stop."""
    check_can_listen(options.host, options.port)
    with (
        closing(CheckpointStore(options.folder)) as store,
        closing(ServiceClient(options=EngineOptions(device, dtype, pack_weights=True))) as service,
    ):
        await asyncio.to_thread(service.create_sampling_client, None, options.models[0])
        server = _server(service, options, store)
        print(
            visible_line(
                f"Serving {', '.join(options.models)} at http://{options.host}:{options.port} ({tested()}). "
                f"Checkpoints are saved in {store.folder}."
            ),
            flush=True,
        )
        await server.serve()


@contextmanager
def serving(options: ServerOptions, service: ServiceClient) -> Iterator[str]:
    """Serves on a thread during the body. Yields the address, with a free port if `options.port` is 0."""
    with closing(CheckpointStore(options.folder)) as store:
        server = _server(service, options, store)
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                thread.join(0.01)
            (listener,) = server.servers[0].sockets
            yield f"http://{options.host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _server(service: ServiceClient, options: ServerOptions, store: CheckpointStore) -> Any:
    config = uvicorn.Config(
        make_app(service, options, store),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
        timeout_keep_alive=75,
    )
    return uvicorn.Server(config)
