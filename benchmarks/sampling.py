"""Measures tokens per second of sampling, compared with transformers' `generate` on one batch, and with its
continuous batching.

    python -m benchmarks.sampling [--prompts 64] [--rounds 3] [--top-p 0.95] [--batch-tokens 2048]
    python -m benchmarks.sampling --shared [--rounds 3] [--hybrid qwen3_5] [--cases chat system]

There are two sets of prompts for the model of `step_model` with its adapter: prompts and continuations of
equal lengths, and of mixed lengths (20 to 1,000 tokens, continued by 8 to 128) as in an evaluation.
`generate` gets all prompts as one left-padded batch, which runs until the longest continuation is complete.
Continuous batching gets them as single requests, each with its own length, from a manager that runs already;
its blocks of keys and values suffice for all of them. There are no stop tokens, so all sides sample all
requested tokens, and only these count. The sides run in turns; the table has the best round of each and the
ratio of the medians. If continuous batching does not run on this machine, its column has no number and the
line says why.

With `--shared`, the cases are of prompts that share beginnings, and this engine runs them with and without
reusing what they share, each round with a new client. With `--hybrid` the model is one of `benchmarks.hybrids
--wide`, which has recurrent layers, without an adapter.

samples    16 samples of 32 tokens for one prompt of 500
group      the same as 16 requests of one sample
chat       10 turns of a conversation that begins with 100 tokens: questions of 80 tokens, replies of 32
rewritten  the same, but the last 4 tokens of a prompt and the first 10 of a reply are not in the next prompt
system     64 prompts of 40 tokens after a common system prompt of 300, continued by 16
nothing    64 prompts of 340 tokens that share nothing, continued by 16

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

from benchmarks import hybrids
from benchmarks.step_model import load_adapted_model, make_folders
from cookbook import ModelInput, SampleResponse, SamplingClient, SamplingParams, ServiceClient
from cookbook.engine.sampling.packed_decoder import PackedDecoder


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


class ContinuousBatching:
    """The scheduler of transformers, which adds and removes requests between two steps."""

    def __init__(self, model: Any, works: list[Work], top_p: float, batch_tokens: int) -> None:
        """Starts it. `batch_tokens` is the most tokens of a step."""
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        pages = max(
            sum(
                -(-(len(prompt) + new) // PAGE)
                for prompt, new in zip(work.prompts, work.num_tokens, strict=True)
            )
            for work in works
        )
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=top_p, eos_token_id=-1, pad_token_id=0,
                max_new_tokens=max(max(work.num_tokens) for work in works),
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=2 * pages, max_batch_tokens=batch_tokens
            ),
        )  # fmt: skip
        self._manager.start()

    def run(self, work: Work) -> None:
        """Raises RuntimeError with the library's reason if it does not run here."""
        wanted = {
            self._manager.add_request(prompt, max_new_tokens=num_tokens): num_tokens
            for prompt, num_tokens in zip(work.prompts, work.num_tokens, strict=True)
        }
        while wanted:
            result = self._manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == wanted.pop(result.request_id)
            elif result is None and not self._manager.is_running():
                raise RuntimeError(f"its thread ended: {getattr(self._manager, 'fatal_error', None)}")

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10)


PAGE = 32
"""The tokens of a page of continuous batching."""

Ask = Callable[[list[list[int]], int, int], list[SampleResponse]]
"""Samples prompts at the same time, given the number of samples and of tokens."""


def samples(ask: Ask, text: Callable[[int], list[int]]) -> None:
    ask([text(500)], 16, 32)


def group(ask: Ask, text: Callable[[int], list[int]]) -> None:
    ask([text(500)] * 16, 1, 32)


def chat(ask: Ask, text: Callable[[int], list[int]], opening: int = 0, thought: int = 0) -> None:
    history = text(100)
    for _ in range(10):
        history += text(80)
        (response,) = ask([history + text(opening)], 1, 32)
        history = history + response.sequences[0].tokens[thought:]


def rewritten(ask: Ask, text: Callable[[int], list[int]]) -> None:
    chat(ask, text, opening=4, thought=10)


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


SHARED = {case.__name__: case for case in (samples, group, chat, rewritten, system, nothing)}


def compare_shared(make_client: Callable[[], SamplingClient], cases: list[str], num_rounds: int) -> None:
    """Prints the table of `--shared`."""
    columns = f"{'reused':>9}{'not':>9}{'ratio':>8}{'medians':>9}"
    print(f"{'':10}{'all: CPU seconds':>35}{'prefills':>35}\n{'':10}{columns}{columns}")
    for name in cases:
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(num_rounds + 1):
            for reuses in (True, False) if number % 2 else (False, True):
                client = make_client()
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
                base, vocab_size = client._engine.base, client._engine.base.vocab_size
                base.reuses_prompts, base.make_decoder = reuses, TimedDecoder
                num_prompt_tokens = num_hits = 0
                TimedDecoder.prefill_seconds = 0.0
                started = time.process_time()
                SHARED[name](
                    ask, lambda num, rng=rng, size=vocab_size: rng.integers(3, size, size=num).tolist()
                )
                if number:  # the first round warms up
                    spent = time.process_time() - started
                    times[reuses].append((spent, TimedDecoder.prefill_seconds))
                client.close()
                if reuses:
                    share = num_hits / num_prompt_tokens
        line = f"{name:10}"
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
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a step of continuous batching")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--hybrid", choices=hybrids.FAMILIES)
    parser.add_argument("--cases", nargs="*", choices=SHARED, default=[*SHARED])
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "cookbook-benchmarks"
    _, adapter_folder = make_folders(folder)
    service = ServiceClient(device="cpu")
    if arguments.shared:
        if arguments.hybrid is None:
            adapter, model_folder = str(adapter_folder), folder / "model"
        else:
            adapter = None
            model_folder = hybrids.make_model(arguments.hybrid, folder / arguments.hybrid, is_wide=True)
        compare_shared(
            lambda: service.create_sampling_client(adapter, str(model_folder)),
            arguments.cases,
            arguments.rounds,
        )
        service.close()
        return
    client = service.create_sampling_client(adapter_folder, str(folder / "model"))
    model = load_adapted_model(folder).eval()
    model.generation_config.eos_token_id = None
    works = make_work(arguments.prompts, model.config.vocab_size)
    continuous = ContinuousBatching(model.get_base_model(), works, arguments.top_p, arguments.batch_tokens)
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, top_p {arguments.top_p:g}\n")
    print(f"{'':16}{'cookbook':>14}{'generate':>14}{'ratio':>8}{'continuous':>14}{'ratio':>8}   tokens/s")
    for work in works:
        compare(
            work,
            [
                lambda work=work: by_cookbook(client, work, arguments.top_p),
                lambda work=work: by_generate(model, work, arguments.top_p),
                lambda work=work: continuous.run(work),
            ],
            arguments.rounds,
        )
    continuous.stop()
    service.close()


def compare(work: Work, sides: list[Callable[[], None]], num_rounds: int) -> None:
    """Prints a line of the table. A side that cannot run has the reason behind it."""
    times: list[list[float]] = [[] for _ in sides]
    reason = ""
    for _ in range(num_rounds):
        for side, found in zip(sides, times, strict=True):
            try:
                found.append(seconds(side))
            except RuntimeError as error:
                if side is not sides[-1]:
                    raise
                reason = f"   continuous batching does not run: {error}"
    rate, *others = (sum(work.num_tokens) / min(found) if found else None for found in times)
    line = f"{work.name:16}{rate:14,.0f}"
    for other, found in zip(others, times[1:], strict=True):
        if other is None:
            line += f"{'-':>14}{'-':>8}"
        else:
            line += f"{other:14,.0f}{statistics.median(found) / statistics.median(times[0]):8.2f}"
    print(f"{line}{reason}", flush=True)


if __name__ == "__main__":
    main()
