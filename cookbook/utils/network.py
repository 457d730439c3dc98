"""Addresses of this machine, and whether another machine answers."""

from __future__ import annotations

import ipaddress
import socket

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Returns whether only programs of this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal_of_page(host: str, origin: str | None) -> str | None:
    """Returns why a request to a server on loopback is refused by its headers Host and Origin, or None.

    Pages of other sites can reach loopback through the browser of this machine's user: they are known by an
    Origin that is not the address they call, or by a Host that is not this machine.
    """
    name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
    if not is_loopback(name):
        return f"The request is for {host!r}, which is not this machine."
    if origin is not None and origin.partition("://")[2] != host:
        return f"Pages of {origin!r} may not use this server."
    return None


def free_port() -> int:
    """Returns a port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def check_answers(host: str, port: int, timeout_seconds: float) -> None:
    """Raises OSError if nothing listens at `port` of `host`, and UnicodeError for an invalid host name."""
    socket.create_connection((host, port), timeout=timeout_seconds).close()
