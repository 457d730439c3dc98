"""Wall time of a step in `train.main` over the same step on pre-built tensors in a bare loop.

    python -m benchmarks.loop_overhead [--steps 60] [--rounds 5]

Both sides train the embedded model on the same batches, in turns, in one process. The bare loop
holds its packed batches ready and does nothing but forward, backward and AdamW; `train.main`
renders, packs, queues, pipelines, reads back and logs. Evaluation and checkpoints are off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cookbook import embedded
from cookbook.engine.base_model import BaseModel
from cookbook.engine.packing import check_data, pack
from cookbook.schedules import learning_rate_at
from cookbook.supervised import train
from cookbook.supervised.batches import make_batch
from cookbook.supervised.data import NamedChatDatasetBuilder
from cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from cookbook.types import LoraConfig

WARM_UP_STEPS = 5


def make_config(num_steps: int, log_path: str) -> train.Config:
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=embedded.MODEL_NAME, batch_size=16)
    return train.Config(
        log_path=log_path,
        model_name=embedded.MODEL_NAME,
        dataset_builder=NamedChatDatasetBuilder(common_config=common, test_size=0),
        max_steps=num_steps,
        eval_every=0,
        save_every=0,
    )


def seconds_of_main(num_steps: int) -> tuple[float, float]:
    """Seconds of the timed steps, and the last step's NLL."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(train.main(make_config(num_steps, f"{folder}/run")))
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/nll" in row]
    return sum(row["perf/seconds"] for row in rows[WARM_UP_STEPS:]), rows[-1]["train/nll"]


def seconds_of_bare_loop(num_steps: int) -> tuple[float, float]:
    config = make_config(num_steps, "unused")
    dataset, _ = config.dataset_builder()
    dataset.set_epoch(config.seed)
    base = BaseModel(config.model_name)
    lora = LoraConfig(rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    adapter = base.add_adapter(lora)
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
    with base.using(adapter):
        for step, batch in enumerate(batches):
            if step == WARM_UP_STEPS:
                started = time.perf_counter()
            loss = -(batch.scored(batch.weights_N) * base.logprobs(batch)).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(
                step, num_steps, config.learning_rate, config.lr_schedule
            )
            optimizer.step()
            optimizer.zero_grad()
            nll = float(loss.detach())
    return time.perf_counter() - started, nll


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ratios = []
    for number in range(arguments.rounds):
        bare, bare_nll = seconds_of_bare_loop(arguments.steps)
        main_seconds, main_nll = seconds_of_main(arguments.steps)
        assert abs(bare_nll - main_nll) < 1e-4, f"not the same work: NLL {bare_nll} and {main_nll}"
        ratios.append(main_seconds / bare)
        print(
            f"round {number}: bare loop {bare:.2f} s, train.main {main_seconds:.2f} s, ratio {ratios[-1]:.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f} (of {len(ratios)}; {arguments.steps} steps each)")


if __name__ == "__main__":
    main()
