"""Addresses of this machine, and whether another machine answers."""

from __future__ import annotations

import ipaddress
import socket

from cookbook.errors import ConfigError

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


def check_can_listen(host: str, port: int) -> None:
    """Raises ConfigError if this machine cannot listen at the address; port 0 is any that is free."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"Invalid port={port}: must be 0 (any that is free) to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Nothing can listen at {host}:{port}: {error.strerror or error}. Choose another port=."
        ) from error


def check_answers(host: str, port: int, timeout_seconds: float) -> None:
    """Raises OSError if nothing listens at `port` of `host`, and UnicodeError for an invalid host name."""
    socket.create_connection((host, port), timeout=timeout_seconds).close()
