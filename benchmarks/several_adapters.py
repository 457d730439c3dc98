"""Measures what it costs to train several adapters on one base model in turns.

    python -m benchmarks.several_adapters

Several clients each run a step (forward_backward and optim_step) on a part of a batch, one after another, as
the clients of a server do. One client runs a step on the whole batch. Both take the same tokens. They are
measured in turns, so that other load of the machine falls on both.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np

import cookbook
from cookbook import embedded
from cookbook.clients.service import ServiceClient
from cookbook.clients.training import TrainingClient

NUM_STEPS = 12
CASES = ((2, 4, 256), (4, 2, 256), (8, 1, 256), (4, 1, 1024), (8, 1, 64))
"""Adapters, sequences of each, and tokens of a sequence."""


def random_batch(num_sequences: int, length: int, vocabulary: int, package: Any = cookbook) -> list[Any]:
    """Returns Datums of random tokens, all trained, in the types of this package or of the Tinker SDK."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num_sequences):
        tokens = rng.integers(5, vocabulary, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        found.append(package.Datum(package.ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return found


def seconds(clients: list[TrainingClient], parts: list[list[cookbook.Datum]]) -> float:
    """Returns the time of a step of each client on its part, queued together."""
    start = time.perf_counter()
    futures = []
    for client, part in zip(clients, parts, strict=True):
        client.forward_backward(part)
        futures.append(client.optim_step(cookbook.AdamParams(learning_rate=1e-4)))
    for future in futures:
        future.result()
    return time.perf_counter() - start


def main(model: str = embedded.MODEL_NAME) -> None:
    service = ServiceClient(device="cpu")
    most = max(case[0] for case in CASES)
    clients = [service.create_lora_training_client(model, rank=16, seed=seed) for seed in range(most)]
    vocabulary = len(clients[0].get_tokenizer())
    for number, num_sequences, length in CASES:
        whole = random_batch(number * num_sequences, length, vocabulary)
        parts = [whole[start::number] for start in range(number)]
        times: dict[str, list[float]] = {"one": [], "several": []}
        for step in range(NUM_STEPS + 2):
            for name, taken in (
                ("one", seconds(clients[:1], [whole])),
                ("several", seconds(clients[:number], parts)),
            ):
                if step >= 2:
                    times[name].append(taken)
        ratios = [several / one for one, several in zip(times["one"], times["several"], strict=True)]
        one, several = (1000 * min(times[name]) for name in ("one", "several"))
        print(
            f"{number} adapters of {num_sequences} x {length} tokens: one {one:.1f} ms, in turns "
            f"{several:.1f} ms (least of {NUM_STEPS}), {several / one:.2f}x; median of the ratios "
            f"{statistics.median(ratios):.2f}x",
            flush=True,
        )
    service.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
