"""What operators on the fake CUDA device cost: launches, bytes, floating-point operations.

Bytes are those that a kernel reads and writes if nothing stays in the cache. An operator counts as one
launch, except where torch is known to need more.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.fake_cuda.device import OperatorCall, calling_function

CLASSES = ("matmul", "attention", "norm", "rope", "loss", "elementwise", "optimizer", "copies")
Kind = Literal["product", "thin product", "attention", "attention backward", "memory", "memcpy"]

_THIN = 64
"""A product with a side of at most so many elements is bound by memory, and reaches half of the bandwidth."""

_ROWS_READ = {"gather", "index_select", "embedding", "index", "take_along_dim"}
"""Operators that read as many elements of their first argument as they return."""
_WRITTEN_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "zeros", "full", "ones", "new_zeros"}
_ADDED_TO = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "index_add", "index_put"}
"""Operators that change as many elements as their last tensor has."""
_TWO_KERNELS = {"slice_backward", "select_backward", "index_put", "index_add", "embedding_dense_backward"}
"""Zeros, and then a kernel that writes into them."""
_WRITTEN_IN_PLACE = {"gated_product_backward": 2}
"""How many of the first arguments an operator that returns nothing reads and also writes."""
_TENSORS_PER_LAUNCH = {"_foreach_norm": 110, "_foreach_mul_": 110, "_foreach_copy_": 64, "_fused_adamw_": 36}
"""How many tensors one kernel takes, by the number of lists (`depth_to_max_tensors` in torch)."""


class Cost(NamedTuple):
    operator_class: str
    kind: Kind
    num_bytes: int
    flops: int


@dataclass
class Costs:
    """The costs of a part of the work. An instance is called for each operator (`FakeCuda.recording`)."""

    lengths: Sequence[int] = ()
    """The lengths of the sequences of a packed row, which say how many scores attention computes."""
    launches: Counter[Cost] = field(default_factory=Counter)
    num_waits: float = 0
    _sequence_numbers: list[int] = field(default_factory=list)
    _places: list[str] = field(default_factory=list)
    """The functions that called the operators with these sequence numbers of autograd."""

    def __call__(self, call: OperatorCall) -> None:
        place = self._place()
        kind, flops = self._work(call)
        num_bytes = _bytes(call)
        number = 2 if call.operator in _TWO_KERNELS else 1
        if call.operator in _TENSORS_PER_LAUNCH:
            tensors = call.inputs[0]
            number = math.ceil(len(tensors) / _TENSORS_PER_LAUNCH[call.operator])
        self.launches[Cost(_class_of(kind, place), kind, num_bytes // number, flops // number)] += number

    def _place(self) -> str:
        """Returns the function that called the operator or, in a backward pass, the forward operator."""
        node = torch._C._current_autograd_node()
        place = calling_function()
        if node is None:
            number = torch._C._autograd._get_sequence_nr()
            if not self._sequence_numbers or self._sequence_numbers[-1] < number:
                self._sequence_numbers.append(number)
                self._places.append(place)
            return place
        index = bisect.bisect_left(self._sequence_numbers, node._sequence_nr() + 1)
        # a later number is that of an operator which a function of autograd has called in its backward pass
        return self._places[index] if index < len(self._places) else place

    def _work(self, call: OperatorCall) -> tuple[Kind, int]:
        """Returns the kind of kernel, and its floating-point operations."""
        name, tensors = call.operator, [t for t in call.inputs if isinstance(t, Tensor)]
        if name == "memcpy":
            return "memcpy", 0
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_grouped_mm"):
            a, b = tensors[-3:-1] if name == "_grouped_mm" else tensors[-2:]
            if name == "_grouped_mm":  # each row meets one of the matrices
                return "product", 2 * a.shape[0] * a.shape[1] * b.shape[-1]
            sides = (*a.shape[-2:], b.shape[-1])
            flops = 2 * math.prod(sides) * math.prod(a.shape[:-2])
            return ("thin product" if min(sides) <= _THIN else "product"), flops
        if name in ("_varlen_attn", "_varlen_attn_backward"):
            query = tensors[0] if name == "_varlen_attn" else tensors[1]
            flops = sum(2 * length**2 * query.shape[1] * query.shape[2] for length in self.lengths)
            return ("attention", flops) if name == "_varlen_attn" else ("attention backward", flops * 5 // 2)
        if name.startswith("_scaled_dot_product"):
            is_backward = "backward" in name
            query, key = tensors[1:3] if is_backward else tensors[:2]
            flops = 4 * query.numel() * key.shape[2]
            return ("attention backward", flops * 5 // 2) if is_backward else ("attention", flops)
        if name == "convolution":
            return "memory", 2 * call.out.numel() * tensors[1][0].numel()
        return "memory", 0

    def time(self, card: Any) -> dict[str, float]:
        """Returns the seconds of each class on a card, one kernel after another."""
        seconds: Counter[str] = Counter()
        for cost, number in self.launches.items():
            seconds[cost.operator_class] += number * card.seconds(cost)
        return dict(seconds)

    def totals(self) -> dict[str, tuple[float, float, float]]:
        """Returns launches, bytes and operations of each class."""
        found = dict.fromkeys(CLASSES, (0.0, 0.0, 0.0))
        for cost, number in self.launches.items():
            launches, num_bytes, flops = found[cost.operator_class]
            found[cost.operator_class] = (
                launches + number,
                num_bytes + number * cost.num_bytes,
                flops + number * cost.flops,
            )
        return found

    def plus(self, other: Costs, times: float) -> Costs:
        """Returns these costs and so many times the other ones."""
        launches = Counter(self.launches)
        for cost, number in other.launches.items():
            launches[cost] += number * times  # type: ignore[assignment]
        return Costs(self.lengths, launches, self.num_waits + times * other.num_waits)


def _class_of(kind: Kind, place: str) -> str:
    path, _, function = place.partition(":")
    if kind == "memcpy":
        return "copies"
    if path.endswith(("unembedding.py", "losses.py")):
        return "loss"
    if path.endswith("optimizer.py"):
        return "optimizer"
    if kind in ("product", "thin product"):
        return "matmul"
    if kind.startswith("attention"):
        return "attention"
    lowered = function.lower()
    if "norm" in lowered:
        return "norm"
    if any(name in lowered for name in ("rotary", "rotate", "rope")):
        return "rope"
    return "elementwise"


def _bytes(call: OperatorCall) -> int:
    """Returns the bytes that an operator reads and writes."""
    outputs = _tensors(call.out)
    if call.operator in _ADDED_TO:
        values = _tensors(call.inputs)[-1]
        return 3 * values.nbytes
    if call.operator in _ROWS_READ:
        return 2 * sum(map(_size, outputs)) + _tensors(call.inputs)[-1].nbytes
    if call.operator in _WRITTEN_ONLY:
        return sum(map(_size, outputs)) + sum(map(_size, _tensors(call.inputs)[1:]))
    written = _tensors(call.inputs)[: _WRITTEN_IN_PLACE.get(call.operator, 0)]
    return sum(map(_size, [*_tensors(call.inputs), *outputs, *written]))


def _size(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's elements in memory, where an expanded one has fewer."""
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
