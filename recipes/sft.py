"""Supervised fine-tuning of a chat model.

    python -m recipes.sft
    python -m recipes.sft model_name=Qwen/Qwen3-0.6B dataset=no_robots
    python -m recipes.sft config=configs/no_robots_qwen3.yaml learning_rate=2e-4

Without arguments it teaches the embedded model to talk like a pirate, in about a minute on two
CPU cores.
"""

from __future__ import annotations

import sys
from typing import Any

from chz.blueprint import Reference

from cookbook import embedded
from cookbook.config import cli
from cookbook.data import NamedChatDatasetBuilder
from cookbook.eval.samples import SamplesEvaluatorBuilder
from cookbook.supervised import train

DEFAULTS: dict[str, Any] = {
    "log_path": "runs/sft",
    "model_name": embedded.MODEL_NAME,
    "renderer_name": None,
    "system_prompt": None,
    "tools_in_system": False,
    "template_kwargs": None,
    "seed": 0,
    "dataset_builder": NamedChatDatasetBuilder,
    "dataset_builder.common_config.model_name_for_tokenizer": Reference("model_name"),
    "dataset_builder.common_config.renderer_name": Reference("renderer_name"),
    "dataset_builder.common_config.system_prompt": Reference("system_prompt"),
    "dataset_builder.common_config.tools_in_system": Reference("tools_in_system"),
    "dataset_builder.common_config.template_kwargs": Reference("template_kwargs"),
    "dataset_builder.common_config.batch_size": 8,
    "dataset_builder.shuffle_seed": Reference("seed"),
    "infrequent_evaluator_builders.0": SamplesEvaluatorBuilder,
}


def main(argv: list[str] | None = None) -> train.RunSummary:
    summary = cli.run(train.Config, train.main, DEFAULTS, prog="recipes.sft", argv=argv)
    if summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)
    return summary


if __name__ == "__main__":
    main()
