"""What a run trains for, if that is not the likelihood of its data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cookbook.data.types import SupervisedDataset
from cookbook.eval.evaluators import Evaluator
from cookbook.runs.folder import RunFolder
from cookbook.types import Datum, ForwardBackwardOutput

if TYPE_CHECKING:
    from cookbook.clients.futures import APIFuture
    from cookbook.clients.training import TrainingClient


class Objective(ABC):
    """Replaces the loss of the training loop, and what it measures on held-out data."""

    @abstractmethod
    async def prepare(
        self, client: TrainingClient, datasets: Sequence[SupervisedDataset], folder: RunFolder, is_new: bool
    ) -> None:
        """Does once what needs the model before its first step. `is_new` is False for a resumed run."""

    @abstractmethod
    def forward_backward(self, client: TrainingClient, data: list[Datum]) -> APIFuture[ForwardBackwardOutput]:
        """Queues the pass of a batch. `loss` and `metrics` of the result are logged under `train/`."""

    @abstractmethod
    def evaluator(self, data: SupervisedDataset) -> Evaluator:
        """Returns what measures held-out data."""
