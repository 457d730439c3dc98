"""Negative log-likelihood on held-out data."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from cookbook.errors import DataError
from cookbook.eval.evaluators import TrainingClientEvaluator
from cookbook.supervised.types import SupervisedDataset
from cookbook.types import Datum

if TYPE_CHECKING:
    from cookbook.training_client import TrainingClient


class NLLEvaluator(TrainingClientEvaluator):
    """The weighted mean NLL in nats per trained token, over all of a dataset."""

    def __init__(self, dataset: SupervisedDataset, name: str = "test") -> None:
        self._dataset = dataset
        self._name = name

    @cached_property
    def _batches(self) -> list[list[Datum]]:
        batches = [self._dataset.get_batch(index) for index in range(len(self._dataset))]
        batches = [batch for batch in batches if batch]
        if not batches:
            raise DataError("The evaluation data has no trained token. Raise max_length, or set test_size=0.")
        return batches

    async def __call__(self, training_client: TrainingClient) -> dict[str, float]:
        passes = [training_client.forward(batch, return_logprobs="trained") for batch in self._batches]
        outputs = [await future for future in passes]
        loss_sum = sum(output.metrics["loss:sum"] for output in outputs)
        weight_sum = sum(output.metrics["weights:sum"] for output in outputs)
        return {f"{self._name}/nll": loss_sum / weight_sum}
