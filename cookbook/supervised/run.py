"""A run in progress: the verbs of the training loop, and what they share."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cookbook.clients.futures import APIFuture
from cookbook.data.report import note_lines
from cookbook.data.types import LEFT_OUT, SupervisedDataset
from cookbook.engine.processes import World
from cookbook.errors import TrainingError
from cookbook.eval.evaluators import FAILURES, Evaluation, Evaluator, TrainingClientEvaluator, evaluate
from cookbook.loggers import MetricLogger
from cookbook.runs.checkpoints import FINAL, Checkpoint, CheckpointLog, checkpoint_name
from cookbook.supervised.batches import BatchQueue, PlacedBatch, Position
from cookbook.supervised.best import BestKeeper, NewBest
from cookbook.supervised.schedules import learning_rate_at
from cookbook.supervised.step_times import EVALUATING, StepTimes
from cookbook.trace import Recorder
from cookbook.types import AdamParams, ForwardBackwardOutput, OptimStepResponse, SaveWeightsResponse

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient
    from cookbook.supervised.train import Config

logger = logging.getLogger(__name__)

NOTHING = Evaluation()


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `metrics` are those of the evaluation of the finished model."""

    log_path: Path
    is_finished: bool
    num_steps: int
    checkpoint_path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None
    """The number of the signal that stopped the run."""
    stopped_early: bool = False
    """Whether the run finished because patience was at an end."""
    best: Checkpoint | None = None
    """The checkpoint of the best evaluation, at `log_path / best.path`; None where none is kept."""


@dataclass(frozen=True)
class _Step:
    """A step that was queued, and what is known of it so far."""

    step: int
    placed: PlacedBatch
    learning_rate: float
    evaluation: Evaluation
    new_best: NewBest | None
    forward_backward: APIFuture[ForwardBackwardOutput] | None
    optim_step: APIFuture[OptimStepResponse] | None
    save: APIFuture[SaveWeightsResponse] | None

    async def is_done(self) -> None:
        """Returns when it is; `optim_step` fails where `forward_backward` did."""
        for future in (self.forward_backward, self.optim_step):
            if future is not None:
                await future


class Run:
    """What `start.start_run` puts together. A context manager: leaving it closes everything."""

    def __init__(
        self,
        config: Config,
        log_path: Path,
        world: World,
        first_step: int,
        total_steps: int | None,
        train_data: SupervisedDataset,
        client: TrainingClient,
        batches: BatchQueue,
        checkpoints: CheckpointLog,
        evaluators: Sequence[tuple[int, Sequence[Evaluator]]],
        best: BestKeeper,
        metric_loggers: Sequence[MetricLogger],
        recorder: Recorder,
        times: StepTimes,
        resources: ExitStack,
        first_position: Position,
        known: Evaluation,
    ) -> None:
        """Evaluators come with their cadence in steps. `total_steps` of None: until the data end.

        `known` is what an earlier life of the run measured of the state after `first_step` steps.
        """
        self._config = config
        self._log_path = log_path
        self._world = world
        self._total_steps = total_steps
        self._train_data = train_data
        self._client = client
        self._batches = batches
        self._checkpoints = checkpoints
        self._evaluators = evaluators
        self._best = best
        self._metric_loggers = metric_loggers
        self._recorder = recorder
        self._times = times
        self._resources = resources
        self._first_step = first_step
        self._known = known
        self._num_submitted = first_step
        self._next: PlacedBatch | None = None
        self._position = first_position
        self._pending: deque[_Step] = deque()
        self._evaluation = Evaluation()
        self._new_best: NewBest | None = None
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._num_logits = client.get_info().model_data.num_logits
        self._was_uniform = False

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    # -- the verbs of the loop --------------------------------------------------------------

    async def remaining_steps(self) -> AsyncIterator[int]:
        """The steps still to be taken: as many as there are batches."""
        while (placed := await self._next_batch()) is not None:
            self._next = placed
            yield self._num_submitted
        if self._total_steps is not None and self._num_submitted < self._total_steps:
            logger.warning(
                "The data ended after %d of %d steps, before the learning rate had come down.",
                self._num_submitted,
                self._total_steps,
            )
        self._total_steps = self._num_submitted

    async def evaluate_if_due(self, step: int) -> None:
        """Evaluates the model as it is after `step` steps, and has it saved if it is the best so far."""
        self._evaluation = Evaluation()
        self._new_best = None
        known = self._known if step == self._first_step else NOTHING
        await self._evaluate(step, self._due(step, is_last=step == self._total_steps), known)
        self._best.pass_step(step)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last evaluation was the last that early stopping waited for."""
        return self._best.is_out_of_patience

    async def submit(self, step: int) -> None:
        """Queues a step and, when it is due, the checkpoint of the state it leaves."""
        config = self._config
        placed = self._next
        assert placed is not None
        batch = placed.batch
        learning_rate = learning_rate_at(
            step, self._total_steps, config.peak_learning_rate, config.lr_schedule, config.warmup_steps
        )
        forward_backward = optim_step = save = None
        if batch.num_trained_tokens:
            with self._recorder.at_step(step), self._recorder.span("loop", "queue"):
                forward_backward = self._client.forward_backward(batch.data, return_logprobs="trained")
                optim_step = self._client.optim_step(self._adam_params(learning_rate))
        else:
            logger.warning("Step %d is left out: no example of its batch kept a trained token.", step)
        self._num_submitted = step + 1
        self._position = placed.next_position
        if self._is_save_due(step + 1):
            save = self._queue_save(checkpoint_name(step + 1), step + 1)
        self._pending.append(
            _Step(
                step=step,
                placed=placed,
                learning_rate=learning_rate,
                evaluation=self._evaluation,
                new_best=self._new_best,
                forward_backward=forward_backward,
                optim_step=optim_step,
                save=save,
            )
        )

    async def log_all_but(self, num_steps: int) -> None:
        """Waits for the oldest steps until only `num_steps` are pending, and logs them."""
        while len(self._pending) > num_steps:
            done = self._pending.popleft()
            with self._recorder.span("loop", "wait for step", done.step):
                await done.is_done()
            with self._recorder.span("loop", "log", done.step):
                await self._log(done)

    async def save_and_stop(self, signal_number: int) -> RunSummary:
        """Saves the state after the last submitted step, unless that is saved already."""
        step = self._num_submitted
        last = self._checkpoints.last()
        if last is not None and last.step == step:
            path = self._checkpoints.path_of(last)
        else:
            path = await self._save(checkpoint_name(step), step)
        self._report_what_was_left_out()
        of_all = "" if self._total_steps is None else f" of {self._total_steps}"
        logger.info("Stopped after step %d%s. Saved %s.%s", step, of_all, path, self._best.in_words())
        logger.info("Run the same command again to resume.")
        return self._summary(path, is_finished=False, stopped_by=signal_number)

    async def evaluate_and_finish(self) -> RunSummary:
        """Saves first: an evaluation that fails, or a kill in the middle of it, costs no training."""
        step = self._num_submitted
        stopped_early = self.is_out_of_patience
        due = self._due(step, is_last=True)
        if stopped_early:  # which some of them have found out at this very step
            done = self._due(step, is_last=False)
            due = [evaluator for evaluator in due if evaluator not in done]
            await self._record_new_best()
        else:
            self._evaluation, self._new_best = Evaluation(), None
        last = self._checkpoints.last()
        if last is not None and last.name == FINAL and last.step == step:
            path = self._checkpoints.path_of(last)
        else:
            path = await self._save(FINAL, step)
        await self._evaluate(step, due)
        await self._record_new_best()
        self._log_tables(step, self._evaluation)
        self._log_metrics(step, {**self._evaluation.metrics, **self._times.of(step)})
        self._report_what_was_left_out()
        how = self._best.why_stopped(step) if stopped_early else f"Finished after {step} steps"
        logger.info("%s. Saved %s.%s", how, path, self._best.in_words())
        self._best.warn_of_a_better_start()
        return self._summary(path, metrics=self._evaluation.metrics, stopped_early=stopped_early)

    # -- their parts ------------------------------------------------------------------------

    def _due(self, step: int, is_last: bool) -> list[Evaluator]:
        return [
            evaluator
            for every, evaluators in self._evaluators
            if every and (step % every == 0 or is_last)
            for evaluator in evaluators
        ]

    async def _evaluate(self, step: int, due: list[Evaluator], known: Evaluation = NOTHING) -> None:
        """Adds to the evaluation of the state after `step` steps. `known` was measured in an earlier life."""
        if not due and known == NOTHING:
            return
        found = await self._measure(step, due) if due else NOTHING
        earlier = {name: value for name, value in known.metrics.items() if not (due and name == FAILURES)}
        found = Evaluation({**earlier, **found.metrics}, {**known.tables, **found.tables})
        with self._recorder.at_step(step):
            is_save_due = self._is_save_due(step)
            self._new_best = self._best.observe(step, found.metrics, self._position, is_save_due)
        self._evaluation = Evaluation(
            {**self._evaluation.metrics, **found.metrics}, {**self._evaluation.tables, **found.tables}
        )

    async def _measure(self, step: int, due: list[Evaluator]) -> Evaluation:
        logger.info("After %d steps:", step)
        here = [evaluator for evaluator in due if self._runs_here(evaluator)]
        with self._recorder.at_step(step), self._recorder.span("evaluation", EVALUATING):
            found = await evaluate(
                self._client, here, self._config.on_evaluator_error, self._config.seed, self._recorder
            )
            return await self._from_rank0(found)

    def _runs_here(self, evaluator: Evaluator) -> bool:
        """Whether this process has a part in it. Samples are drawn by the main process alone, if it can."""
        needs_all = isinstance(evaluator, TrainingClientEvaluator) or self._client.samples_together
        return needs_all or self._world.is_main

    async def _from_rank0(self, found: Evaluation) -> Evaluation:
        """What all go by: two processes that sample, or ask a judge, need not hear the same."""
        if self._world.is_alone:
            return found
        return await asyncio.to_thread(self._world.broadcast, found)

    def _queue_save(self, name: str, step: int) -> APIFuture[SaveWeightsResponse]:
        with self._recorder.at_step(step):
            return self._client.save_state(name, overwrite=True)

    async def _next_batch(self) -> PlacedBatch | None:
        step = self._num_submitted
        with self._recorder.span("loop", "wait for batch", step):
            placed = await self._batches.next()
        if placed is not None:
            self._recorder.add("render", "render", *placed.rendering, step)
        return placed

    async def _record_new_best(self) -> None:
        """Records the best checkpoint of an evaluation that no step follows."""
        if self._new_best is not None:
            await self._new_best.record()
            self._new_best = None

    def _is_save_due(self, step: int) -> bool:
        every = self._config.save_every
        return bool(every) and step % every == 0 and step != self._total_steps

    def _adam_params(self, learning_rate: float) -> AdamParams:
        config = self._config
        return AdamParams(
            learning_rate=learning_rate,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            grad_clip_norm=config.grad_clip_norm,
        )

    async def _log(self, done: _Step) -> None:
        batch = done.placed.batch
        if done.new_best is not None:  # the steps before it are logged, so a resume may begin here
            await done.new_best.record()
        metrics: dict[str, float] = {"epoch": done.placed.epoch, **done.evaluation.metrics}
        if done.forward_backward is not None and done.optim_step is not None:
            output = await done.forward_backward
            grad_norm = (await done.optim_step).metrics["grad_norm"]
            if not (math.isfinite(output.loss) and math.isfinite(grad_norm)):
                raise self._diverged(done, f"train/nll is {output.loss}, the gradient norm {grad_norm}")
            self._refuse_to_stay_uniform(done, output)
            metrics |= {"train/nll": output.loss, "optim/grad_norm": grad_norm}
        times = self._times.of(done.step)
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
        if self._total_steps is not None:
            metrics["perf/seconds_left"] = median(self._recent_seconds) * (self._total_steps - done.step - 1)
        self._log_tables(done.step, done.evaluation)
        self._log_metrics(done.step, metrics)
        if done.save is not None:
            name = checkpoint_name(done.step + 1)
            self._record(name, await done.save, done.step + 1, done.placed.next_position)

    def _refuse_to_stay_uniform(self, done: _Step, output: ForwardBackwardOutput) -> None:
        """Raises TrainingError where two batches in succession find the model uniform.

        A new model may be, before its first step; one that a step does not change has no gradient either.
        """
        num_logits = self._num_logits
        was_uniform, self._was_uniform = self._was_uniform, _is_uniform(output, num_logits)
        if was_uniform and self._was_uniform:
            raise self._diverged(
                done,
                f"train/nll stays at {output.loss:.4f}, the logarithm of {num_logits:,}: all tokens of the "
                f"vocabulary are equally likely",
            )

    def _diverged(self, done: _Step, how: str) -> TrainingError:
        return TrainingError(
            f"Training diverged at step {done.step}: {how}. Lower learning_rate="
            f"{self._config.learning_rate} and start again in another log_path, from an earlier checkpoint "
            f"with load_checkpoint_path=."
        )

    def _report_what_was_left_out(self) -> None:
        summary = self._train_data.summary()
        counts = [
            f"{count:,} {name.replace('_', ' ')}" for name, count in summary.items() if name in LEFT_OUT
        ]
        if counts:
            logger.warning("Of the training data: %s.", ", ".join(counts))
        if lines := note_lines(self._train_data.notes()):
            logger.info("%s", "\n".join(["While the training data were read:", *lines]))

    def _log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        for metric_logger in self._metric_loggers:
            metric_logger.log(step, metrics)

    def _log_tables(self, step: int, evaluation: Evaluation) -> None:
        for metric_logger in self._metric_loggers:
            for name, table in evaluation.tables.items():
                metric_logger.log_table(step, name, table)

    async def _save(self, name: str, step: int) -> Path:
        """Saves the state after the last submitted step."""
        saved = await self._queue_save(name, step)
        return self._record(name, saved, step, self._position)

    def _record(self, name: str, saved: SaveWeightsResponse, step: int, position: Position) -> Path:
        return self._checkpoints.path_of(self._checkpoints.add(name, saved.path, step, *position))

    def _summary(self, path: Path, is_finished: bool = True, **more: Any) -> RunSummary:
        best = self._checkpoints.best()
        return RunSummary(self._log_path, is_finished, self._num_submitted, path, best=best, **more)


def _is_uniform(output: ForwardBackwardOutput, num_logits: int) -> bool:
    """Whether every trained target has the probability 1 / num_logits, to rounding.

    Only logits that are all equal give that to all of them. Targets that are not trained read 0.0.
    """
    logprobs = np.concatenate([each["logprobs"].to_numpy() for each in output.loss_fn_outputs])
    trained = logprobs[logprobs != 0]
    return bool(len(trained)) and bool(np.allclose(trained, -math.log(num_logits), rtol=1e-5, atol=0))
