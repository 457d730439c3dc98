"""Logs a run before its first step: the model, the data, the learning rate and the changed settings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cookbook.data.types import SupervisedDataset, row_counts_of
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.folder import ROUNDING_KEYS, RunFolder
from cookbook.supervised.config import Config
from cookbook.supervised.continuation import Start, total_steps_from
from cookbook.supervised.hyperparameters import fitting_rank
from cookbook.supervised.schedules import learning_rate_at
from cookbook.types import ModelData
from cookbook.utils.notes import counted_noun

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient

logger = logging.getLogger(__name__)

MAX_ADVISED_RANK = 512
LINE_WIDTH = 80
EXPECTED_KINDS = ("embeddings", "norms and vectors", "convolutions", "routers", "other parts")
"""The weights that no adapter is expected on."""


def announce_changes(
    config: Config, folder: RunFolder, checkpoints: CheckpointLog, start: Start, train_data: SupervisedDataset
) -> None:
    """Logs the settings that differ from those of the earlier run, and their effect on the next steps."""
    for key, (was, now) in sorted(folder.changes.items()):
        if key in ROUNDING_KEYS:
            logger.info(
                "%s was %s and is %s: results agree with those of the earlier run to rounding, "
                "not bit for bit.",
                key,
                was,
                now,
            )
    if not folder.length_changes or start.step == 0:
        return
    assert folder.earlier_config is not None
    total_before = total_steps_from(
        start.step,
        start.position,
        train_data,
        folder.earlier_config.get("num_epochs", config.num_epochs),
        folder.earlier_config.get("max_steps"),
        start.rows_per_batch_before,
    )
    was, now = (
        learning_rate_at(
            start.step, total, config.peak_learning_rate, config.lr_schedule, config.warmup_steps
        )
        for total in (total_before, start.total_steps)
    )
    change = f"stays at {now:.3g}" if was == now else f"goes from {was:.3g} to {now:.3g}"
    schedule = f"the {config.lr_schedule} schedule now ends at {start.total_steps}: "
    logger.info(
        "Continuing from step %d of %s to %s; %sthe learning rate %s.",
        start.step,
        "a finished run" if checkpoints.is_finished else "an unfinished run",
        "the end of the data" if start.total_steps is None else f"step {start.total_steps}",
        "" if config.lr_schedule == "constant" else schedule,
        change,
    )
    if start.rows_per_batch_before is None:
        return
    counts, epoch = row_counts_of(train_data), start.position.epoch + 1
    if counts is None:
        logger.info("Batches have a different size from epoch %d on.", epoch)
        return
    assert start.position.row is not None  # a position has a row if rows are counted
    of_all = "" if counts.per_epoch is None else f" of {counts.per_epoch:,}"
    logger.info(
        "Batches have %d rows from here on, %d before: the next is row %s%s of epoch %d.",
        counts.per_batch,
        start.rows_per_batch_before,
        f"{start.position.row + 1:,}",
        of_all,
        epoch,
    )


def announce(
    config: Config,
    folder: RunFolder,
    client: TrainingClient,
    start: Start,
    train_data: SupervisedDataset,
    eval_data: SupervisedDataset | None,
) -> None:
    """Logs the trained weights, the data, and the settings that were chosen for the user."""
    model = client.get_info().model_data
    logger.info(
        "%s on %s in %s%s, %s.",
        config.model_name,
        model.device,
        model.dtype,
        f" ({config.quantization} base)" if config.quantization else "",
        f"LoRA rank {config.lora_rank}" if config.lora_rank else "all weights trained",
    )
    if config.lora_rank:
        for line in adapter_lines(model):
            logger.info("%s", line)
    if not folder.world.is_alone:
        each = "a part of the" if client.samples_together else "all"
        logger.info("%d processes train together; each holds %s base weights.", folder.world.size, each)
    recommended = config.recommended_learning_rate
    if config.learning_rate == recommended.value:
        logger.info("Learning rate %g, %s.", recommended.value, recommended.reason)
        if config.lora_rank and config.lora_alpha != 32:
            logger.info("  It suits lora_alpha=32, and this run has %g.", config.lora_alpha)
    else:
        logger.info("Learning rate %g (auto would be %g).", config.learning_rate, recommended.value)
    num_tokens = sum(report.trained_tokens for report in train_data.reports())
    if config.lora_rank and model.num_trained_parameters < num_tokens:
        rank = fitting_rank(num_tokens, model.num_trained_parameters, config.lora_rank)
        logger.info(
            "The adapter has %s parameters for %s trained tokens. One parameter per token is a rough rule "
            "for LoRA to learn like full fine-tuning: that would be %s.",
            f"{model.num_trained_parameters:,}",
            f"{num_tokens:,}",
            f"lora_rank={rank}" if rank <= MAX_ADVISED_RANK else "full fine-tuning itself, lora_rank=0",
        )
    logger.info(
        "Training on %s, evaluating on %s. %s%s.",
        _size(train_data),
        "nothing" if eval_data is None else _size(eval_data),
        "As many steps as there are batches"
        if start.total_steps is None
        else counted_noun(start.total_steps, "step"),
        f", {start.step:,} of them done" if start.step else "",
    )
    logger.info("Everything goes to %s.", folder.path)


def adapter_lines(model: ModelData) -> list[str]:
    """Returns what share of the weights the adapter is on, and what it is not on, in 80 columns.

    Kinds of weights that might be expected to carry an adapter have a line each, which says why not.
    """
    from cookbook.engine.model.targets import WHY_NOT  # imports torch

    parts = [f"{kind} {share:.1%}" for kind, share in model.without_adapter.items() if share >= 0.0005]
    line = f"The adapter is on {model.adapted_share:.1%} of the weights"
    for place, part in enumerate(parts):
        longer = f"{line}{', ' if place else '; not on '}{part}"
        if len(longer) > LINE_WIDTH - 1:
            break
        line = longer
    reasons = [
        f"  {share:.1%} carry none: {WHY_NOT[kind]} ({kind})."
        for kind, share in model.without_adapter.items()
        if kind in WHY_NOT and kind not in EXPECTED_KINDS and share >= 0.01
    ]
    return [f"{line}.", *reasons]


def _size(dataset: SupervisedDataset) -> str:
    num_batches = dataset.epoch_length()
    if num_batches is None:
        return "a stream"
    num_rows = dataset.summary().get("rows")
    return f"{num_batches:,} batches" if num_rows is None else f"{num_rows:,} rows"
