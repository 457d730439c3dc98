"""The two protocols of evaluators, and the builders that configs name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import chz

from cookbook.errors import TrainingError
from cookbook.tables import Table

if TYPE_CHECKING:
    from cookbook.sampling_client import SamplingClient
    from cookbook.training_client import TrainingClient


EvalValue: TypeAlias = float | Table
"""A number, or a table to look at."""


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


@chz.chz
class EvaluatorBuilder:
    """A config that makes an evaluator."""

    def __call__(self) -> Evaluator:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


AnyEvaluatorBuilder: TypeAlias = EvaluatorBuilder | Callable[[], Evaluator]


@dataclass(frozen=True)
class Evaluation:
    """What the evaluators of one step found."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


async def evaluate(training_client: TrainingClient, evaluators: list[Evaluator]) -> Evaluation:
    """All that is to be known of the weights as they are when everything queued before has run."""
    found = Evaluation()
    sampling_client = None
    for evaluator in evaluators:
        if isinstance(evaluator, TrainingClientEvaluator):
            result = await evaluator(training_client)
        else:
            if sampling_client is None:
                sampling_client = await training_client.save_weights_and_get_sampling_client_async()
            result = await evaluator(sampling_client)
        _add(found, evaluator, result)
    return found


def _add(found: Evaluation, evaluator: Evaluator, result: object) -> None:
    """Adds a result; numpy and torch scalars are welcome as numbers, anything else is named."""
    try:
        for name, value in result.items():  # type: ignore[attr-defined]
            if isinstance(value, Table):
                found.tables[str(name)] = value
            else:
                found.metrics[str(name)] = float(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{type(evaluator).__name__} returned {result!r}. An evaluator returns numbers or tables by name."
        ) from error
