"""Keeps the inputs of checkpointed layers in host memory from the forward to the backward pass.

The copies have a stream of their own. In the forward pass the input of a layer leaves while the layer runs,
and its memory on the device is free when the next layer begins. In the backward pass the input of the layer
below is fetched while a layer runs again, so at most two inputs are on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_ON_DEVICE = 2
"""The inputs that are on the device at the same time in the backward pass."""


@dataclass
class _Input:
    """The input of one layer."""

    place: int
    on_host: Tensor
    on_device: Tensor | None
    copied: Any
    """The event at the end of its last copy, or None on a CPU, whose copies have ended when they return."""


class InputsOnHost:
    """The inputs of the layers of one pass.

    On a device of type "cpu" they are copied as well, so that tests can compare the results.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._inputs: list[_Input] = []

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Moves the first tensor that autograd saves in the body, which is the hidden states of a layer.

        Other inputs are often the same tensor for all layers.
        """
        is_saved = False

        def pack(tensor: Tensor) -> Tensor | _Input:
            nonlocal is_saved
            # Returning the tensor itself would create a reference cycle that the garbage collector misses.
            values = tensor.detach()
            if is_saved or not values.is_contiguous():
                return values
            is_saved = True
            return self._send(values)

        def unpack(saved: Tensor | _Input) -> Tensor:
            return saved if isinstance(saved, Tensor) else self._receive(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def num_on_device(self) -> int:
        """Returns the number of inputs that are kept on the device now."""
        return sum(kept.on_device is not None for kept in self._inputs)

    def _send(self, values: Tensor) -> _Input:
        compute = self._module.current_stream(self._device)
        on_host = torch.empty(
            values.shape, dtype=values.dtype, pin_memory=self._device.type == "cuda", device="cpu"
        )
        self._stream.wait_stream(compute)
        with self._module.stream(self._stream):
            on_host.copy_(values, non_blocking=True)
            copied = self._stream.record_event()
        if self._inputs:
            before = self._inputs[-1]
            compute.wait_event(before.copied)  # then its memory may be written to
            before.on_device = None
        self._inputs.append(_Input(len(self._inputs), on_host, values, copied))
        return self._inputs[-1]

    def _receive(self, kept: _Input) -> Tensor:
        compute = self._module.current_stream(self._device)
        found = kept.on_device
        if found is None:
            found = self._fetch(kept, compute)
        compute.wait_event(kept.copied)
        kept.on_device = None
        if kept.place > 0 and (below := self._inputs[kept.place - 1]).on_device is None:
            below.on_device = self._fetch(below, compute)
        return found

    def _fetch(self, kept: _Input, compute: Any) -> Tensor:
        """Returns the input's tensor on the device, which is complete after the event `kept.copied`."""
        values = torch.empty(kept.on_host.shape, dtype=kept.on_host.dtype, device=self._device)
        self._stream.wait_stream(compute)  # which may still use that memory
        with self._module.stream(self._stream):
            values.copy_(kept.on_host, non_blocking=True)
            kept.copied = self._stream.record_event()
        if self._device.type == "cuda":
            values.record_stream(self._stream)  # if the pass fails, the copy ends before the memory is reused
        return values
