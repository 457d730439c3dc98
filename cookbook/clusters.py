"""Ray as this project uses it: an extra, imported when it is needed, quiet, and out of reach in one line."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cookbook.errors import ClusterError, ConfigError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def import_ray() -> Any:
    """Ray, told to keep quiet and to send nothing home. Raises ConfigError where it is not installed."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read once, when Ray is imported
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "Sweeps and jobs are run by Ray, which is not installed: pip install 'sft-cookbook[ray]'"
        ) from None
    for handler in logging.getLogger("ray").handlers:  # some of its loggers turn themselves up
        if type(handler).__module__.partition(".")[0] == ray.__name__:  # others have put theirs there too
            handler.setLevel(logging.ERROR)
    return ray


def has_token() -> bool:
    """Whether this user has the token with which Ray's clusters know their own."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()


def check_reachable(address: str, default_port: int) -> None:
    """Raises ClusterError where nobody listens at `address`, without the minutes that Ray tries for."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or default_port
    except ValueError as error:
        raise ClusterError(f"address={address} is no address ({error}). Write host:port.") from None
    if not host:
        raise ClusterError(f"address={address} is no address. Write host:port.")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"The Ray cluster at {address} cannot be reached: {error.strerror or error}. "
            f"Is it running, and is this its address?"
        ) from None
