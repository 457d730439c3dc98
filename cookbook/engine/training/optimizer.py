"""AdamW on named weights, with fp32 masters for weights in lower precision.

All of its state is allocated when it is created, so a step needs no lasting memory. A step is taken
completely or not at all. With 8 bits the moments of all but small weights are those of `adamw_8bit`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model import fsdp
from cookbook.engine.model.memory import is_out_of_memory
from cookbook.engine.options import OptimizerBits
from cookbook.engine.processes import ALONE, World
from cookbook.engine.training.adamw_8bit import MIN_SIZE, AdamW8Bit, bytes_of_moments, is_in_8_bits
from cookbook.errors import CheckpointError
from cookbook.types import AdamParams

logger = logging.getLogger(__name__)

_MASTER = "master"


def bytes_to_train(weights: Iterable[Tensor], bits: OptimizerBits = 32) -> int:
    """Returns the maximum number of bytes that training needs besides `weights`, also in a pass.

    For each weight in fp32 these are its gradient, the gradient of earlier passes, and two moments. A weight
    in lower precision also has an fp32 master, and its gradient is first computed in its own dtype.
    """
    fp32 = torch.float32.itemsize
    return sum(
        weight.numel() * (2 * fp32 + (0 if weight.dtype == torch.float32 else fp32 + weight.itemsize))
        + _bytes_of_moments(weight, bits)
        for weight in weights
    )


def bytes_to_undo(weights: Iterable[Tensor], bits: OptimizerBits = 32) -> int:
    """Returns the bytes of the copies of masters and moments with which a failed step is undone."""
    return sum(
        weight.numel() * torch.float32.itemsize + _bytes_of_moments(weight, bits) for weight in weights
    )


def _bytes_of_moments(weight: Tensor, bits: OptimizerBits) -> int:
    if bits == 8 and is_in_8_bits(weight):
        return bytes_of_moments(weight)
    return 2 * weight.numel() * torch.float32.itemsize


class Optimizer:
    """Accumulates gradients on the masters, which are the weights themselves if those are fp32."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], can_undo: bool = True, bits: OptimizerBits = 32
    ) -> None:
        """`can_undo` says that there is memory for a copy of masters and moments while a step is taken.

        Raises ConfigError if moments of 8 bits are not supported on the device of the weights.
        """
        self._weights = weights
        self._can_undo = can_undo
        self.masters: dict[str, nn.Parameter] = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in weights.items()
        }
        self._bits = bits
        in_8_bits = [master for master in self.masters.values() if bits == 8 and is_in_8_bits(master)]
        others = [master for master in self.masters.values() if not (bits == 8 and is_in_8_bits(master))]
        self._adamws: list[torch.optim.AdamW | AdamW8Bit] = []
        if in_8_bits:
            self._adamws.append(AdamW8Bit(in_8_bits))
        elif bits == 8:
            logger.warning(
                "optimizer_bits=8 has no effect: no trained tensor has %d values or more.", MIN_SIZE
            )
        if others:
            adamw = torch.optim.AdamW(others, fused=True)
            for master in others:
                adamw.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
                }
            self._adamws.append(adamw)
        self._moments: dict[Tensor, dict[str, Tensor]] = {
            master: state for adamw in self._adamws for master, state in adamw.state.items()
        }
        self._stepped: set[str] = set()
        """The weights whose moments a step has changed. The others have had no gradient so far."""
        self.num_steps = 0
        self.is_half_stepped = False
        """Whether a step failed midway and could not be undone."""

    def collect_gradients(self) -> None:
        """Adds the gradients of a backward pass on weights in lower precision to their masters."""
        for name, weight in self._weights.items():
            master = self.masters[name]
            if master is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def take_gradients(self) -> dict[str, Tensor | None]:
        """Returns the accumulated gradients and clears them."""
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

    def step(self, params: AdamParams, world: World = ALONE) -> Tensor:
        """Takes one step on the gradients of all processes. Returns their norm before clipping.

        The gradients are kept. If the step fails on any process, weights, moments and step counts of all
        processes are as before, or `is_half_stepped` is set.
        """
        self._all_reduce_gradients(world)
        trained = [master for master in self.masters.values() if master.grad is not None]
        moments = [value for master in trained for value in self._moments[master].values()]
        changing = [fsdp.local_part(tensor.detach()) for tensor in (*trained, *moments)]
        before, stepped, num_steps = self._copies_of(changing), set(self._stepped), self.num_steps
        has_changed_weights = False
        try:
            with world.failing_together():
                gradients = [master.grad for master in trained if master.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
                norm = fsdp.full_tensor(norm)
                if params.grad_clip_norm > 0:
                    torch.nn.utils.clip_grads_with_norm_(self.masters.values(), params.grad_clip_norm, norm)
                has_changed_weights = True
                for adamw in self._adamws:
                    adamw.param_groups[0].update(
                        lr=params.learning_rate,
                        betas=(params.beta1, params.beta2),
                        eps=params.eps,
                        weight_decay=params.weight_decay,
                    )
                    adamw.step()
                self._copy_masters()
                self._stepped |= {name for name, master in self.masters.items() if master.grad is not None}
                self.num_steps += 1
        except BaseException:
            if has_changed_weights and before is None:
                self.is_half_stepped = True
            elif has_changed_weights:
                if before:
                    _copy_all(changing, before)
                self._copy_masters()
            self._stepped, self.num_steps = stepped, num_steps
            raise
        return norm

    def _all_reduce_gradients(self, world: World) -> None:
        """Sums the gradients over the processes, so that each takes the step that a single one would take."""
        masters = [master for master in self.masters.values() if not fsdp.is_dtensor(master)]
        if world.is_alone or not masters:
            return  # sharded gradients were summed in the backward pass
        is_trained = world.all_reduce_max(*(master.grad is not None for master in masters))
        trained = [master for master, counts in zip(masters, is_trained, strict=True) if counts]
        for master in trained:
            if master.grad is None:  # none of this process's sequences reached the weight
                master.grad = torch.zeros_like(master)
        world.all_reduce_sum([master.grad for master in trained if master.grad is not None])

    def _copies_of(self, tensors: list[Tensor]) -> list[Tensor] | None:
        """Returns copies with which a failed step is undone, or None if there is no memory for them."""
        if not self._can_undo:
            return None
        try:
            copies = [torch.empty_like(tensor) for tensor in tensors]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None  # the step itself needs less memory
        if copies:
            _copy_all(copies, tensors)
        return copies

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, weight in self._weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])

    # -- state ------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that a step depends on besides the weights, by name."""
        tensors = {
            f"{name}.{key}": value.to(master.device)
            for name, master in self.masters.items()
            if name in self._stepped
            for key, value in self._moments[master].items()
        }
        for name, master in self.masters.items():
            if master is not self._weights[name]:
                tensors[f"{name}.{_MASTER}"] = master.detach()
        return tensors

    @torch.no_grad()
    def reset(self) -> None:
        """Copies the masters from the current weights, and sets moments and step counts to zero."""
        self.discard_gradients()
        for name, master in self.masters.items():
            if master is not self._weights[name]:
                master.copy_(self._weights[name])
            for value in self._moments[master].values():
                value.zero_()
        self._stepped, self.num_steps, self.is_half_stepped = set(), 0, False

    def check(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError, naming `path`, unless `tensors` are complete and fit the weights."""
        expected = {
            f"{name}.{key}": value
            for name, master in self.masters.items()
            for key, value in (*self._moments[master].items(), (_MASTER, master))
        }
        self._check_bits(path, tensors)
        if surplus := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(
                f"Checkpoint {path} is damaged: its optimizer has {surplus[0]}, which belongs to no weight "
                f"that is trained. Load an earlier checkpoint."
            )
        for name, master in self.masters.items():
            saved = [key for key in self._moments[master] if f"{name}.{key}" in tensors]
            if saved and len(saved) != len(self._moments[master]):
                raise CheckpointError(
                    f"Checkpoint {path} is damaged: the optimizer state of {name} is incomplete."
                )
        for name, found in tensors.items():
            if found.shape != expected[name].shape:
                raise CheckpointError(
                    f"Checkpoint {path} is damaged: {name} has shape {list(found.shape)}, expected "
                    f"{list(expected[name].shape)}. Load an earlier checkpoint."
                )
            if found.dtype != expected[name].dtype:
                raise CheckpointError(
                    f"Checkpoint {path} is damaged: {name} is {found.dtype}, expected "
                    f"{expected[name].dtype}. Load an earlier checkpoint."
                )

    def _check_bits(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError if moments were saved with other bits than this optimizer has."""
        for name, master in self.masters.items():
            found, own = tensors.get(f"{name}.exp_avg"), self._moments[master]["exp_avg"]
            if found is not None and {found.dtype, own.dtype} == {torch.uint8, torch.float32}:
                saved = 8 * found.itemsize
                raise CheckpointError(
                    f"Checkpoint {path} has moments of {saved} bits ({name}), and this client "
                    f"optimizer_bits={self._bits}. Use optimizer_bits={saved}, or load its weights alone "
                    f"(load_state)."
                )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        """Copies the state from `tensors`, after `check` and `reset`."""
        for name, master in self.masters.items():
            if f"{name}.step" in tensors:
                self._stepped.add(name)
                for key, value in self._moments[master].items():
                    value.copy_(tensors[f"{name}.{key}"])
            if f"{name}.{_MASTER}" in tensors and master is not self._weights[name]:
                master.copy_(tensors[f"{name}.{_MASTER}"])
        self.num_steps = num_steps


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors in one call for each device and dtype, for which torch has a kernel for many."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault((target.device, target.dtype), ([], []))
        group[0].append(target)
        group[1].append(source)
    for group in groups.values():
        torch._foreach_copy_(*group)
