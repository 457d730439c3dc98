"""Runs the kernels in Triton's interpreter, on a CPU, and prints how far they are from the truth.

    TRITON_INTERPRET=1 PYTHONPATH=.:tests/helpers python tests/cookbook/engine/model/interpreted.py

Prints a line of JSON for each case: its name, and by what was compared the largest difference relative to the
largest value, of the kernel and of what it replaces. The truth is in float64: transformers' RoPE, torch's
activations and PEFT's experts, and torch's softmax over all logits at once. The interpreter is chosen when
Triton is first imported, so this is a program.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import test_expert_lora
import test_rope
import test_unembedding

from cookbook.engine.model import expert_lora, fused, kernels, rope, triton_kernels
from cookbook.engine.model.unembedding import Head, score, score_and_backpropagate

Errors = dict[str, tuple[float, float]]


def error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max())


def rotation(num_heads: tuple[int, int], size: int, dtype: torch.dtype, one_angle: bool) -> Errors:
    """Returns the errors of the rotated tensors and of their gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = (draw(2, 5, heads, size).transpose(1, 2) for heads in num_heads)  # as attention makes them
    angles = torch.randn(1 if one_angle else 2, 5, size, generator=generator)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    grads = [draw(2, heads, 5, size) for heads in num_heads]
    results: list[list[Tensor]] = []
    ways: list[Callable[..., Any]] = [rope.rotated_together, test_rope.ours, test_rope.THEIRS]
    for way, kind in zip(ways, (dtype, dtype, torch.float64), strict=True):
        leaves = [x.to(kind).requires_grad_() for x in (q, k)]
        made = way(*leaves, cos.to(kind), sin.to(kind))
        results.append([*made, *torch.autograd.grad(made, leaves, [grad.to(kind) for grad in grads])])
    assert all(x.stride() == y.stride() for x, y in zip(results[0][:2], (q, k), strict=True))
    return {
        name: (error(found, truth), error(plain, truth))
        for name, found, plain, truth in zip(("q", "k", "grad q", "grad k"), *results, strict=True)
    }


def blocks(has_kernel: bool, head: Head, *inputs: Tensor) -> dict[str, Tensor]:
    """Returns log-probabilities and gradients, from blocks of logits with or without the kernel."""
    hidden_SD, targets_S, weights_S = inputs
    kernels.is_used = lambda name, device: has_kernel
    logprobs_S, loss, grad_SD = score_and_backpropagate(
        head, hidden_SD, targets_S, lambda logprobs_C, part: -(weights_S[part] * logprobs_C).sum()
    )
    found = {"logprobs": logprobs_S, "loss": loss, "hidden": grad_SD}
    for _, parameter in head.trained_keys():
        assert parameter.grad is not None
        found[f"trained {tuple(parameter.shape)}"] = parameter.grad
        parameter.grad = None
    if head.lora is not None:
        assert head.lora.a_RD.grad is not None
        found["a"] = head.lora.a_RD.grad
        head.lora.a_RD.grad = None
    found["scored"] = score(head, hidden_SD, targets_S)
    return found


def softmax(dtype: torch.dtype, num_targets: int, **options: Any) -> Errors:
    head = test_unembedding.make_head(dtype=dtype, **options)
    hidden_SD, targets_S, weights_S = test_unembedding.make_positions(dtype)
    if num_targets > 1:
        generator = torch.Generator().manual_seed(2)
        shape = len(targets_S), num_targets
        targets_S = torch.randint(test_unembedding.VOCAB_SIZE, shape, generator=generator)
        weights_S = torch.rand(shape, generator=generator)
    truth = test_unembedding.by_autograd(head, hidden_SD, targets_S, weights_S)
    names = {"logprobs": "logprobs", "loss": "loss", "hidden": "hidden", "a": "a", "scored": "logprobs"}
    if head.lora is not None:
        names[f"trained {tuple(head.lora.b_VR.shape)}"] = "b"
    if head.weight_VD.requires_grad:
        names[f"trained {tuple(head.weight_VD.shape)}"] = "weight"
    found, plain = (blocks(has_kernel, head, hidden_SD, targets_S, weights_S) for has_kernel in (True, False))
    return {
        name: (error(found[name], truth[names[name]]), error(plain[name], truth[names[name]]))
        for name in found
    }


def trials() -> Errors:
    """Returns 0 for each kernel whose trial on a device passes here."""
    device = torch.device("cpu")
    return {name: (float(not kernels._TRIALS[name](device)), 0.0) for name in kernels.NAMES}


def assert_refuses_a_second_pass(out: Tensor, leaf: Tensor, grad: Tensor) -> None:
    """The first one has written gradients to what the second one would read."""
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        torch.autograd.grad(out, leaf, grad)


def experts() -> Errors:
    """Returns the errors of experts with LoRAs, whose truth are PEFT's layers."""
    found = []
    for has_kernel, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        kernels.is_used = lambda name, device, has_kernel=has_kernel: has_kernel
        model = test_expert_lora.peft_layer(0, test_expert_lora.BOTH, torch.float32).to(dtype)
        if dtype == torch.float32:
            expert_lora.fuse(model)
            assert model.base_model.model.experts.experts_form.activation == "silu"
        else:  # grouped products are not for float64
            model.base_model.model.experts.get_base_layer().config._experts_implementation = "batched_mm"
        tokens_ND, chosen_NK, weights_NK = test_expert_lora.inputs_of(17)
        inputs = tokens_ND.to(dtype), chosen_NK, weights_NK.to(dtype)
        found.append(test_expert_lora.results_of(model, inputs))
    kernel, plain, truth = found
    return {name: (error(kernel[name], truth[name]), error(plain[name], truth[name])) for name in truth}


def gated_product(activation: str, dtype: torch.dtype, of_halves: bool) -> Errors:
    """Returns the errors of the product and of its gradients. Rows have gaps, and no program is full."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 2 * triton_kernels._GATED_BLOCK + 90, generator=generator).to(dtype)
    rows *= 3
    grad = torch.randn(2, 3, rows.shape[-1] // 2, generator=generator).to(dtype)
    results: list[list[Tensor]] = []
    for has_kernel, kind in ((True, dtype), (False, dtype), (False, torch.float64)):
        kernels.is_used = lambda name, device, has_kernel=has_kernel: has_kernel
        leaf = rows.to(kind).requires_grad_()
        both = leaf * 1  # the kernel writes gradients there
        if of_halves:
            out = fused.gated_product_of_halves(both, activation)
        elif kind == torch.float64:
            gate, up = both.chunk(2, -1)
            out = kernels.ACTIVATIONS[activation](gate) * up
        else:
            out = fused.gated_product(*both.chunk(2, -1), activation)
        results.append([out, *torch.autograd.grad(out, leaf, grad.to(kind), retain_graph=True)])
        if has_kernel:
            assert torch.equal(results[0][1], both)  # they are written where gate and up were
            assert_refuses_a_second_pass(out, leaf, grad)
    return {
        name: (error(found, truth), error(plain, truth))
        for name, found, plain, truth in zip(("product", "gradient"), *results, strict=True)
    }


def cases() -> Iterator[tuple[str, Callable[[], Errors]]]:
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "rotation", lambda: rotation((4, 2), 16, fp32, False)
    yield "rotation of 3 heads of 24", lambda: rotation((3, 1), 24, fp32, True)
    yield "rotation in bfloat16", lambda: rotation((4, 2), 16, bf16, False)
    yield "trials", trials
    for activation in kernels.ACTIVATIONS:
        yield f"gated product, {activation}", functools.partial(gated_product, activation, fp32, False)
        yield (
            f"gated product of halves, {activation}",
            functools.partial(gated_product, activation, fp32, True),
        )
    yield "gated product in bfloat16", lambda: gated_product("silu", bf16, True)
    yield "gated product of experts", experts
    yield "softmax", lambda: softmax(fp32, 1)
    yield "softmax with an adapter and trained weights", lambda: softmax(fp32, 1, lora=True, full=True)
    yield "softmax with a softcap", lambda: softmax(fp32, 1, softcap=3.0, lora=True)
    yield "softmax of several targets", lambda: softmax(fp32, 4, scale=0.25)
    yield "softmax in bfloat16", lambda: softmax(bf16, 1)
    yield "softmax in bfloat16 with trained weights", lambda: softmax(bf16, 1, full=True, softcap=3.0)


if __name__ == "__main__":
    for name, run in cases():
        print(json.dumps([name, run()]), flush=True)
