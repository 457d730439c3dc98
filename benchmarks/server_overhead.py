"""Measures what HTTP adds to a training step: the unmodified SDK against the clients in process.

    python -m benchmarks.server_overhead [--same-process]

Both train the embedded model on the same sequences, in turns, so that other load of the machine falls on
both. A step is forward_backward and optim_step, submitted together and awaited. The server runs in a process
of its own, as `recipes.serve` does; with `--same-process` on a thread beside the SDK, on the engine of the
clients in process, so that they also share Python's lock.

The last column is the time of the SDK's step when its requests are answered at once, with earlier answers
(`benchmarks.replayed_answers`): what no server can save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tinker

import cookbook
from benchmarks.sampling import seconds
from benchmarks.server_tokens import running
from benchmarks.several_adapters import random_batch
from cookbook import embedded
from cookbook.clients.service import ServiceClient
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving
from cookbook.utils.network import free_port

SIZES = ((1, 64, 40), (8, 256, 12))
"""Sequences in a batch, tokens of each, and steps."""


def stepper(client: Any, package: Any, num_sequences: int, length: int) -> Callable[[], None]:
    data, adam = random_batch(num_sequences, length, 2000, package), package.AdamParams(learning_rate=1e-4)

    def step() -> None:
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(adam)
        passed.result()
        stepped.result()

    return step


@contextmanager
def address_of_server(service: ServiceClient, is_same_process: bool) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        if is_same_process:
            with serving(ServerOptions([embedded.MODEL_NAME], Path(folder), port=0), service) as address:
                yield address
            return
        port = free_port()
        command = [sys.executable, "-m", "recipes.serve", f"port={port}", f"folder={folder}"]
        with running("recipes.serve", command, port, embedded.MODEL_NAME) as side:
            yield side.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--same-process", action="store_true", help="serve on a thread of this process")
    options = parser.parse_args()
    service = ServiceClient(device="cpu")
    with address_of_server(service, options.same_process) as address:
        compare(service, address)
    service.close()


def compare(service: ServiceClient, address: str) -> None:
    """Prints the medians of both sides for each size of batch."""
    over_http = tinker.ServiceClient(base_url=address, api_key="tml-local")
    theirs = over_http.create_lora_training_client(embedded.MODEL_NAME, rank=16, seed=0).result()
    ours = service.create_lora_training_client(embedded.MODEL_NAME, rank=16, seed=0)
    for num_sequences, length, num_steps in SIZES:
        steps = {
            "in process": stepper(ours, cookbook, num_sequences, length),
            "over HTTP": stepper(theirs, tinker, num_sequences, length),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(num_steps + 2):
            for name, step in steps.items():
                taken = seconds(step)
                if number >= 2:
                    times[name].append(taken)
        base, http = (1000 * statistics.median(times[name]) for name in ("in process", "over HTTP"))
        alone = 1000 * seconds_of_the_sdk(address, num_sequences, length, num_steps)
        print(
            f"{num_sequences:3d} sequences of {length:3d}: {base:.1f} ms in process, {http:.1f} ms over "
            f"HTTP, +{http - base:4.1f} ms, {http / base:.3f}x; {alone:.1f} ms if answered at once "
            f"(medians of {num_steps})",
            flush=True,
        )
    over_http.close("success")


def seconds_of_the_sdk(address: str, num_sequences: int, length: int, num_steps: int) -> float:
    """Returns the median time of the SDK's steps when each request is answered at once."""
    port = free_port()
    other = str(httpx.URL(address).port)
    command = [sys.executable, "-m", "benchmarks.replayed_answers", other, str(port)]
    with running("benchmarks.replayed_answers", command, port, embedded.MODEL_NAME) as replayed:
        over_http = tinker.ServiceClient(base_url=replayed.address, api_key="tml-local")
        client = over_http.create_lora_training_client(embedded.MODEL_NAME, rank=16, seed=0).result()
        step = stepper(client, tinker, num_sequences, length)
        step()
        httpx.post(f"{replayed.address}/replay").raise_for_status()
        median = statistics.median(seconds(step) for _ in range(num_steps))
        over_http.close("success")
    return median


if __name__ == "__main__":
    main()
