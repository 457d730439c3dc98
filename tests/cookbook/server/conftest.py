"""A server of the tiny model on a thread of this process, and the unmodified SDK's clients of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tinker

from cookbook.clients.service import ServiceClient
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceClient]:
    service = ServiceClient(device="cpu")
    yield service
    service.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server that a module starts itself."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(
    service: ServiceClient, tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server."""
    options = ServerOptions([tiny_qwen3], tmp_path_factory.mktemp("server"), port=0)
    with serving(options, service) as address:
        yield address


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tinker.ServiceClient]:
    """Returns a client of the SDK for the server at an address."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return lambda address: tinker.ServiceClient(base_url=address, api_key="tml-of-a-test")
