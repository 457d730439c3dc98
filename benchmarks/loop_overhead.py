"""Measures the time of a step in `train.main` relative to a bare loop on pre-built tensors.

    python -m benchmarks.loop_overhead [--steps 60] [--rounds 5]

All sides train the embedded model on the same batches, in turns. The bare loop has its packed batches ready
and only runs forward, backward and AdamW; `train.main` packs, queues, pipelines, reads results and logs, once
on batches rendered beforehand and once with rendering during the run. Evaluation and checkpoints are off.
Each measurement runs in a separate process, since two threads that use OpenMP in one process slow each other
down. On two cores use OMP_NUM_THREADS=1, which leaves the other core to rendering, as with a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import chz
import torch

from cookbook import embedded
from cookbook.data import NamedChatDatasetBuilder
from cookbook.data.types import ChatDatasetBuilderCommonConfig, SupervisedDataset, SupervisedDatasetBuilder
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import check_data, pack
from cookbook.supervised import train
from cookbook.supervised.batches import make_batch
from cookbook.supervised.schedules import learning_rate_at
from cookbook.types import Datum, LoraConfig

WARM_UP_STEPS = 5

Measurement = tuple[float, float, float]
"""Seconds of the timed steps, NLL of the last step, and the fraction of time in which the engine was idle."""


class RenderedBatches(SupervisedDataset):
    def __init__(self, batches: list[list[Datum]]) -> None:
        self._batches = batches

    def get_batch(self, index: int) -> list[Datum]:
        return self._batches[index]

    def __len__(self) -> int:
        return len(self._batches)


@chz.chz
class RenderedBuilder(SupervisedDatasetBuilder):
    """Renders all batches before training, outside of the timed steps."""

    builder: SupervisedDatasetBuilder
    seed: int

    def __call__(self) -> tuple[SupervisedDataset, None]:
        dataset, _ = self.builder()
        dataset.set_epoch(self.seed)
        return RenderedBatches([dataset.get_batch(index) for index in range(len(dataset))]), None


def make_config(num_steps: int, log_path: str) -> train.Config:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=embedded.MODEL_NAME, batch_size=16)
    return train.Config(
        log_path=log_path,
        model_name=embedded.MODEL_NAME,
        dataset_builder=NamedChatDatasetBuilder(common_config=common, test_size=0),
        max_steps=num_steps,
        eval_every=0,
        save_every=0,
    ).resolved()


def seconds_of_main(num_steps: int) -> Measurement:
    return seconds_of(lambda log_path: make_config(num_steps, log_path))


def seconds_of_main_on_rendered_batches(num_steps: int) -> Measurement:
    def make(log_path: str) -> train.Config:
        config = make_config(num_steps, log_path)
        builder = RenderedBuilder(builder=config.dataset_builder, seed=config.seed)
        return chz.replace(config, dataset_builder=builder)

    return seconds_of(make)


def seconds_of(make: Callable[[str], train.Config]) -> Measurement:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(train.main(make(f"{folder}/run")))
        rows = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    timed = [row for row in rows if "train/nll" in row][WARM_UP_STEPS:]
    seconds = sum(row["perf/seconds"] for row in timed)
    return seconds, timed[-1]["train/nll"], sum(row["perf/seconds_idle"] for row in timed) / seconds


def seconds_of_bare_loop(num_steps: int) -> Measurement:
    config = make_config(num_steps, "unused")
    dataset, _ = config.dataset_builder()
    dataset.set_epoch(config.seed)
    base = BaseModel(config.model_name)
    lora = LoraConfig(rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    adapter = base.adapters.add(lora)
    parameters = list(adapter.weights.values())
    optimizer = torch.optim.AdamW(
        parameters,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    batches = []
    for step in range(num_steps):
        data = make_batch(dataset.get_batch(step)).data
        sequences = check_data(data, ("target_tokens",), base.vocab_size)
        batches.append(pack(sequences, base.device, trained_only=True))
    nll = 0.0
    with base.adapters.using(adapter):
        for step, batch in enumerate(batches):
            if step == WARM_UP_STEPS:
                started = time.perf_counter()
            weights_P = batch.weights_P
            _, loss = base.backpropagate(
                batch, lambda logprobs_C, part, w_S=weights_P: -(w_S[part] * logprobs_C).sum(), False
            )
            torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(
                step, num_steps, config.learning_rate, config.lr_schedule
            )
            optimizer.step()
            optimizer.zero_grad()
            nll = float(loss)
    return time.perf_counter() - started, nll, 0.0


SIDES = {
    "bare": seconds_of_bare_loop,
    "rendered": seconds_of_main_on_rendered_batches,
    "main": seconds_of_main,
}


def measure(side: str, num_steps: int) -> Measurement:
    """Measures one side in a new process."""
    command = [sys.executable, "-m", "benchmarks.loop_overhead", "--side", side, "--steps", str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    seconds, nll, idle = map(float, done.stdout.split()[-3:])
    return seconds, nll, idle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(*SIDES[arguments.side](arguments.steps))
        return
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    idle: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        nlls = []
        for side, measured in seconds.items():
            found, nll, idle_share = measure(side, arguments.steps)
            measured.append(found)
            idle[side].append(idle_share)
            nlls.append(nll)
        assert max(nlls) - min(nlls) < 1e-4, f"not the same work: last NLLs {nlls}"
        print(
            f"round {number}: "
            + ", ".join(f"{side} {measured[-1]:.2f} s" for side, measured in seconds.items())
        )
    bare = statistics.median(seconds["bare"])
    print(
        f"{arguments.steps - WARM_UP_STEPS} steps of the bare loop: {bare:.2f} s, "
        f"median of {arguments.rounds} rounds"
    )
    for side, what in {"rendered": "on rendered batches", "main": "with rendering"}.items():
        ratios = [found / base for found, base in zip(seconds[side], seconds["bare"], strict=True)]
        print(
            f"train.main {what}: {statistics.median(seconds[side]) / bare:.3f} of it "
            f"(rounds {min(ratios):.3f} to {max(ratios):.3f}); "
            f"engine idle {statistics.median(idle[side]):.1%}"
        )


if __name__ == "__main__":
    main()
