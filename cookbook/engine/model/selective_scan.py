"""The scan of Mamba for training on a CPU, with a backward pass of its own.

transformers runs it token by token under autograd, which keeps the decays, the inputs and the states of all
tokens, and in the backward pass makes a tensor of zeros of that size for each token. Here the state at the
beginning of each block of tokens is kept, and a block's states are computed again when its gradients are.

Shape suffixes: T tokens, R sequences, C channels, N size of a channel's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cookbook.engine.model.replaced_functions import ReplacedFunctions

_BLOCK_TOKENS = 16


class TrainingFunctions(ReplacedFunctions):
    """The functions of a mixer that have a version here."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__(mixer, ["mamba_selective_scan"], lambda name, theirs: selective_scan)


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    **unused: Any,
) -> Any:
    """Returns the outputs [R, C, T] of `mamba_selective_scan` in transformers 5.23, whose arguments it takes.

    `hidden_states` and `dt` are [R, C, T], A is [C, N], B and C are [R, N, T]. The state before the first
    token is `initial_state` [R, C, N], or zeros. With `return_last_state` the last one is returned too.
    """
    dt = dt.float() if delta_bias is None else dt.float() + delta_bias.float()[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    if initial_state is None:
        initial_state = dt.new_zeros(len(dt), *A.shape)
    token_first = [each.float().permute(2, 0, 1) for each in (hidden_states, dt, B, C)]
    out_TRC, last_RCN = SelectiveScan.apply(*token_first, A.float(), initial_state.float())
    out_RCT = out_TRC.permute(1, 2, 0)
    if D is not None:
        out_RCT = out_RCT + hidden_states * D[:, None]
    if z is not None:
        out_RCT = out_RCT * F.silu(z)
    out_RCT = out_RCT.to(hidden_states.dtype)
    return (out_RCT, last_RCN) if return_last_state else out_RCT


class SelectiveScan(torch.autograd.Function):
    """The states `s[t] = exp(dt[t] A) s[t - 1] + dt[t] x[t] B[t]`, read by C[t], and the last of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TRC: Tensor,
        dt_TRC: Tensor,
        B_TRN: Tensor,
        C_TRN: Tensor,
        A_CN: Tensor,
        state_RCN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out_TRC, firsts = torch.empty_like(dt_TRC), []
        for block in _blocks(len(dt_TRC)):
            firsts.append(state_RCN)
            _, states_TRCN = _states(x_TRC[block], dt_TRC[block], B_TRN[block], A_CN, state_RCN)
            out_TRC[block] = (states_TRCN @ C_TRN[block, ..., None])[..., 0]
            state_RCN = states_TRCN[-1].clone()
        ctx.save_for_backward(x_TRC, dt_TRC, B_TRN, C_TRN, A_CN, *firsts)
        return out_TRC, state_RCN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the states is a recurrence from the last token to the first, with these decays."""
        x_TRC, dt_TRC, B_TRN, C_TRN, A_CN, *firsts = ctx.saved_tensors
        grad_out_TRC, behind_RCN = grads[0], grads[1].clone()
        of_x, of_dt = torch.empty_like(dt_TRC), torch.empty_like(dt_TRC)
        of_B, of_C, of_A = torch.empty_like(B_TRN), torch.empty_like(C_TRN), torch.zeros_like(A_CN)
        for block, first_RCN in reversed(list(zip(_blocks(len(dt_TRC)), firsts, strict=True))):
            x, dt, B = x_TRC[block], dt_TRC[block], B_TRN[block]
            decays_TRCN, states_TRCN = _states(x, dt, B, A_CN, first_RCN)
            grad_out = grad_out_TRC[block]
            of_C[block] = (grad_out[..., None, :] @ states_TRCN)[..., 0, :]
            grads_TRCN = grad_out[..., None] * C_TRN[block, :, None]
            for grad_RCN, decay_RCN in zip(
                reversed(grads_TRCN.unbind()), reversed(decays_TRCN.unbind()), strict=True
            ):
                behind_RCN = torch.mul(grad_RCN.add_(behind_RCN), decay_RCN, out=behind_RCN)
            before_TRCN = torch.cat([first_RCN[None], states_TRCN[:-1]])
            of_exponent = before_TRCN.mul_(decays_TRCN).mul_(grads_TRCN)
            of_A += (of_exponent * dt[..., None]).sum((0, 1))
            of_input = (grads_TRCN @ B[..., None])[..., 0]
            of_B[block] = ((x * dt)[..., None, :] @ grads_TRCN)[..., 0, :]
            of_x[block] = of_input * dt
            of_dt[block] = of_exponent.mul_(A_CN).sum(-1).addcmul_(of_input, x)
        return of_x, of_dt, of_B, of_C, of_A, behind_RCN


def _blocks(num_tokens: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_TOKENS) for start in range(0, num_tokens, _BLOCK_TOKENS))


def _states(
    x_TRC: Tensor, dt_TRC: Tensor, B_TRN: Tensor, A_CN: Tensor, state_RCN: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the decays and the states of a block's tokens, both [T, R, C, N]."""
    decays_TRCN = (dt_TRC[..., None] * A_CN).exp_()
    states_TRCN = (x_TRC * dt_TRC)[..., None] * B_TRN[:, :, None]
    for decay_RCN, next_RCN in zip(decays_TRCN.unbind(), states_TRCN.unbind(), strict=True):
        state_RCN = next_RCN.addcmul_(decay_RCN, state_RCN)
    return decays_TRCN, states_TRCN
