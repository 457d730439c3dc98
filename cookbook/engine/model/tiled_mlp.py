"""Runs the MLP of a checkpointed layer in tiles of its tokens, and keeps its input alone.

A layer that runs again in the backward pass holds all its activations until it is done, and most of them are
those of the MLP: its inner size is three or four times that of the layer, and it keeps several tensors of
that size. Here the MLP runs on one tile of tokens after another, in the forward pass and in its own backward
pass, so what it keeps does not grow with the sequence. Where nothing behind the MLP needs its result, which
is so in most models, it is not computed when the layer runs again: there is no more to compute than without
tiles.

Shape suffixes: N tokens, D hidden size; X anything before the last axis.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cookbook.engine.model.dropout import DropoutKeys
from cookbook.engine.options import EngineOptions

TILE = {"cpu": 1024, "cuda": 4096}
"""The tokens of a tile. Larger ones are no faster."""


def tile_for(options: EngineOptions, device: torch.device, is_sharded: bool) -> int:
    """Returns the tokens of a tile, or 0 where MLPs are not tiled: in compiled and in sharded layers."""
    return 0 if options.compile or is_sharded else TILE.get(device.type, TILE["cuda"])


def mlps_in(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that map a token's hidden state by linear layers, and see no other token.

    They take one input and have linear layers, with or without an adapter, and functions without weights.
    """
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if _is_mlp(child) else mlps_in(child)
    return found


def _is_mlp(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, BaseTunerLayer, nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    linear: list[nn.Module] = []
    others: list[nn.Module] = []
    for child in module.children():
        is_stack = hasattr(child, "parameter_name")  # the layer of PEFT on stacked experts
        is_linear = isinstance(child, (nn.Linear, BaseTunerLayer)) and not is_stack
        (linear if is_linear else others).append(child)
    if len(linear) < 2 or next(module.parameters(recurse=False), None) is not None:
        return False
    if any(next(child.parameters(), None) is not None for child in others):
        return False
    kind: Any = type(module)
    return _takes_one_input(kind)


@functools.cache
def _takes_one_input(kind: Any) -> bool:
    inputs = inspect.signature(kind.forward).parameters
    return len(inputs) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in inputs.values())


@contextlib.contextmanager
def tiled(layer: nn.Module, tile: int, dropout_keys: DropoutKeys) -> Iterator[None]:
    """Runs the MLPs of a layer in tiles in the body, where they have more tokens than `tile`."""
    modules = [module for module in mlps_in(layer) if "forward" not in vars(module)]
    for module in modules:
        module.forward = _Tiles(module, tile, dropout_keys)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _Tiles:
    """The forward pass of an MLP in tiles."""

    def __init__(self, module: nn.Module, tile: int, dropout_keys: DropoutKeys) -> None:
        self._module = module
        self._tile = tile
        self._dropout_keys = dropout_keys

    def __call__(self, x_XD: Tensor) -> Tensor:
        x_ND = x_XD.reshape(-1, x_XD.shape[-1])
        if len(x_ND) <= self._tile or not torch.is_grad_enabled():
            whole: Tensor = type(self._module).forward(self._module, x_XD)
            return whole
        trained = [weight for weight in self._module.parameters() if weight.requires_grad]
        # The input is saved before anything runs: a checkpointed layer that runs again stops at the last
        # tensor that is saved.
        kept = _Keep.apply(torch.empty(0, requires_grad=True), x_ND).grad_fn
        out_ND: Tensor = _InTiles.apply(self, kept, x_ND, *trained)
        return out_ND.view(*x_XD.shape[:-1], -1)

    def parts(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self._tile):
            yield slice(start, min(start + self._tile, num_tokens))

    def run(self, x_ND: Tensor, part: slice) -> Tensor:
        """Returns the result for a part of the tokens."""
        with self._dropout_keys.of_part(part):
            out_ND: Tensor = type(self._module).forward(self._module, x_ND)
        return out_ND


class _Keep(torch.autograd.Function):
    """Saves a tensor for another function, which reads it from this one's node."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("No result depends on it.")


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: _Tiles, kept: Any, x_ND: Tensor, *trained: Tensor) -> Tensor:
        ctx.tiles, ctx.kept, ctx.num_trained = tiles, kept, len(trained)
        out_ND = None
        for part in tiles.parts(len(x_ND)):
            tile_ND = tiles.run(x_ND[part], part)
            if out_ND is None:
                out_ND = tile_ND.new_empty(len(x_ND), tile_ND.shape[-1])
            out_ND[part] = tile_ND
        assert out_ND is not None
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_ND,) = grads
        (x_ND,) = ctx.kept.saved_tensors
        tiles, needs_x = ctx.tiles, ctx.needs_input_grad[2]
        trained = [weight for weight in tiles._module.parameters() if weight.requires_grad]
        assert len(trained) == ctx.num_trained
        grad_x_ND = torch.empty_like(x_ND) if needs_x else None
        sums: list[Tensor | None] = [None] * len(trained)
        for part in tiles.parts(len(x_ND)):
            tile_ND = x_ND[part].detach().requires_grad_(needs_x)
            with torch.enable_grad():
                out_ND = tiles.run(tile_ND, part)
            wanted = [tile_ND, *trained] if needs_x else trained
            found = list(torch.autograd.grad(out_ND, wanted, grad_ND[part], allow_unused=True))
            if grad_x_ND is not None:
                grad_x_ND[part] = found.pop(0)
            for place, grad in enumerate(found):
                if grad is not None:  # in bfloat16 a sum of many tiles would lose their last bits
                    before = sums[place]
                    sums[place] = grad.float() if before is None else before.add_(grad)
        return None, None, grad_x_ND, *sums


class MlpActivations:
    """Tells which tensors are kept by an MLP that can run in tiles, while the forward pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self._mlps = mlps_in(model)
        self._inputs: list[Tensor] = []

    def is_kept_by_mlp(self, tensor: Tensor, address_of: Callable[[Tensor], int]) -> bool:
        """Returns whether an MLP runs, and the tensor is not its input."""
        return bool(self._inputs) and address_of(tensor) != address_of(self._inputs[-1])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs.append(inputs[0].detach())

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._inputs.pop()

        handles = [mlp.register_forward_pre_hook(enter) for mlp in self._mlps]
        handles += [mlp.register_forward_hook(leave) for mlp in self._mlps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
