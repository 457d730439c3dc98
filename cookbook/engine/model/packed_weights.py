"""Linear layers in oneDNN's own layout, for sampling on a CPU.

A product of this layout has the same bits for a row whatever the number of rows, on some CPUs and with some
sizes from two rows on. So a sample does not depend on what shares its batch, and a single row needs little
padding or none. It takes a second copy of the weights.

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model import text_part
from cookbook.engine.model.memory import in_gib, total_memory

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 1 / 8
"""The largest copy, as a share of the machine's memory. It does not depend on what is free, so that the same
program computes the same bits on the same machine."""
_MULTIPLES = (1, 2, 4, 8)
_ROWS_TRIED = (1, 2, 3, 4, 6, 8, 12, 20, 28, 44, 64, 180)
"""Libraries choose kernels by the number of rows."""
OUTPUTS_TRIED = 4096
"""More would take seconds for the projection to a large vocabulary."""
_VECTOR = 32
"""How many floats a CPU may process at once, the rest of a tensor by another formula of exp."""


class PackedLinear:
    """The product with one weight. It stands in the place of a layer's `forward` while it is used."""

    def __init__(self, layer: nn.Linear) -> None:
        self._of = _identity(layer.weight)
        self._packed_OI = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self._bias_O = layer.bias

    def __call__(self, x_NI: Tensor) -> Tensor:
        return _product(x_NI, self._packed_OI, self._bias_O)

    def is_of(self, layer: nn.Linear) -> bool:
        """Returns whether the layer has the weight that was packed, unchanged."""
        return _identity(layer.weight) == self._of

    def add_lora(self, out_NO: Tensor, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        """Adds an adapter's product to a result, in place, and returns it.

        Its weights change, so they are not packed. A row alone would be rounded differently.
        """
        padded_NI = x_NI if len(x_NI) > 1 else x_NI.expand(2, -1)
        added_NO = _product(_product(padded_NI, a_RI), b_OR)
        return out_NO.add_(added_NO[: len(out_NO)], alpha=scaling)


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Returns oneDNN's product with a weight, which may be packed."""
    out_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return out_NO


class PackedWeights:
    """All linear layers of a model, packed."""

    def __init__(self, model: Any, layers: list[nn.Linear], row_multiple: int) -> None:
        """`row_multiple`: products of so many rows have the same bits for a row."""
        self._model = model
        self.row_multiple = row_multiple
        self._packed = {layer: PackedLinear(layer) for layer in layers}

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
    """Returns those that text runs through."""
    return [module for module in _modules(model) if type(module) is nn.Linear]


def _modules(model: Any) -> list[nn.Module]:
    of_towers = {module for tower in text_part.towers(model).values() for module in tower.modules()}
    return [module for module in model.modules() if module not in of_towers]


def pack(model: Any, dtype: torch.dtype, share_of_memory: float = _SHARE_OF_MEMORY) -> PackedWeights | None:
    """Returns the packed weights of a model on a CPU, or None where they would not help or not fit."""
    layers = _linear_layers(model)
    reason = _why_not(model, layers, dtype, share_of_memory)
    if reason is None:
        try:
            for multiple in _MULTIPLES:
                reason = _why_unequal(layers, model.get_output_embeddings(), multiple)
                if reason is None:
                    return PackedWeights(model, layers, multiple)
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # private functions of torch
            reason = f"{type(error).__name__}: {error}"
    logger.info("Weights are not packed for sampling: %s.", reason)
    return None


def _why_not(model: Any, layers: list[nn.Linear], dtype: torch.dtype, share_of_memory: float) -> str | None:
    if dtype != torch.float32:
        return f"they are {str(dtype).removeprefix('torch.')}, and float32 is packed"
    known = {id(layer.weight) for layer in layers}
    known |= {
        id(module.weight)
        for module in _modules(model)
        if isinstance(module, nn.Embedding | nn.Conv1d) and _has_no_product(module)
    }
    known |= {id(weight) for weight in text_part.frozen_parameters(model)}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and id(weight) not in known:
            return f"{name} is not the weight of a linear layer"
    size = sum(layer.weight.nbytes for layer in layers)
    device = layers[0].weight.device if layers else torch.device("cpu")
    allowed = share_of_memory * total_memory(device)
    if size > allowed:
        return f"a copy takes {in_gib(size)}, and {in_gib(allowed)} are allowed for it"
    return None


def _has_no_product(module: nn.Embedding | nn.Conv1d) -> bool:
    """Returns whether a weight is read row by row, or belongs to channels that do not read each other."""
    if isinstance(module, nn.Conv1d):
        return module.groups == module.in_channels == module.out_channels
    return type(module) is nn.Embedding


@torch.no_grad()
def _why_unequal(layers: list[nn.Linear], head: Any, multiple: int) -> str | None:
    """Returns why the bits of a row would depend on the number of rows on this CPU, or None.

    The numbers of rows are multiples of the given number.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in {layer.weight.shape: layer for layer in layers}.values():
        if multiple * layer.out_features % _VECTOR and layer is not head:
            return f"{multiple} rows of {layer.out_features} outputs are no multiple of {_VECTOR} numbers"
        weight_OI = layer.weight[:OUTPUTS_TRIED]
        rows_NI = torch.randn(_ROWS_TRIED[-1], layer.in_features, generator=generator)
        packed_OI = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
        expected_NO = _product(rows_NI, packed_OI)
        for num_rows in (number for number in _ROWS_TRIED if number % multiple == 0):
            if not torch.equal(_product(rows_NI[:num_rows], packed_OI), expected_NO[:num_rows]):
                return f"products of {num_rows} rows with {[*layer.weight.shape]} round differently"
    return None
