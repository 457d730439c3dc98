"""The programs of docs/server.md run against a server of the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cookbook.clients.service import ServiceClient
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving

PAGE = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.splitlines()[0])
def test_a_program_of_the_page_runs(
    program: str, service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:8000" in program
    with serving(ServerOptions(["cookbook/tiny-chat"], tmp_path / "server", port=0), service) as address:
        exec(compile(program.replace("http://127.0.0.1:8000", address), "server.md", "exec"), {})
