"""The options of a server: who may reach it, what it serves, and its limits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cookbook.errors import ConfigError
from cookbook.utils import extras
from cookbook.utils.network import LOOPBACK, is_loopback

API_KEY_VARIABLE = "COOKBOOK_API_KEY"
KEY_PREFIX = "tml-"
"""What the Tinker SDK demands that a key begins with."""
DEFAULT_FOLDER = Path("~/.cookbook/server")


@dataclass(frozen=True)
class ServerOptions:
    """Raises ConfigError for an address that others can reach without a key, and for a key without prefix."""

    models: Sequence[str]
    """The base models that clients may name. The first one is loaded when the server starts."""
    folder: Path = DEFAULT_FOLDER
    """Where checkpoints are saved. One server uses it at a time."""
    runs: Sequence[Path] = ()
    """Folders of runs or checkpoints, or of several of them, that OpenAI's clients sample from by name."""
    host: str = LOOPBACK
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_request_mib: float = 64.0
    """The largest body of a request, after decompression."""
    session_timeout_seconds: float = 120.0
    """A session without a request or a heartbeat for so long has ended, and its adapters are freed."""
    max_adapters: int = 64
    """How many adapters may be in memory at the same time: models in training and samplers."""
    max_pending: int = 4096
    """How many requests of one session may wait for their results."""
    poll_seconds: float = 30.0
    """How long a poll waits for a result before the client is told to ask again."""
    result_seconds: float = 60.0
    """How long a result is kept after a client has read it, in case that the answer was lost."""

    def __post_init__(self) -> None:
        least = {
            "max_adapters": 1,
            "max_pending": 1,
            "max_request_mib": 0,
            "session_timeout_seconds": 0,
            "poll_seconds": 0,
            "result_seconds": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if not (value >= bound if bound else value > 0):
                raise ConfigError(f"Invalid {name}={value}: must be {'>= 1' if bound else '> 0'}.")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"host={self.host} can be reached from other machines, and there is no API key. Set the "
                f"environment variable {API_KEY_VARIABLE} to one that begins with {KEY_PREFIX!r}, or use "
                f"host={LOOPBACK}."
            )
        if self.api_key is not None and not self.api_key.startswith(KEY_PREFIX):
            raise ConfigError(
                f"The API key in {API_KEY_VARIABLE} does not begin with {KEY_PREFIX!r}, and the Tinker SDK "
                f"sends no other key. Put {KEY_PREFIX!r} before it."
            )
        if self.api_key is not None and len(self.api_key) < len(KEY_PREFIX) + 16:
            raise ConfigError(
                f"The API key in {API_KEY_VARIABLE} has fewer than 16 characters after {KEY_PREFIX!r}. "
                f"Use a random one, such as of `openssl rand -hex 16`."
            )
        if not self.models:
            raise ConfigError("There is no model to serve. Give model_name=.")


def check_installed() -> None:
    """Raises ConfigError if a package that the server needs is not installed."""
    for package in ("tinker", "starlette", "uvicorn", "zstandard"):
        extras.require(package, "recipes.serve", extra="server")


def api_key_of_environment() -> str | None:
    return os.environ.get(API_KEY_VARIABLE) or None
