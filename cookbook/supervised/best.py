"""The best evaluation of a run: which it is, its checkpoint, and how long a better one is waited for."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cookbook.clients.futures import APIFuture
from cookbook.errors import TrainingError
from cookbook.eval.evaluators import FAILURES
from cookbook.runs.checkpoints import FINAL, CheckpointLog, checkpoint_name
from cookbook.runs.directions import DEFAULT_METRIC, BestMode, direction
from cookbook.supervised.batches import Position
from cookbook.types import SaveWeightsResponse

if TYPE_CHECKING:
    from cookbook.clients.training import TrainingClient

logger = logging.getLogger(__name__)


class BestTracker:
    """Folds the evaluations of a run, in order, into the best one and the patience that is left.

    It depends on those evaluations alone, so a resumed run that reads them back from
    metrics.jsonl knows what one that was never stopped knows. The evaluation before training is
    no candidate: its weights are those the run was given. Nor is an evaluation without the
    metric, whose evaluator failed or was not due, and patience does not count it; a value that is
    not a number is counted, and never better.
    """

    def __init__(
        self,
        metric: str | None,
        mode: BestMode = "auto",
        patience: int | None = None,
        min_delta: float = 0.0,
        history: Iterable[Mapping[str, Any]] = (),
        restarts: Collection[int] = (),
    ) -> None:
        """`history`: the rows of metrics.jsonl so far. A `metric` of None: nothing is tracked.

        Behind the evaluation after each number of steps in `restarts` patience counts anew.
        """
        self.metric = metric
        self.patience = patience
        self._min_delta = min_delta
        self._sign = 1 if metric is None or direction(metric, mode) == "min" else -1
        self._before_training = math.nan
        self._best = math.inf
        self._to_beat = math.inf
        self._num_without_improvement = 0
        self._restarts = restarts
        for row in history:
            self.observe(row["step"], row)
            self.pass_step(row["step"])

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes in an evaluation of the weights after `step` steps. Whether it is the best so far."""
        if self.metric is None or self.metric not in metrics:
            return False
        value = self._sign * metrics[self.metric]
        if step == 0:
            self._before_training = value
            return False
        if value < self._to_beat - self._min_delta:
            self._to_beat = value
            self._num_without_improvement = 0
        else:
            self._num_without_improvement += 1
        if not value < self._best:
            return False
        self._best = value
        return True

    def pass_step(self, step: int) -> None:
        """Called for every step, after its evaluation if it has one."""
        if step in self._restarts:
            self._num_without_improvement = 0

    @property
    def is_out_of_patience(self) -> bool:
        return self.patience is not None and self._num_without_improvement >= self.patience

    @property
    def is_worse_than_before_training(self) -> bool:
        return self._before_training < self._best < math.inf


@dataclass(frozen=True)
class NewBest:
    """An evaluation that was the best so far, and the checkpoint of the weights it measured."""

    step: int
    metric: str
    value: float
    position: Position
    checkpoints: CheckpointLog
    save: APIFuture[SaveWeightsResponse] | None
    """None where that state is saved anyway."""

    async def record(self) -> None:
        """Not before all earlier steps are logged: a resume may go on from here."""
        if self.save is None:
            self.checkpoints.mark_best(self.step, self.metric, self.value)
        else:
            path = (await self.save).path
            name = checkpoint_name(self.step)
            epoch, batch, row = self.position
            self.checkpoints.add_best(name, path, self.step, epoch, batch, self.metric, self.value, row)


class BestKeeper:
    """Has the weights of the best evaluation kept, and says which they are."""

    def __init__(self, tracker: BestTracker, checkpoints: CheckpointLog, client: TrainingClient) -> None:
        self._tracker = tracker
        self._checkpoints = checkpoints
        self._client = client

    def observe(
        self, step: int, metrics: Mapping[str, float], position: Position, is_save_due: bool
    ) -> NewBest | None:
        """Takes in an evaluation; where it is the best so far, queues a checkpoint of what it measured.

        Nothing else may have been queued since. `position` is the batch that comes next;
        `is_save_due` says that this state is saved in turn.
        """
        metric = self._tracker.metric
        if step == 0:
            self._check_first(metrics)
        if not self._tracker.observe(step, metrics):
            return None
        assert metric is not None
        save = None
        if not is_save_due and not self._checkpoints.has_step(step):
            save = self._client.save_state(checkpoint_name(step), overwrite=True)
        return NewBest(step, metric, metrics[metric], position, self._checkpoints, save)

    def pass_step(self, step: int) -> None:
        self._tracker.pass_step(step)

    @property
    def is_out_of_patience(self) -> bool:
        return self._tracker.is_out_of_patience

    def _check_first(self, metrics: Mapping[str, float]) -> None:
        """Raises TrainingError where the first evaluation, for which every evaluator runs, lacks the metric.

        Not for the metric that is tracked by default, which only needs held-out data.
        """
        metric = self._tracker.metric
        if metric is None or metric in metrics:
            return
        if FAILURES in metrics:
            logger.warning("`%s` is not known yet: an evaluator failed.", metric)
            return
        found = ", ".join(sorted(metrics)) or "no metric at all"
        if metric == DEFAULT_METRIC and self._tracker.patience is None:
            logger.info("No best checkpoint is kept: nothing measures %s (found: %s).", metric, found)
            return
        raise TrainingError(
            f"best_metric={metric} is not among the metrics of this run's evaluations: {found}. "
            f"Name one of those, or add the evaluator that measures it."
        )

    def in_words(self) -> str:
        """A sentence to put behind another, or nothing."""
        best = self._checkpoints.best()
        if best is None:
            return ""
        what = f"{best.metric} {best.value:.4f}"
        if best.name == FINAL:
            return f" It is the best: {what}."
        return f" The best is {self._checkpoints.path_of(best)}: {what} after {best.step} steps."

    def why_stopped(self, step: int) -> str:
        tracker = self._tracker
        return (
            f"Stopped early after {step} steps: no better {tracker.metric} in {tracker.patience} evaluations"
        )

    def warn_of_a_better_start(self) -> None:
        if self._tracker.is_worse_than_before_training:
            logger.warning(
                "%s was better before training than in any evaluation since.", self._tracker.metric
            )
