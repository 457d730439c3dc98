"""A LoRA on the stacked weights of experts, computed on the rows that are routed to each expert.

PEFT adds B A to the weights of all experts in each forward pass, and autograd keeps the sums. Here each
expert's low-rank product is added to the result of its rows. The backward pass computes the gated values
again from the result of the first product, so that routed rows keep that result and two low-rank tensors.

The weights of all experts of a layer are [E, O, I] (or [E, I, O], "transposed"), and PEFT's matrices are
A [E*R, .] with the expert outermost and B [., R*E] with the expert innermost.

Shape suffixes: N tokens, K experts of a token, S = N*K routed rows in the order of their experts, E experts,
D hidden size, U outputs of the first product (gate and up), H inputs of the second, R rank, I inputs and O
outputs of either product.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.peft_layers import active_in
from cookbook.engine.model.stacked_4bit import Matrices, StackedIn4Bits
from cookbook.engine.model.targets import is_grouped, stacked_names

_ALIGNMENT = 8
"""Grouped products on CUDA need rows of 16 bytes, so ranks are padded with zeros to a multiple of 8."""


# -- products by expert ---------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Where the rows of each expert end in routed rows."""

    ends_E: Tensor
    bounds: list[tuple[int, int, int]] | None
    """Expert, first and last row of the experts that have rows, for loops over experts; None on a device with
    grouped products, which would have to wait for them."""

    @classmethod
    def of(cls, experts_S: Tensor, num_experts: int, device_has_grouped: bool) -> Groups:
        counts_E = torch.zeros(num_experts, dtype=torch.int32, device=experts_S.device)
        ones_S = torch.ones_like(experts_S, dtype=torch.int32)
        counts_E.index_add_(0, experts_S, ones_S)
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        if device_has_grouped:
            return cls(ends_E, None)
        return cls(ends_E, [*_bounds_of(ends_E)])


def has_grouped_products(device: torch.device) -> bool:
    """Returns whether one kernel computes the products of all experts. A CPU loops over them either way."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")


def _grouped(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    compute: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    product: Tensor = compute(a, b, offs=ends_E)
    return product


def add_product(
    out_SO: Tensor | None, rows_SI: Tensor, weight_EIO: Any, groups: Groups, scale: float = 1.0
) -> Tensor:
    """Returns out + scale * (each row times its expert's weight), in place of `out_SO` if that is given."""
    if groups.bounds is None and isinstance(weight_EIO, Tensor):
        product_SO = _grouped(rows_SI, weight_EIO, groups.ends_E)
        if out_SO is None:
            return product_SO if scale == 1.0 else product_SO.mul_(scale)
        return out_SO.add_(product_SO, alpha=scale)
    is_new = out_SO is None
    if out_SO is None:
        out_SO = rows_SI.new_empty(len(rows_SI), weight_EIO.shape[2])
    for expert, start, end in groups.bounds or _bounds_of(groups.ends_E):
        part = out_SO[start:end]
        torch.addmm(
            part, rows_SI[start:end], weight_EIO[expert], beta=0 if is_new else 1, alpha=scale, out=part
        )
    return out_SO


def _bounds_of(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def sums_of_products(left_SI: Tensor, right_SO: Tensor, groups: Groups) -> Tensor:
    """Returns, for each expert, the sum of the outer products of its rows: [E, I, O]."""
    if groups.bounds is None:
        return _grouped(left_SI.T, right_SO, groups.ends_E)
    shape = len(groups.ends_E), left_SI.shape[1], right_SO.shape[1]
    has_all = len(groups.bounds) == len(groups.ends_E)
    total_EIO = left_SI.new_empty(shape) if has_all else left_SI.new_zeros(shape)
    for expert, start, end in groups.bounds:
        torch.mm(left_SI[start:end].T, right_SO[start:end], out=total_EIO[expert])
    return total_EIO


# -- one weight with its LoRA ---------------------------------------------------------------


@dataclass(frozen=True)
class StackedLora:
    """A and B of the active adapter on a stacked weight, as PEFT holds them."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    def factors(self, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the factor on the inputs and the one on the outputs: [E, R, I] and [E, R, O]."""
        a_ERI = self.a.detach().to(dtype).view(num_experts, -1, self.a.shape[1])
        # transposed as a matrix, which is faster than with three axes
        b_REO = self.b.detach().to(dtype).T.contiguous()
        b_ERO = b_REO.view(-1, num_experts, b_REO.shape[1]).transpose(0, 1)
        if b_ERO.is_cuda:
            b_ERO = b_ERO.contiguous()
        if (missing := -a_ERI.shape[1] % _ALIGNMENT) and a_ERI.is_cuda:
            a_ERI = nn.functional.pad(a_ERI, (0, 0, 0, missing))
            b_ERO = nn.functional.pad(b_ERO, (0, 0, 0, missing))
        return a_ERI, b_ERO

    def gradients(self, grad_ERI: Tensor, grad_ERO: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of A and B, given those of the two factors."""
        rank = self.a.shape[0] // len(grad_ERI)
        grad_a = grad_ERI[:, :rank].reshape(self.a.shape).to(self.a.dtype)
        grad_b = grad_ERO[:, :rank].transpose(0, 1).reshape(-1, grad_ERO.shape[2]).T
        return grad_a, grad_b.to(self.b.dtype)


@dataclass(frozen=True)
class Product:
    """One of the two products of experts: its frozen weight and bias, and its LoRA."""

    experts: Any
    name: str
    lora: StackedLora | None

    def weight(self, is_backward: bool = False) -> Any:
        """Returns the weights [E, I, O], or [E, O, I] for the backward pass."""
        stacked = getattr(self.experts, self.name)
        is_as_stored = self.experts.is_transposed != is_backward
        if isinstance(stacked, StackedIn4Bits):
            return Matrices(stacked, is_transposed=not is_as_stored)
        return stacked if is_as_stored else stacked.transpose(1, 2)

    @property
    def bias_EO(self) -> Tensor | None:
        return getattr(self.experts, f"{self.name}_bias") if self.experts.has_bias else None

    def forward(self, rows_SI: Tensor, groups: Groups, experts_S: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the result [S, O], and the low-rank rows [S, R] if there is a LoRA."""
        out_SO = add_product(None, rows_SI, self.weight(), groups)
        low_SR = None
        if self.lora is not None:
            inputs_ERI, outputs_ERO = self.lora.factors(len(groups.ends_E), rows_SI.dtype)
            low_SR = add_product(None, rows_SI, inputs_ERI.transpose(1, 2), groups)
            add_product(out_SO, low_SR, outputs_ERO, groups, self.lora.scaling)
        if self.bias_EO is not None:
            out_SO += self.bias_EO[experts_S]
        return out_SO, low_SR

    def backward(self, grad_SO: Tensor, groups: Groups) -> tuple[Tensor, Tensor | None]:
        """Returns the gradient of the rows [S, I], and that of the low-rank rows [S, R]."""
        grad_SI = add_product(None, grad_SO, self.weight(is_backward=True), groups)
        if self.lora is None:
            return grad_SI, None
        inputs_ERI, outputs_ERO = self.lora.factors(len(groups.ends_E), grad_SO.dtype)
        grad_low_SR = add_product(None, grad_SO, outputs_ERO.transpose(1, 2), groups, self.lora.scaling)
        return add_product(grad_SI, grad_low_SR, inputs_ERI, groups), grad_low_SR

    def gradients(
        self, rows_SI: Tensor, low_SR: Tensor, grad_SO: Tensor, grad_low_SR: Tensor, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of A and B."""
        assert self.lora is not None
        inputs_ERI = sums_of_products(grad_low_SR, rows_SI, groups)
        outputs_ERO = sums_of_products(low_SR, grad_SO, groups).mul_(self.lora.scaling)
        return self.lora.gradients(inputs_ERI, outputs_ERO)


# -- the layer ------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    """The weighted sum of each token's experts. Only A and B of the LoRAs get gradients, and the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens_ND: Tensor,
        weights_NK: Tensor,
        chosen_NK: Tensor,
        first: Product,
        second: Product,
        *loras: nn.Parameter,
    ) -> Tensor:
        experts, num_tokens, top_k = first.experts, *chosen_NK.shape
        experts_S, order_S = chosen_NK.reshape(-1).sort(stable=True)
        groups = Groups.of(experts_S, experts.num_experts, has_grouped_products(tokens_ND.device))
        rows_SD = tokens_ND[order_S // top_k]
        up_SU, low_up_SR = first.forward(rows_SD, groups, experts_S)
        hidden_SH = _gated(experts, up_SU)
        out_SD, low_out_SR = second.forward(hidden_SH, groups, experts_S)
        normed_SD = experts.post_expert_norm(out_SD) if experts.has_post_expert_norm else out_SD
        weighted_SD = normed_SD * weights_NK.reshape(-1)[order_S, None]
        result_ND = _in_order_of_tokens(weighted_SD, order_S, num_tokens).to(tokens_ND.dtype)
        ctx.save_for_backward(
            tokens_ND, weights_NK, up_SU, low_up_SR, low_out_SR, experts_S, order_S,
            out_SD if experts.has_post_expert_norm else None,
        )  # fmt: skip
        ctx.products, ctx.groups, ctx.top_k = (first, second), groups, top_k
        return result_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        tokens_ND, weights_NK, up_SU, low_up_SR, low_out_SR, experts_S, order_S, out_SD = ctx.saved_tensors
        (first, second), groups = ctx.products, ctx.groups
        experts = first.experts
        from_token_S = order_S // ctx.top_k
        weight_S1 = weights_NK.reshape(-1)[order_S, None].to(grad_ND.dtype)
        with torch.enable_grad():
            up_SU = up_SU.detach().requires_grad_()
            hidden_SH = _gated(experts, up_SU)
        # The gradient before the routing weights are applied: its product with the result is their gradient.
        grad_out_SD = grad_ND[from_token_S]
        if out_SD is not None:
            grad_out_SD, grad_weight_S = _through_norm(experts, out_SD, grad_out_SD)
        grad_hidden_SH, grad_low_SR = second.backward(grad_out_SD, groups)
        if out_SD is None:
            grad_weight_S = (grad_hidden_SH * hidden_SH.detach()).sum(1)
            if second.bias_EO is not None:
                grad_weight_S += (grad_out_SD * second.bias_EO[experts_S]).sum(1)
        grad_loras: list[Tensor] = []
        if second.lora is not None:
            grad_loras += second.gradients(
                hidden_SH.detach(), low_out_SR * weight_S1, grad_out_SD, grad_low_SR * weight_S1, groups
            )
        (grad_up_SU,) = torch.autograd.grad(hidden_SH, up_SU, grad_hidden_SH.mul_(weight_S1))
        grad_rows_SD, grad_low_SR = first.backward(grad_up_SU, groups)
        if first.lora is not None:
            rows_SD = tokens_ND[from_token_S]
            grad_loras = [*first.gradients(rows_SD, low_up_SR, grad_up_SU, grad_low_SR, groups), *grad_loras]
        grad_tokens_ND = _in_order_of_tokens(grad_rows_SD, order_S, len(tokens_ND))
        grad_weights = torch.empty_like(grad_weight_S).index_copy_(0, order_S, grad_weight_S)
        return (
            grad_tokens_ND,
            grad_weights.view_as(weights_NK).to(weights_NK.dtype),
            None,
            None,
            None,
            *grad_loras,
        )


def _gated(experts: Any, up_SU: Tensor) -> Tensor:
    gated: Tensor = experts._apply_gate(up_SU) if experts.has_gate else experts.act_fn(up_SU)
    return gated


def _through_norm(experts: Any, out_SD: Tensor, grad_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of a norm's input, and the products of the norm's result with its gradient."""
    with torch.enable_grad():
        out_SD = out_SD.detach().requires_grad_()
        normed_SD = experts.post_expert_norm(out_SD)
    (grad_out_SD,) = torch.autograd.grad(normed_SD, out_SD, grad_SD)
    return grad_out_SD, (normed_SD.detach() * grad_SD).sum(1)


def _in_order_of_tokens(rows_SD: Tensor, order_S: Tensor, num_tokens: int) -> Tensor:
    """Returns the sum of each token's rows, in the same order of additions on every device."""
    by_token_SD = torch.empty_like(rows_SD).index_copy_(0, order_S, rows_SD)
    return by_token_SD.view(num_tokens, -1, rows_SD.shape[1]).sum(1)


def run_experts(
    experts: Any, loras: dict[str, StackedLora], tokens_XD: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Returns the result of a layer's experts with an adapter, or without one if `loras` is empty."""
    first, second = (Product(experts, name, loras.get(name)) for name in stacked_names(experts))
    parameters = [part for product in (first, second) if (lora := product.lora) for part in (lora.a, lora.b)]
    tokens_ND = tokens_XD.reshape(-1, tokens_XD.shape[-1])
    chosen_NK, weights_NK = chosen.reshape(len(tokens_ND), -1), weights.reshape(len(tokens_ND), -1)
    out_ND: Tensor = _Experts.apply(tokens_ND, weights_NK, chosen_NK, first, second, *parameters)
    return out_ND.view(tokens_XD.shape)


# -- PEFT's layers --------------------------------------------------------------------------


@torch.compiler.disable
def _forward(self: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Replaces the forward pass of PEFT's outermost layer on a module of experts."""
    experts, loras = self.get_base_layer(), _active_loras(self)
    if not loras:
        result: Tensor = experts(tokens, chosen, weights)
        return result
    return run_experts(experts, loras, tokens, chosen, weights)


def _active_loras(layer: Any) -> dict[str, StackedLora]:
    """Returns the active LoRA of each stacked weight, from nested layers of PEFT."""
    loras: dict[str, StackedLora] = {}
    while hasattr(layer, "parameter_name"):
        active = active_in(layer, layer.lora_A)
        if active is not None and not layer.disable_adapters:
            loras[layer.parameter_name] = StackedLora(
                layer.lora_A[active].weight, layer.lora_B[active].weight, layer.scaling[active]
            )
        layer = layer.base_layer
    return loras


def run_in_4_bits(model: nn.Module) -> None:
    """Makes experts in 4 bits compute here with no adapter on them too.

    Autograd would keep what their own forward pass dequantises.
    """
    for experts in model.modules():
        if any(isinstance(weight, StackedIn4Bits) for weight in experts.parameters(recurse=False)):
            experts.forward = types.MethodType(_forward_without_lora, experts)


@torch.compiler.disable
def _forward_without_lora(self: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return run_experts(self, {}, tokens, chosen, weights)


def fuse(model: nn.Module) -> None:
    """Installs the grouped forward on PEFT's layers around experts."""
    inner = {id(layer.base_layer) for layer in model.modules() if hasattr(layer, "parameter_name")}
    for layer in model.modules():
        if not hasattr(layer, "parameter_name") or not is_grouped(layer.get_base_layer()):  # type: ignore[operator]
            continue
        if id(layer) not in inner:
            layer.forward = types.MethodType(_forward, layer)


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`, whose bound methods are reference cycles."""
    for layer in model.modules():
        if hasattr(layer, "parameter_name") and "forward" in vars(layer):
            del layer.forward
