"""Estimates memory, time and disk of a fine-tune, before a model is loaded.

    python -m recipes.estimate
    python -m recipes.estimate model_name=Qwen/Qwen3-8B dataset=chats.jsonl card=4090
    python -m recipes.estimate config=configs/no_robots_qwen3.yaml quantization=nf4 card=l40s
    python -m recipes.estimate table

Accepts every key of recipes.sft. It reads the data and the model's config, and no weights. `card` names a GPU
that need not be in this machine. `table` prints what well-known models need on several cards: the tokens of a
micro-batch, the longest sequence, the largest model.
"""

from __future__ import annotations

import logging
import sys

import chz

from cookbook import models
from cookbook.config import cli
from cookbook.engine.cards import CARDS
from cookbook.errors import ConfigError
from cookbook.supervised import estimate, memory_table, train
from cookbook.supervised.batches import BEGINNING
from cookbook.supervised.continuation import total_steps_from
from cookbook.utils.nearest import did_you_mean
from cookbook.utils.rich_console import make_console, plain
from recipes.sft import DEFAULTS


@chz.chz
class EstimateConfig(train.Config):
    """The run, and the card to estimate it for."""

    card: str | None = chz.field(
        default=None, doc=f"GPU to estimate for: {', '.join(CARDS)}; default: the device of this machine"
    )

    @chz.validate
    def _check_card(self) -> None:
        if self.card is not None and self.card not in CARDS:
            raise ConfigError(
                f"card={self.card} is not known.{did_you_mean(self.card, CARDS)} Cards: {', '.join(CARDS)}."
            )


async def run(config: EstimateConfig) -> None:
    models.check_vocabulary(config.model_name)
    train_data, _ = config.data_builder()
    steps = total_steps_from(0, BEGINNING, train_data, config.num_epochs, config.max_steps)
    card = None if config.card is None else CARDS[config.card]
    made = estimate.estimate(config, estimate.length_of(config, train_data, steps), card)
    make_console().print(plain("\n".join([f"{config.model_name}, {config.log_path}", *made.lines()])))


def print_table() -> None:
    logging.disable(logging.INFO)
    console = make_console()
    found = list(memory_table.rows())
    for text, table in (
        (
            "Tokens of a micro-batch of sequences of 2,048 tokens, bfloat16, LoRA of rank 32 on all layers.\n"
            "*: layers run again in the backward pass. **: and their inputs are kept in host memory.\n"
            "-: does not fit. Derived from configs, not measured.",
            memory_table.markdown(found),
        ),
        (
            "The longest sequence in tokens, for each size of memory. +: the model takes no longer ones.\n"
            "-: not even one token fits. Derived from configs, not measured.",
            memory_table.longest_markdown(found),
        ),
        (
            "The largest of these models whose sequences of 2,048 tokens fit. Derived, not measured.",
            memory_table.largest_markdown(found),
        ),
    ):
        console.print(plain(f"{text}\n\n{table}\n"))


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["table"]:
        with cli.exiting_on_errors():
            print_table()
        return
    cli.run(EstimateConfig, run, DEFAULTS, prog="recipes.estimate", argv=arguments)


if __name__ == "__main__":
    main()
