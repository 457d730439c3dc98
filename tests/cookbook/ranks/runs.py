"""A run of `train.main` in each process, as the command line runs it."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import chz
from waiting import wait_until

from cookbook.config import cli
from cookbook.eval.evaluators import EvaluatorBuilder, TrainingClientEvaluator
from cookbook.supervised import train


class Pause(TrainingClientEvaluator):
    """Waits, when it is called for the second time, for the file that $PAUSE_UNTIL names."""

    _num_calls = 0

    async def __call__(self, training_client: Any) -> dict[str, float]:
        self._num_calls += 1
        file = os.environ.get("PAUSE_UNTIL")
        if file and self._num_calls == 2:
            await asyncio.to_thread(wait_until, Path(file).exists, 120)
        return {}


@chz.chz
class PauseBuilder(EvaluatorBuilder):
    def __call__(self) -> Pause:
        return Pause()


def run(config: dict[str, Any], of_rank: dict[str, dict[str, Any]] | None = None, work_in: str = "") -> Any:
    """`of_rank` has keys that some ranks are started with; `work_in` is a folder, with {rank} in its name."""
    rank = os.environ.get("RANK", "0")
    if work_in:
        os.chdir(work_in.format(rank=rank))
    file = Path(f"config-{os.getpid()}.json").absolute()
    file.write_text(json.dumps(config | (of_rank or {}).get(rank, {})), encoding="utf-8")
    summary = cli.run(train.Config, train.main, {}, prog="recipes.sft", argv=[f"config={file}"])
    return {
        **asdict(summary),
        "best": None,
        "log_path": str(summary.log_path),
        "checkpoint_path": str(summary.checkpoint_path),
    }
