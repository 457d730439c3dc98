"""Linear layers in oneDNN's own layout, for sampling on a CPU.

A product of this layout has the same bits for a row whatever the number of rows, so that a sample does not
depend on what shares its batch, and a single row needs no padding. It takes a second copy of the weights.

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.memory import in_gib, total_memory

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 1 / 8
"""The largest copy, as a share of the machine's memory. It does not depend on what is free, so that the same
program computes the same bits on the same machine."""
_ROWS_TRIED = (1, 2, 3, 4, 6, 8, 12, 20, 28, 44, 64)
"""Libraries choose kernels by the number of rows."""


class PackedLinear:
    """The product with one weight. It stands in the place of a layer's `forward` while it is used."""

    def __init__(self, layer: nn.Linear, row_multiple: int) -> None:
        """`row_multiple` is that of products with weights in the usual layout, which adapters have."""
        self._of = _identity(layer.weight)
        self._packed_OI = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self._bias_O = layer.bias
        self._row_multiple = row_multiple

    def __call__(self, x_NI: Tensor) -> Tensor:
        out_NO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NI, self._packed_OI, self._bias_O, "none", [], ""
        )
        return out_NO

    def is_of(self, layer: nn.Linear) -> bool:
        """Returns whether the layer has the weight that was packed, unchanged."""
        return _identity(layer.weight) == self._of

    def add_lora(self, out_NO: Tensor, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        """Adds an adapter's product to a result, in place, and returns it."""
        padding = -len(x_NI) % self._row_multiple
        padded_NI = nn.functional.pad(x_NI, (0, 0, 0, padding)) if padding else x_NI
        added_NO = padded_NI @ a_RI.T @ b_OR.T
        return out_NO.add_(added_NO[: len(out_NO)], alpha=scaling)


class PackedWeights:
    """All linear layers of a model, packed."""

    def __init__(self, model: Any, row_multiple: int) -> None:
        self._model = model
        self._packed = {layer: PackedLinear(layer, row_multiple) for layer in _linear_layers(model)}

    def are_current(self) -> bool:
        """Returns whether the model has the weights that were packed, and no adapter but LoRAs on them."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if not all(packed.is_of(layer) for layer, packed in self._packed.items()):
            return False
        for module in self._model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                return False
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                is_fused = "active_lora" in vars(layer) and not layer.runs_variant
                if not is_fused or layer.base_layer not in self._packed:
                    return False
        return True

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Runs the model's linear layers with the packed weights in the body, which takes no gradients."""
        for layer, packed in self._packed.items():
            vars(layer)["forward"] = packed  # setattr of a module takes 30 times as long
        try:
            yield
        finally:
            for layer in self._packed:
                del vars(layer)["forward"]


def _identity(weight: Tensor) -> tuple[int, int]:
    """Returns what changes when a weight is written to or replaced."""
    return weight.data_ptr(), weight._version


def _linear_layers(model: Any) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def pack(
    model: Any, dtype: torch.dtype, row_multiple: int, share_of_memory: float = _SHARE_OF_MEMORY
) -> PackedWeights | None:
    """Returns the packed weights of a model on a CPU, or None where they would not help or not fit."""
    reason = _why_not(model, dtype, share_of_memory)
    if reason is None:
        try:
            reason = _why_unequal(model)
            if reason is None:
                return PackedWeights(model, row_multiple)
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # private functions of torch
            reason = f"{type(error).__name__}: {error}"
    logger.info("Weights are not packed for sampling: %s.", reason)
    return None


def _why_not(model: Any, dtype: torch.dtype, share_of_memory: float) -> str | None:
    if dtype != torch.float32:
        return f"they are {str(dtype).removeprefix('torch.')}, and float32 is packed"
    layers = _linear_layers(model)
    known = {id(layer.weight) for layer in layers}
    known |= {id(module.weight) for module in model.modules() if type(module) is nn.Embedding}
    known |= {id(module.weight) for module in model.modules() if _is_depthwise(module)}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and id(weight) not in known:
            return f"{name} is not the weight of a linear layer"
    size = sum(layer.weight.nbytes for layer in layers)
    device = layers[0].weight.device if layers else torch.device("cpu")
    allowed = share_of_memory * total_memory(device)
    if size > allowed:
        return f"a copy takes {in_gib(size)}, and {in_gib(allowed)} are allowed for it"
    return None


def _is_depthwise(module: nn.Module) -> bool:
    """Returns whether a module is a convolution in which no channel reads another's, so it has no product."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels


@torch.no_grad()
def _why_unequal(model: Any) -> str | None:
    """Returns why the bits of a row would depend on the number of rows on this CPU, or None."""
    generator = torch.Generator().manual_seed(0)
    for layer in {layer.weight.shape: layer for layer in _linear_layers(model)}.values():
        rows_NI = torch.randn(_ROWS_TRIED[-1], layer.in_features, generator=generator)
        packed = PackedLinear(layer, 1)
        expected_NO = packed(rows_NI)
        for num_rows in _ROWS_TRIED:
            if not torch.equal(packed(rows_NI[:num_rows]), expected_NO[:num_rows]):
                return f"products of {num_rows} rows with {[*layer.weight.shape]} round differently"
    return None
