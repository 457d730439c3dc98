"""Trains by direct preference optimization, on pairs of a chosen and a rejected reply.

    python -m recipes.dpo dataset=pairs.jsonl
    python -m recipes.dpo model_name=Qwen/Qwen3-0.6B dataset=pairs.jsonl beta=0.05 learning_rate=1e-5

Rows have `prompt`, `chosen` and `rejected`, as TRL and the hub have them. It takes every key of recipes.sft.
"""

from __future__ import annotations

import sys
from typing import Any

from cookbook.config import cli
from cookbook.supervised import train
from cookbook.supervised.dpo import DpoConfig, PairDatasetBuilder
from recipes import sft
from renderers import TrainOnWhat

Config = DpoConfig

DEFAULTS: dict[str, Any] = {
    **sft.DEFAULTS,
    "log_path": "runs/dpo",
    "dataset_builder": PairDatasetBuilder,
    "dataset_builder.common_config.train_on_what": TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    "dataset_builder.repeated": "keep",
    "learning_rate": 2e-5,
    "best_metric": "test/dpo_loss",
    "best_mode": "min",
}


def main(argv: list[str] | None = None) -> train.RunSummary:
    summary = cli.run(DpoConfig, train.main, DEFAULTS, prog="recipes.dpo", argv=argv)
    if summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)
    return summary


if __name__ == "__main__":
    main()
