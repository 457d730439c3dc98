"""Everything before the first step of a run: data, model, evaluators, loggers, position."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cookbook import models
from cookbook.data.types import ChatDatasetBuilder, SupervisedDataset
from cookbook.errors import ConfigError
from cookbook.eval.evaluators import AnyEvaluatorBuilder, Evaluation, Evaluator, EvaluatorBuilder, RunContext
from cookbook.eval.nll import NLLEvaluator
from cookbook.loggers import (
    ConsoleLogger,
    JsonlLogger,
    MetricLogger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)
from cookbook.report.live import ReportLogger
from cookbook.runs import environment
from cookbook.runs.checkpoints import CheckpointLog
from cookbook.runs.folder import RunFolder
from cookbook.runs.rows import OF_EVERY_STEP
from cookbook.supervised.agreement import check_same_data
from cookbook.supervised.batches import BatchQueue
from cookbook.supervised.best import BestTracker
from cookbook.supervised.config import Config
from cookbook.supervised.continuation import Start, announce, find_start
from cookbook.supervised.hyperparameters import fitting_rank
from cookbook.supervised.preflight import check_evaluations, check_space
from cookbook.supervised.run import Resources, Run
from cookbook.supervised.step_times import StepTimes
from cookbook.trace import Recorder
from cookbook.utils.tables import Table

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient

logger = logging.getLogger(__name__)

MAX_ADVISED_RANK = 512


async def start_run(config: Config, folder: RunFolder, checkpoints: CheckpointLog, console: Console) -> Run:
    """Puts a run together. Whatever can be refused is refused before a model is loaded."""
    with ExitStack() as stack:
        _warn_of_other_formats(config, is_resumed=checkpoints.last() is not None)
        evaluators = _make_evaluators(config, folder)
        with folder.world.first_on_each_machine():
            train_data, eval_data = config.dataset_builder()
        check_same_data(folder.world, train_data, eval_data)
        _report_data(train_data, eval_data)
        check_evaluations(config, has_eval_data=eval_data is not None)
        _check_lengths(config, train_data, eval_data)
        start = find_start(config, folder, checkpoints, train_data, eval_data)
        first_step, total_steps = start.step, start.total_steps
        batches = stack.enter_context(
            BatchQueue(
                train_data,
                config.seed,
                ahead=config.submit_ahead + 2,
                num_epochs=config.num_epochs,
                num_steps=None if total_steps is None else total_steps - first_step,
                start=start.position,
            )
        )
        await batches.check()
        if eval_data is not None:
            evaluators[0][1].insert(0, NLLEvaluator(eval_data))
        known = _known_evaluation(folder, first_step)
        restarts = _patience_restarts(config, folder, checkpoints, first_step)
        tracker = _track_best(config, folder, first_step, evaluators, restarts)
        recorder = Recorder()
        client = await _create_client(config, folder, checkpoints, recorder, stack)
        if not client.samples_together:
            check_space(
                config.log_path, folder.path, client.get_info().model_data.num_trained_parameters * 10
            )
        announce(config, folder, checkpoints, start, train_data)
        _continue(folder, checkpoints, start, has_restarted=first_step in restarts)
        _announce(config, folder, client, train_data, eval_data, first_step, total_steps)
        if folder.world.is_main:
            environment.record(folder.path, client.get_info().model_data)
        metric_loggers = _make_loggers(config, folder, start, known, console, stack)
        trace_path = folder.path / "trace.json" if config.trace and folder.world.is_main else None
        times = StepTimes(recorder, trace_path)
        stack.callback(times.close)
        resources = Resources(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            start=start,
            train_data=train_data,
            batches=batches,
            evaluators=evaluators,
            known=known,
            tracker=tracker,
            client=client,
            recorder=recorder,
            times=times,
            metric_loggers=metric_loggers,
            open=stack.pop_all(),
        )
    return Run(resources)


def _chat_format(config: Config) -> dict[str, str]:
    """What a checkpoint must say for its model to be prompted as it was trained."""
    metadata = {"renderer_name": str(config.renderer_name)}
    if config.system_prompt:
        metadata["system_prompt"] = config.system_prompt
    if config.tools_in_system:
        metadata["tools_in_system"] = "True"
    return metadata


def _warn_of_other_formats(config: Config, is_resumed: bool) -> None:
    """Warns where the weights to start from, or the data, have another chat format than is recorded."""
    ours = _chat_format(config)
    recorded: Mapping[str, str] = {}
    if config.load_checkpoint_path is not None and not is_resumed:
        from cookbook.engine import checkpoint

        recorded = checkpoint.read_info(config.load_checkpoint_path).user_metadata or {}
    builder = config.dataset_builder
    for key in ("renderer_name", "system_prompt", "tools_in_system"):
        if recorded and ours.get(key) != recorded.get(key):
            logger.warning(
                "%s was trained with %s=%s, this run goes on with %s.",
                config.load_checkpoint_path,
                key,
                recorded.get(key),
                ours.get(key),
            )
        if isinstance(builder, ChatDatasetBuilder):
            of_data = getattr(builder.common_config, key)
            if of_data != getattr(config, key):
                logger.warning(
                    "The data are rendered with %s=%s, but checkpoints will record %s.",
                    key,
                    of_data,
                    getattr(config, key),
                )


def _report_data(train_data: SupervisedDataset, eval_data: SupervisedDataset | None) -> None:
    told = []
    for report in [*train_data.reports(), *(eval_data.reports() if eval_data else ())]:
        if report not in told:  # held-out rows are from the same sources
            told.append(report)
            logger.info("%s", "\n".join(report.lines()))


def _check_lengths(
    config: Config, train_data: SupervisedDataset, eval_data: SupervisedDataset | None
) -> None:
    """Raises ConfigError for examples longer than the model reads, before the step that has one."""
    reports = [*train_data.reports(), *(eval_data.reports() if eval_data else ())]
    longest = max((report.longest_kept for report in reports), default=0)
    context_length = models.context_length(config.model_name)
    if context_length is not None and longest > context_length:
        raise ConfigError(
            f"The longest example has {longest:,} tokens, and {config.model_name} reads {context_length:,} "
            f"at most. Say max_length={context_length}, which cuts such examples, or on_long=drop with it."
        )


def _continue(folder: RunFolder, checkpoints: CheckpointLog, start: Start, has_restarted: bool) -> None:
    """Makes the folder that of this run. Until here it is as the earlier run left it.

    The config comes last: a kill before it leaves a run that is continued by the same command.
    """
    if start.rows_per_batch_before is not None:
        checkpoints.count_rows(start.rows_per_batch_before)
    if folder.length_changes or folder.patience_changes:
        checkpoints.continue_from_final()
    folder.record_config(start.step, has_restarted)


def _make_evaluators(config: Config, folder: RunFolder) -> list[tuple[int, list[Evaluator]]]:
    """With their cadence, the frequent ones first. What one refuses it refuses before the data are read."""
    run = RunContext(
        folder.path, config.model_name, config.renderer_name, config.system_prompt, config.tools_in_system
    )

    def make(builder: AnyEvaluatorBuilder) -> Evaluator:
        return builder.in_run(run)() if isinstance(builder, EvaluatorBuilder) else builder()

    return [
        (config.eval_every, list(map(make, config.evaluator_builders))),
        (config.infrequent_eval_every, list(map(make, config.infrequent_evaluator_builders))),
    ]


def _known_evaluation(folder: RunFolder, step: int) -> Evaluation:
    """What an earlier life of the run measured of the state after `step` steps.

    The last evaluation of a run that is continued need not be due there, and is kept all the same.
    """
    row = next((row for row in folder.read_metrics() if row["step"] == step), {})
    metrics = {
        name: value
        for name, value in row.items()
        if name != "step" and name.split("/")[0] not in OF_EVERY_STEP
    }
    tables: dict[str, Table] = {}
    for record in folder.read_tables():
        if record["step"] == step:
            shown = tables.setdefault(record["table"], Table(list(record["row"]), []))
            tables[record["table"]] = Table(shown.columns, [*shown.rows, list(record["row"].values())])
    return Evaluation(metrics, tables)


def _patience_restarts(
    config: Config, folder: RunFolder, checkpoints: CheckpointLog, first_step: int
) -> set[int]:
    """The steps from which patience counts anew: where a run that was out of it is made longer.

    Raises ConfigError where a finished run is not made longer, and is still out of patience.
    """
    restarts = folder.patience_restarts()
    rows = [row for row in folder.read_metrics() if row["step"] <= first_step]
    if not _tracker(config, rows, restarts).is_out_of_patience:
        return restarts
    if folder.length_changes:
        logger.info(
            "The run was out of patience after %d steps; patience counts anew from here, and the best %s so "
            "far is still the one to beat.",
            first_step,
            config.best_metric,
        )
        return restarts | {first_step}
    if checkpoints.is_finished:
        raise ConfigError(
            f"The run in log_path={folder.path} stopped early after {first_step} steps, and "
            f"early_stopping_patience={config.early_stopping_patience} with early_stopping_min_delta="
            f"{config.early_stopping_min_delta:g} is used up by then. To continue it raise "
            f"early_stopping_patience, or give more max_steps or num_epochs."
        )
    return restarts


def _tracker(config: Config, rows: list[dict[str, Any]], restarts: set[int]) -> BestTracker:
    return BestTracker(
        config.best_metric,
        config.best_mode,
        config.early_stopping_patience,
        config.early_stopping_min_delta,
        history=rows,
        restarts=restarts,
    )


def _track_best(
    config: Config,
    folder: RunFolder,
    first_step: int,
    evaluators: list[tuple[int, list[Evaluator]]],
    restarts: set[int],
) -> BestTracker:
    if config.early_stopping_patience is not None and not any(
        every and members for every, members in evaluators
    ):
        raise ConfigError(
            f"early_stopping_patience={config.early_stopping_patience} counts evaluations, and this run has "
            f"none. Give data to evaluate on or an evaluator, or leave early stopping out."
        )
    return _tracker(config, [row for row in folder.read_metrics() if row["step"] < first_step], restarts)


async def _create_client(
    config: Config, folder: RunFolder, checkpoints: CheckpointLog, recorder: Recorder, stack: ExitStack
) -> TrainingClient:
    from cookbook.clients.service import ServiceClient
    from cookbook.engine.checkpoint import remove_unfinished

    folder.world.on_rank0(lambda: remove_unfinished(folder.checkpoint_dir))
    service = ServiceClient(
        options=config.engine_options(), checkpoint_dir=folder.checkpoint_dir, recorder=recorder
    )
    stack.callback(service.close)
    client = await service.create_lora_training_client_async(
        config.model_name,
        rank=config.lora_rank,
        seed=config.seed,
        train_mlp=config.train_mlp,
        train_attn=config.train_attn,
        train_unembed=config.train_unembed,
        user_metadata=_chat_format(config),
        alpha=config.lora_alpha,
    )
    last = checkpoints.last()
    if last is not None:
        await client.load_state_with_optimizer(checkpoints.path_of(last))
    elif config.load_checkpoint_path is not None:
        await client.load_state(config.load_checkpoint_path)
    return client


def _make_loggers(
    config: Config,
    folder: RunFolder,
    start: Start,
    known: Evaluation,
    console: Console,
    stack: ExitStack,
) -> list[MetricLogger]:
    made: list[MetricLogger] = []
    if not folder.world.is_main:
        return made

    def keep(metric_logger: MetricLogger) -> None:
        made.append(metric_logger)
        stack.callback(metric_logger.close)

    first_step = start.step
    keep(JsonlLogger(folder.path, first_step, known.metrics, known.tables))
    if config.wandb_project is not None:
        keep(WandbLogger(folder.path, config.wandb_project, config.wandb_name, folder.config))
    if config.tensorboard:
        keep(TensorBoardLogger(folder.path, first_step, folder.config))
    if config.trackio_project is not None:
        keep(
            TrackioLogger(folder.path, config.trackio_project, config.trackio_name, folder.config, first_step)
        )
    keep(ConsoleLogger(console, total_steps=start.total_steps, first_step=first_step))
    keep(ReportLogger(folder.path))  # after those whose files it reads
    return made


def _announce(
    config: Config,
    folder: RunFolder,
    client: TrainingClient,
    train_data: SupervisedDataset,
    eval_data: SupervisedDataset | None,
    first_step: int,
    total_steps: int | None,
) -> None:
    info = client.get_info().model_data
    logger.info(
        "%s on %s in %s%s, %s.",
        config.model_name,
        info.device,
        info.dtype,
        f" ({config.quantization} base)" if config.quantization else "",
        f"LoRA rank {config.lora_rank}" if config.lora_rank else "all weights trained",
    )
    if not folder.world.is_alone:
        logger.info(
            "%d processes train together; %s.",
            folder.world.size,
            "each holds a part of the base weights"
            if client.samples_together
            else "each holds all base weights",
        )
    _announce_learning_rate(config)
    _advise_rank(config, info.num_trained_parameters, train_data)
    logger.info(
        "Training on %s, evaluating on %s. %s%s.",
        _size(train_data),
        "nothing" if eval_data is None else _size(eval_data),
        "As many steps as there are batches" if total_steps is None else f"{total_steps:,} steps",
        f", {first_step:,} of them done" if first_step else "",
    )
    logger.info("Everything goes to %s.", folder.path)


def _announce_learning_rate(config: Config) -> None:
    recommended = config.recommended_learning_rate
    if config.learning_rate == recommended.value:
        logger.info("Learning rate %g, %s.", recommended.value, recommended.reason)
        if config.lora_rank and config.lora_alpha != 32:
            logger.info("  It suits lora_alpha=32, and this run has %g.", config.lora_alpha)
    else:
        logger.info("Learning rate %g (auto would be %g).", config.learning_rate, recommended.value)


def _advise_rank(config: Config, num_parameters: int, train_data: SupervisedDataset) -> None:
    """Tells of an adapter with fewer parameters than the data have trained tokens."""
    num_tokens = sum(report.trained_tokens for report in train_data.reports())
    if config.lora_rank == 0 or num_parameters >= num_tokens:
        return
    rank = fitting_rank(num_tokens, num_parameters, config.lora_rank)
    logger.info(
        "The adapter has %s parameters for %s trained tokens. A parameter a token is a rough rule for LoRA "
        "to learn like full fine-tuning: that would be %s.",
        f"{num_parameters:,}",
        f"{num_tokens:,}",
        f"lora_rank={rank}" if rank <= MAX_ADVISED_RANK else "full fine-tuning itself, lora_rank=0",
    )


def _size(dataset: SupervisedDataset) -> str:
    num_batches = dataset.epoch_length()
    if num_batches is None:
        return "a stream"
    num_rows = dataset.summary().get("rows")
    return f"{num_batches:,} batches" if num_rows is None else f"{num_rows:,} rows"
