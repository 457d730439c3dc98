"""The two kinds of evaluators, the builders that configs name, and the evaluation of one step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
"""A metric, or a table for people to read."""

OnEvaluatorError: TypeAlias = Literal["warn", "raise"]
"""Whether a failed evaluator is warned about and skipped in its step, or ends the run."""

FAILURES = "eval/failures"
"""The metric that counts the failed evaluators of a step; only present if there are any."""


class TrainingClientEvaluator(ABC):
    """Evaluates with forward passes of the model in training."""

    @abstractmethod
    async def __call__(self, training_client: TrainingClient) -> Mapping[str, EvalValue]:
        """Returns metrics by path, such as `test/nll`, and tables by name."""


class SamplingClientEvaluator(ABC):
    """Evaluates by sampling from a snapshot of the model, which the evaluators of one step share."""

    @abstractmethod
    async def __call__(self, sampling_client: SamplingClient) -> Mapping[str, EvalValue]:
        """Returns metrics by path, such as `test/exact_match`, and tables by name."""


Evaluator: TypeAlias = TrainingClientEvaluator | SamplingClientEvaluator


@dataclass(frozen=True)
class RunContext:
    """The settings of a run that the builders of its evaluators use."""

    log_path: Path
    model_name: str
    renderer_name: str | None
    system_prompt: str | None
    tools_in_system: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    add_tokens: Sequence[str] = ()


@chz.chz
class EvaluatorBuilder:
    """A config that creates an evaluator."""

    def in_run(self, run: RunContext) -> EvaluatorBuilder:
        """Returns this config with its unset fields taken from a run. Called before `__call__`."""
        return self

    def metric_patterns(self) -> Sequence[str] | None:
        """Returns patterns of the metrics of its evaluator (* matches anything); None if unknown."""
        return None

    def __call__(self) -> Evaluator:
        """Creates the evaluator. Called before a model is loaded, so that invalid settings fail early."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


AnyEvaluatorBuilder: TypeAlias = EvaluatorBuilder | Callable[[], Evaluator]


def metric_patterns_of(builder: AnyEvaluatorBuilder) -> Sequence[str] | None:
    """Returns the patterns that `builder` declares.

    Returns None if its class overrides only `__call__`, or is not an EvaluatorBuilder.
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
    """Runs the evaluators on the weights after all requests that are already queued.

    `seed` is used for requests without a seed. With it the state of the client does not change: a checkpoint
    saved afterwards equals one saved before. With `on_error="warn"` a failed evaluator only adds to
    `eval/failures`, and the others run; with "raise" its error is raised. A cancellation or a
    KeyboardInterrupt is not a failure.
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
    """A sampling client that is created for the first evaluator that needs it, and shared with the others."""

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
    """Adds the result of an evaluator, whose numbers may be numpy or torch scalars.

    Raises TrainingError, and adds nothing, if it is not a mapping to numbers and tables or repeats a name.
    """
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
            f"{name} returned {result!r}. An evaluator has to return a dict of numbers and tables by name."
        ) from error
    twice = sorted(metrics.keys() & found.metrics.keys())
    twice += [path for path in tables if not _continues(found.tables.get(path), tables[path])]
    if twice:
        raise TrainingError(
            f"{name} returned `{twice[0]}`, which another evaluator of this step returned too. Give one of "
            f"them another name."
        )
    found.metrics.update(metrics)
    for path, table in tables.items():
        earlier = found.tables.get(path)
        found.tables[path] = table if earlier is None else Table(table.columns, [*earlier.rows, *table.rows])


def _continues(earlier: Table | None, table: Table) -> bool:
    """Returns whether `table` can be appended to an earlier one of its name: both have the same columns."""
    return earlier is None or list(earlier.columns) == list(table.columns)
