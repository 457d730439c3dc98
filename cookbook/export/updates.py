"""What an adapter changes of the weights of its base model, weight by weight.

W + s B A is computed in float32, and with DoRA each row of the result is scaled to its magnitude. Modules
that PEFT trained in full, and single rows of the embeddings, take the place of those of the base model.

Shape suffixes: I inputs, O outputs, R rank, M trained rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cookbook.engine import checkpoint
from cookbook.engine.model import peft_settings
from cookbook.errors import CheckpointError
from cookbook.runs.find import TrainedModel


class Update(Protocol):
    """The update of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update itself, for messages."""
        ...

    def shape_on(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Returns the shape of an updated weight that had `shape`, or None if the update does not fit it."""
        ...

    def added_to(self, weight: Tensor) -> Tensor:
        """Returns the updated weight in float32."""
        ...


@dataclass(frozen=True)
class _Factors:
    """The factors of an update scaling * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    is_transposed: bool = False
    """Whether the weight is [I, O], as in GPT-2, and not [O, I]."""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b_OR.shape[0], self.a_RI.shape[1])
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True)
class LowRank(_Factors):
    """Adds scaling * B A, and with DoRA scales each row to its magnitude."""

    magnitude_O: Tensor | None = None

    def shape_on(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape if shape == self.shape else None

    def added_to(self, weight: Tensor) -> Tensor:
        weight_OI = weight.float().T if self.is_transposed else weight.float()
        merged_OI = torch.addmm(weight_OI, self.b_OR.float(), self.a_RI.float(), alpha=self.scaling)
        if self.magnitude_O is not None:
            merged_OI *= (self.magnitude_O.float() / merged_OI.norm(dim=1))[:, None]
        return merged_OI.T if self.is_transposed else merged_OI


@dataclass(frozen=True)
class StackedLowRank(_Factors):
    """Adds scaling * B A to the stacked weight [E, O, I] of each expert, in PEFT's layout of A and B.

    A is [R*E, I], the expert outermost, and B is [O, R*E], the expert innermost.
    """

    def shape_on(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        fits = len(shape) == 3 and shape[1:] == self.shape and len(self.a_RI) % shape[0] == 0
        return shape if fits else None

    def added_to(self, weight: Tensor) -> Tensor:
        num_experts = len(weight)
        a_ERI = self.a_RI.float().view(num_experts, -1, self.a_RI.shape[1])
        b_EOR = self.b_OR.float().view(len(self.b_OR), -1, num_experts).permute(2, 0, 1)
        merged = weight.float().clone()
        for expert in range(num_experts):
            update_OI = b_EOR[expert] @ a_ERI[expert]
            merged[expert] += self.scaling * (update_OI.T if self.is_transposed else update_OI)
        return merged


@dataclass(frozen=True)
class ReplacedWeight:
    """Takes the place of a weight."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def shape_on(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape if shape == self.shape else None

    def added_to(self, weight: Tensor) -> Tensor:
        return self.weight.float()


@dataclass(frozen=True)
class ReplacedRows:
    """Take the places of rows of the embeddings, of which there may be more than the base model has."""

    indices: list[int]
    values_MD: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return max(self.indices) + 1, self.values_MD.shape[1]

    def shape_on(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(shape) != 2 or shape[1] != self.values_MD.shape[1]:
            return None
        return max(shape[0], max(self.indices) + 1), shape[1]

    def added_to(self, weight: Tensor) -> Tensor:
        weight_VD = weight.float()
        if missing := max(0, max(self.indices) + 1 - len(weight_VD)):
            weight_VD = torch.cat([weight_VD, weight_VD.mean(0).expand(missing, -1)])
        return weight_VD.index_copy(0, torch.tensor(self.indices), self.values_MD.float())


def read_updates(source: TrainedModel) -> dict[str, Update]:
    """Returns the updates by the name of the weight; {} for a full fine-tune.

    Raises CheckpointError if files are damaged or hold anything else.
    """
    if source.is_full:
        checkpoint.check_files(source.folder)
        return {}
    settings = peft_settings.read(source.folder)
    parts = peft_settings.parts_of(source.folder, settings)
    tensors: dict[str, dict[str, Tensor]] = {}
    updates: dict[str, Update] = {}
    for key, tensor in checkpoint.read_weights(source.folder).items():
        name = key.removeprefix(peft_settings.PREFIX)
        if (part := peft_settings.part_of(key)) is not None:
            tensors.setdefault(part[0], {})[part[1]] = tensor
        elif key in parts.saved:
            updates[name] = ReplacedWeight(tensor)
        else:
            module = name.removesuffix(peft_settings.TOKENS)
            updates[f"{module}.weight"] = ReplacedRows(list(parts.token_rows[module]), tensor)
    for module, found in tensors.items():
        if (stacked := peft_settings.stacked_weight_of(module, settings)) is not None:
            scaling = peft_settings.scaling(stacked, settings)
            updates[stacked] = StackedLowRank(found["A"], found["B"], scaling)
            continue
        if f"{module}.weight" in updates:
            raise CheckpointError(
                f"{source.folder} holds two updates of {module}.weight. Merge it with PEFT itself "
                f"(merge_and_unload)."
            )
        updates[f"{module}.weight"] = _low_rank(source, module, found, settings)
    return updates


def _low_rank(
    source: TrainedModel, module: str, found: Mapping[str, Tensor], settings: Mapping[str, object]
) -> LowRank:
    scaling = peft_settings.scaling(module, settings)
    kinds = found.keys() - {"magnitude"}
    if kinds == {"embedding_A", "embedding_B"} and "magnitude" not in found:
        return LowRank(found["embedding_B"].T, found["embedding_A"].T, scaling)
    if kinds != {"A", "B"}:
        raise CheckpointError(
            f"Checkpoint {source.folder} is damaged: of the LoRA on {module} it has "
            f"{', '.join(sorted(found))}, and A and B are needed."
        )
    return LowRank(found["A"], found["B"], scaling, magnitude_O=found.get("magnitude"))
