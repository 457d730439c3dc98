"""A linear recurrence over tokens in a logarithmic number of steps.

transformers runs the recurrence of RecurrentGemma token by token, so that its time grows with the length of
the longest sequence of each batch, however few sequences the batch has.

Shape suffixes: B sequences, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_METHOD = "_rnn_scan"


def install(decoder: nn.Module) -> None:
    """Replaces the scan of each layer of `decoder` that has one by `rnn_scan`."""
    for module in decoder.modules():
        if hasattr(module, _METHOD):
            setattr(module, _METHOD, rnn_scan)


def rnn_scan(
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns the states of all tokens [B, T, D] and the last one [B, D], which is in `acc_dtype`.

    The state of a token is its gate times the state before it, or 0 at a reset, plus its input
    (`hidden_states`). `recurrent_states` [B, D] is the state before the first token.
    """
    gate_BTD = (recurrent_gate * ~reset).to(acc_dtype)
    input_BTD = hidden_states.to(acc_dtype)
    if recurrent_states is not None:
        before_BD = gate_BTD[:, 0] * recurrent_states.to(gate_BTD.device)
        input_BTD = torch.cat([input_BTD[:, :1] + before_BD[:, None], input_BTD[:, 1:]], dim=1)
    state_BTD = LinearScan.apply(gate_BTD, input_BTD)
    return state_BTD.to(hidden_states.dtype), state_BTD[:, -1]


class LinearScan(torch.autograd.Function):
    """The states `s[t] = gate[t] * s[t - 1] + input[t]`, with 0 before the first, for tensors [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, gate_BTD: Tensor, input_BTD: Tensor) -> Tensor:
        state_BTD = _scan(gate_BTD, input_BTD)
        ctx.save_for_backward(gate_BTD, state_BTD)
        return state_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the inputs is the same recurrence from the last token to the first."""
        gate_BTD, state_BTD = ctx.saved_tensors
        following_BTD = torch.cat([gate_BTD[:, 1:], torch.zeros_like(gate_BTD[:, :1])], dim=1)
        grad_BTD = _scan(following_BTD.flip(1), grads[0].flip(1)).flip(1)
        before_BTD = torch.cat([torch.zeros_like(state_BTD[:, :1]), state_BTD[:, :-1]], dim=1)
        return grad_BTD * before_BTD, grad_BTD


def _scan(gate_BTD: Tensor, input_BTD: Tensor) -> Tensor:
    """Returns the states. After each step a state covers twice as many tokens (Hillis and Steele, 1986)."""
    length = 1
    while length < input_BTD.shape[1]:
        reached_BTD = input_BTD[:, length:] + gate_BTD[:, length:] * input_BTD[:, :-length]
        input_BTD = torch.cat([input_BTD[:, :length], reached_BTD], dim=1)
        gate_BTD = torch.cat([gate_BTD[:, :length], gate_BTD[:, length:] * gate_BTD[:, :-length]], dim=1)
        length *= 2
    return input_BTD
