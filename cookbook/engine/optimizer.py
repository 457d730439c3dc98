"""AdamW on named weights, with fp32 masters of those that are held in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cookbook.engine import sharding
from cookbook.engine.mesh import Mesh
from cookbook.errors import CheckpointError
from cookbook.types import AdamParams

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MASTER = "master"


class Optimizer:
    """Gradients add up on the masters, which are the weights themselves where those are fp32."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self.masters: dict[str, nn.Parameter] = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in weights.items()
        }
        self._adamw = torch.optim.AdamW(self.masters.values(), fused=True)
        self.num_steps = 0

    def collect_gradients(self) -> None:
        """Adds what a backward pass left on weights of fewer bits to their masters."""
        for name, weight in self._weights.items():
            master = self.masters[name]
            if master is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def take_gradients(self) -> dict[str, Tensor | None]:
        """The gradients so far, which are then none."""
        taken = {name: master.grad for name, master in self.masters.items()}
        self.discard_gradients()
        return taken

    def add_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, gradient in gradients.items():
            master = self.masters[name]
            if master.grad is None:
                master.grad = gradient
            elif gradient is not None:
                master.grad += gradient

    def discard_gradients(self) -> None:
        for weight in (*self._weights.values(), *self.masters.values()):
            weight.grad = None

    def add_up_gradients(self, mesh: Mesh) -> None:
        """Sums the gradients over the processes: every one then takes the step that one alone would take."""
        if mesh.is_alone:
            return
        masters = [master for master in self.masters.values() if not sharding.is_dealt_out(master)]
        if not masters:
            return  # their gradients were added up in the backward pass
        is_trained = mesh.agree_max(*(master.grad is not None for master in masters))
        trained = [master for master, counts in zip(masters, is_trained, strict=True) if counts]
        for master in trained:
            if master.grad is None:  # none of this process's sequences reached it
                master.grad = torch.zeros_like(master)
        mesh.add_up([master.grad for master in trained if master.grad is not None])

    def step(self, params: AdamParams) -> Tensor:
        """One step on the gradients, which stay; their norm before it was clipped. Waits for no device."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norm = sharding.whole(norm)
        if params.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), params.grad_clip_norm, norm)
        for group in self._adamw.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        self._adamw.step()
        self._copy_masters()
        self.num_steps += 1
        return norm

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, weight in self._weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])

    # -- state ------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that a step depends on beside the weights, by name."""
        tensors = {
            f"{name}.{key}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state.get(master, {}).items()
        }
        for name, master in self.masters.items():
            if master is not self._weights[name]:
                tensors[f"{name}.{_MASTER}"] = master.detach()
        return tensors

    @torch.no_grad()
    def restore(self, path: str, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        """Takes over what `tensors` gave. Raises CheckpointError, naming `path`, where a part is missing."""
        for name, master in self.masters.items():
            entry = {key: tensors[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in tensors}
            if entry and len(entry) != len(_MOMENTS):
                raise CheckpointError(
                    f"Checkpoint {path} is damaged: the optimizer state of {name} is incomplete."
                )
            if entry:
                self._adamw.state[master] = {
                    key: value.to(master.device, copy=True) for key, value in entry.items()
                }
            if f"{name}.{_MASTER}" in tensors and master is not self._weights[name]:
                master.copy_(tensors[f"{name}.{_MASTER}"])
        self.num_steps = num_steps
