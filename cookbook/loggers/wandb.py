"""Logs to Weights & Biases."""

from __future__ import annotations

import configparser
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cookbook.errors import ConfigError
from cookbook.loggers.base import MetricLogger, Metrics
from cookbook.utils import files
from cookbook.utils.extras import require
from cookbook.utils.tables import Table

REPAIR = (
    "Log in with `wandb login`, work without a network with WANDB_MODE=offline, or leave wandb_project out."
)
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
KEY_LENGTH = 40
"""The least length of an API key, without the prefix of keys of self-hosted servers."""


def check_wandb_login(project: str) -> None:
    """Raises ConfigError if wandb.init would find no API key. Contacts no server.

    Looks where wandb does: in its environment variables, its settings file and ~/.netrc.
    """
    asked = f"wandb_project={project!r}"
    if not project or set(project) & set("/\\#?%:"):
        raise ConfigError(f"{asked}: give a name without / \\ # ? % and :. WANDB_ENTITY sets the account.")
    require("wandb", asked)
    mode = _setting("mode") or "online"
    if mode not in MODES:
        raise ConfigError(f"{asked}, but WANDB_MODE={mode} is not known. Use online, offline or disabled.")
    is_disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    if (
        mode in ("offline", "disabled", "dryrun")
        or is_disabled
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    ):
        return
    key = _setting("api_key") or _key_of_netrc(_setting("base_url"))
    if not key:
        raise ConfigError(f"{asked}, but no login of Weights & Biases is on this machine. {REPAIR}")
    secret = key.split("-", 1)[-1]
    if len(secret) < KEY_LENGTH and "." not in key:  # a key with dots is an access token
        raise ConfigError(
            f"{asked}, but the API key has {len(secret)} characters, and a key has {KEY_LENGTH} or more "
            f"(WANDB_API_KEY, or what `wandb login` saved). {REPAIR}"
        )


def _setting(name: str) -> str | None:
    """Returns a setting of wandb, from its environment variable or else its settings file."""
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(default_section="", interpolation=None)
    try:
        settings.read(folder / "settings")
    except configparser.Error:
        return None  # wandb reports the error itself
    return settings.get("default", name, fallback=None)


def _key_of_netrc(base_url: str | None) -> str | None:
    """Returns the password for the server at `base_url`, or for any of wandb's own servers."""
    named = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else []
    places = [*named, Path.home() / ".netrc", Path.home() / "_netrc"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (netrc.NetrcParseError, OSError):
        return None
    own = None if base_url is None else urlsplit(base_url).hostname
    for host, (_, _, password) in hosts.items():
        if host == own or host.endswith(("wandb.ai", "coreweave.com")):
            return password
    return None


class WandbLogger(MetricLogger):
    """Logs to Weights & Biases, with its own client. A resumed run continues under the same run id."""

    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id.txt"
        if not id_file.exists():
            files.write(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=files.read(id_file).decode().strip(),
                resume="allow",
                config=dict(config),
                dir=str(folder),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}, but Weights & Biases cannot start: {error}\n{REPAIR}"
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, table: Table) -> None:
        import wandb

        rows = [list(row) for row in table.rows]
        # wandb gives an empty cell a type of its own.
        shown = wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()
