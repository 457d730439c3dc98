"""Finds the linear layers of a module that read one tensor: q, k and v, or gate and up.

With a LoRA each of them reads that tensor for its own A, and the backward pass adds up what they give to its
gradient. A group of them can do so once (`lora`). Which layers form a group is seen when the model is tried
at loading. If a later pass gives them other inputs, they run one by one, with the same results.

Shape suffix: X anything before the last axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from cookbook.engine.model.recurrence import recurrent_mixers

Names = tuple[str, ...]


@contextlib.contextmanager
def noting_groups(model: nn.Module, decoder: nn.Module) -> Iterator[set[Names]]:
    """Yields a set to which the body's passes add groups: names of linear layers in the order of their calls.

    The members are children of one module. They are called once in each of its passes, one after another or
    not, with one and the same tensor. Recurrent mixers are left out: their projections may run on other
    tokens than those that the mixer gives them (`shared_projections`).
    """
    mixers = {id(mixer) for mixer in recurrent_mixers(decoder)}
    watches = []
    for name, module in model.named_modules():
        linear = {short: child for short, child in module.named_children() if isinstance(child, nn.Linear)}
        if len(linear) > 1 and id(module) not in mixers:
            watches.append(_Watch(module, f"{name}." if name else "", linear))
    found: set[Names] = set()
    try:
        yield found
    finally:
        for watch in watches:
            found |= watch.end()


class _Watch:
    """What the linear children of one module are called with."""

    def __init__(self, module: nn.Module, prefix: str, linear: dict[str, nn.Linear]) -> None:
        self._prefix = prefix
        self._calls: list[tuple[str, Tensor]] = []
        self._groups: set[Names] | None = None
        """The groups of the passes so far. A pass without one of them removes it."""
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._calls.clear()),
            module.register_forward_hook(lambda *_: self._end_pass()),
            *(
                child.register_forward_pre_hook(lambda _, inputs, short=short: self._called(short, inputs))
                for short, child in linear.items()
            ),
        ]

    def _called(self, short: str, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._calls.append((short, inputs[0]))

    def _end_pass(self) -> None:
        called = [short for short, _ in self._calls]
        members: dict[int, list[str]] = {}
        for short, x in self._calls:  # which keep their tensors alive, so no two have one id
            if called.count(short) == 1:
                members.setdefault(id(x), []).append(short)
        self._calls.clear()
        groups = {tuple(group) for group in members.values() if len(group) > 1}
        self._groups = groups if self._groups is None else self._groups & groups

    def end(self) -> set[Names]:
        for hook in self._hooks:
            hook.remove()
        self._calls.clear()
        return {tuple(self._prefix + short for short in group) for group in self._groups or ()}


class InputGroup:
    """Layers that were seen to read one tensor. The first of them that is called computes all results."""

    def __init__(self, members: Sequence[nn.Module], device_types: Sequence[str]) -> None:
        self._members = members
        self._device_types = device_types
        self._x_XI: Tensor | None = None
        self._results: dict[int, Tensor] = {}
        """The results of members that have not been called with the tensor yet."""

    def active(self, x_XI: Tensor) -> list[Any]:
        """Returns the members that can run together on a tensor, or none where that is not faster."""
        if x_XI.device.type not in self._device_types:
            return []
        return [member for member in self._members if _can_share(member)]

    def put(self, x_XI: Tensor, results: Sequence[tuple[nn.Module, Tensor]]) -> None:
        self._x_XI = x_XI
        self._results = {id(member): result for member, result in results}

    def take(self, member: nn.Module, x_XI: Tensor) -> Tensor | None:
        """Returns a result that another member has computed from this tensor."""
        if self._x_XI is not x_XI:
            return None
        result = self._results.pop(id(member), None)
        if not self._results:
            self._x_XI = None
        return result


def _can_share(member: Any) -> bool:
    """Returns whether the layer has a LoRA of the plain formula, without a mask of dropout of its own."""
    if member.disable_adapters or member.runs_variant or member.active_lora is None:
        return False
    dropout = member.active_lora[3]
    return dropout is None or dropout.keys_N is None
