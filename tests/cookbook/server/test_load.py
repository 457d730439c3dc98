"""Several clients at a time: results are those of one alone, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tinker
from waiting import wait_until

from cookbook.clients.service import ServiceClient
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving
from cookbook.utils.network import free_port

Connect = Callable[[str], tinker.ServiceClient]


def datum(number: int) -> tinker.Datum:
    tokens = [5 + (number * 7 + place * 3) % 300 for place in range(9)]
    return tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


def work(
    client: tinker.ServiceClient, model: str, seed: int, num_steps: int, saved: list[str]
) -> list[float]:
    """Trains for some steps, two requests each, and saves now and then. Returns the losses."""
    trained = client.create_lora_training_client(model, rank=2, seed=seed).result()
    losses = []
    for step in range(num_steps):
        one = trained.forward_backward([datum(seed * 1000 + step)], "cross_entropy")
        trained.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        losses.append(one.result().metrics["loss:sum"])
        if step % 10 == 9:
            saved.append(trained.save_state(f"step{step}").result().path)
    return losses


@pytest.mark.slow
def test_clients_that_train_together_have_the_results_of_one_alone_and_leave_nothing(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path, connect: Connect
) -> None:
    options = ServerOptions([tiny_qwen3], tmp_path, port=0, result_seconds=0.1)
    with serving(options, service) as address:
        clients = [connect(address) for _ in range(4)]

        def run(seed: int) -> list[float]:
            return work(clients[seed], tiny_qwen3, seed, 5, [])

        with ThreadPoolExecutor(4) as pool:
            together = [*pool.map(run, range(4))]
        assert work(clients[0], tiny_qwen3, 2, 5, []) == together[2]
        for client in clients:
            client.close("success").result()
        sessions = httpx.get(f"{address}/api/v1/sessions").json()["sessions"]
        assert sessions == []
    engine = next(iter(service._engines.values()))
    wait_until(lambda: not [one for one in engine.clients if type(one).__name__ == "TrainingClient"])


class Served:
    """A server in a process of its own, which is killed and started again on one port and folder."""

    def __init__(self, model: str, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "recipes.serve", f"model_name={model}", f"port={self.port}"),
            *(f"folder={folder}", "device=cpu", "session_timeout_seconds=15"),
        ]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)
        wait_until(self.answers, 200)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/api/v1/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def mib(self) -> float:
        return float(psutil.Process(self._process.pid).memory_info().rss / 2**20)


@pytest.mark.slow
def test_eight_clients_a_killed_client_and_a_killed_server_lose_nothing_that_was_acknowledged(
    tiny_qwen3: str, tmp_path: Path, connect: Connect
) -> None:
    served = Served(tiny_qwen3, tmp_path)
    saved: list[str] = []
    memory: list[float] = []
    try:
        script = (
            "import tinker, sys\n"
            f"client = tinker.ServiceClient(base_url={served.address!r}, api_key='tml-local')\n"
            f"client.create_lora_training_client({tiny_qwen3!r}, rank=2).result()\n"
            "print('ready', flush=True)\n"
            "sys.stdin.read()\n"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        os.kill(other.pid, signal.SIGKILL)
        other.wait()

        def run(seed: int) -> list[float]:
            client = connect(served.address)
            losses = work(client, tiny_qwen3, seed, 100, saved)  # 200 requests and more
            client.close("success").result()
            memory.append(served.mib)
            return losses

        with ThreadPoolExecutor(8) as pool:
            losses = [*pool.map(run, range(8))]
        assert [len(one) for one in losses] == [100] * 8
        wait_until(lambda: httpx.get(f"{served.address}/api/v1/sessions").json()["sessions"] == [], 60)
        first = served.mib
        run(9)
        assert served.mib < first * 1.1 + 20

        failures: list[BaseException] = []

        def train_until_killed() -> None:
            try:
                work(connect(served.address), tiny_qwen3, 11, 10_000, saved)
            except tinker.TinkerError as error:
                failures.append(error)
            except ValueError as error:
                failures.append(error)

        thread = threading.Thread(target=train_until_killed)
        before = len(saved)
        thread.start()
        wait_until(lambda: len(saved) > before + 1, 120)
        served.kill()
        served.start()
        thread.join(120)
        assert not thread.is_alive()
        assert "no session" in str(failures[0])
        client = connect(served.address)
        listed: Any = client.create_rest_client().list_user_checkpoints(limit=1000).result()
        assert {one.tinker_path for one in listed.checkpoints} >= set(saved)
        last = client.create_training_client_from_state_with_optimizer(saved[-1]).result()
        last.forward_backward([datum(1)], "cross_entropy").result()
    finally:
        served.kill()
