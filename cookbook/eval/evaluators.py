"""The two protocols of evaluators, and the builders that configs name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import chz

from cookbook.errors import TrainingError

if TYPE_CHECKING:
    from cookbook.sampling_client import SamplingClient
    from cookbook.training_client import TrainingClient


class TrainingClientEvaluator(ABC):
    """Measures with forward passes of the model in training."""

    @abstractmethod
    async def __call__(self, training_client: TrainingClient) -> dict[str, float]:
        """Metrics by path, such as `test/nll`."""


class SamplingClientEvaluator(ABC):
    """Measures by sampling from a snapshot of the model. Evaluators of one step share one."""

    @abstractmethod
    async def __call__(self, sampling_client: SamplingClient) -> dict[str, float]:
        """Metrics by path, such as `test/exact_match`."""


Evaluator: TypeAlias = TrainingClientEvaluator | SamplingClientEvaluator


@chz.chz
class EvaluatorBuilder:
    """A config that makes an evaluator."""

    def __call__(self) -> Evaluator:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


AnyEvaluatorBuilder: TypeAlias = EvaluatorBuilder | Callable[[], Evaluator]


async def evaluate(training_client: TrainingClient, evaluators: list[Evaluator]) -> dict[str, float]:
    """All metrics of the weights as they are when everything queued before has run."""
    metrics: dict[str, float] = {}
    sampling_client = None
    for evaluator in evaluators:
        if isinstance(evaluator, TrainingClientEvaluator):
            result = await evaluator(training_client)
        else:
            if sampling_client is None:
                sampling_client = await training_client.save_weights_and_get_sampling_client_async()
            result = await evaluator(sampling_client)
        metrics |= _checked(evaluator, result)
    return metrics


def _checked(evaluator: Evaluator, result: object) -> dict[str, float]:
    """The result as plain floats: numpy and torch scalars are welcome, anything else is named."""
    try:
        return {str(name): float(value) for name, value in result.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{type(evaluator).__name__} returned {result!r}. An evaluator returns numbers by name."
        ) from error
