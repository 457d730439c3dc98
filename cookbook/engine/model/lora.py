"""A linear layer with a LoRA, whose forward and backward pass go over memory as few times as possible.

PEFT computes `W x + s * B (A x)` as separate operations. Besides the two low-rank products, these take two
passes over the result and, in the backward pass, a third over the gradient of the input. Here the low-rank
products are added in place to the result of the full product, and the gradients of A and B come from the same
two low-rank tensors. A 4-bit weight is dequantised for the forward product and again for the backward
product, and is not kept in between.

On CUDA, layers of one input (`input_groups`) run together: their A's are stacked, so that the input is read
for one product with A and not for each, and its gradient is summed in the memory of one product.

Shape suffixes: N tokens, I inputs, O outputs, R rank, or the sum of the ranks of a group; X anything before
the last axis.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.dropout import KeyedDropout
from cookbook.engine.model.fp8 import Fp8Linear
from cookbook.engine.model.input_groups import InputGroup, Names
from cookbook.engine.model.packed_weights import PackedLinear
from cookbook.engine.model.peft_layers import active_in
from cookbook.engine.model.quantization import weight_of
from cookbook.engine.model.unembedding import product


class _LoraLinear(torch.autograd.Function):
    """base(x) + scaling * (drop(x) A^T) B^T, in the dtype of x.

    The gradients of A and B have their own dtype. Masks of dropout are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        base: nn.Linear,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        dropout: KeyedDropout | None,
    ) -> Tensor:
        keys_N = None if dropout is None else dropout.keys_N
        dropped_NI = x_NI if dropout is None or keys_N is None else dropout.drop(x_NI, keys_N)
        low_NR = dropped_NI @ a_RI.to(x_NI.dtype).T
        out_NO: Tensor = base(x_NI)
        out_NO.addmm_(low_NR, b_OR.to(x_NI.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_NI, a_RI, b_OR, low_NR, keys_N)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        return out_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> Any:
        x_NI, a_RI, b_OR, low_NR, keys_N = ctx.saved_tensors
        grad_low_NR = (grad_NO @ b_OR.to(grad_NO.dtype)).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_NO @ weight_of(ctx.base, grad_NO.dtype)
            if keys_N is None:
                grad_x.addmm_(grad_low_NR, a_RI.to(grad_NO.dtype))
            else:
                grad_x += ctx.dropout.drop(grad_low_NR @ a_RI.to(grad_NO.dtype), keys_N)
        if ctx.needs_input_grad[2]:
            if keys_N is not None:
                x_NI = ctx.dropout.drop(x_NI, keys_N)
            grad_a = product(grad_low_NR.T, x_NI).to(a_RI.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = product(grad_NO.T, low_NR).mul_(ctx.scaling).to(b_OR.dtype)
        return grad_x, None, grad_a, grad_b, None, None


class _LoraLinears(torch.autograd.Function):
    """What `_LoraLinear` computes without dropout, for several layers with one input. Returns their outputs.

    `weights` are A and B of each layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, bases: list[nn.Linear], scalings: list[float], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        all_a, all_b = weights[::2], weights[1::2]
        ctx.bases, ctx.scalings, ctx.ranks = bases, scalings, [len(a_RI) for a_RI in all_a]
        ctx.dtypes = [a_RI.dtype for a_RI in all_a]
        a_RI = torch.cat(all_a).to(x_NI.dtype)
        low_NR = x_NI @ a_RI.T
        outs = []
        for base, b_OR, scaling, part_NR in zip(
            bases, all_b, scalings, low_NR.split(ctx.ranks, 1), strict=True
        ):
            out_NO: Tensor = base(x_NI)
            outs.append(out_NO.addmm_(part_NR, b_OR.to(x_NI.dtype).T, alpha=scaling))
        ctx.save_for_backward(x_NI, a_RI, low_NR, *all_b)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_NI, a_RI, low_NR, *all_b = ctx.saved_tensors
        is_whole = all(grad_NO is not None for grad_NO in grads)
        grad_low_NR = torch.empty_like(low_NR) if is_whole else torch.zeros_like(low_NR)
        grad_x_NI: Tensor | None = None
        grads_b: list[Tensor | None] = [None] * len(grads)
        lows, grad_lows = low_NR.split(ctx.ranks, 1), grad_low_NR.split(ctx.ranks, 1)
        for place, (grad_NO, b_OR, scaling) in enumerate(zip(grads, all_b, ctx.scalings, strict=True)):
            if grad_NO is None:
                continue
            grad_lows[place].addmm_(grad_NO, b_OR.to(grad_NO.dtype), beta=0, alpha=scaling)
            if ctx.needs_input_grad[4 + 2 * place]:
                grads_b[place] = product(grad_NO.T, lows[place]).mul_(scaling).to(b_OR.dtype)
            if ctx.needs_input_grad[0]:
                weight_OI = weight_of(ctx.bases[place], grad_NO.dtype)
                grad_x_NI = grad_NO @ weight_OI if grad_x_NI is None else grad_x_NI.addmm_(grad_NO, weight_OI)
        if grad_x_NI is not None:
            grad_x_NI.addmm_(grad_low_NR, a_RI)
        grads_a: Sequence[Tensor | None] = [None] * len(grads)
        if any(ctx.needs_input_grad[3::2]):
            parts = product(grad_low_NR.T, x_NI).split(ctx.ranks)
            grads_a = [
                None if grad_NO is None else part_RI.to(dtype)
                for grad_NO, part_RI, dtype in zip(grads, parts, ctx.dtypes, strict=True)
            ]
        of_weights = [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]
        return grad_x_NI, None, None, *of_weights


def _forward(self: Any, x_XI: Tensor) -> Tensor:
    """Replaces `peft.tuners.lora.Linear.forward` for one adapter."""
    base = self.base_layer
    result: Tensor
    if self.runs_variant and not self.disable_adapters:
        result = type(self).forward(self, x_XI)
        return result
    if self.disable_adapters or self.active_lora is None:
        result = base(x_XI)
        return result
    group: InputGroup | None = self.input_group
    if group is not None and not torch.compiler.is_compiling():
        if (taken := group.take(self, x_XI)) is not None:
            return taken
        if self in (layers := group.active(x_XI)) and len(layers) > 1:
            return _run_together(self, group, layers, x_XI)
    a_RI, b_OR, scaling, dropout = self.active_lora
    x_NI = x_XI.reshape(-1, x_XI.shape[-1])
    if isinstance(packed := base.forward, PackedLinear):
        out_NO = packed.add_lora(base(x_NI), x_NI, a_RI, b_OR, scaling)
    else:
        out_NO = _LoraLinear.apply(x_NI, base, a_RI, b_OR, scaling, dropout)
    return out_NO.view(*x_XI.shape[:-1], -1)


def _run_together(layer: Any, group: InputGroup, layers: list[Any], x_XI: Tensor) -> Tensor:
    """Returns the result of a layer, and puts those of the others into the group."""
    weights = [weight for other in layers for weight in other.active_lora[:2]]
    outs_NO = _LoraLinears.apply(
        x_XI.reshape(-1, x_XI.shape[-1]),
        [other.base_layer for other in layers],
        [other.active_lora[2] for other in layers],
        *weights,
    )
    results = [
        (other, out_NO.view(*x_XI.shape[:-1], -1)) for other, out_NO in zip(layers, outs_NO, strict=True)
    ]
    group.put(x_XI, results)
    taken = group.take(layer, x_XI)
    assert taken is not None
    return taken


def _set_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
    """Replaces `peft.tuners.lora.Linear.set_adapter`."""
    type(self).set_adapter(self, *args, **kwargs)
    _set_active_lora(self)


def _set_active_lora(layer: Any) -> None:
    """Sets `active_lora` to A, B, the scaling and the dropout of the active adapter, or to None.

    An adapter that PEFT computes in another way (DoRA) is left to PEFT's own forward pass.

    The forward pass reads this attribute rather than looking up the adapter's name: compiled code is
    recompiled for every name that it reads, and every snapshot has its own name.
    """
    active = active_in(layer, layer.lora_A)
    layer.active_lora = None
    layer.runs_variant = active in layer.lora_variant
    if active is not None and not layer.runs_variant:
        dropout = layer.lora_dropout[active]
        layer.active_lora = (
            layer.lora_A[active].weight,
            layer.lora_B[active].weight,
            layer.scaling[active],
            dropout if isinstance(dropout, KeyedDropout) else None,
        )


def fuse(model: nn.Module, groups: Iterable[Names] = (), groups_run_on: Sequence[str] = ("cuda",)) -> None:
    """Installs the fused forward on every LoRA of a linear layer in a PEFT model, also in 4 or 8 bits.

    `groups` are names of layers that read one input, which run together on devices of the given types. On a
    CPU that is not faster.
    """
    from peft.import_utils import is_bnb_4bit_available
    from peft.tuners import lora

    fused: set[tuple[type, type]] = {(lora.Linear, nn.Linear), (lora.Linear, Fp8Linear)}
    if is_bnb_4bit_available():
        import bitsandbytes

        fused.add((lora.Linear4bit, bitsandbytes.nn.Linear4bit))
    for module in model.modules():
        if (type(module), type(getattr(module, "base_layer", None))) in fused:
            module.forward = types.MethodType(_forward, module)
            module.set_adapter = types.MethodType(_set_adapter, module)  # type: ignore[assignment]
            module.input_group = None  # type: ignore[assignment]
            _set_active_lora(module)
    for names in groups:
        members = [module for module in map(model.get_submodule, names) if "input_group" in vars(module)]
        if len(members) > 1:
            group = InputGroup(members, groups_run_on)
            for module in members:
                module.input_group = group  # type: ignore[assignment]


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`. A bound method on the instance is a reference cycle, which would keep the layer's
    weights in memory until garbage collection."""
    for module in model.modules():
        if "active_lora" in vars(module):
            del module.forward, module.set_adapter, module.active_lora, module.runs_variant
            del module.input_group
