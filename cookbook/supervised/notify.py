"""Tells a webhook or a command that a run has ended, and how."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from cookbook.errors import ConfigError, describe
from cookbook.utils.notes import counted_noun

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 20.0


def refuse(target: str | None, what: str) -> None:
    """Raises ConfigError for a run that starts from its recorded config, which has no `notify`."""
    if target is not None:
        raise ConfigError(
            f"{what} starts from its recorded config, and notify= is not recorded: a URL may hold a secret, "
            f"and a record starts no programs. Remove it, and run the command behind this one instead."
        )


class Summary(Protocol):
    """What a message says of a `RunSummary`."""

    @property
    def is_finished(self) -> bool: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def checkpoint_path(self) -> Path: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def check_target(target: str) -> None:
    """Raises ConfigError for a URL without a host, and for a command that a shell could not read."""
    try:
        words = shlex.split(target)
    except ValueError as error:
        raise ConfigError(f"notify={target!r} is not a command: {error}.") from error
    if not words:
        raise ConfigError("notify is empty. Give a URL, or a command.")
    if is_url(target) and not urlsplit(target).hostname:
        raise ConfigError("notify= is a URL without a host. Write it as https://example.org/hook.")


def check_command(target: str) -> None:
    """Raises ConfigError if the target is a command that is not on this machine."""
    words = [] if is_url(target) else shlex.split(target)
    if words and shutil.which(words[0]) is None:
        raise ConfigError(
            f"notify={target!r}: there is no command {words[0]!r}. Give one that can be run, or a URL."
        )


def message_of(
    log_path: str, summary: Summary | None = None, error: BaseException | None = None
) -> dict[str, Any]:
    """Returns the message about a run that has returned a summary, or raised an error."""
    if summary is None:
        status, text = "failed", f"{log_path} failed: {describe(error) if error is not None else ''}"
        return {"status": status, "log_path": log_path, "text": text, "content": text}
    how = "finished" if summary.is_finished else "stopped"
    values = {name: value for name, value in summary.metrics.items() if name.count("/") == 1}
    measured = "".join(f", {name} {value:.4f}" for name, value in values.items())
    text = f"{log_path} {how} after {counted_noun(summary.num_steps, 'step')}{measured}"
    return {
        "status": how,
        "log_path": log_path,
        "steps": summary.num_steps,
        "checkpoint": str(summary.checkpoint_path),
        "metrics": dict(summary.metrics),
        "text": text,
        "content": text,
    }


def notify(target: str, message: Mapping[str, Any]) -> None:
    """Posts the message as JSON to a URL, or runs a command with its text as the last argument.

    The command also reads the JSON on standard input. `text` is what Slack shows, `content` what Discord
    shows. A failure is logged, without the URL, which may hold a secret.
    """
    try:
        if is_url(target):
            import httpx

            httpx.post(target, json=message, timeout=TIMEOUT_SECONDS).raise_for_status()
        else:
            command = [*shlex.split(target), str(message["text"])]
            subprocess.run(command, input=json.dumps(message).encode(), timeout=TIMEOUT_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        logger.warning("notify: the command did not succeed (%s).", type(error).__name__)
    except OSError as error:
        logger.warning("notify: the command cannot be run (%s).", error.strerror)
    except Exception as error:  # httpx raises many kinds of errors, whose texts hold the URL
        status = getattr(getattr(error, "response", None), "status_code", None)
        logger.warning("notify: the message was not delivered (%s).", status or type(error).__name__)


@dataclass
class RunEnding:
    """How a run ended; without a summary it failed, or had nothing to do."""

    summary: Summary | None = None


@contextlib.contextmanager
def ending_with(target: str | None, log_path: str) -> Iterator[RunEnding]:
    """Sends the message about a run after the body, whether it returns or raises; None sends none."""
    ending = RunEnding()
    try:
        yield ending
    except BaseException as error:
        if target is not None:
            notify(target, message_of(log_path, error=error))
        raise
    if target is not None and ending.summary is not None:
        notify(target, message_of(log_path, ending.summary))
