"""Addresses of this machine, and whether another one answers."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def check_answers(host: str, port: int, timeout_seconds: float) -> None:
    """Raises OSError where nothing listens at `port` of `host`, UnicodeError for a name no host can have."""
    socket.create_connection((host, port), timeout=timeout_seconds).close()
