"""Prepares a run: reads the data, loads the model, and opens the loggers."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cookbook import models
from cookbook.data.builders import ConversationBuilder
from cookbook.data.types import ChatDatasetBuilder, SupervisedDataset
from cookbook.errors import CheckpointError, ConfigError
from cookbook.eval.evaluators import AnyEvaluatorBuilder, Evaluation, Evaluator, EvaluatorBuilder, RunContext
from cookbook.eval.nll import NLLEvaluator
from cookbook.eval.samples import SamplesEvaluator
from cookbook.loggers import (
    ConsoleLogger,
    JsonlLogger,
    MetricLogger,
    MLflowLogger,
    SwanLabLogger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)
from cookbook.report.live import ReportLogger
from cookbook.runs import environment
from cookbook.runs.checkpoints import Checkpoint, CheckpointLog
from cookbook.runs.folder import RunFolder
from cookbook.runs.rows import STEP_METRIC_PREFIXES
from cookbook.supervised.agreement import check_same_data
from cookbook.supervised.announce import announce, announce_changes
from cookbook.supervised.batches import BatchQueue
from cookbook.supervised.best import BestTracker
from cookbook.supervised.config import Config
from cookbook.supervised.continuation import Start, find_start
from cookbook.supervised.estimate import RunEstimate, log_estimate
from cookbook.supervised.objectives import Objective
from cookbook.supervised.preflight import check_evaluations, check_space
from cookbook.supervised.run import Resources, Run
from cookbook.supervised.step_times import StepTimes
from cookbook.trace import Recorder
from cookbook.types import ModelData
from cookbook.utils.notes import counted_noun
from cookbook.utils.tables import Table
from renderers import get_renderer
from renderers.agreement import warning_of
from renderers.jinja.chat_template import ChatTemplateRenderer
from renderers.jinja.modes import mode_of_all

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient
    from cookbook.supervised.hub_pushes import HubPushes

logger = logging.getLogger(__name__)


async def start_run(config: Config, folder: RunFolder, checkpoints: CheckpointLog, console: Console) -> Run:
    """Returns a run that is ready for its first step. Checks all that it can before it loads the model."""
    with ExitStack() as stack:
        _limit_threads(config, folder)
        _warn_about_data_format(config)
        train_data, eval_data = _read_data(config, folder)
        template_kwargs = _sampled_with(config, checkpoints, train_data)
        chat_format = _chat_format(config, template_kwargs)
        if config.load_checkpoint_path is not None and checkpoints.last() is None:
            _warn_about_start(config, chat_format)
        objective = config.objective()
        evaluators = _create_evaluators(config, folder, template_kwargs, eval_data, objective)
        start = find_start(config, folder, checkpoints, train_data, eval_data)
        batches = BatchQueue(
            train_data,
            config.seed,
            ahead=config.submit_ahead + 2,
            num_epochs=config.num_epochs,
            num_steps=None if start.total_steps is None else start.total_steps - start.step,
            start=start.position,
        )
        await stack.enter_context(batches).check()
        tracker, has_restarted = _track_best(config, folder, checkpoints, start.step, evaluators)
        known = _known_evaluation(folder, start.step)
        is_main, num_processes = folder.world.is_main, folder.world.size
        estimated = log_estimate(config, train_data, start.total_steps, num_processes) if is_main else None
        recorder = Recorder()
        client = await _create_client(config, chat_format, folder, checkpoints, recorder, stack)
        model = client.get_info().model_data
        if not client.samples_together:
            check_space(config.log_path, folder.path, model.num_trained_parameters * 10)
        announce_changes(config, folder, checkpoints, start, train_data)
        # Up to here the folder is unchanged.
        _record_config(folder, checkpoints, start, has_restarted)
        announce(config, folder, client, start, train_data, eval_data)
        _record_machine(folder, model, estimated)
        metric_loggers = _create_loggers(config, folder, start, known, console, stack)
        await _prepare(objective, client, folder, checkpoints, train_data, eval_data)
        pushes = _create_pushes(config, folder, stack)
        times = _create_times(config, folder, recorder, stack)
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
            objective=objective,
            pushes=pushes,
        )
    return Run(resources)


def _record_machine(folder: RunFolder, model: ModelData, estimated: RunEstimate | None) -> None:
    """Records what the run runs on, and the estimate that was logged."""
    if folder.world.is_main:
        environment.record(folder.path, model)
    if estimated is not None:
        estimated.record(folder.path)


async def _prepare(
    objective: Objective | None,
    client: TrainingClient,
    folder: RunFolder,
    checkpoints: CheckpointLog,
    *data: SupervisedDataset | None,
) -> None:
    if objective is not None:
        datasets = [one for one in data if one is not None]
        await objective.prepare(client, datasets, folder, is_new=checkpoints.last() is None)


def _record_config(folder: RunFolder, checkpoints: CheckpointLog, start: Start, has_restarted: bool) -> None:
    """Records the config and what it changes in the log of checkpoints.

    The config is last: if the process is killed before that, the same command resumes the run.
    """
    if start.rows_per_batch_before is not None:
        checkpoints.count_rows(start.rows_per_batch_before)
    if folder.length_changes or folder.patience_changes:
        checkpoints.continue_from_final()
    folder.record_config(start.step, has_restarted)


def _limit_threads(config: Config, folder: RunFolder) -> None:
    """Uses few threads on a busy machine; on a resume as many as before, for the same bits."""
    from cookbook.engine.devices import resolve_device
    from cookbook.engine.threads import limit_threads

    if folder.world.is_alone and resolve_device(config.device).type == "cpu":
        is_resumed = folder.earlier_config is not None
        limit_threads(environment.recorded_threads(folder.path) if is_resumed else None)


def _create_times(config: Config, folder: RunFolder, recorder: Recorder, stack: ExitStack) -> StepTimes:
    trace_path = folder.path / "trace.json" if config.trace and folder.world.is_main else None
    times = StepTimes(recorder, trace_path)
    stack.callback(times.close)
    return times


def _create_pushes(config: Config, folder: RunFolder, stack: ExitStack) -> HubPushes | None:
    if config.push_to_hub is None or not folder.world.is_main:
        return None
    from cookbook.export.push import repository_of
    from cookbook.supervised.hub_pushes import HubPushes

    pushes = HubPushes(repository_of(config.push_to_hub), folder.path)
    stack.callback(pushes.close)
    return pushes


MIN_HELD_OUT_ROWS = 32


def _warn_about_noise(config: Config, eval_data: SupervisedDataset | None) -> None:
    """Warns if the best checkpoint is chosen by an evaluation of few rows."""
    if config.best_metric is None or not config.eval_every or eval_data is None:
        return
    num_rows = eval_data.summary().get("rows")
    if num_rows is not None and num_rows < MIN_HELD_OUT_ROWS:
        logger.warning(
            "Only %d rows are held out: which checkpoint is the best by %s is mostly noise. Hold out %d or "
            "more (test_size=), or set best_metric=None.",
            num_rows,
            config.best_metric,
            MIN_HELD_OUT_ROWS,
        )


def _use_held_out_prompts(
    evaluators: Sequence[tuple[int, Sequence[Evaluator]]], eval_data: SupervisedDataset | None
) -> None:
    """Gives evaluators without prompts of their own those of the first held-out conversations."""
    for evaluator in [one for _, members in evaluators for one in members]:
        if isinstance(evaluator, SamplesEvaluator) and evaluator.wants_prompts and eval_data is not None:
            evaluator.use_held_out(eval_data)


def _sampled_with(
    config: Config, checkpoints: CheckpointLog, train_data: SupervisedDataset
) -> Mapping[str, Any] | None:
    """Returns the variables of the chat template with which the model is sampled, and logs chosen ones.

    They are those of the config. If it sets none, a resumed run has those that its checkpoint records, and a
    new one those of its data.
    """
    if config.template_kwargs is not None:
        return config.template_kwargs
    last = checkpoints.last()
    if last is None:
        chosen = trained_mode(config, train_data)
    else:
        from cookbook.engine import checkpoint
        from cookbook.runs.find import recorded_template_kwargs

        info = checkpoint.read_info(checkpoints.path_of(last))
        chosen = recorded_template_kwargs(info.user_metadata)
    if chosen:
        logger.info("%s", sentence_on_mode(chosen))
    return chosen


def trained_mode(config: Config, train_data: SupervisedDataset) -> dict[str, Any] | None:
    """Returns the template's variables with which all trained replies of a new run are prompted.

    Returns None if they are the usual ones, are set by the config, or differ, and if the data are not all
    read yet, as in a stream.
    """
    is_known = config.template_kwargs is None and train_data.epoch_length() is not None
    if not is_known or config.renderer_name != ChatTemplateRenderer.name:
        return None
    return mode_of_all(note for report in train_data.reports() for note in report.notes)


def sentence_on_mode(mode: Mapping[str, Any]) -> str:
    return (
        f"Every trained reply follows a prompt with template_kwargs={json.dumps(mode, ensure_ascii=False)}. "
        "Evaluators, chat and exports use it too, and every checkpoint records it. Set template_kwargs to "
        "choose another."
    )


def _chat_format(config: Config, template_kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the chat format to record with every checkpoint, for prompting its model as it was trained."""
    metadata = {"renderer_name": str(config.renderer_name)}
    if config.system_prompt:
        metadata["system_prompt"] = config.system_prompt
    if config.tools_in_system:
        metadata["tools_in_system"] = "True"
    if template_kwargs:
        metadata["template_kwargs"] = json.dumps(template_kwargs, sort_keys=True, ensure_ascii=False)
    return metadata


_FORMAT_KEYS = ("renderer_name", "system_prompt", "tools_in_system", "template_kwargs")


def _warn_about_start(config: Config, chat_format: Mapping[str, str]) -> None:
    """Warns if the initial weights were trained with another chat format than this run records."""
    from cookbook.engine import checkpoint

    recorded = checkpoint.read_info(str(config.load_checkpoint_path)).user_metadata or {}
    for key in _FORMAT_KEYS:
        if recorded and chat_format.get(key) != recorded.get(key):
            logger.warning(
                "%s was trained with %s=%s, this run trains with %s.",
                config.load_checkpoint_path,
                key,
                recorded.get(key),
                chat_format.get(key),
            )


def warn_about_template(model_name: str, renderer_name: str) -> None:
    """Warns if the renderer prints another format than the model's own, naming the one to use."""
    renderer = get_renderer(renderer_name, models.get_tokenizer(model_name))
    if warning := warning_of(renderer, model_name, models.recommended_renderer(model_name)):
        logger.warning("%s", warning)


def _warn_about_data_format(config: Config) -> None:
    """Warns if the data have another chat format than the model, or than will be recorded."""
    builder = config.dataset_builder
    if not isinstance(builder, ChatDatasetBuilder):
        return
    if config.renderer_name is not None:
        warn_about_template(config.model_name, config.renderer_name)
    for key in _FORMAT_KEYS:
        in_data = getattr(builder.common_config, key)
        if (in_data or None) != (getattr(config, key) or None):
            logger.warning(
                "The data are rendered with %s=%s, but checkpoints will record %s.",
                key,
                in_data,
                getattr(config, key),
            )


def _read_data(config: Config, folder: RunFolder) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Returns the training and the evaluation data, and logs the reports on them.

    Raises ConfigError if an example is longer than the model's context, or if evaluations are configured and
    the data leave nothing to evaluate.
    """
    with folder.world.first_on_each_machine():
        train_data, eval_data = _build_data(config, folder)
    check_same_data(folder.world, train_data, eval_data)
    reports = [*train_data.reports(), *(eval_data.reports() if eval_data else ())]
    for number, report in enumerate(reports):
        if report not in reports[:number]:  # held-out rows are from the same sources
            logger.info("%s", "\n".join(report.lines()))
    check_evaluations(config, has_eval_data=eval_data is not None)
    longest = max((report.longest_kept for report in reports), default=0)
    context_length = models.context_length(config.model_name)
    if context_length is not None and longest > context_length:
        raise ConfigError(
            f"The longest example has {longest:,} tokens, and {config.model_name} reads {context_length:,} "
            f"at most. Set max_length={context_length}, which truncates such examples, or on_long=drop with "
            f"it."
        )
    _warn_about_noise(config, eval_data)
    return train_data, eval_data


def _build_data(config: Config, folder: RunFolder) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Returns the data of the config; those that an earlier version selected, for a run that it began."""
    builder = config.data_builder
    train_data, eval_data = builder()
    recorded = folder.read_data_report().get("fingerprint")
    if recorded in (None, train_data.fingerprint()) or not isinstance(builder, ConversationBuilder):
        return train_data, eval_data
    earlier_train_data, earlier_eval_data = builder.as_in_earlier_versions()()
    if earlier_train_data.fingerprint() != recorded:
        return train_data, eval_data
    logger.info("The run continues with the rows that it began with: split_by=rows, repeated=keep.")
    return earlier_train_data, earlier_eval_data


def _create_evaluators(
    config: Config,
    folder: RunFolder,
    template_kwargs: Mapping[str, Any] | None,
    eval_data: SupervisedDataset | None,
    objective: Objective | None,
) -> list[tuple[int, list[Evaluator]]]:
    """Returns pairs of a cadence and its evaluators, frequent ones first: `eval_data` comes before all."""
    run = RunContext(
        folder.path,
        config.model_name,
        config.renderer_name,
        config.system_prompt,
        config.tools_in_system,
        template_kwargs,
        config.add_tokens,
    )

    def make(builder: AnyEvaluatorBuilder) -> Evaluator:
        return builder.in_run(run)() if isinstance(builder, EvaluatorBuilder) else builder()

    held_out: list[Evaluator] = []
    if eval_data is not None:
        held_out = [NLLEvaluator(eval_data) if objective is None else objective.evaluator(eval_data)]
    evaluators = [
        (config.eval_every, [*held_out, *map(make, config.evaluator_builders)]),
        (config.infrequent_eval_every, list(map(make, config.infrequent_evaluator_builders))),
    ]
    _use_held_out_prompts(evaluators, eval_data)
    return evaluators


def _known_evaluation(folder: RunFolder, step: int) -> Evaluation:
    """Returns the evaluation by an earlier process of the run after `step` steps.

    It counts even if none is due at that step: it may be the final evaluation of a run that is now extended.
    """
    row = next((row for row in folder.read_metrics() if row["step"] == step), {})
    metrics = {
        name: value
        for name, value in row.items()
        if name != "step" and name.split("/")[0] not in STEP_METRIC_PREFIXES
    }
    tables: dict[str, Table] = {}
    for record in folder.read_tables():
        if record["step"] == step:
            shown = tables.setdefault(record["table"], Table(list(record["row"]), []))
            tables[record["table"]] = Table(shown.columns, [*shown.rows, list(record["row"].values())])
    return Evaluation(metrics, tables)


def _track_best(
    config: Config,
    folder: RunFolder,
    checkpoints: CheckpointLog,
    first_step: int,
    evaluators: Sequence[tuple[int, Sequence[Evaluator]]],
) -> tuple[BestTracker, bool]:
    """Returns a tracker of the evaluations before `first_step`, and whether patience restarts at that step.

    Patience restarts if a run that is out of patience is extended. Raises ConfigError if a finished run is
    out of patience and not extended, or if early stopping has no evaluator.
    """
    if config.early_stopping_patience is not None and not any(every and some for every, some in evaluators):
        raise ConfigError(
            f"early_stopping_patience={config.early_stopping_patience} counts evaluations, and this run has "
            f"none. Give data to evaluate on or an evaluator, or remove early_stopping_patience."
        )
    rows = [row for row in folder.read_metrics() if row["step"] <= first_step]
    restarts = folder.patience_restarts()

    def tracker_of(rows: list[dict[str, Any]]) -> BestTracker:
        return BestTracker(
            config.best_metric,
            config.best_mode,
            config.early_stopping_patience,
            config.early_stopping_min_delta,
            history=rows,
            restarts=restarts,
        )

    if tracker_of(rows).is_out_of_patience:
        if folder.length_changes:
            logger.info(
                "The run was out of patience after %d steps; patience restarts here, and the best %s so far "
                "is still the one to beat.",
                first_step,
                config.best_metric,
            )
            restarts |= {first_step}
        elif checkpoints.is_finished:
            raise ConfigError(
                f"The run in log_path={folder.path} stopped early after "
                f"{counted_noun(first_step, 'step')}, and "
                f"early_stopping_patience={config.early_stopping_patience} with early_stopping_min_delta="
                f"{config.early_stopping_min_delta:g} is used up by then. To continue it raise "
                f"early_stopping_patience, or give more max_steps or num_epochs."
            )
    return tracker_of([row for row in rows if row["step"] < first_step]), first_step in restarts


async def _create_client(
    config: Config,
    chat_format: dict[str, str],
    folder: RunFolder,
    checkpoints: CheckpointLog,
    recorder: Recorder,
    stack: ExitStack,
) -> TrainingClient:
    from cookbook.clients.service import ServiceClient
    from cookbook.engine.checkpoint import read_info, remove_unfinished

    folder.world.on_rank0(lambda: remove_unfinished(folder.checkpoint_dir))
    service = ServiceClient(
        options=config.engine_options(), checkpoint_dir=folder.checkpoint_dir, recorder=recorder
    )
    stack.callback(service.close)
    last = checkpoints.last()
    weights = config.load_checkpoint_path if last is None else checkpoints.path_of(last)
    lora = config.lora()
    if weights is not None and lora.rank:  # an adapter keeps the layers that it has
        saved = read_info(weights).lora
        dropout = saved.dropout if config.lora_dropout is None else config.lora_dropout
        lora = replace(saved, seed=config.seed, dropout=dropout)
    client = await service.create_training_client_async(config.model_name, lora, chat_format)
    if last is not None:
        try:
            await client.load_state_with_optimizer(checkpoints.path_of(last))
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n{_how_to_continue(checkpoints, last)}") from error
    elif config.load_checkpoint_path is not None:
        await client.load_state(config.load_checkpoint_path)
    return client


def _how_to_continue(checkpoints: CheckpointLog, damaged: Checkpoint) -> str:
    """Returns what continues a run whose newest checkpoint cannot be loaded."""
    path, earlier = checkpoints.path_of(damaged), checkpoints.before(damaged)
    if earlier is None:
        return "There is no earlier checkpoint: if_log_path_exists=delete starts the run over."
    return (
        f"To continue from the one before it, after {counted_noun(earlier.step, 'step')}, move this one away "
        f"and run the same command again: mv {shlex.quote(str(path))} {shlex.quote(f'{path}.damaged')}"
    )


def _create_loggers(
    config: Config,
    folder: RunFolder,
    start: Start,
    known: Evaluation,
    console: Console,
    stack: ExitStack,
) -> list[MetricLogger]:
    created: list[MetricLogger] = []
    if not folder.world.is_main:
        return created

    def keep(metric_logger: MetricLogger) -> None:
        created.append(metric_logger)
        stack.callback(metric_logger.close)

    first_step = start.step
    keep(JsonlLogger(folder.path, first_step, known.metrics, known.tables))
    if config.wandb_project is not None:
        keep(WandbLogger(folder.path, config.wandb_project, config.wandb_name, folder.config))
    if config.tensorboard:
        keep(TensorBoardLogger(folder.path, first_step, folder.config))
    if config.mlflow_experiment is not None:
        keep(MLflowLogger(folder.path, config.mlflow_experiment, config.mlflow_name, folder.config))
    if config.swanlab_project is not None:
        keep(SwanLabLogger(folder.path, config.swanlab_project, config.swanlab_name, folder.config))
    if config.trackio_project is not None:
        keep(
            TrackioLogger(folder.path, config.trackio_project, config.trackio_name, folder.config, first_step)
        )
    keep(ConsoleLogger(console, total_steps=start.total_steps, first_step=first_step))
    keep(ReportLogger(folder.path))  # after those whose files it reads
    return created
