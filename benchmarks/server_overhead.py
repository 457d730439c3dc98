"""Measures what HTTP adds to a training step: the unmodified SDK against the clients in process.

    python -m benchmarks.server_overhead

Both train the embedded model on the same sequences on one engine, in turns, so that other load of the machine
falls on both. A step is forward_backward and optim_step, submitted together and awaited.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker

import cookbook
from benchmarks.sampling import seconds
from benchmarks.several_adapters import random_batch
from cookbook import embedded
from cookbook.clients.service import ServiceClient
from cookbook.server.options import ServerOptions
from cookbook.server.serving import serving

NUM_STEPS = 40
SIZES = ((1, 64), (8, 256), (32, 512))
"""Sequences in a batch, and tokens of each."""


def stepper(client: Any, package: Any, num_sequences: int, length: int) -> Callable[[], None]:
    data, adam = random_batch(num_sequences, length, 2000, package), package.AdamParams(learning_rate=1e-4)

    def step() -> None:
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(adam)
        passed.result()
        stepped.result()

    return step


def main() -> None:
    service = ServiceClient(device="cpu")
    options = ServerOptions([embedded.MODEL_NAME], Path(tempfile.mkdtemp()), port=0)
    with serving(options, service) as address:
        over_http = tinker.ServiceClient(base_url=address, api_key="tml-local")
        theirs = over_http.create_lora_training_client(embedded.MODEL_NAME, rank=16, seed=0).result()
        ours = service.create_lora_training_client(embedded.MODEL_NAME, rank=16, seed=0)
        for size in SIZES:
            steps = {
                "in process": stepper(ours, cookbook, *size),
                "over HTTP": stepper(theirs, tinker, *size),
            }
            times: dict[str, list[float]] = {name: [] for name in steps}
            num_steps = NUM_STEPS if size[0] < 32 else 8
            for number in range(num_steps + 2):
                for name, step in steps.items():
                    taken = seconds(step)
                    if number >= 2:
                        times[name].append(taken)
            base, http = (1000 * statistics.median(times[name]) for name in ("in process", "over HTTP"))
            print(
                f"{size[0]:3d} sequences of {size[1]:3d}: {base:.1f} ms in process, {http:.1f} ms over HTTP, "
                f"+{http - base:4.1f} ms, {http / base:.3f}x (medians of {num_steps})"
            )
    service.close()


if __name__ == "__main__":
    main()
