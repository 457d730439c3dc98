"""Runs in separate processes, which can be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from outside_world import draw_blank_pictures
from programs import Programs


@pytest.fixture(autouse=True)
def _blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end sooner. `tests/cookbook/report` looks at pictures."""
    draw_blank_pictures(monkeypatch)


class ForkServer:
    """A process that runs `fork_runs.py`."""

    def __init__(self, programs: Programs) -> None:
        script = Path(__file__).with_name("fork_runs.py")
        self._process, self._jobs, self._answers = programs.start_script(script)

    def run(
        self,
        config: dict[str, Any],
        kill_at_event: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
        on_files: str = "",
    ) -> int:
        """Returns the exit code of a run, or minus the number of the signal that ended it."""
        job = {"config": config, "kill_at_event": kill_at_event, "on_files": on_files}
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()
        child = int(self._answers.readline())
        if meanwhile is not None:
            meanwhile(child)
        return os.waitstatus_to_exitcode(int(self._answers.readline()))

    def close(self) -> None:
        self._jobs.close()
        ended = self._process.wait()
        self._answers.close()
        assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="session")
def server(programs: Programs) -> Iterator[ForkServer]:
    server = ForkServer(programs)
    yield server
    server.close()
