"""Everything before the first step of a run: data, model, evaluators, loggers, position."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from cookbook import models
from cookbook.checkpoints import CheckpointLog
from cookbook.errors import ConfigError, DataError
from cookbook.eval.evaluators import Evaluator
from cookbook.loggers import ConsoleLogger, JsonlLogger, MetricLogger, WandbLogger
from cookbook.supervised.batches import BatchQueue
from cookbook.supervised.nll_evaluator import NLLEvaluator
from cookbook.supervised.run import Run
from cookbook.supervised.run_folder import RunFolder
from cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

if TYPE_CHECKING:
    from cookbook.supervised.train import Config
    from cookbook.training_client import TrainingClient

logger = logging.getLogger(__name__)


async def start_run(config: Config, folder: RunFolder, checkpoints: CheckpointLog, console: Console) -> Run:
    """Puts a run together. Whatever can be refused is refused before a model is loaded."""
    with ExitStack() as stack:
        _check_start_weights(config)
        _check_tokenizer(config)
        train_data, eval_data = config.dataset_builder()
        steps = _remaining_steps(config, checkpoints, len(train_data))
        batches = stack.enter_context(
            BatchQueue(train_data, steps, config.seed, ahead=config.submit_ahead + 2)
        )
        await batches.check()
        evaluators = _make_evaluators(config, eval_data)
        client = await _create_client(config, folder, checkpoints, stack)
        _announce(config, folder, client, train_data, eval_data, steps)
        metric_loggers = _make_loggers(config, folder, steps, console, stack)
        resources = stack.pop_all()
    return Run(
        config=config,
        log_path=folder.path,
        steps=steps,
        train_data=train_data,
        client=client,
        batches=batches,
        checkpoints=checkpoints,
        evaluators=evaluators,
        metric_loggers=metric_loggers,
        resources=resources,
    )


def _check_start_weights(config: Config) -> None:
    if config.load_checkpoint_path is not None:
        from cookbook.engine import state

        state.read_info(config.load_checkpoint_path)


def _check_tokenizer(config: Config) -> None:
    """Tokens of another vocabulary would train another model than the one that is meant."""
    builder = config.dataset_builder
    if not isinstance(builder, ChatDatasetBuilder):
        return
    name = builder.common_config.model_name_for_tokenizer
    if name != config.model_name:
        theirs, ours = models.get_tokenizer(name), models.get_tokenizer(config.model_name)
        if theirs.get_vocab() != ours.get_vocab():
            raise ConfigError(
                f"The data are tokenized for {name!r}, whose vocabulary is not that of "
                f"model_name={config.model_name!r}. Give both the same name."
            )


def _remaining_steps(config: Config, checkpoints: CheckpointLog, num_batches: int) -> range:
    total_steps = config.num_epochs * num_batches
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    last = checkpoints.last()
    if last is None:
        return range(total_steps)
    if divmod(last.step, num_batches) != (last.epoch, last.batch):
        raise DataError(
            f"The data have changed: step {last.step} would go on with another batch than it would have "
            f"({num_batches} batches an epoch now). Restore them, or choose another log_path."
        )
    return range(last.step, total_steps)


def _make_evaluators(
    config: Config, eval_data: SupervisedDataset | None
) -> list[tuple[int, list[Evaluator]]]:
    frequent: list[Evaluator] = [] if eval_data is None else [NLLEvaluator(eval_data)]
    frequent += [build() for build in config.evaluator_builders]
    infrequent = [build() for build in config.infrequent_evaluator_builders]
    return [(config.eval_every, frequent), (config.infrequent_eval_every, infrequent)]


async def _create_client(
    config: Config, folder: RunFolder, checkpoints: CheckpointLog, stack: ExitStack
) -> TrainingClient:
    from cookbook.engine.state import remove_unfinished
    from cookbook.service import ServiceClient

    remove_unfinished(folder.checkpoint_dir)
    service = ServiceClient(config.device, config.dtype, checkpoint_dir=folder.checkpoint_dir)
    stack.callback(service.close)
    client = await service.create_lora_training_client_async(
        config.model_name,
        rank=config.lora_rank,
        seed=config.seed,
        train_mlp=config.train_mlp,
        train_attn=config.train_attn,
        train_unembed=config.train_unembed,
        user_metadata={"renderer_name": str(config.renderer_name)},
        alpha=config.lora_alpha,
    )
    last = checkpoints.last()
    if last is not None:
        await client.load_state_with_optimizer(checkpoints.path_of(last))
    elif config.load_checkpoint_path is not None:
        await client.load_state(config.load_checkpoint_path)
    return client


def _make_loggers(
    config: Config, folder: RunFolder, steps: range, console: Console, stack: ExitStack
) -> list[MetricLogger]:
    made: list[MetricLogger] = []

    def keep(metric_logger: MetricLogger) -> None:
        made.append(metric_logger)
        stack.callback(metric_logger.close)

    keep(JsonlLogger(folder.path / "metrics.jsonl", first_step=steps.start))
    if config.wandb_project is not None:
        keep(WandbLogger(folder.path, config.wandb_project, config.wandb_name, folder.config))
    keep(ConsoleLogger(console, total_steps=steps.stop, first_step=steps.start))
    return made


def _announce(
    config: Config,
    folder: RunFolder,
    client: TrainingClient,
    train_data: SupervisedDataset,
    eval_data: SupervisedDataset | None,
    steps: range,
) -> None:
    info = client.get_info().model_data
    logger.info("%s on %s in %s, LoRA rank %d.", config.model_name, info.device, info.dtype, config.lora_rank)
    logger.info(
        "Training on %s, evaluating on %s. %d steps%s.",
        _size(train_data),
        "nothing" if eval_data is None else _size(eval_data),
        steps.stop,
        f", {steps.start} of them done" if steps.start else "",
    )
    logger.info("Everything goes to %s.", folder.path)


def _size(dataset: SupervisedDataset) -> str:
    num_rows = dataset.summary().get("rows")
    return f"{len(dataset):,} batches" if num_rows is None else f"{num_rows:,} rows"
