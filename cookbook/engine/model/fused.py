"""One kernel in place of several on CUDA: RMSNorm, and the gated product of an MLP.

transformers writes both as sequences of elementwise operations. On CUDA each is a kernel that reads and
writes all activations, and together they take half of the time of a small model's step. A module is replaced
only if its formula is known: that of a copy with random weights is compared on a CPU, because classes of one
name differ (Gemma's norms add 1 to their weight, and are left as they are).

RMSNorm is torch's own kernel, which rounds once where the plain path rounds twice. The gated product is a
kernel of Liger-Kernel if that is installed (the extra `cuda`), and else the plain operations, of which the
backward pass computes the activation again rather than to keep it.

Shape suffixes: X anything before the last axis, I the inner size of an MLP.
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
                module.__class__ = _fused_class(kind, _norm_forward)
                found["norms"] += 1
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= {*dict(module.named_children())}:
            key = kind, type(module.act_fn)
            if key not in activations:
                activations[key] = _activation_of(module)
            if activations[key] is not None:
                module.fused_activation = activations[key]
                module.__class__ = _fused_class(kind, _mlp_forward)
                found["gated products"] += 1
    return found


@functools.cache
def _fused_class(kind: Any, forward: Callable[..., Any]) -> Any:
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

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
}


@torch.no_grad()
def _activation_of(module: Any) -> str | None:
    """Returns the name of the activation if the module is `down(activation(gate(x)) * up(x))`."""
    generator = _generator()

    def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
        layer = nn.Linear(num_inputs, num_outputs, bias=False, device="cpu", dtype=torch.float32)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        return layer

    gate, up, down = linear(_SIZE, _INNER_SIZE), linear(_SIZE, _INNER_SIZE), linear(_INNER_SIZE, _SIZE)
    x = torch.randn(5, _SIZE, generator=generator)
    try:
        other = _copy_with(module, gate_proj=gate, up_proj=up, down_proj=down, act_fn=module.act_fn)
        found = other(x)
    except _FAILURES:
        return None
    for name, activation in _ACTIVATIONS.items():
        if torch.allclose(found, down(activation(gate(x)) * up(x)), rtol=1e-5, atol=1e-5):
            return name
    return None


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x), self.fused_activation))
    return result


def gated_product(gate_XI: Tensor, up_XI: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up, with the bits of the plain operations where no kernel is installed."""
    out_XI: Tensor = _GatedProduct.apply(gate_XI, up_XI, activation)
    return out_XI


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_XI: Tensor, up_XI: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_XI, up_XI)
        ctx.activation = activation
        if _has_kernels(gate_XI):
            out_XI: Tensor = kernels.gated_product(gate_XI, up_XI, activation)
            return out_XI
        return _ACTIVATIONS[activation](gate_XI).mul_(up_XI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        gate_XI, up_XI = ctx.saved_tensors
        (grad_XI,) = grads
        if _has_kernels(gate_XI):  # it writes to its inputs, which a second backward pass would read
            gate_XI, up_XI = gate_XI.contiguous(), up_XI.contiguous()
            kernels.gated_product_backward(gate_XI, up_XI, grad_XI.contiguous(), ctx.activation)
            return gate_XI, up_XI, None
        grad_up_XI = _ACTIVATIONS[ctx.activation](gate_XI).mul_(grad_XI)
        if ctx.activation == "silu":
            return torch.ops.aten.silu_backward(grad_XI * up_XI, gate_XI), grad_up_XI, None
        grad_gate_XI = torch.ops.aten.gelu_backward(grad_XI * up_XI, gate_XI, approximate="tanh")
        return grad_gate_XI, grad_up_XI, None


def _has_kernels(tensor: Tensor) -> bool:
    """Returns whether Liger's kernels are used. In float16 a backward pass may run twice (`loss_scaling`)."""
    return tensor.dtype == torch.bfloat16 and kernels.is_used("gated_product", tensor.device)
