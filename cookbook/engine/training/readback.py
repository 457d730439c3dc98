"""Device results on their way to the host, read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Readback:
    """Starts copying tensors to host memory at once; `arrays()` waits for the copies.

    On CUDA the copies go into pinned memory behind the kernels that are already queued, so the
    worker goes on queueing the next step meanwhile.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = [tensor.detach() for tensor in tensors]
        if any(tensor.is_cuda for tensor in tensors):
            self._host = [_copy_to_pinned(tensor) for tensor in self._host]
            self._event = torch.cuda.Event()
            self._event.record()

    def arrays(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def _copy_to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
