"""One kernel in place of several on CUDA: RMSNorm, and the gated product of an MLP.

transformers writes both as sequences of elementwise operations. On CUDA each is a kernel that reads and
writes all activations, and together they take half of the time of a small model's step. A module is replaced
only if its formula is known: that of a copy with random weights is compared on a CPU, because classes of one
name differ (Gemma's norms add 1 to their weight, and are left as they are).

RMSNorm is torch's own kernel, which rounds once where the plain path rounds twice. The gated product is a
kernel of `kernels` where Triton is installed, and else the plain operations, of which the backward pass
computes the activation again rather than to keep it.

Shape suffixes: X anything before the last axis, N tokens, I the inner size of an MLP, U twice that: gate and
up of one product.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cookbook.engine.model import kernels

_SIZE, _INNER_SIZE = 8, 12
"""The sizes of the copies whose results are compared."""
_FAILURES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What a copy raises whose class has other parts."""


def install(decoder: nn.Module) -> dict[str, int]:
    """Replaces the forward passes that are known. Returns how many of each kind.

    The class of a replaced module is a subclass of its own, of the same name.
    """
    found = {"norms": 0, "gated products": 0}
    is_norm: dict[Any, bool] = {}
    activations: dict[Any, str | None] = {}
    modules: Any = decoder.modules()
    for module in modules:
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm"):
            norm = kind, _eps_of(module), "weight" in module._parameters  # some of Gemma 4 have none
            if norm not in is_norm:
                is_norm[norm] = _is_plain_norm(module)
            if is_norm[norm]:
                module.__class__ = class_with(kind, _norm_forward)
                found["norms"] += 1
        elif (forward := _FORWARDS.get(_names_in(module))) is not None:
            key = kind, *_settings_of(module)
            if key not in activations:
                activations[key] = _activation_of(module)
            if activations[key] is not None:
                module.fused_activation = activations[key]
                module.__class__ = class_with(kind, forward)
                found["gated products"] += 1
    return found


def _names_in(module: nn.Module) -> frozenset[str]:
    """Returns the names of the linear layers, and of nothing else, in a module that may be an MLP."""
    return frozenset(name for name, _ in module.named_children() if name.endswith("_proj"))


def _settings_of(module: nn.Module) -> tuple[Any, ...]:
    """Returns what may differ between modules of one class: activations, and numbers such as limits."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    kinds = {name: type(child) for name, child in module.named_children()}
    return *sorted(numbers.items()), *sorted(kinds.items(), key=str)


@functools.cache
def class_with(kind: Any, forward: Callable[..., Any]) -> Any:
    """Returns the subclass with another forward pass. A method on an instance would be a reference cycle."""
    parts = {"forward": forward, "plain_forward": kind.forward, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), parts)


def _copy_with(module: nn.Module, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """Returns a copy of a module that has these parts instead of its own."""
    other = copy.copy(module)
    other.__dict__ = {
        **module.__dict__,
        "_parameters": {name: part for name, part in parts.items() if isinstance(part, nn.Parameter)},
        "_modules": {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
    }
    return other


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# -- RMSNorm --------------------------------------------------------------------------------


def _eps_of(module: Any) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _is_plain_norm(module: Any) -> bool:
    """Returns whether the module is `weight * x / sqrt(mean(x^2) + eps)` over the last axis."""
    if len(inspect.signature(type(module).forward).parameters) != 2:  # it takes a gate, or a residual, too
        return False
    eps, weight = _eps_of(module), getattr(module, "weight", None)
    if (
        eps is None
        or not isinstance(weight, nn.Parameter)
        or weight.ndim != 1
        or len(module._parameters) != 1
    ):
        return False
    generator = _generator()
    weight = nn.Parameter(torch.randn(_SIZE, generator=generator))
    x = torch.randn(5, _SIZE, generator=generator) * 0.01  # so small that another eps would show
    try:
        found = _copy_with(module, weight=weight)(x)
    except _FAILURES:
        return False
    return torch.allclose(found, F.rms_norm(x, (_SIZE,), weight, eps), rtol=1e-5, atol=1e-6)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    weight: Tensor = self.weight
    if weight.dtype != hidden_states.dtype:
        result: Tensor = self.plain_forward(hidden_states)
        return result
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


# -- the gated product ----------------------------------------------------------------------

_BEYOND_LIMITS = 1000.0
"""So much larger some numbers of a trial are: a module that limits its activations is no plain product."""


@torch.no_grad()
def _activation_of(module: Any) -> str | None:
    """Returns the name of the activation if the module is `down(activation(gate(x)) * up(x))`."""
    generator = _generator()

    def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
        layer = nn.Linear(num_inputs, num_outputs, bias=False, device="cpu", dtype=torch.float32)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, device="cpu"))
        return layer

    both, down = linear(_SIZE, 2 * _INNER_SIZE), linear(_INNER_SIZE, _SIZE)
    gate, up = linear(_SIZE, _INNER_SIZE), linear(_SIZE, _INNER_SIZE)
    for half, weight in zip((gate, up), both.weight.chunk(2), strict=True):
        half.weight.copy_(weight)
    given = {"gate_proj": gate, "up_proj": up, "gate_up_proj": both, "down_proj": down}
    children = {
        name: given.get(name, child)
        for name, child in module.named_children()
        if name in given or next(child.parameters(), None) is None
    }
    x = _trial_numbers(10, _SIZE)
    try:
        found = _copy_with(module, **children)(x)
    except _FAILURES:
        return None
    return _plain_activation(found, gate(x), up(x), down)


@torch.no_grad()
def activation_of_halves(product: Callable[[Tensor], Tensor]) -> str | None:
    """Returns the name of the activation if a function of gate and up in one row is their gated product."""
    x_NU = _trial_numbers(10, 2 * _INNER_SIZE)
    try:
        found = product(x_NU)
    except _FAILURES:
        return None
    gate, up = x_NU.chunk(2, -1)
    return _plain_activation(found, gate, up)


def _trial_numbers(num_rows: int, size: int) -> Tensor:
    """Returns random numbers, those of each second row so large that limits of activations are reached."""
    x = torch.randn(num_rows, size, generator=_generator(), device="cpu")
    x[1::2] *= _BEYOND_LIMITS
    return x


def _plain_activation(found: Any, gate: Tensor, up: Tensor, down: nn.Linear | None = None) -> str | None:
    """Returns the name of the activation whose gated product was found, to the rounding of its terms."""
    for name, activation in kernels.ACTIVATIONS.items():
        expected = activation(gate) * up
        scale = expected.abs()
        if down is not None:
            expected, scale = down(expected), scale @ down.weight.abs().T
        is_same_shape = isinstance(found, Tensor) and found.shape == expected.shape
        if is_same_shape and bool(((found - expected).abs() <= 1e-5 * scale + 1e-6).all()):
            return name
    return None


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x), self.fused_activation))
    return result


def _mlp_of_halves_forward(self: Any, hidden_states: Tensor) -> Tensor:
    hidden = gated_product_of_halves(self.gate_up_proj(hidden_states), self.fused_activation)
    result: Tensor = self.down_proj(hidden)
    return result


_FORWARDS = {
    frozenset({"gate_proj", "up_proj", "down_proj"}): _mlp_forward,
    frozenset({"gate_up_proj", "down_proj"}): _mlp_of_halves_forward,
}
"""The forward passes of MLPs, by the names of their linear layers."""


def gated_product(gate_XI: Tensor, up_XI: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up, with the bits of the plain operations where no kernel is installed."""
    out_XI: Tensor = _GatedProduct.apply(gate_XI, up_XI, activation)
    return out_XI


def gated_product_of_halves(gate_up_XU: Tensor, activation: str) -> Tensor:
    """Returns what `gated_product` does of the halves of the last axis, which are not copied."""
    out_XI: Tensor = _GatedProductOfHalves.apply(gate_up_XU, activation)
    return out_XI


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_XI: Tensor, up_XI: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_XI, up_XI)
        ctx.activation = activation
        if has_kernels(gate_XI):
            out_NI: Tensor = kernels.gated_product(_rows_of(gate_XI), _rows_of(up_XI), activation)
            return out_NI.view(gate_XI.shape)
        return _product(gate_XI, up_XI, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        gate_XI, up_XI = ctx.saved_tensors
        (grad_XI,) = grads
        if has_kernels(gate_XI):  # it writes to its inputs, which a second backward pass would read
            gate_NI, up_NI = _rows_of(gate_XI), _rows_of(up_XI)
            kernels.gated_product_backward(gate_NI, up_NI, _rows_of(grad_XI), ctx.activation)
            return gate_NI.view(gate_XI.shape), up_NI.view(up_XI.shape), None
        return *_gradients(gate_XI, up_XI, grad_XI, ctx.activation), None


class _GatedProductOfHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_XU: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up_XU)
        ctx.activation = activation
        if has_kernels(gate_up_XU):
            out_NI: Tensor = kernels.gated_product(*_rows_of(gate_up_XU).chunk(2, 1), activation)
            return out_NI.view(*gate_up_XU.shape[:-1], -1)
        gate_XI, up_XI = gate_up_XU.chunk(2, -1)
        return _product(gate_XI, up_XI, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (gate_up_XU,) = ctx.saved_tensors
        (grad_XI,) = grads
        if has_kernels(gate_up_XU):
            gate_up_NU = _rows_of(gate_up_XU)
            kernels.gated_product_backward(*gate_up_NU.chunk(2, 1), _rows_of(grad_XI), ctx.activation)
            return gate_up_NU.view(gate_up_XU.shape), None
        gate_XI, up_XI = gate_up_XU.chunk(2, -1)
        return torch.cat(_gradients(gate_XI, up_XI, grad_XI, ctx.activation), -1), None


def _product(gate_XI: Tensor, up_XI: Tensor, activation: str) -> Tensor:
    return kernels.ACTIVATIONS[activation](gate_XI).mul_(up_XI)


def _gradients(gate_XI: Tensor, up_XI: Tensor, grad_XI: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Returns the gradients by gate and up."""
    grad_up_XI = kernels.ACTIVATIONS[activation](gate_XI).mul_(grad_XI)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_XI * up_XI, gate_XI), grad_up_XI
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad_XI * up_XI, gate_XI, approximate=approximate), grad_up_XI


def _rows_of(x_XI: Tensor) -> Tensor:
    """Returns the tensor as rows [N, I] whose elements follow each other, which is a view where it can be."""
    x_NI = x_XI.reshape(-1, x_XI.shape[-1])
    return x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()


def has_kernels(tensor: Tensor) -> bool:
    """Returns whether a gated product is one kernel.

    In float16 a backward pass may run twice (`loss_scaling`).
    """
    return tensor.dtype in (torch.bfloat16, torch.float32) and kernels.is_used("gated_product", tensor.device)
