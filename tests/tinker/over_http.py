"""Runs the programs of tinker-cookbook with the unmodified SDK against a server, and in process beside it.

    .venv-tinker/bin/python tests/tinker/over_http.py [name ...] [workers=1] [server=.venv/bin/python]

`server` is the interpreter that the server runs in. The first steps of both ways have to compute the same;
`only=http` does not run the programs in process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import run
import world
from programs import PROGRAMS

SECONDS_TO_START = 300


def unpatched(command: Sequence[str]) -> list[str]:
    """Returns the command line of a module or a script, as a user of the SDK starts it."""
    is_script = command[0].endswith(".py")
    return [sys.executable, *command] if is_script else [sys.executable, "-m", *command]


@contextlib.contextmanager
def server(python: str, folder: Path) -> Iterator[str]:
    """Serves the models of a folder of `world.make` during the body. Yields the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = ",".join(world.MODELS)
    arguments = [f"model_name={models}", f"port={port}", f"folder={folder / 'served'}"]
    printed = folder / "server.txt"
    with printed.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [python, "-m", "recipes.serve", *arguments],
            cwd=folder,
            env=run.environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, printed)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], printed: Path) -> None:
    """Returns when a server answers. Raises RuntimeError with its output if it does not."""
    deadline = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/v1/healthz", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"The server does not answer: {printed.read_text(encoding='utf-8')}")


def main(argv: Sequence[str]) -> int:
    options = dict(one.split("=", 1) for one in argv if one.startswith(("workers=", "server=", "only=")))
    names = [one for one in argv if one.split("=", 1)[0] not in ("workers", "server", "only")]
    is_quick = names == ["quick"]
    programs = [one for one in PROGRAMS if (one.is_quick if is_quick else not names or one.name in names)]
    workers = int(options.get("workers", 1))
    folder = Path(tempfile.mkdtemp(prefix="tinker-over-http-"))
    over_http, in_process = world.make(folder / "http"), world.make(folder / "in_process")
    with server(options.get("server", str(run.ROOT / ".venv/bin/python")), over_http) as address:
        variables = {
            **run.environment(over_http),
            "TINKER_BASE_URL": address,
            "TINKER_API_KEY": "tml-local",
            "TINKER_TELEMETRY": "0",
        }
        del variables["PYTHONPATH"]  # the programs see the SDK, and nothing of this project
        outcomes = run.run_all(programs, over_http, unpatched, variables, workers)
    others = []
    if options.get("only") != "http":
        print("In process:")
        others = run.run_all(programs, in_process, workers=workers)
    failed = [one for one in (*outcomes, *others) if one.error]
    different = run.differing(outcomes, others)
    print(
        f"{sum(not one.error for one in outcomes)} of {len(outcomes)} programs ran to their ends over HTTP."
    )
    print(*different, sep="\n")
    if failed or different:
        print(f"What they printed is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main(sys.argv[1:]))
