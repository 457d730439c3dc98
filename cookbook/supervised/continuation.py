"""Finds where a run begins or resumes: the step, the position in the data, the total number of steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import chz

from cookbook.config.chz_private import given_value
from cookbook.data.types import (
    ChatDatasetBuilder,
    ChatDatasetBuilderCommonConfig,
    SupervisedDataset,
    row_counts_of,
)
from cookbook.errors import ConfigError, DataError
from cookbook.runs.checkpoints import FINAL, Checkpoint, CheckpointLog
from cookbook.runs.folder import RunFolder, how_to_train_on, recorded_config
from cookbook.supervised.batches import BEGINNING, Position
from cookbook.supervised.config import Config
from cookbook.utils import json_files
from cookbook.utils.json_files import JsonOrigin, Positive
from cookbook.utils.notes import counted_noun

logger = logging.getLogger(__name__)

_Config = TypeVar("_Config", Config, ChatDatasetBuilderCommonConfig)

_EARLIER_DEFAULT = "chat_template"
"""The renderer that earlier versions chose for models which now have one of their own."""


@dataclass(frozen=True)
class Start:
    """The next step and the total number of steps."""

    step: int
    position: Position
    total_steps: int | None
    """None if the run ends with data of unknown length."""
    rows_per_batch_before: int | None = None
    """The earlier batch size if it changes, else None."""


def with_recorded_format(config: Config) -> Config:
    """Returns the config with `renderer_name=chat_template` if the run that it resumes was begun so.

    That was the default for models which now have a renderer of their own. A renderer that the config names
    is kept.
    """
    recorded = recorded_config(config.log_path) if config.if_log_path_exists == "resume" else None
    if recorded is None:
        return config
    config = _with_recorded_format(config, recorded)
    builder, of_data = config.dataset_builder, recorded.get("dataset_builder")
    common = of_data.get("common_config") if isinstance(of_data, dict) else None
    if not isinstance(builder, ChatDatasetBuilder) or not isinstance(common, dict):
        return config
    changed = _with_recorded_format(builder.common_config, common)
    if changed is builder.common_config:
        return config
    return chz.replace(config, dataset_builder=chz.replace(builder, common_config=changed))


def _with_recorded_format(config: _Config, recorded: Mapping[str, Any]) -> _Config:
    is_default = given_value(config, "renderer_name") is None
    if not is_default or recorded.get("renderer_name") != _EARLIER_DEFAULT:
        return config
    return chz.replace(config, renderer_name=_EARLIER_DEFAULT)


def check_length(config: Config, folder: RunFolder, checkpoints: CheckpointLog) -> None:
    """Raises ConfigError if the config ends before the last checkpoint. Reads no data."""
    last = checkpoints.last()
    if last is None:
        return
    longer = f"Give a larger one. Checkpoints of earlier steps are in {folder.checkpoint_dir}."
    if config.max_steps is not None and config.max_steps < last.step:
        raise ConfigError(
            f"max_steps={config.max_steps}, but the run in log_path={folder.path} has taken {last.step} "
            f"steps. {longer}"
        )
    if (last.epoch, last.batch) > (config.num_epochs, 0):
        raise ConfigError(
            f"num_epochs={config.num_epochs}, but the run in log_path={folder.path} is in epoch "
            f"{last.epoch + 1} of its data. {longer}"
        )


def find_start(
    config: Config,
    folder: RunFolder,
    checkpoints: CheckpointLog,
    train_data: SupervisedDataset,
    eval_data: SupervisedDataset | None,
) -> Start:
    """Returns where the run begins or resumes, and records the report on the data in the folder.

    Raises DataError if the data have changed, and ConfigError if no steps are left.
    """
    last = checkpoints.last()
    before = _batch_size_before(folder)
    position = BEGINNING
    if last is not None:
        _check_same_data(folder, last, train_data, before)
        position = _position_of(folder, last, train_data, before)
    _record_data(folder, train_data, eval_data)
    step = 0 if last is None else last.step
    total = total_steps_from(step, position, train_data, config.num_epochs, config.max_steps)
    if total is None and config.lr_schedule != "constant":
        raise ConfigError(
            f"lr_schedule={config.lr_schedule} falls to 0 at the last step, and the length of the "
            f"streamed data is unknown. Set max_steps=, or choose lr_schedule=constant."
        )
    if last is not None and last.name == FINAL and checkpoints.is_finished:
        _check_that_steps_are_left(config, folder, step, total)
    return Start(step, position, total, before if last is not None else None)


def _batch_size_before(folder: RunFolder) -> int | None:
    """Returns the earlier batch size of the run if it changes, else None."""
    sizes: list[Any] = [
        was for key, (was, _) in folder.length_changes.items() if key.split(".")[-1] == "batch_size"
    ]
    if not sizes:
        return None
    path = folder.path / "config.json"
    origin = JsonOrigin(str(path), ConfigError, f"Restore it. {how_to_train_on(folder.path)}")
    json_files.check({"batch_size": sizes[0]}, {"batch_size": Positive | None}, origin)
    return sizes[0]


def _position_of(
    folder: RunFolder, last: Checkpoint, train_data: SupervisedDataset, before: int | None
) -> Position:
    """Returns the position in the data after a checkpoint, also if the batch size has changed."""
    counts = row_counts_of(train_data)
    if counts is not None:
        row = last.batch * (before or counts.per_batch) if last.row is None else last.row
        return Position(last.epoch, last.batch, row)
    if before is not None and last.batch > 0:
        raise ConfigError(
            f"batch_size was {before} and is different now, in the middle of an epoch: a "
            f"{type(train_data).__name__} gives batches by number alone, so the run cannot resume at the "
            f"next row. {how_to_train_on(folder.path)}"
        )
    return Position(last.epoch, last.batch)


def _check_same_data(
    folder: RunFolder, last: Checkpoint, train_data: SupervisedDataset, before: int | None
) -> None:
    """Raises DataError if the data are known to differ from those the run began with."""
    recorded = folder.read_data_report()
    counts = row_counts_of(train_data)
    has_moved = recorded.get("fingerprint") != train_data.fingerprint()
    if recorded.get("rows") is not None:
        has_moved |= counts is None or counts.per_epoch != recorded["rows"]
    elif last.row is None and (num_batches := _num_batches(train_data, before)) is not None:
        has_moved |= divmod(last.step, num_batches) != (last.epoch, last.batch)
    if has_moved:
        raise DataError(
            f"The data have changed since this run began: step {last.step} would continue with other "
            f"batches than it would have. Restore them. {how_to_train_on(folder.path)}"
        )


def _num_batches(train_data: SupervisedDataset, batch_size: int | None) -> int | None:
    """Returns the batches in an epoch, None if unknown. A `batch_size` of None is the dataset's own."""
    if batch_size is None:
        return train_data.epoch_length()
    counts = row_counts_of(train_data)
    if counts is None or counts.per_epoch is None:
        return None
    return -(-counts.per_epoch // batch_size)


def _record_data(
    folder: RunFolder, train_data: SupervisedDataset, eval_data: SupervisedDataset | None
) -> None:
    counts = row_counts_of(train_data)
    reports = list(train_data.reports())
    others = [] if eval_data is None else [one for one in eval_data.reports() if one not in reports]
    folder.write_data_report(
        train_data.fingerprint(),
        None if counts is None else counts.per_epoch,
        [report.to_json() for report in reports],
        [report.to_json() for report in others],
    )


def total_steps_from(
    step: int,
    position: Position,
    train_data: SupervisedDataset,
    num_epochs: int,
    max_steps: int | None,
    batch_size: int | None = None,
) -> int | None:
    """Returns the total number of steps of a run that is at `position` after `step` steps.

    A `batch_size` of None is the dataset's own. Returns None if only data of unknown length end the run.
    """
    num_batches = _num_batches(train_data, batch_size)
    if num_batches is None:
        return max_steps
    counts = row_counts_of(train_data)
    if position.epoch >= num_epochs:
        num_left = 0
    elif counts is None or position.row is None:
        num_left = (num_epochs - position.epoch) * num_batches - position.batch
    else:
        assert counts.per_epoch is not None  # else num_batches would be None
        in_epoch = -(-(counts.per_epoch - position.row) // (batch_size or counts.per_batch))
        num_left = in_epoch + (num_epochs - position.epoch - 1) * num_batches
    return step + num_left if max_steps is None else min(step + num_left, max_steps)


def _check_that_steps_are_left(config: Config, folder: RunFolder, step: int, total: int | None) -> None:
    """Raises ConfigError if a finished run would get no more steps."""
    if total is None or total > step:
        return
    now = ", ".join(f"{key.split('.')[-1]}={value}" for key, (_, value) in sorted(folder.changes.items()))
    by_steps = config.max_steps is not None and config.max_steps <= step
    raise ConfigError(
        f"The run in log_path={folder.path} is finished after {counted_noun(step, 'step')}, and "
        f"{now} adds none: "
        + (f"max_steps={config.max_steps}." if by_steps else f"num_epochs={config.num_epochs} is done.")
        + f" To continue it give a larger {'max_steps' if by_steps else 'num_epochs'}."
    )
