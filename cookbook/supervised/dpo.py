"""Direct preference optimization (Rafailov et al. 2023) as an objective of the training loop.

A batch has a chosen and a rejected reply to each prompt, side by side. With log-probabilities summed over the
tokens of a reply, under the model (p) and under the model before the first step (r),

    loss = -log sigmoid(beta * ((p_chosen - r_chosen) - (p_rejected - r_rejected)))

averaged over pairs. The reference is the model before the first step: for a new adapter the base model, whose
output a new adapter does not change. Its log-probabilities are computed once, and kept in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import chz
import numpy as np

from cookbook.data import formats
from cookbook.data.builders import NamedChatDatasetBuilder
from cookbook.data.conversation import Conversation
from cookbook.data.formats.pairs import side_of
from cookbook.data.rendered import TrainableRows
from cookbook.data.sources import Row
from cookbook.data.types import SupervisedDataset
from cookbook.errors import CheckpointError, ConfigError, DataError
from cookbook.eval.evaluators import TrainingClientEvaluator
from cookbook.runs.folder import RunFolder
from cookbook.supervised.config import Config
from cookbook.supervised.objectives import Objective
from cookbook.types import Datum, ForwardBackwardOutput, TensorData
from cookbook.utils import files, json_files, notes

if TYPE_CHECKING:
    from torch import Tensor

    from cookbook.clients.futures import APIFuture
    from cookbook.clients.training import TrainingClient

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference_logprobs.json"
_KEYS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


@chz.chz
class PairDatasetBuilder(NamedChatDatasetBuilder):
    """Rows with `chosen` and `rejected`, as TRL and the hub have them: texts or messages.

    `prompt` is a text or messages that come before both; without it, both are whole conversations.
    """

    def conversations_of(self, row: Row) -> list[Conversation]:
        if missing := [key for key in ("chosen", "rejected") if not row.get(key)]:
            raise DataError(f"it has no `{missing[0]}`. A pair has a chosen and a rejected reply.")
        for key in row.keys() - set(_KEYS):
            notes.count("row", "Columns not read", str(key))
        further = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}
        found = []
        for key in ("chosen", "rejected"):
            reply = side_of(row, [key], "assistant")
            is_whole = reply[0]["role"] != "assistant"
            before = [] if is_whole or not row.get("prompt") else side_of(row, ["prompt"], "user")
            if not before and not is_whole:
                raise DataError(
                    f"its `{key}` has no prompt before it. Give `prompt`, or whole conversations."
                )
            found += formats.conversations_of({"messages": [*before, *reply], **further}, "messages")
        return found

    def _trainable_rows(self, *arguments: Any, **options: Any) -> TrainableRows:
        rows = super()._trainable_rows(*arguments, **options)
        pairs = np.array([row for row in rows.rows if len(rows.kept_examples_of(row)) == 2], np.int64)
        if skipped := len(rows.rows) - len(pairs):
            logger.warning("%d pairs are skipped: max_length leaves nothing to train of a reply.", skipped)
        rows.rows = pairs
        return rows

    @chz.validate
    def _check_pairs(self) -> None:
        if self.streaming or self.common_config.on_long == "window" or self.repeated not in (None, "keep"):
            raise ConfigError(
                "Pairs are read as a whole: streaming, on_long=window and repeated are not for them."
            )


@chz.chz
class DpoConfig(Config):
    """A run of direct preference optimization."""

    beta: float = chz.field(
        default=0.1, doc="how strongly the model is kept near the one before the first step"
    )

    def objective(self) -> Objective:
        return DpoObjective(self.beta)

    def metric_patterns(self) -> list[str]:
        return [f"test/{name}" for name in ("dpo_loss", "dpo_accuracy", "dpo_margin", "nll")]

    @chz.validate
    def _check_beta(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"Invalid beta={self.beta}: must be finite and > 0.")


def dpo_loss(policy_2P: Tensor, reference_2P: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns the loss and the margin of each pair: [P]. Inputs are [chosen, rejected, chosen, ...]."""
    import torch.nn.functional as F

    ratio_P2 = (policy_2P - reference_2P).view(-1, 2)
    margin_P = beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
    return -F.logsigmoid(margin_P), margin_P


class DpoObjective(Objective):
    """The loss of pairs, given the reference's log-probabilities."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._reference: dict[str, float] = {}  # by the digest of a reply

    async def prepare(
        self, client: TrainingClient, datasets: Sequence[SupervisedDataset], folder: RunFolder, is_new: bool
    ) -> None:
        path = folder.path / REFERENCE_FILE
        if not is_new:
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing, and the reference model is gone. Start the run over."
                )
            self._reference = json_files.read_object(path, CheckpointError, "Restore it.")
            return
        batches = [batch for data in datasets for batch in data.iter_batches() if batch]
        passes = [client.forward(batch, return_logprobs="trained") for batch in batches]
        for batch, future in zip(batches, passes, strict=True):
            for datum, output in zip(batch, (await future).loss_fn_outputs, strict=True):
                self._reference[_digest(datum)] = float(output["logprobs"].to_numpy().sum())
        if folder.world.is_main:
            files.write(path, json.dumps(self._reference))

    def forward_backward(self, client: TrainingClient, data: list[Datum]) -> APIFuture[ForwardBackwardOutput]:
        return client.forward_backward_custom(data, self._loss, return_logprobs="trained")

    def _loss(self, data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        import torch

        masks = [torch.from_numpy(_mask(datum)) for datum in data]
        policy_2P = torch.stack(
            [(each_T * mask_T).sum() for each_T, mask_T in zip(logprobs, masks, strict=True)]
        )
        losses_P, margins_P = dpo_loss(policy_2P, torch.tensor([*map(self.reference, data)]), self._beta)
        trained = torch.cat([each_T[mask_T] for each_T, mask_T in zip(logprobs, masks, strict=True)]).detach()
        return losses_P.mean(), {
            **_metrics(losses_P, margins_P, policy_2P, [int(mask_T.sum()) for mask_T in masks]),
            "logprobs:min": float(trained.min()),
            "logprobs:max": float(trained.max()),
        }

    def reference(self, datum: Datum) -> float:
        if (found := self._reference.get(_digest(datum))) is None:
            raise DataError(f"{REFERENCE_FILE} lacks a reply: the data have changed. Start the run over.")
        return found

    def evaluator(self, data: SupervisedDataset) -> DpoEvaluator:
        return DpoEvaluator(self, data, self._beta)


class DpoEvaluator(TrainingClientEvaluator):
    """Measures the loss, the share of pairs whose chosen reply gained more, and the NLL of chosen replies."""

    def __init__(self, objective: DpoObjective, data: SupervisedDataset, beta: float) -> None:
        self._objective, self._data, self._beta = objective, data, beta

    async def __call__(self, training_client: TrainingClient) -> dict[str, float]:
        import torch

        batches = [batch for batch in self._data.iter_batches() if batch]
        passes = [training_client.forward(batch, return_logprobs="trained") for batch in batches]
        data = [datum for batch in batches for datum in batch]
        outputs = [output for future in passes for output in (await future).loss_fn_outputs]
        policy_2P = torch.tensor([float(output["logprobs"].to_numpy().sum()) for output in outputs])
        reference_2P = torch.tensor([*map(self._objective.reference, data)])
        losses_P, margins_P = dpo_loss(policy_2P, reference_2P, self._beta)
        found = _metrics(losses_P, margins_P, policy_2P, [int(_mask(datum).sum()) for datum in data])
        return {f"test/{name}": value for name, value in found.items()}


def _metrics(losses_P: Tensor, margins_P: Tensor, policy_2P: Tensor, lengths: list[int]) -> dict[str, float]:
    return {
        "dpo_loss": float(losses_P.detach().mean()),
        "dpo_accuracy": float((margins_P > 0).float().mean()),
        "dpo_margin": float(margins_P.detach().mean()),
        "nll": -float(policy_2P[::2].detach().sum()) / sum(lengths[::2]),
    }


def _mask(datum: Datum) -> np.ndarray:
    return TensorData(datum.loss_fn_inputs["weights"]).to_numpy() > 0


def _digest(datum: Datum) -> str:
    targets_T = TensorData(datum.loss_fn_inputs["target_tokens"]).to_numpy()
    parts = (datum.model_input.to_numpy(), targets_T, _mask(datum))
    return hashlib.blake2b(
        b"".join(np.ascontiguousarray(part).tobytes() for part in parts), digest_size=12
    ).hexdigest()
