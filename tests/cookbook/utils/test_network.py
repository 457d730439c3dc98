"""Tests of the ports of this machine."""

from __future__ import annotations

import socket

import pytest

from cookbook.errors import ConfigError
from cookbook.utils.network import (
    LOOPBACK,
    check_answers,
    check_can_listen,
    free_port,
    refusal_of_page,
)  # fmt: skip


def test_a_free_port_answers_once_something_listens_on_it() -> None:
    port = free_port()
    with pytest.raises(OSError, match="refused"):
        check_answers(LOOPBACK, port, timeout_seconds=5)
    with socket.create_server((LOOPBACK, port)):
        check_answers(LOOPBACK, port, timeout_seconds=5)


@pytest.mark.parametrize(
    ("host", "origin", "is_refused"),
    [
        ("127.0.0.1:8000", None, False),
        ("localhost:8000", "http://localhost:8000", False),
        ("[::1]:8000", "http://[::1]:8000", False),
        ("[::1]", None, False),
        ("elsewhere.example:8000", None, True),
        ("127.0.0.1.elsewhere.example:8000", None, True),
        ("192.168.1.2:8000", None, True),
        ("", None, True),
        ("127.0.0.1:8000", "https://elsewhere.example", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", True),
        ("127.0.0.1:8000", "null", True),
    ],
)
def test_pages_of_other_sites_are_refused(host: str, origin: str | None, is_refused: bool) -> None:
    assert (refusal_of_page(host, origin) is not None) == is_refused


def test_an_address_where_nothing_can_listen_is_refused() -> None:
    check_can_listen(LOOPBACK, 0)
    check_can_listen(LOOPBACK, free_port())
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=f"Invalid port={port}: must be 0"):
            check_can_listen(LOOPBACK, port)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use. Choose another"):
            check_can_listen(LOOPBACK, port)
