"""Rotary embeddings in fewer kernels: the results of transformers' own function, and of no other formula."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3

from cookbook.engine.model import rope

THEIRS = modeling_qwen3.apply_rotary_pos_emb


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Returns queries and keys as attention makes them, views of [B, T, H, E], and cosines and sines."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 3, 16, generator=generator).transpose(1, 2)
    k = torch.randn(2, 5, 1, 16, generator=generator).transpose(1, 2)
    angles = torch.randn(2, 5, 16, generator=generator)
    return [one.to(dtype) for one in (q, k, angles.cos(), angles.sin())]


def results(rotate: Any, dtype: torch.dtype) -> list[Tensor]:
    """Returns both results and the gradients of queries and keys."""
    q, k, cos, sin = inputs(dtype)
    q, k = q.requires_grad_(), k.requires_grad_()
    made = rotate(q, k, cos, sin)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(one.shape, generator=generator).to(dtype) for one in made]
    return [*made, *torch.autograd.grad(made, (q, k), grads)]


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(rope.rotated(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_results_and_gradients_are_those_of_transformers(dtype: torch.dtype, tolerance: float) -> None:
    for found, expected in zip(results(ours, dtype), results(THEIRS, dtype), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.stride() == expected.stride()


def test_in_bfloat16_the_error_is_no_larger_than_theirs() -> None:
    exact = results(THEIRS, torch.float64)
    angles = [one.bfloat16().double() for one in inputs(torch.float64)]
    made = [*THEIRS(*angles)]
    for found, theirs, true in zip(
        results(ours, torch.bfloat16), results(THEIRS, torch.bfloat16), [*made, *exact[2:]], strict=True
    ):
        ours_error, their_error = (float((one.double() - true).norm()) for one in (found, theirs))
        assert ours_error <= 1.05 * their_error


@pytest.mark.parametrize(
    ("family", "is_known"),
    [
        ("qwen3", True),
        ("llama", True),
        ("gemma3", True),
        ("glm", False),
        ("cohere", False),
        ("ernie4_5", False),
    ],
)
def test_only_the_known_formula_is_replaced(family: str, is_known: bool) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    function = module.apply_rotary_pos_emb
    function = getattr(function, "_theirs", function)
    assert rope._is_known(function) == is_known


def test_tensors_of_a_cpu_take_the_function_of_transformers() -> None:
    given = inputs(torch.bfloat16)
    for found, expected in zip(rope._Rotation(THEIRS)(*given), THEIRS(*given), strict=True):
        assert torch.equal(found, expected)


def test_queries_alone_and_heads_laid_out_in_another_way_take_the_function_of_transformers() -> None:
    """Qwen4's attention rotates queries and keys as most do, and its indexer each with a call of its own."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import apply_rotary_pos_emb

    theirs = getattr(apply_rotary_pos_emb, "_theirs", apply_rotary_pos_emb)
    q, _, cos, sin = inputs(torch.float32)
    q = q.transpose(1, 2)
    expected = theirs(q, cos=cos, sin=sin, unsqueeze_dim=2)
    assert torch.equal(rope._Rotation(theirs)(q, cos=cos, sin=sin, unsqueeze_dim=2), expected)
