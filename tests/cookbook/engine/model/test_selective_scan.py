"""Tests the scan of Mamba with its own backward pass against that of transformers under autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from cookbook.engine.model.selective_scan import selective_scan

R, C, N = 3, 5, 4


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_outputs_states_and_gradients_equal_those_of_the_loop(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    random = partial(torch.randn, generator=generator)
    inputs = {
        "hidden_states": random(R, C, num_tokens),
        "dt": random(R, C, num_tokens),
        "A": -random(C, N).exp(),
        "B": random(R, N, num_tokens),
        "C": random(R, N, num_tokens),
        "D": random(C),
        "z": random(R, C, num_tokens),
        "delta_bias": random(C),
    }
    weights_RCT, weights_RCN = random(R, C, num_tokens), random(R, C, N)
    for each in inputs.values():
        each.requires_grad_()

    def run(scan: object) -> list[Tensor]:
        assert callable(scan)
        out_RCT, last_RCN = scan(**inputs, delta_softplus=True, return_last_state=True)
        loss = (weights_RCT * out_RCT).sum() + (weights_RCN * last_RCN).sum()
        return [out_RCT, last_RCN, *torch.autograd.grad(loss, list(inputs.values()))]

    for found, expected in zip(run(selective_scan), run(mamba_selective_scan), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_scan_continues_from_a_state_as_one_over_all_tokens() -> None:
    """The state carries gradients from the second half to the first."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    x, dt, B, C_RNT = random(R, C, 40), random(R, C, 40).exp(), random(R, N, 40), random(R, N, 40)
    A, weights_RCT = -random(C, N).exp(), random(R, C, 40)
    inputs = [each.requires_grad_() for each in (x, dt, A, B, C_RNT)]
    whole = selective_scan(*inputs)

    def part(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        given = x[..., tokens], dt[..., tokens], A, B[..., tokens], C_RNT[..., tokens]
        found: tuple[Tensor, Tensor] = selective_scan(*given, return_last_state=True, initial_state=state)
        return found

    first, state = part(slice(0, 23), None)
    second, _ = part(slice(23, 40), state)
    of_whole = torch.autograd.grad((weights_RCT * whole).sum(), inputs)
    joined = torch.cat([first, second], dim=-1)
    of_parts = torch.autograd.grad((weights_RCT * joined).sum(), inputs)
    for found, expected in zip((joined, *of_parts), (whole, *of_whole), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
