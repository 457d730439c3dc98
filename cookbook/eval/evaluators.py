"""The two protocols of evaluators, and the builders that configs name."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import chz

from cookbook.errors import TrainingError, describe
from cookbook.eval.random_state import keeping_random_state
from cookbook.trace import Recorder
from cookbook.utils.tables import Table

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from cookbook.clients.training import TrainingClient

logger = logging.getLogger(__name__)

EvalValue: TypeAlias = float | Table
"""A number, or a table to look at."""

OnEvaluatorError: TypeAlias = Literal["warn", "raise"]
"""Whether an evaluator that fails is told of and left out of its step, or ends the run."""

FAILURES = "eval/failures"
"""The metric that counts evaluators which failed in a step. It is there where one did."""


class TrainingClientEvaluator(ABC):
    """Measures with forward passes of the model in training."""

    @abstractmethod
    async def __call__(self, training_client: TrainingClient) -> Mapping[str, EvalValue]:
        """Metrics by path, such as `test/nll`, and tables by name."""


class SamplingClientEvaluator(ABC):
    """Measures by sampling from a snapshot of the model. Evaluators of one step share one."""

    @abstractmethod
    async def __call__(self, sampling_client: SamplingClient) -> Mapping[str, EvalValue]:
        """Metrics by path, such as `test/exact_match`, and tables by name."""


Evaluator: TypeAlias = TrainingClientEvaluator | SamplingClientEvaluator


@dataclass(frozen=True)
class RunContext:
    """The facts about a run that builders of evaluators may need."""

    log_path: Path
    model_name: str
    renderer_name: str | None
    system_prompt: str | None
    tools_in_system: bool = False


@chz.chz
class EvaluatorBuilder:
    """A config that makes an evaluator."""

    def in_run(self, run: RunContext) -> EvaluatorBuilder:
        """This config with what it leaves open taken from a run. It is called before `__call__`."""
        return self

    def metric_patterns(self) -> Sequence[str] | None:
        """Returns the paths of the evaluator's metrics, with * for unknown parts; None: any."""
        return None

    def __call__(self) -> Evaluator:
        """Called before a model is loaded: whatever can be refused is refused here."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


AnyEvaluatorBuilder: TypeAlias = EvaluatorBuilder | Callable[[], Evaluator]


def metric_patterns_of(builder: AnyEvaluatorBuilder) -> Sequence[str] | None:
    """Returns the patterns that `builder` declares; None where a subclass builds another evaluator and
    declares none.
    """
    if not isinstance(builder, EvaluatorBuilder):
        return None
    for kind in type(builder).__mro__:
        if "metric_patterns" in vars(kind):
            return builder.metric_patterns()
        if "__call__" in vars(kind):
            return None
    raise AssertionError("EvaluatorBuilder has both")


@dataclass(frozen=True)
class Evaluation:
    """The results of the evaluators of one step."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


async def evaluate(
    training_client: TrainingClient,
    evaluators: Iterable[Evaluator],
    on_error: OnEvaluatorError = "raise",
    seed: int | None = None,
    recorder: Recorder | None = None,
) -> Evaluation:
    """All that is to be known of the weights as they are when everything queued before has run.

    With a `seed`, of which samples that bring none are drawn, it leaves the client's state as it
    was: a checkpoint saved after it is the one that would have been saved before.
    With `on_error="warn"` an evaluator that fails adds nothing but to `eval/failures`, and the
    others run. A cancellation or a KeyboardInterrupt is not a failure.
    """
    found = Evaluation()
    snapshot = _Snapshot(training_client, seed)
    num_failures = 0
    for evaluator in evaluators:
        try:
            span = (recorder or Recorder()).span("evaluation", type(evaluator).__name__)
            with span, keeping_random_state():
                if isinstance(evaluator, TrainingClientEvaluator):
                    result = await evaluator(training_client)
                else:
                    result = await evaluator(await snapshot.get())
            _add(found, evaluator, result)
        except Exception as error:
            if on_error == "raise":
                raise
            num_failures += 1
            logger.warning(
                "%s failed and is skipped in this step: %s",
                type(evaluator).__name__,
                describe(error),
                exc_info=True,
            )
    if num_failures:
        found.metrics[FAILURES] = num_failures
    return found


class _Snapshot:
    """A sampling client that is made when the first evaluator asks, and is then everybody's."""

    def __init__(self, training_client: TrainingClient, seed: int | None) -> None:
        self._training_client = training_client
        self._seed = seed
        self._sampling_client: SamplingClient | None = None

    async def get(self) -> SamplingClient:
        if self._sampling_client is None:
            self._sampling_client = await self._training_client.save_weights_and_get_sampling_client_async(
                seed=self._seed
            )
        return self._sampling_client


def _add(found: Evaluation, evaluator: Evaluator, result: object) -> None:
    """Adds the result if all of it is valid, otherwise nothing; numpy and torch scalars count as numbers."""
    name = type(evaluator).__name__
    metrics: dict[str, float] = {}
    tables: dict[str, Table] = {}
    try:
        for path, value in result.items():  # type: ignore[attr-defined]
            if isinstance(value, Table):
                tables[str(path)] = value
            else:
                metrics[str(path)] = float(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{name} returned {result!r}. An evaluator returns numbers or tables by name."
        ) from error
    twice = sorted(metrics.keys() & found.metrics.keys())
    twice += [path for path in tables if not _continues(found.tables.get(path), tables[path])]
    if twice:
        raise TrainingError(
            f"{name} returned `{twice[0]}`, and so did another evaluator of this step. Give one of them "
            f"another name."
        )
    found.metrics.update(metrics)
    for path, table in tables.items():
        earlier = found.tables.get(path)
        found.tables[path] = table if earlier is None else Table(table.columns, [*earlier.rows, *table.rows])


def _continues(earlier: Table | None, table: Table) -> bool:
    """Returns whether two tables of one name can be joined, as those of two evaluators of samples can."""
    return earlier is None or list(earlier.columns) == list(table.columns)
