"""Starts, finds and stops the Ray head on this machine, which runs the jobs if no cluster is named.

It listens only on the loopback interface and accepts jobs only with the user's Ray token. It uses free ports,
and a folder that other users cannot enter, so that it does not disturb another Ray on this machine. A note in
$COOKBOOK_HOME (~/.cookbook) records its address.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cookbook.errors import ClusterError
from cookbook.utils import clusters, files, json_files, network
from cookbook.utils.json_files import JsonOrigin, Positive
from cookbook.utils.network import LOOPBACK

RAY = (sys.executable, "-m", "ray.scripts.scripts")
START_SECONDS = 240
START_ATTEMPTS = 3
"""A port may be taken between its choice and its use. The head then ends, and is started with other ports."""
STOP_SECONDS = 60
START_LOG = "start.log"
FOLDER_PREFIX = "cookbook-ray-"
NO_TIMEOUT_SECONDS = 10 * 365 * 24 * 3600
"""How long a job may wait for devices: in effect without limit, instead of Ray's 15 minutes."""


@dataclass(frozen=True)
class RayHead:
    address: str
    """The address of its dashboard, which accepts the jobs."""
    pid: Positive
    folder: str
    """The private folder around Ray's own files."""

    def is_alive(self) -> bool:
        try:
            clusters.check_reachable(self.address, 8265)
            os.kill(self.pid, 0)
        except (ClusterError, OSError):
            return False
        return True


def find_head() -> RayHead | None:
    """Returns the head that runs on this machine, or None."""
    head = _noted_head()
    return head if head is not None and head.is_alive() else None


def start_head() -> RayHead:
    """Returns the head on this machine, started if there is none. Raises ClusterError if that fails."""
    if (head := find_head()) is not None:
        return head
    clusters.import_ray(to_start=True)
    deadline = time.monotonic() + START_SECONDS
    for attempts_left in reversed(range(START_ATTEMPTS)):
        started, process, ports = _start()
        if _accepts_jobs(started, process, ports, deadline):
            break
        has_ended = process.poll() is not None
        process.terminate()
        if not attempts_left or not has_ended:
            last = _last_output(started)
            raise ClusterError(f"A Ray head cannot be started on this machine: {last}")
        files.remove(Path(started.folder))
    note = _note()
    files.make_folder(note.parent, may_be_link=True)
    files.write(note, json.dumps(asdict(started)))
    return started


def check_not_ended(address: str) -> None:
    """Raises ClusterError if `address` is that of this machine's head and the head has ended."""
    head = _noted_head()
    if head is not None and head.address == address and not _exists(head.pid):
        raise ClusterError(f"The Ray head on this machine has ended: {_last_output(head)}")


PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)
AGENTS = ("dashboard-agent-listen-port", "runtime-env-agent-port")
"""The ports of the two processes that start a job. They are ready some seconds after the dashboard."""


def _start() -> tuple[RayHead, subprocess.Popen[bytes], dict[str, int]]:
    """Starts a head; returns it, its process and its ports."""
    folder = clusters.private_folder(FOLDER_PREFIX)
    ports = {name: network.free_port() for name in PORTS}
    command = [
        *(*RAY, "start", "--head", "--block", "--disable-usage-stats"),
        *("--temp-dir", str(folder / clusters.FOLDER_FOR_RAY)),
        *("--include-dashboard", "true", "--dashboard-host", LOOPBACK),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    with files.appending(folder / START_LOG) as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives the command that started it
            env=os.environ
            | {
                "RAY_JOB_START_TIMEOUT_SECONDS": str(NO_TIMEOUT_SECONDS),
                # Ray ends a head whose agents take more than 30 seconds, which they do on a busy machine.
                "RAY_agent_register_timeout_ms": str(START_SECONDS * 1000),
                "RAY_AUTH_MODE": "token",
                clusters.NO_CLUSTER: "0",
            },
        )
    head = RayHead(f"http://{LOOPBACK}:{ports['dashboard-port']}", process.pid, str(folder))
    return head, process, ports


def end_head(head: RayHead) -> None:
    """Ends the head and all its processes, including running jobs. Raises ClusterError if it does not end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(head.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _exists(head.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _exists(head.pid):
        raise ClusterError(
            f"The Ray head (process {head.pid}) does not end. Kill it, or restart the machine."
        )
    folder = Path(head.folder)
    if folder.name.startswith(FOLDER_PREFIX):  # never remove any other folder, whatever the note says
        with contextlib.suppress(OSError):  # one of Ray's daemons may still write there
            files.remove(folder)
    files.remove(_note())


def _accepts_jobs(
    head: RayHead, process: subprocess.Popen[bytes], ports: Mapping[str, int], deadline: float
) -> bool:
    """Waits until the head can start jobs. Returns False if it ends before, or at the deadline."""
    from cookbook.jobs.connection import connect

    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ClusterError, OSError):
            connect(head.address).list_jobs()
            for agent in AGENTS:
                network.check_answers(LOOPBACK, ports[agent], timeout_seconds=10)
            return True
        time.sleep(0.5)
    return False


def _last_output(head: RayHead) -> str:
    """Returns what the head and its processes printed last, and where all of it is."""
    folder = Path(head.folder)
    logs = folder / clusters.FOLDER_FOR_RAY / "session_latest" / "logs"
    last = [
        lines[-1].strip()
        for log in (folder / START_LOG, logs / "ray_process_exit.log", logs / "raylet.err")
        if log.exists()
        and (lines := [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()])
    ]
    return f"{' / '.join(last) or 'it printed nothing'} (all of it: {folder})"


def _exists(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of this process would stay a zombie
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _noted_head() -> RayHead | None:
    note = _note()
    if not note.exists():
        return None
    repair = "Remove it, and end the Ray head that it named by hand if one still runs."
    values = json_files.read_object(note, ClusterError, repair)
    return json_files.record_of(RayHead, values, JsonOrigin(str(note), ClusterError, repair))


def _note() -> Path:
    home = os.environ.get("COOKBOOK_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cookbook") / "ray-head.json"
