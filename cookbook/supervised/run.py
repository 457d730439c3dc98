"""A run in progress: its resources, and the verbs of the training loop in the order of `train.main`.

A step takes a batch, evaluates the current state if that is due, queues one forward_backward and one
optim_step, saves the new state if that is due, and is logged once the engine has finished it. Step k starts
from the state after k steps; the evaluation of that state is logged in the row of step k.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cookbook.clients.futures import APIFuture
from cookbook.data.report import note_lines
from cookbook.data.types import SKIPPED, SupervisedDataset
from cookbook.errors import TrainingError
from cookbook.eval.evaluators import FAILURES, Evaluation, Evaluator, TrainingClientEvaluator, evaluate
from cookbook.eval.samples import SamplesEvaluator
from cookbook.loggers import MetricLogger
from cookbook.runs.checkpoints import FINAL, CheckpointLog, checkpoint_name
from cookbook.runs.folder import RunFolder
from cookbook.supervised.batches import BatchQueue, PlacedBatch, Position
from cookbook.supervised.best import BestTracker
from cookbook.supervised.config import Config
from cookbook.supervised.continuation import Start
from cookbook.supervised.objectives import Objective
from cookbook.supervised.run_summary import RunSummary
from cookbook.supervised.schedules import learning_rate_at
from cookbook.supervised.step_times import EVALUATING, StepTimes
from cookbook.trace import Recorder
from cookbook.types import AdamParams, ForwardBackwardOutput, OptimStepResponse, SaveWeightsResponse
from cookbook.utils.notes import counted_noun
from cookbook.utils.tables import Table

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient
    from cookbook.supervised.hub_pushes import HubPushes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """The resources of a run, created and opened by `start.start_run`."""

    config: Config
    folder: RunFolder
    checkpoints: CheckpointLog
    start: Start
    train_data: SupervisedDataset
    batches: BatchQueue
    evaluators: Sequence[tuple[int, Sequence[Evaluator]]]
    """Pairs of a cadence in steps (0: never) and its evaluators."""
    known: Evaluation
    """What an earlier process of this run measured of the state that the run resumes from."""
    tracker: BestTracker
    client: TrainingClient
    recorder: Recorder
    times: StepTimes
    metric_loggers: Sequence[MetricLogger]
    open: ExitStack
    """Closes all resources."""
    objective: Objective | None = None
    """What the run trains for, if that is not the likelihood of its data."""
    pushes: HubPushes | None = None
    """Pushes checkpoints to the hub, if the config says so."""


@dataclass(frozen=True)
class NewBest:
    """The best evaluation so far, whose weights are saved."""

    metric: str
    value: float
    save: APIFuture[SaveWeightsResponse] | None
    """None if a periodic checkpoint saves that state."""


@dataclass(frozen=True)
class StateEvaluation(Evaluation):
    """The evaluation of a state; empty if none was due."""

    new_best: NewBest | None = None
    is_out_of_patience: bool = False
    """Whether early stopping ends the run here."""


@dataclass(frozen=True)
class PendingStep:
    """A step that is queued on the engine."""

    step: int
    batch: PlacedBatch
    evaluation: StateEvaluation
    """The evaluation of the state before the step."""
    learning_rate: float
    forward_backward: APIFuture[ForwardBackwardOutput] | None
    """None, like `optim_step`, if no example of the batch has a trained token."""
    optim_step: APIFuture[OptimStepResponse] | None
    save: APIFuture[SaveWeightsResponse] | None
    """The save of the state after the step; None if none is due."""


def withdraw(pending: deque[PendingStep]) -> PendingStep | None:
    """Cancels the queued steps that the engine has not begun, and removes them from `pending`.

    Returns the first of them, at which a resumed run begins; None if all have begun.
    """
    first = None
    while pending:
        newest = pending[-1]
        if newest.forward_backward is None or not newest.forward_backward.cancel():
            break
        for future in (newest.optim_step, newest.save):
            if future is not None:
                future.cancel()
        first = pending.pop()
    return first


class Run:
    """A run in progress, as a context manager that closes the resources.

    Its attributes are the resources and what accumulates over a run. Values of a single step are passed from
    verb to verb instead.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._uniform_logprob = -math.log(resources.client.get_info().model_data.num_logits)
        self._was_uniform = False

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.open.close()

    @property
    def start(self) -> Start:
        return self._resources.start

    # -- the verbs of a step ----------------------------------------------------------------

    async def next_batch(self, step: int) -> PlacedBatch | None:
        """Returns the batch of `step`, or None after the last step."""
        r = self._resources
        with r.recorder.span("loop", "wait for batch", step):
            batch = await r.batches.next()
        if batch is not None:
            r.recorder.add("render", "render", *batch.rendering, step)
        elif r.start.total_steps is not None and step < r.start.total_steps:
            logger.warning(
                "The data ended after %d of %d steps, before the learning rate had decayed.",
                step,
                r.start.total_steps,
            )
        return batch

    async def evaluate(self, step: int, due: Sequence[Evaluator] | None = None) -> StateEvaluation:
        """Evaluates the state after `step` steps, and queues a checkpoint of it if it is the best so far.

        Call it before anything else is queued after the previous step. A `due` of None means the evaluators
        that are due by their cadence; the result then includes what an earlier process of this run measured
        of the state.
        """
        r = self._resources
        known = r.known if due is None and step == r.start.step else Evaluation()
        due = self._due(step) if due is None else due
        found = Evaluation()
        if due:
            logger.info("After %s:", counted_noun(step, "step"))
            # Only the main process samples, unless each process holds a shard of the weights.
            takes_part = r.folder.world.is_main or r.client.samples_together
            here = [one for one in due if takes_part or isinstance(one, TrainingClientEvaluator)]
            with r.recorder.at_step(step), r.recorder.span("evaluation", EVALUATING):
                found = await evaluate(r.client, here, r.config.on_evaluator_error, r.config.seed, r.recorder)
                # Values may differ between processes if an evaluator samples or asks a judge.
                if not r.folder.world.is_alone:
                    found = await asyncio.to_thread(r.folder.world.broadcast, found)
        earlier = {name: value for name, value in known.metrics.items() if not (due and name == FAILURES)}
        metrics = {**earlier, **found.metrics}
        if step == 0 and (due or known != Evaluation()):
            r.tracker.check_first(metrics)
        new_best = None
        if r.tracker.observe(step, metrics):
            metric, save = r.tracker.metric, None
            assert metric is not None
            if not self._is_save_due(step) and not r.checkpoints.has_step(step):
                with r.recorder.at_step(step):
                    save = r.client.save_state(checkpoint_name(step), overwrite=True)
            new_best = NewBest(metric, metrics[metric], save)
        tables = {**known.tables, **found.tables}
        return StateEvaluation(metrics, tables, new_best, r.tracker.is_out_of_patience)

    def submit(self, step: int, batch: PlacedBatch, evaluation: StateEvaluation) -> PendingStep:
        """Queues a step and, if it is due, a checkpoint of the state after it."""
        r, config = self._resources, self._resources.config
        learning_rate = learning_rate_at(
            step, r.start.total_steps, config.peak_learning_rate, config.lr_schedule, config.warmup_steps
        )
        forward_backward = optim_step = save = None
        if batch.num_trained_tokens:
            adam_params = AdamParams(
                learning_rate=learning_rate,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_eps,
                weight_decay=config.weight_decay,
                grad_clip_norm=config.grad_clip_norm,
            )
            with r.recorder.at_step(step), r.recorder.span("loop", "queue"):
                if r.objective is None:
                    forward_backward = r.client.forward_backward(batch.data, return_logprobs="none")
                else:
                    forward_backward = r.objective.forward_backward(r.client, batch.data)
                optim_step = r.client.optim_step(adam_params)
        else:
            logger.warning("Step %d is skipped: no example of its batch has a trained token left.", step)
        if self._is_save_due(step + 1):
            with r.recorder.at_step(step + 1):
                save = r.client.save_state(checkpoint_name(step + 1), overwrite=True)
        return PendingStep(step, batch, evaluation, learning_rate, forward_backward, optim_step, save)

    async def log(self, done: PendingStep) -> None:
        """Waits for a step and logs it. Records the checkpoints of the states before and after it.

        Log the steps in order: a run may resume from any recorded checkpoint, so the steps before it must be
        logged.
        """
        r, batch = self._resources, done.batch
        with r.recorder.span("loop", "wait for step", done.step):
            for future in (done.forward_backward, done.optim_step):
                if future is not None:
                    await future
        with r.recorder.span("loop", "log", done.step):
            await self._record_best(done.evaluation, done.step, batch.position)
            metrics: dict[str, float] = {"epoch": batch.epoch, **done.evaluation.metrics}
            if done.forward_backward is not None and done.optim_step is not None:
                output, optim_step = await done.forward_backward, await done.optim_step
                if r.objective is not None:
                    metrics |= {f"train/{name}": v for name, v in output.metrics.items() if ":" not in name}
                else:
                    metrics["train/nll"] = output.loss
                metrics["optim/grad_norm"] = optim_step.metrics["grad_norm"]
                memory = {key: of for key, of in optim_step.metrics.items() if key.startswith("memory_")}
                metrics |= {f"perf/{key}": value for key, value in memory.items()}
                self._check_converging(done.step, output, optim_step.metrics["grad_norm"])
            times = r.times.of(done.step)
            self._recent_seconds.append(times["perf/seconds"])
            metrics |= {
                "optim/learning_rate": done.learning_rate,
                "data/sequences": len(batch.data),
                "data/tokens": batch.num_tokens,
                "data/trained_tokens": batch.num_trained_tokens,
                **times,
            }
            if done.forward_backward is not None:
                metrics["perf/tokens_per_second"] = batch.num_tokens / times["perf/seconds"]
            if r.start.total_steps is not None:
                steps_left = r.start.total_steps - done.step - 1
                metrics["perf/seconds_left"] = median(self._recent_seconds) * steps_left
            self._write_row(done.step, metrics, done.evaluation.tables)
            if done.save is not None:
                name, path = checkpoint_name(done.step + 1), (await done.save).path
                added = r.checkpoints.add(name, path, done.step + 1, *batch.next_position)
                if r.pushes is not None:
                    r.pushes.add(r.checkpoints.path_of(added), added.step)

    # -- the two ends of a run --------------------------------------------------------------

    async def save_and_stop(self, step: int, position: Position, signal_number: int) -> RunSummary:
        """Saves the state after `step` steps. `position` is the position of the next batch."""
        path = await self._save(checkpoint_name(step), step, position)
        self._report_skipped()
        total_steps = self.start.total_steps
        of_all = "" if total_steps is None else f" of {total_steps}"
        logger.info("Stopped after step %d%s. Saved %s.%s", step, of_all, path, self._best_in_words())
        logger.info("Run the same command again to resume.")
        return self._summary(step, path, is_finished=False, stopped_by=signal_number)

    async def finish(
        self, step: int, position: Position, last_evaluation: StateEvaluation | None
    ) -> RunSummary:
        """Saves the finished model, then evaluates it with every evaluator.

        The model is saved first, so that a failing evaluator costs no training. `last_evaluation` is the
        evaluation at which early stopping ended the run; its evaluators do not run again. It is None if the
        run has taken all its steps.
        """
        r = self._resources
        due = [one for every, evaluators in r.evaluators if every for one in evaluators]
        if last_evaluation is not None:
            done = self._due(step)
            due = [one for one in due if one not in done]
            await self._record_best(last_evaluation, step, position)
        path = await self._save(FINAL, step, position)
        evaluation = await self.evaluate(step, due)
        await self._record_best(evaluation, step, position)
        before = last_evaluation or StateEvaluation()
        metrics = {**before.metrics, **evaluation.metrics}
        self._write_row(step, {**metrics, **r.times.of(step)}, {**before.tables, **evaluation.tables})
        self._report_skipped()
        how = f"Finished after {counted_noun(step, 'step')}"
        if last_evaluation is not None:
            how = (
                f"Stopped early after {counted_noun(step, 'step')}: no better {r.tracker.metric} in "
                f"{r.tracker.patience} evaluations"
            )
        logger.info("%s. Saved %s.%s", how, path, self._best_in_words())
        if r.pushes is not None:
            await asyncio.to_thread(r.pushes.finish)
        if r.tracker.is_worse_than_before_training:
            logger.warning("%s was better before training than in any evaluation since.", r.tracker.metric)
        return self._summary(step, path, metrics=metrics, stopped_early=last_evaluation is not None)

    # -- helpers ------------------------------------------------------------------------

    def _due(self, step: int) -> list[Evaluator]:
        """Returns the evaluators that are due. Samples are also drawn half-way, whatever their cadence."""
        total = self._resources.start.total_steps
        is_half_way = total is not None and step == total // 2
        return [
            one
            for every, members in self._resources.evaluators
            if every
            for one in members
            if step % every == 0 or (is_half_way and isinstance(one, SamplesEvaluator))
        ]

    def _is_save_due(self, step: int) -> bool:
        """Returns whether a periodic checkpoint is due; `finish` saves the state after the last step."""
        every = self._resources.config.save_every
        return bool(every) and step % every == 0 and step != self.start.total_steps

    async def _save(self, name: str, step: int, position: Position) -> Path:
        """Saves and records the state after `step` steps, unless that checkpoint exists already.

        Any checkpoint of the state suffices, except that FINAL must be saved under its own name.
        """
        r = self._resources
        last = r.checkpoints.last()
        if last is None or last.step != step or (name == FINAL and last.name != FINAL):
            with r.recorder.at_step(step):
                saved = await r.client.save_state(name, overwrite=True)
            last = r.checkpoints.add(name, saved.path, step, *position)
        return r.checkpoints.path_of(last)

    async def _record_best(self, evaluation: StateEvaluation, step: int, position: Position) -> None:
        """Records the checkpoint of a new best evaluation. All steps before it must be logged."""
        best, checkpoints = evaluation.new_best, self._resources.checkpoints
        if best is None:
            return
        if best.save is None:
            checkpoints.mark_best(step, best.metric, best.value)
        else:
            path, (epoch, batch, row) = (await best.save).path, position
            name = checkpoint_name(step)
            checkpoints.add_best(name, path, step, epoch, batch, best.metric, best.value, row)

    def _check_converging(self, step: int, output: ForwardBackwardOutput, grad_norm: float) -> None:
        """Raises TrainingError if loss or gradient norm is not finite, or two steps in a row are uniform.

        A uniform model gives all tokens the same probability. A new model may be uniform at its first step;
        one that is still uniform after a step has no gradient.
        """
        # Only equal logits give every trained target the probability 1 / num_logits.
        is_uniform = all(
            math.isclose(output.metrics[key], self._uniform_logprob, rel_tol=1e-5)
            for key in ("logprobs:min", "logprobs:max")
        )
        was_uniform, self._was_uniform = self._was_uniform, is_uniform
        if not (math.isfinite(output.loss) and math.isfinite(grad_norm)):
            how = f"train/nll is {output.loss}, the gradient norm {grad_norm}"
        elif is_uniform and was_uniform:
            how = (
                f"train/nll stays at {output.loss:.4f}, the logarithm of "
                f"{round(math.exp(-self._uniform_logprob)):,}: all tokens of the vocabulary are equally "
                f"likely"
            )
        else:
            return
        raise TrainingError(
            f"Training diverged at step {step}: {how}. Lower learning_rate="
            f"{self._resources.config.learning_rate} and start again in another log_path, from an earlier "
            f"checkpoint with load_checkpoint_path=."
        )

    def _write_row(self, step: int, metrics: dict[str, float], tables: Mapping[str, Table]) -> None:
        for metric_logger in self._resources.metric_loggers:
            for name, table in tables.items():
                metric_logger.log_table(step, name, table)
        for metric_logger in self._resources.metric_loggers:
            metric_logger.log(step, metrics)

    def _report_skipped(self) -> None:
        train_data = self._resources.train_data
        counts = [
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in train_data.summary().items()
            if name in SKIPPED
        ]
        if counts:
            logger.warning("Training data: %s.", ", ".join(counts))
        if lines := note_lines(train_data.notes()):
            logger.info("%s", "\n".join(["While the training data were read:", *lines]))

    def _best_in_words(self) -> str:
        """Returns a sentence to append to another, or an empty string."""
        best = self._resources.checkpoints.best()
        if best is None:
            return ""
        what = f"{best.metric} {best.value:.4f}"
        if best.name == FINAL:
            return f" It is the best: {what}."
        path = self._resources.checkpoints.path_of(best)
        return f" The best is {path}: {what} after {counted_noun(best.step, 'step')}."

    def _summary(self, step: int, path: Path, is_finished: bool = True, **more: Any) -> RunSummary:
        r = self._resources
        return RunSummary(r.folder.path, is_finished, step, path, best=r.checkpoints.best(), **more)
