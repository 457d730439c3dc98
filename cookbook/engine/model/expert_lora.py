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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cookbook.engine.model import fp8, fused
from cookbook.engine.model.expert_forms import ExpertsForm, form_of, gated
from cookbook.engine.model.peft_layers import active_in
from cookbook.engine.model.quantization import own_quantized_stacks
from cookbook.engine.model.stacked_4bit import Matrices, StackedIn4Bits

_ALIGNMENT = 8
"""Grouped products on CUDA need rows of 16 bytes, so ranks are padded with zeros to a multiple of 8."""


# -- products by expert ---------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Where the rows of each expert end in routed rows. Rows behind the last end are in no product."""

    ends_E: Tensor
    sizes: list[int] | None
    """The number of rows of each expert, for loops over experts; None on a device with grouped products,
    which would have to wait for them."""

    @classmethod
    def of(cls, experts_S: Tensor, num_experts: int) -> Groups:
        if has_grouped_products(experts_S.device):
            counts_E = torch.zeros(num_experts + 1, dtype=torch.int32, device=experts_S.device)
            ones_S = torch.ones_like(experts_S, dtype=torch.int32)
            counts_E.index_add_(0, experts_S.clamp(max=num_experts), ones_S)
            return cls(counts_E[:-1].cumsum(0, dtype=torch.int32), None)
        sizes = torch.bincount(experts_S, minlength=num_experts)[:num_experts].tolist()
        return cls.of_sizes(sizes, experts_S.device)

    @classmethod
    def of_sizes(cls, sizes: list[int], device: torch.device) -> Groups:
        ends_E = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
        return cls(ends_E, None if has_grouped_products(device) else sizes)

    def parts(self, *rows: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields the experts that have rows, and their parts of each tensor of rows."""
        sizes = self.sizes or torch.diff(self.ends_E, prepend=self.ends_E.new_zeros(1)).tolist()
        parts = zip(*(tensor[: sum(sizes)].split(sizes) for tensor in rows), strict=True)
        for expert, found in enumerate(parts):
            if sizes[expert]:
                yield expert, list(found)


def has_grouped_products(device: torch.device) -> bool:
    """Returns whether one kernel computes the products of all experts. A CPU loops over them either way."""
    if device.type == "meta":  # of an estimate
        return True
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
    if groups.sizes is None and isinstance(weight_EIO, Tensor):
        product_SO = _grouped(rows_SI, weight_EIO, groups.ends_E)
        if out_SO is None:
            return product_SO if scale == 1.0 else product_SO.mul_(scale)
        return out_SO.add_(product_SO, alpha=scale)
    matrices = weight_EIO.unbind() if isinstance(weight_EIO, Tensor) else weight_EIO
    if out_SO is not None:
        for expert, (rows, out) in groups.parts(rows_SI, out_SO):
            out.addmm_(rows, matrices[expert], alpha=scale)
        return out_SO
    out_SO = rows_SI.new_empty(len(rows_SI), weight_EIO.shape[2])
    for expert, (rows, out) in groups.parts(rows_SI, out_SO):
        torch.mm(rows, matrices[expert], out=out)
    return out_SO if scale == 1.0 else out_SO.mul_(scale)


def sums_of_products(
    left_SI: Tensor, right_SO: Tensor, groups: Groups, num_experts: int, is_outermost: bool, scale: float
) -> Tensor:
    """Returns, for each expert, the sum of the outer products of its rows, times `scale`.

    The result is [E, I, O], or [I, E, O] where the expert is not to be outermost in memory.
    """
    if groups.sizes is None:
        total_EIO = _grouped(left_SI.T, right_SO, groups.ends_E)
        if (missing := num_experts - len(total_EIO)) > 0:
            total_EIO = nn.functional.pad(total_EIO, (0, 0, 0, 0, 0, missing))
        total = total_EIO if is_outermost else total_EIO.transpose(0, 1)
        return total if scale == 1.0 else total.mul_(scale)
    shape = (num_experts, left_SI.shape[1]) if is_outermost else (left_SI.shape[1], num_experts)
    has_all = len(groups.sizes) == num_experts and all(groups.sizes)
    total = (left_SI.new_empty if has_all else left_SI.new_zeros)((*shape, right_SO.shape[1]))
    totals = total.unbind(0 if is_outermost else 1)
    for expert, (left, right) in groups.parts(left_SI, right_SO):
        torch.mm(left.T, right, out=totals[expert])
    return total if scale == 1.0 else total.mul_(scale)


# -- one weight with its LoRA ---------------------------------------------------------------


@dataclass(frozen=True)
class StackedLora:
    """A and B of the active adapter on a stacked weight, as PEFT holds them."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    is_swapped: bool = False
    """Whether B is on the inputs and A on the outputs. PEFT takes weights [E, I, O] for [E, O, I] if their
    module does not say that they are transposed."""

    def factors(self, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the factor on the inputs and the one on the outputs: [E, R, I] and [E, R, O]."""
        a_ERX = self.a.detach().to(dtype).view(num_experts, -1, self.a.shape[1])
        # transposed as a matrix, which is faster than with three axes
        b_RXY = self.b.detach().to(dtype).T.contiguous()
        b_ERY = b_RXY.view(-1, num_experts, b_RXY.shape[1]).transpose(0, 1)
        if b_ERY.is_cuda:
            b_ERY = b_ERY.contiguous()
        if (missing := -a_ERX.shape[1] % _ALIGNMENT) and a_ERX.is_cuda:
            a_ERX = nn.functional.pad(a_ERX, (0, 0, 0, missing))
            b_ERY = nn.functional.pad(b_ERY, (0, 0, 0, missing))
        return (b_ERY, a_ERX) if self.is_swapped else (a_ERX, b_ERY)

    def gradients(
        self,
        grad_low_SR: Tensor,
        rows_SI: Tensor,
        low_SR: Tensor,
        grad_SO: Tensor,
        groups: Groups,
        num_experts: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of A and B."""
        of_inputs, of_outputs = (grad_low_SR, rows_SI, 1.0), (low_SR, grad_SO, self.scaling)
        (left, right, scale), of_b = (of_outputs, of_inputs) if self.is_swapped else (of_inputs, of_outputs)
        rank = self.a.shape[0] // num_experts
        grad_ERX = sums_of_products(left, right, groups, num_experts, is_outermost=True, scale=scale)[
            :, :rank
        ]
        left, right, scale = of_b
        grad_REY = sums_of_products(left, right, groups, num_experts, is_outermost=False, scale=scale)[:rank]
        # contiguous, because gradients that are transposed are added slowly
        grad_b = grad_REY.reshape(-1, grad_REY.shape[2]).T.contiguous()
        return grad_ERX.reshape(self.a.shape).to(self.a.dtype), grad_b.to(self.b.dtype)


@dataclass(frozen=True)
class Product:
    """A product of experts: its frozen weight and bias, and its LoRA."""

    experts: Any
    form: ExpertsForm
    name: str
    lora: StackedLora | None

    @property
    def num_experts(self) -> int:
        """The number of experts that the weight has. Some may be in no product."""
        return len(getattr(self.experts, self.name))

    def weight(self, groups: Groups, dtype: torch.dtype, is_backward: bool = False) -> Any:
        """Returns the weights [E, I, O], or [E, O, I] for the backward pass, to compute with in `dtype`."""
        stacked = getattr(self.experts, self.name)
        is_as_stored = self.form.is_transposed != is_backward
        if (in_fp8 := fp8.stack_of(self.experts, self.name, dtype)) is not None:
            stacked = in_fp8.first(len(groups.ends_E)) if groups.sizes is None else in_fp8
        if isinstance(stacked, StackedIn4Bits | fp8.StackInFp8):
            return Matrices(stacked, is_transposed=not is_as_stored)
        stacked = stacked[: len(groups.ends_E)]
        return stacked if is_as_stored else stacked.transpose(1, 2)

    @property
    def bias_EO(self) -> Tensor | None:
        return getattr(self.experts, f"{self.name}_bias") if self.form.has_bias else None

    def factors(self, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.lora is not None
        inputs_ERI, outputs_ERO = self.lora.factors(self.num_experts, dtype)
        return inputs_ERI[: len(groups.ends_E)], outputs_ERO[: len(groups.ends_E)]

    def forward(
        self, rows_SI: Tensor, groups: Groups, experts_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the result [S, O], and the low-rank rows [S, R] if there is a LoRA."""
        out_SO = add_product(None, rows_SI, self.weight(groups, rows_SI.dtype), groups)
        low_SR = None
        if self.lora is not None:
            inputs_ERI, outputs_ERO = self.factors(groups, rows_SI.dtype)
            low_SR = add_product(None, rows_SI, inputs_ERI.transpose(1, 2), groups)
            add_product(out_SO, low_SR, outputs_ERO, groups, self.lora.scaling)
        if self.bias_EO is not None:
            out_SO += self.bias_EO[experts_S]
        return out_SO, low_SR

    def backward(self, grad_SO: Tensor, groups: Groups) -> tuple[Tensor, Tensor | None]:
        """Returns the gradient of the rows [S, I], and that of the low-rank rows [S, R]."""
        grad_SI = add_product(None, grad_SO, self.weight(groups, grad_SO.dtype, is_backward=True), groups)
        if self.lora is None:
            return grad_SI, None
        inputs_ERI, outputs_ERO = self.factors(groups, grad_SO.dtype)
        grad_low_SR = add_product(None, grad_SO, outputs_ERO.transpose(1, 2), groups, self.lora.scaling)
        return add_product(grad_SI, grad_low_SR, inputs_ERI, groups), grad_low_SR

    def gradients(
        self, rows_SI: Tensor, low_SR: Tensor, grad_SO: Tensor, grad_low_SR: Tensor, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of A and B."""
        assert self.lora is not None
        return self.lora.gradients(grad_low_SR, rows_SI, low_SR, grad_SO, groups, self.num_experts)


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
        experts, form, num_tokens, top_k = first.experts, first.form, *chosen_NK.shape
        experts_S, order_S = chosen_NK.reshape(-1).sort(stable=True)
        groups = Groups.of(experts_S, second.num_experts)
        rows_SD = tokens_ND[order_S // top_k]
        up_SU, low_up_SR = first.forward(rows_SD, groups, experts_S)
        hidden_SH = _hidden(first, up_SU)
        out_SD, low_out_SR = second.forward(hidden_SH, groups, experts_S)
        if form.has_identity:
            out_SD = torch.where(_is_identity(experts_S, second), rows_SD, out_SD)
        normed_SD = experts.post_expert_norm(out_SD) if form.has_norm else out_SD
        weighted_SD = normed_SD * weights_NK.reshape(-1)[order_S, None]
        result_ND = _in_order_of_tokens(weighted_SD, order_S, num_tokens).to(tokens_ND.dtype)
        ctx.save_for_backward(
            tokens_ND, weights_NK, up_SU, low_up_SR, low_out_SR, experts_S, order_S,
            out_SD if form.has_norm else None,
        )  # fmt: skip
        ctx.products, ctx.groups, ctx.top_k = (first, second), groups, top_k
        return result_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        tokens_ND, weights_NK, up_SU, low_up_SR, low_out_SR, experts_S, order_S, out_SD = ctx.saved_tensors
        (first, second), groups = ctx.products, ctx.groups
        weight_S1 = weights_NK.reshape(-1)[order_S, None].to(grad_ND.dtype)
        with torch.enable_grad():
            up_SU = up_SU.detach().requires_grad_()
            hidden_SH = _hidden(first, up_SU)
        # The gradient before the routing weights are applied: its product with the result is their gradient.
        grad_out_SD = grad_ND[order_S // ctx.top_k]
        if out_SD is not None:
            grad_out_SD, grad_weight_S = _through_norm(first.experts, out_SD, grad_out_SD)
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
        needs_rows = first.lora is not None or first.form.has_identity
        rows_SD: Any = tokens_ND[order_S // ctx.top_k] if needs_rows else None
        if first.lora is not None:
            grad_loras = [*first.gradients(rows_SD, low_up_SR, grad_up_SU, grad_low_SR, groups), *grad_loras]
        if first.form.has_identity:
            is_identity_S1 = _is_identity(experts_S, second)
            of_identity_S = (grad_out_SD * rows_SD).sum(1)
            grad_weight_S = torch.where(is_identity_S1[:, 0], of_identity_S, grad_weight_S)
            grad_rows_SD = torch.where(is_identity_S1, grad_out_SD * weight_S1, grad_rows_SD)
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


class _SortedRows(torch.autograd.Function):
    """A single product of rows that are in the order of their experts."""

    @staticmethod
    def forward(ctx: Any, rows_SI: Tensor, groups: Groups, product: Product, *lora: nn.Parameter) -> Tensor:
        out_SO, low_SR = product.forward(rows_SI, groups)
        ctx.save_for_backward(rows_SI, low_SR)
        ctx.product, ctx.groups = product, groups
        return out_SO

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> Any:
        rows_SI, low_SR = ctx.saved_tensors
        grad_SI, grad_low_SR = ctx.product.backward(grad_SO, ctx.groups)
        if ctx.product.lora is None:
            return grad_SI, None, None
        gradients = ctx.product.gradients(rows_SI, low_SR, grad_SO, grad_low_SR, ctx.groups)
        return grad_SI, None, None, *gradients


def _hidden(first: Product, up_SU: Tensor) -> Tensor:
    """Returns the inputs of the second product."""
    if first.form.activation is not None and fused.has_kernels(up_SU):
        return fused.gated_product_of_halves(up_SU, first.form.activation)
    hidden_SH: Tensor = gated(first.experts, up_SU) if first.form.has_gate else first.experts.act_fn(up_SU)
    return hidden_SH


def _is_identity(experts_S: Tensor, second: Product) -> Tensor:
    """Returns which rows are returned as they are: [S, 1]."""
    return (experts_S >= second.num_experts)[:, None]


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
    experts: Any, form: ExpertsForm, loras: Mapping[str, StackedLora], tokens_XD: Tensor, *others: Any
) -> Tensor:
    """Returns the result of experts with an adapter, or without one if `loras` is empty.

    `tokens_XD` and `others` are the inputs of the experts in their form.
    """
    products = [Product(experts, form, name, loras.get(name)) for name in form.names]
    parameters = [part for product in products if (lora := product.lora) for part in (lora.a, lora.b)]
    tokens_ND = tokens_XD.reshape(-1, tokens_XD.shape[-1])
    if form.call == "sorted":
        (sizes,) = others
        groups = Groups.of_sizes(sizes, tokens_ND.device)
        sorted_ND: Tensor = _SortedRows.apply(tokens_ND, groups, *products, *parameters)
        return sorted_ND
    if form.call == "all":
        weights = tokens_ND.new_ones(len(tokens_ND))
        num_experts = products[0].num_experts
        chosen = torch.arange(num_experts, device=tokens_ND.device).repeat_interleave(
            len(tokens_ND) // num_experts
        )
    else:
        chosen, weights = others
    chosen_NK, weights_NK = chosen.reshape(len(tokens_ND), -1), weights.reshape(len(tokens_ND), -1)
    out_ND: Tensor = _Experts.apply(tokens_ND, weights_NK, chosen_NK, *products, *parameters)
    return out_ND.view(tokens_XD.shape)


# -- PEFT's layers --------------------------------------------------------------------------


@torch.compiler.disable
def _forward(self: Any, *inputs: Any) -> Tensor:
    """Replaces the forward pass of PEFT's outermost layer on a module of experts."""
    experts, loras = self.get_base_layer(), _active_loras(self)
    if not loras:
        result: Tensor = experts(*inputs)
        return result
    return run_experts(experts, self.experts_form, loras, *inputs)


def _active_loras(layer: Any) -> dict[str, StackedLora]:
    """Returns the active LoRA of each stacked weight, from nested layers of PEFT."""
    loras: dict[str, StackedLora] = {}
    form: ExpertsForm = layer.experts_form
    is_swapped = form.is_transposed and not getattr(layer.get_base_layer(), "is_transposed", False)
    while hasattr(layer, "parameter_name"):
        active = active_in(layer, layer.lora_A)
        if active is not None and not layer.disable_adapters:
            a, b = layer.lora_A[active].weight, layer.lora_B[active].weight
            loras[layer.parameter_name] = StackedLora(a, b, layer.scaling[active], is_swapped)
        layer = layer.base_layer
    return loras


def run_quantized(model: nn.Module) -> None:
    """Makes experts in 4 or 8 bits compute here with no adapter on them too.

    Autograd would keep what their own forward pass dequantises.
    """
    for experts in model.modules():
        if any(True for _ in own_quantized_stacks(experts)):
            experts.experts_form = form_of(experts)  # type: ignore[assignment]
            is_known = experts.experts_form is not None
            forward = _forward_without_lora if is_known else _forward_of_one_flat_expert
            experts.forward = types.MethodType(forward, experts)


def run_grouped(model: nn.Module) -> None:
    """Makes frozen experts compute here that transformers runs one by one, which waits for the device.

    It has grouped products for the others, and a loop for those of LongCat and Step 3.7.
    """
    modules: list[Any] = list(model.modules())
    for experts in modules:
        if hasattr(experts, "has_gate") or any(True for _ in own_quantized_stacks(experts)):
            continue
        if (form := form_of(experts)) is not None and form.call == "routed":
            kind: Any = type(experts)
            experts.experts_form = form
            experts.__class__ = fused.class_with(kind, _forward_frozen)


def _forward_frozen(self: Any, *inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters()):
        result: Tensor = self.plain_forward(*inputs)
        return result
    return run_experts(self, self.experts_form, {}, *inputs)


@torch.compiler.disable
def _forward_without_lora(self: Any, *inputs: Any) -> Tensor:
    return run_experts(self, self.experts_form, {}, *inputs)


def _forward_of_one_flat_expert(self: Any, tokens_ND: Tensor, *weights: StackedIn4Bits) -> Any:
    """Replaces the forward pass of a module that gets one expert's weights. They are dequantised in it."""

    def compute(tokens_ND: Tensor) -> Any:
        return type(self).forward(self, tokens_ND, *(weight.matrix(0) for weight in weights))

    return checkpoint(compute, tokens_ND, use_reentrant=False, preserve_rng_state=False)


def fuse(model: nn.Module) -> None:
    """Installs the grouped forward on PEFT's layers around experts of a known form."""
    inner = {id(layer.base_layer) for layer in model.modules() if hasattr(layer, "parameter_name")}
    for layer in model.modules():
        if not hasattr(layer, "parameter_name") or id(layer) in inner or "forward" in vars(layer):
            continue
        form = form_of(layer.get_base_layer())  # type: ignore[operator]
        if form is not None:
            layer.experts_form = form  # type: ignore[assignment]
            layer.forward = types.MethodType(_forward, layer)


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`, whose bound methods are reference cycles."""
    for layer in model.modules():
        if hasattr(layer, "parameter_name") and "forward" in vars(layer):
            del layer.forward, layer.experts_form
