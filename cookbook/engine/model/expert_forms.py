"""Recognises how a module of experts stores its stacked weights, and how it is called.

Most modules describe themselves, for the grouped products of transformers. Others are tried on a small copy
of their weights, because their code may compute something else.

Shape suffixes: N tokens, K experts of a token, E experts, R rows in the order of their experts, D hidden
size, I inputs and O outputs of a product, U outputs of the first product (gate and up), H inputs of the
second.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from cookbook.engine.model import fused

Call: TypeAlias = Literal["routed", "all", "sorted"]
"""How experts get their tokens: "routed" as tokens [N, D] with the experts [N, K] of each and their weights
[N, K], "all" as the same number of rows for each expert [E*N, D], and "sorted" as rows [R, I] with the number
of rows of each expert. The last is a single product, the others are two with a gate between them."""


@dataclass(frozen=True)
class ExpertsForm:
    call: Call
    names: tuple[str, ...]
    """The stacked weights in the order of their use."""
    is_transposed: bool = False
    """Whether a weight is stored as [E, I, O], and not as [E, O, I]."""
    has_bias: bool = False
    has_gate: bool = True
    has_norm: bool = False
    has_identity: bool = False
    """Whether tokens may choose experts behind the last one, which return their input."""
    activation: str | None = None
    """The activation of a gate that is a plain gated product (`kernels.ACTIVATIONS`)."""


def form_of(module: nn.Module) -> ExpertsForm | None:
    """Returns the form of a module of experts, or None for an unknown one and for other modules."""
    if (known := vars(module).get("experts_form")) is not None:
        return known
    form = _form_without_activation(module)
    if form is None or form.call == "sorted" or not form.has_gate:
        return form
    return replace(form, activation=fused.activation_of_halves(functools.partial(gated, module)))


def _form_without_activation(module: nn.Module) -> ExpertsForm | None:
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return ExpertsForm(
            "routed",
            (first, "down_proj"),
            is_transposed=bool(module.is_transposed),
            has_bias=bool(module.has_bias),
            has_gate=bool(module.has_gate),
            has_norm=bool(getattr(module, "has_post_expert_norm", False)),
        )
    shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters(recurse=False)}
    if not shapes or any(len(shape) != 3 for shape in shapes.values()):
        return None
    try:
        with torch.no_grad(), torch.device("cpu"):
            return _form_by_trying(module, shapes)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # its code needs something else


def num_flat_experts(module: nn.Module) -> int | None:
    """Returns the number of experts whose matrices a module holds one below the other: [E*R, C].

    Its forward pass gets the tokens of one expert and this expert's part of each weight, which the module
    around it reads (DBRX). For other modules None is returned.
    """
    weights = list(module.parameters(recurse=False))
    shapes = {tuple(weight.shape) for weight in weights}
    num_inputs = len(inspect.signature(type(module).forward).parameters) - 1
    if len(weights) < 2 or len(shapes) != 1 or num_inputs != 1 + len(weights):
        return None
    shape = shapes.pop()
    numbers = [value for name, value in vars(module).items() if "num_experts" in name and type(value) is int]
    if len(shape) != 2 or len(numbers) != 1 or shape[0] == numbers[0] or shape[0] % numbers[0]:
        return None
    return numbers[0]


def gated(module: Any, up_RU: Tensor) -> Tensor:
    """Returns the inputs of the second product of gated experts: [R, H]."""
    if hasattr(module, "_apply_gate"):
        hidden_RH: Tensor = module._apply_gate(up_RU)
        return hidden_RH
    gate_RH, linear_RH = up_RU.chunk(2, dim=-1)
    product_RH: Tensor = module.act_fn(gate_RH) * linear_RH
    return product_RH


# -- trying -------------------------------------------------------------------------------------

Shape: TypeAlias = tuple[int, ...]


def _form_by_trying(module: nn.Module, shapes: Mapping[str, Shape]) -> ExpertsForm | None:
    num_inputs = len(inspect.signature(type(module).forward).parameters) - 1
    if shapes.keys() == {"weight"} and num_inputs == 2:
        return ExpertsForm("sorted", ("weight",)) if _is_sorted(module, shapes["weight"]) else None
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        return None
    names = ("gate_up_proj", "down_proj")
    first, second = (shapes[name] for name in names)
    fits = (first[2], first[1]) == (second[1], 2 * second[2]) and first[0] >= second[0]
    if num_inputs == 3 and fits and _is_routed(module, first, second):
        return ExpertsForm("routed", names, has_identity=first[0] > second[0])
    if num_inputs == 1 and first == (second[0], second[2], 2 * second[1]) and _is_for_all(module, first):
        return ExpertsForm("all", names, is_transposed=True)
    return None


def _is_routed(module: nn.Module, first_EUD: Shape, second_EDH: Shape) -> bool:
    """Returns whether a module has the weighted sums of its experts' results, or of their inputs."""
    small, (first, second) = _small_copy(module, first_EUD[2], second_EDH[2], first_EUD, second_EDH)
    tokens_ND, weights_NK = _random(3, first.shape[2]), _random(3, 2)
    last, behind = len(second) - 1, len(first) - 1
    chosen_NK = torch.tensor([[0, last], [last, behind], [0, behind]])
    expected_ND = torch.zeros_like(tokens_ND)
    for token, place in torch.ones_like(chosen_NK).nonzero().tolist():
        result_1D, expert = tokens_ND[token : token + 1], int(chosen_NK[token, place])
        if expert <= last:
            result_1D = gated(small, result_1D @ first[expert].T) @ second[expert].T
        expected_ND[token] += weights_NK[token, place] * result_1D[0]
    return _are_close(type(small).forward(small, tokens_ND, chosen_NK, weights_NK), expected_ND)


def _is_for_all(module: nn.Module, first_EDU: Shape) -> bool:
    """Returns whether a module takes the same number of rows for each expert, in their order."""
    num_experts, hidden, outputs = first_EDU
    inner = outputs // 2
    small, (first, second) = _small_copy(module, hidden, inner, first_EDU, (num_experts, inner, hidden))
    rows_ERD = _random(num_experts, 2, first.shape[1])
    expected = (gated(small, rows_ERD @ first) @ second).flatten(0, 1)
    return _are_close(type(small).forward(small, rows_ERD.flatten(0, 1)), expected)


def _is_sorted(module: nn.Module, shape_EOI: Shape) -> bool:
    """Returns whether a module multiplies rows in the order of their experts with the weights of these."""
    small = copy.copy(module)
    weight_EOI = _random(shape_EOI[0], 3, 5)
    small._parameters = {"weight": nn.Parameter(weight_EOI)}
    sizes = [expert % 3 for expert in range(shape_EOI[0])]
    rows_RI = _random(sum(sizes), 5)
    parts = zip(rows_RI.split(sizes), weight_EOI, strict=True)
    expected = torch.cat([part @ weight.T for part, weight in parts])
    return _are_close(type(small).forward(small, rows_RI, sizes), expected)


def _small_copy(
    module: nn.Module, hidden: int, inner: int, *shapes: Shape
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a copy of a module with two small random weights on the CPU, and these."""
    small = copy.copy(module)
    sizes = {hidden: 6, inner: 4, 2 * inner: 8}
    if len({*sizes, *(shape[0] for shape in shapes)}) < len(sizes) + len({shape[0] for shape in shapes}):
        sizes = {}  # one number has two meanings
    numbers = {key: value for key, value in vars(module).items() if type(value) is int}
    vars(small).update({key: sizes.get(value, value) for key, value in numbers.items()})
    weights = tuple(_random(shape[0], *(sizes.get(size, size) for size in shape[1:])) for shape in shapes)
    small._parameters = {
        name: nn.Parameter(weight)
        for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True)
    }
    return small, weights


def _random(*shape: int) -> Tensor:
    """Returns the same random numbers for a shape every time, and leaves torch's generator as it is."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(sum(shape)), device="cpu")


def _are_close(found: Any, expected: Tensor) -> bool:
    is_same_shape = isinstance(found, Tensor) and found.shape == expected.shape
    return is_same_shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
