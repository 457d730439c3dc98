"""Measures tokens per second of sampling, compared with transformers' `generate` on one batch.

    python -m benchmarks.sampling [--prompts 64] [--rounds 3] [--top-p 0.95]
    python -m benchmarks.sampling --shared [--rounds 3]

There are two sets of prompts for the model of `step_model` with its adapter: prompts and continuations of
equal lengths, and of mixed lengths (20 to 1,000 tokens, continued by 8 to 128) as in an evaluation. Peers get
all prompts as one left-padded batch, which runs until the longest continuation is complete. There are no stop
tokens, so both sides sample all requested tokens, and only these count. The sides run in turns; the table has
the best round of each and the ratio of the medians.

With `--shared`, the cases are of prompts that share beginnings, and this engine runs them with and without
reusing what they share, each round with a new client:

samples   16 samples of 32 tokens for one prompt of 500
chat      10 turns of a conversation that begins with 100 tokens: questions of 40 tokens, replies of 32
system    64 prompts of 40 tokens after a common system prompt of 300, continued by 16
nothing   64 prompts of 340 tokens that share nothing, continued by 16

The table has the least CPU time of each side's rounds, their ratio and the ratio of the medians, the same
for the time in prefills alone, and how many of the prompts' tokens were not computed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step_data import VOCAB_SIZE
from benchmarks.step_model import load_adapted_model, make_folders
from cookbook import ModelInput, SampleResponse, SamplingClient, SamplingParams, ServiceClient
from cookbook.engine.sampling.decoders import PackedDecoder


@dataclass(frozen=True)
class Work:
    """Prompts and the lengths of their continuations in tokens."""

    name: str
    prompts: list[list[int]]
    num_tokens: list[int]


def make_work(num_prompts: int, vocab_size: int) -> list[Work]:
    rng = np.random.default_rng(0)

    def log_uniform(low: int, high: int) -> list[int]:
        return np.exp(rng.uniform(np.log(low), np.log(high), num_prompts)).round().astype(int).tolist()

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [rng.integers(vocab_size, size=length).tolist() for length in lengths]

    return [
        Work("equal lengths", prompts([128] * num_prompts), [64] * num_prompts),
        Work("mixed lengths", prompts(log_uniform(20, 1000)), log_uniform(8, 128)),
    ]


def by_cookbook(client: SamplingClient, work: Work, top_p: float) -> None:
    futures = [
        client.sample(
            ModelInput.from_ints(prompt),
            1,
            SamplingParams(max_tokens=num_tokens, seed=seed, top_p=top_p, stop_token_ids=[-1]),
        )
        for seed, (prompt, num_tokens) in enumerate(zip(work.prompts, work.num_tokens, strict=True))
    ]
    for future, num_tokens in zip(futures, work.num_tokens, strict=True):
        assert len(future.sequences[0].tokens) == num_tokens


@torch.no_grad()
def by_generate(model: Any, work: Work, top_p: float) -> None:
    longest = max(map(len, work.prompts))
    tokens = torch.zeros(len(work.prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(work.prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=top_p,
        max_new_tokens=max(work.num_tokens),
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out.shape[1] == longest + max(work.num_tokens)


Ask = Callable[[list[list[int]], int, int], list[SampleResponse]]
"""Samples prompts at the same time, given the number of samples and of tokens."""


def samples(ask: Ask, text: Callable[[int], list[int]]) -> None:
    ask([text(500)], 16, 32)


def chat(ask: Ask, text: Callable[[int], list[int]]) -> None:
    history = text(100)
    for _ in range(10):
        history += text(40)
        (response,) = ask([history], 1, 32)
        history = history + response.sequences[0].tokens


def system(ask: Ask, text: Callable[[int], list[int]]) -> None:
    begin = text(300)
    ask([begin + text(40) for _ in range(64)], 1, 16)


def nothing(ask: Ask, text: Callable[[int], list[int]]) -> None:
    ask([text(340) for _ in range(64)], 1, 16)


class TimedDecoder(PackedDecoder):
    """Adds up the CPU seconds of its prefills."""

    prefill_seconds = 0.0

    def prefill(self, groups: Any) -> torch.Tensor:
        started = time.thread_time()
        logits_GV = super().prefill(groups)
        TimedDecoder.prefill_seconds += time.thread_time() - started
        return logits_GV


def compare_shared(service: ServiceClient, folder: Path, adapter_folder: Path, num_rounds: int) -> None:
    """Prints the table of `--shared`."""
    columns = f"{'reused':>9}{'not':>9}{'ratio':>8}{'medians':>9}"
    print(f"{'':10}{'all: CPU seconds':>35}{'prefills':>35}\n{'':10}{columns}{columns}")
    for case in (samples, chat, system, nothing):
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(num_rounds + 1):
            for reuses in (True, False) if number % 2 else (False, True):
                client = service.create_sampling_client(str(adapter_folder), str(folder / "model"))
                num_prompt_tokens = num_hits = 0
                rng = np.random.default_rng(0)

                def ask(
                    prompts: list[list[int]],
                    num_samples: int,
                    num_tokens: int,
                    client: SamplingClient = client,
                ) -> list[SampleResponse]:
                    nonlocal num_prompt_tokens, num_hits
                    params = SamplingParams(max_tokens=num_tokens, seed=0, stop_token_ids=[-1])
                    futures = [
                        client.sample(ModelInput.from_ints(prompt), num_samples, params) for prompt in prompts
                    ]
                    responses = [future.result() for future in futures]
                    num_prompt_tokens += sum(map(len, prompts))
                    num_hits += sum(response.prompt_cache_hit_tokens for response in responses)
                    return responses

                ask([[5, 6]], 1, 1)  # prepares the adapter and chooses the decoder
                client._engine.wait()
                base = client._engine.base
                base.reuses_prompts, base.make_decoder = reuses, TimedDecoder
                num_prompt_tokens = num_hits = 0
                TimedDecoder.prefill_seconds = 0.0
                started = time.process_time()
                case(ask, lambda length, rng=rng: rng.integers(VOCAB_SIZE, size=length).tolist())
                if number:  # the first round warms up
                    spent = time.process_time() - started
                    times[reuses].append((spent, TimedDecoder.prefill_seconds))
                client.close()
                if reuses:
                    share = num_hits / num_prompt_tokens
        line = f"{case.__name__:10}"
        for reused, not_reused in zip(
            zip(*times[True], strict=True), zip(*times[False], strict=True), strict=True
        ):
            medians = statistics.median(not_reused) / statistics.median(reused)
            best, other = min(reused), min(not_reused)
            line += f"{best:9.2f}{other:9.2f}{other / best:8.2f}{medians:9.2f}"
        print(f"{line}   {share:.0%} not computed", flush=True)


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--shared", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "cookbook-benchmarks"
    _, adapter_folder = make_folders(folder)
    service = ServiceClient(device="cpu")
    if arguments.shared:
        compare_shared(service, folder, adapter_folder, arguments.rounds)
        service.close()
        return
    client = service.create_sampling_client(adapter_folder, str(folder / "model"))
    model = load_adapted_model(folder).eval()
    model.generation_config.eos_token_id = None
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, top_p {arguments.top_p:g}\n")
    print(f"{'':16}{'cookbook':>14}{'transformers':>14}{'ratio':>8}   tokens/s")
    for work in make_work(arguments.prompts, model.config.vocab_size):
        sides = [
            lambda work=work: by_cookbook(client, work, arguments.top_p),
            lambda work=work: by_generate(model, work, arguments.top_p),
        ]
        times: list[list[float]] = [[], []]
        for _ in range(arguments.rounds):
            for side, found in zip(sides, times, strict=True):
                found.append(seconds(side))
        ours, theirs = (sum(work.num_tokens) / min(found) for found in times)
        ratio = statistics.median(times[1]) / statistics.median(times[0])
        print(f"{work.name:16}{ours:14,.0f}{theirs:14,.0f}{ratio:8.2f}")
    service.close()


if __name__ == "__main__":
    main()
