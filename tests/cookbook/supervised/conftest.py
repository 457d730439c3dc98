"""Runs in processes of their own, which can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class ForkServer:
    """`fork_runs.py` as a process; see there."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("fork_runs.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        config: dict[str, Any],
        kill_at_event: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
        on_files: str = "",
    ) -> int:
        """The exit code of a run; minus the signal's number if one ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"config": config, "kill_at_event": kill_at_event, "on_files": on_files}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if meanwhile is not None:
            meanwhile(child)
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()
