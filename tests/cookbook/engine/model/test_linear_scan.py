"""Tests the recurrence in parallel against that of transformers, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from cookbook.engine.model.linear_scan import rnn_scan, rwkv_scan


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 64])
@pytest.mark.parametrize("has_state", [False, True])
def test_states_and_gradients_equal_those_of_the_loop(num_tokens: int, has_state: bool) -> None:
    loop = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=6, lru_width=6, num_attention_heads=2))
    generator = torch.Generator().manual_seed(num_tokens)
    inputs_BTD = torch.randn(3, num_tokens, 6, generator=generator, requires_grad=True)
    gates_BTD = torch.rand(3, num_tokens, 6, generator=generator, requires_grad=True)
    reset_BT1 = torch.rand(3, num_tokens, 1, generator=generator) < 0.1
    state_BD = torch.randn(3, 6, generator=generator) if has_state else None
    if state_BD is None:
        reset_BT1[:, 0] = True

    def run(scan: object) -> list[Tensor]:
        assert callable(scan)
        states_BTD, last_BD = scan(
            hidden_states=inputs_BTD,
            recurrent_gate=gates_BTD,
            reset=reset_BT1,
            recurrent_states=state_BD,
        )
        weights_BTD = torch.linspace(-1, 2, states_BTD.numel()).view_as(states_BTD)
        loss = (weights_BTD * states_BTD).sum() + last_BD.square().sum()
        gradients = torch.autograd.grad(loss, [inputs_BTD, gates_BTD], allow_unused=True)
        found = [torch.zeros_like(inputs_BTD) if each is None else each for each in gradients]
        return [states_BTD, last_BD, *found]

    for found, expected in zip(run(rnn_scan), run(loop._rnn_scan), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size_of_keys", [1, 30])
@pytest.mark.parametrize("num_tokens", [1, 2, 13, 64])
def test_rwkv_and_its_gradients_equal_those_of_the_loop(num_tokens: int, size_of_keys: int) -> None:
    """Weights are exponentials of the keys, and large ones would overflow."""
    generator = torch.Generator().manual_seed(num_tokens)
    decay_D, first_D = torch.randn(2, 6, generator=generator).unbind()
    key_BTD, value_BTD, weights_BTD = torch.randn(3, 3, num_tokens, 6, generator=generator).unbind()
    inputs = [decay_D, first_D, size_of_keys * key_BTD, value_BTD]
    for each in inputs:
        each.requires_grad_()

    def run(scan: object) -> list[Tensor]:
        assert callable(scan)
        out_BTD, _ = scan(*inputs)
        return [out_BTD, *torch.autograd.grad((weights_BTD * out_BTD).sum(), inputs, materialize_grads=True)]

    ours = partial(rwkv_scan, rwkv_linear_attention_cpu)
    for found, expected in zip(run(ours), run(rwkv_linear_attention_cpu), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
