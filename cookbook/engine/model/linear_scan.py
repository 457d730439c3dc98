"""A linear recurrence over tokens in a logarithmic number of steps.

transformers runs the recurrences of RecurrentGemma and RWKV token by token, so that their time grows with the
length of the longest sequence of each batch, however few sequences the batch has.

Shape suffixes: B sequences, T tokens, D channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cookbook.engine.model.replaced_functions import ReplacedFunctions

_METHOD = "_rnn_scan"
_CALLED, _REPLACED = "rwkv_linear_attention", "rwkv_linear_attention_cpu"
"""The function of RWKV that the layers call, and the loop that it is without a kernel."""


def install(decoder: nn.Module) -> None:
    """Replaces the scan of each layer of `decoder` that has one by `rnn_scan` or `rwkv_scan`."""
    for module in decoder.modules():
        if hasattr(module, _METHOD):
            setattr(module, _METHOD, rnn_scan)
        forward = getattr(type(module).forward, "__code__", None)
        if forward is not None and _CALLED in forward.co_names:
            module.forward = _with_rwkv_scan(module, module.forward)


def _with_rwkv_scan(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A pass that is computed again for checkpointing goes through here too."""
    functions = ReplacedFunctions(module, [_REPLACED], lambda name, loop: functools.partial(rwkv_scan, loop))

    def scanning(*args: Any, **kwargs: Any) -> Any:
        with functions.in_use():
            return forward(*args, **kwargs)

    return scanning


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


def rwkv_scan(
    loop: Callable[..., Any],
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Tensor, Any]:
    """Returns the attention of RWKV-4 [B, T, D] and None, or with a state what transformers' `loop` returns.

    A token reads the mean of the values up to it. They have the weight exp(key), which decays by
    exp(time_decay) in the logarithm for each token; that of its own is exp(key + time_first). So that no
    weight overflows, the sums up to a token are divided by about the largest weight among them.
    """
    if state is not None or return_state:
        return loop(time_decay, time_first, key, value, state, return_state)
    key_BTD, value_BTD, decay_D = key.float(), value.float(), -time_decay.float().exp()
    with torch.no_grad():  # the mean does not depend on the scale
        times_T1 = torch.arange(key.shape[1], device=key.device)[:, None]
        scale_BTD = (key_BTD - times_T1 * decay_D).cummax(1).values + times_T1 * decay_D
        before_BTD = torch.cat([key_BTD[:, :1] - decay_D, scale_BTD[:, :-1]], dim=1)
        largest_BTD = torch.maximum(before_BTD, key_BTD + time_first)
    gate_BTD = (before_BTD + decay_D - scale_BTD).exp()
    weight_BTD = (key_BTD - scale_BTD).exp()
    sums = LinearScan.apply(
        torch.cat([gate_BTD, gate_BTD], dim=2), torch.cat([weight_BTD * value_BTD, weight_BTD], dim=2)
    )
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    values_BTD, weights_BTD = ((before_BTD - largest_BTD).exp().repeat(1, 1, 2) * sums).chunk(2, dim=2)
    own_BTD = (key_BTD + time_first - largest_BTD).exp()
    mean_BTD = (values_BTD + own_BTD * value_BTD) / (weights_BTD + own_BTD)
    return mean_BTD.to(key.dtype), None


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
