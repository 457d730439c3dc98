"""AdamW whose moments are held in 8 bits, with the kernels of bitsandbytes.

A value of a moment is one of 256 numbers, which lie closer together near zero, times the largest magnitude of
its block of 256 values, so it takes 1.016 bytes (Dettmers et al., 8-bit Optimizers via Block-wise
Quantization, arXiv:2110.02861). Weights, gradients and the arithmetic of a step are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
MIN_SIZE = 4096
"""Smaller weights keep moments in float32, as in bitsandbytes: they take no memory."""
_PIECE = {"cpu": 2**22, "cuda": 2**30}
"""The number of values of a call. The kernel for CPUs computes in copies of 16 bytes a value, and the one for
CUDA counts in 32 bits. Both are multiples of BLOCK, so the result does not depend on them."""


def is_in_8_bits(weight: Tensor) -> bool:
    """Returns whether the moments of a weight are held in 8 bits, if those of any are."""
    return weight.numel() >= MIN_SIZE


def bytes_of_moments(weight: Tensor) -> int:
    """Returns the bytes of both moments of a weight whose moments are held in 8 bits."""
    return 2 * (weight.numel() + torch.float32.itemsize * num_blocks(weight))


def num_blocks(weight: Tensor) -> int:
    return -(-weight.numel() // BLOCK)


class AdamW8Bit:
    """Has the interface that `Optimizer` needs of `torch.optim.AdamW`.

    The state of a weight has the tensors `step` (on the CPU), `exp_avg`, `exp_avg_sq` (numbers of the table,
    uint8, in the weight's shape), `exp_avg_scale` and `exp_avg_sq_scale` (for each block, float32).
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        """Raises ConfigError if bitsandbytes has no kernel for the device of the weights."""
        from bitsandbytes.functional import create_dynamic_map

        self.param_groups: list[dict[str, Any]] = [{"params": list(weights)}]
        self.state = {weight: _zeros(weight) for weight in self.param_groups[0]["params"]}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for device in {weight.device for weight in self.state}:
            signed, unsigned = (create_dynamic_map(signed=signed).to(device) for signed in (True, False))
            self._tables[device] = signed, unsigned
            self._try(device)

    def _try(self, device: torch.device) -> None:
        """Takes a step on one block, because bitsandbytes may lack a library for this version of CUDA."""
        weight = torch.zeros(BLOCK, device=device)
        try:
            self._update(weight, weight.clone(), _zeros(weight), {"lr": 0.0, "betas": (0.9, 0.999)})
        except (RuntimeError, AttributeError, OSError) as error:
            import bitsandbytes

            raise ConfigError(
                f"optimizer_bits=8 is not supported on {device}: bitsandbytes {bitsandbytes.__version__} has "
                f"no kernel for it ({str(error).partition(chr(10))[0]}). Use optimizer_bits=32."
            ) from error

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for weight in group["params"]:
            if weight.grad is not None:
                self._update(weight, weight.grad, self.state[weight], group)

    def _update(
        self, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> None:
        """Steps on one weight. The kernels read memory in order, whatever the strides."""
        state["step"].add_(1)
        beta1, beta2 = group["betas"]
        signed, unsigned = self._tables[weight.device]
        values, gradients = weight.contiguous().view(-1), gradient.contiguous().view(-1)
        first, second = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        size = _PIECE.get(weight.device.type, _PIECE["cuda"])
        for start in range(0, len(values), size):
            part, blocks = slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam",  # it decays the weights apart from the moments, as AdamW does
                gradients[part],
                values[part],
                first[part],
                second[part],
                beta1,
                beta2,
                0.0,
                0.0,
                group.get("eps", 1e-8),
                int(state["step"]),
                group["lr"],
                signed,
                unsigned,
                state["exp_avg_scale"][blocks],
                state["exp_avg_sq_scale"][blocks],
                group.get("weight_decay", 0.0),
                1.0,
            )
        if not weight.is_contiguous():
            weight.copy_(values.view(weight.shape))


def _zeros(weight: Tensor) -> dict[str, Tensor]:
    blocks = num_blocks(weight)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        **{name: torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device) for name in MOMENTS},
        **{f"{name}_scale": torch.zeros(blocks, device=weight.device) for name in MOMENTS},
    }
