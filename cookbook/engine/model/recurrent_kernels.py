"""Faster torch versions of the functions that transformers uses without kernels, for sampling on a CPU.

They take the arguments of the functions that they replace, and their results differ by rounding. They have no
backward pass, but for Mamba's scan: they change tensors in place, a step of one token the state that it gets.
`benchmarks/LOG.md` has the times of both.

Shape suffixes: R rows, T tokens, C channels, K kernel size of a convolution, H heads, G groups of heads that
share B and C of Mamba, D size of a head, N size of a state. In a scan: P tokens of a chunk, M chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cookbook.engine.model.replaced_functions import ReplacedFunctions
from cookbook.engine.model.selective_scan import selective_scan


class SamplingFunctions(ReplacedFunctions):
    """The functions of a mixer that have a faster version here."""

    def __init__(self, mixer: nn.Module) -> None:
        ours = dict(_FUNCTIONS)
        ours["mamba_selective_scan"] = self._scan
        self._states_before: Iterator[Tensor] = iter(())
        if limit := getattr(mixer, "time_step_limit", None):
            ours["mamba2_selective_state_update"] = functools.partial(mamba2_step, dt_limit=tuple(limit))
        super().__init__(mixer, ours, lambda name, theirs: ours[name])

    def continue_from(self, state: Tensor | None) -> None:
        """Sets the state before the next scans of Mamba, which transformers does not pass to them.

        It is [R, C, N], or [R, H, C, N] if there is a scan for each head.
        """
        states = () if state is None else (state,) if state.ndim == 3 else state.unbind(1)
        self._states_before = iter(states)

    def _scan(self, *args: Any, **kwargs: Any) -> Any:
        return selective_scan(*args, **(kwargs | {"initial_state": next(self._states_before, None)}))


def convolution_step(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Returns the output of a short convolution for one more token: [R, C, 1]. Moves the inputs [R, C, K] on.

    `RecurrentStates` holds the inputs of each token together, so K is the outermost axis in memory.
    """
    state_KRC = conv_state.permute(2, 0, 1)
    inputs_KRC = torch.cat([state_KRC, hidden_states.permute(2, 0, 1)])
    state_KRC.copy_(inputs_KRC[1:])
    weight_KC = weight.t().contiguous()
    inputs_KRC = inputs_KRC[-len(weight_KC) :].to(weight.dtype)
    out_RC = inputs_KRC.mul_(weight_KC[:, None]).sum(0)
    if bias is not None:
        out_RC += bias
    if activation is not None:
        out_RC = ACT2FN[activation](out_RC)
    return out_RC.to(hidden_states.dtype)[..., None]


def delta_rule_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Returns the output of a gated delta rule for one more token, [R, 1, H, D], and the state [R, H, N, D].

    The log of the decay is [R, 1, H], or [R, 1, H, N] for each key channel (Kimi). The query reads the old
    state together with the key, because new state = decayed old state + key x change.
    """
    num_rows, _, num_key_heads, state_size = key.shape
    num_heads, head_size = value.shape[2:]
    query_and_key = torch.stack([query[:, 0], key[:, 0]], 2).float()
    if use_qk_l2norm_in_kernel:
        query_and_key *= torch.rsqrt(query_and_key.square().sum(-1, keepdim=True) + 1e-6)
    if num_heads > num_key_heads:
        query_and_key = query_and_key.repeat_interleave(num_heads // num_key_heads, dim=1)
    query_and_key = query_and_key.flatten(0, 1)
    query_1N, key_1N = query_and_key[:, :1], query_and_key[:, 1:]
    state = initial_state.float().view(num_rows * num_heads, state_size, head_size)
    # the axes of all below: R * H, then a vector as a row or a column
    state.mul_(g.float().exp().reshape(num_rows * num_heads, -1, 1))
    read_2D = query_and_key.bmm(state)
    change_1D = value.float().reshape(num_rows * num_heads, 1, head_size) - read_2D[:, 1:]
    change_1D *= beta.float().reshape(num_rows * num_heads, 1, 1)
    state.addcmul_(key_1N.transpose(1, 2), change_1D)
    out_1D = read_2D[:, :1].addcmul_((query_1N * key_1N).sum(-1, keepdim=True), change_1D)
    out = out_1D.mul_(state_size**-0.5).view(num_rows, 1, num_heads, head_size)
    return out.to(query.dtype), state.view(num_rows, num_heads, state_size, head_size)


def mamba2_step(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    dt_limit: tuple[float, float] | None = None,
    **unused: Any,
) -> Tensor:
    """Returns the output of Mamba-2 for one more token, [R, H, D]. Changes the state [R, H, D, N] in place.

    A and the time step are one number for each head, which the caller has expanded to [H, D, N] and [R, H,
    D]. `dt_limit` bounds the time step as in transformers' scan. Its own step ignores the limits, so that
    `generate` differs from the forward pass (Zamba2, Nemotron-H).
    """
    num_rows, num_heads, head_size = hidden_states.shape
    num_groups, state_size = B.shape[1:]
    dt_RH1 = _time_step(dt[..., :1], None if dt_bias is None else dt_bias[:, :1], dt_softplus)
    if dt_limit is not None:
        dt_RH1 = dt_RH1.clamp(*dt_limit)
    new_state = state.float()  # the same tensor in fp32
    new_state.mul_((dt_RH1 * A[:, :1, 0]).exp_()[..., None])
    grouped = num_rows * num_groups, num_heads // num_groups * head_size
    state_of_groups = new_state.view(*grouped, state_size)
    inputs_RHD = hidden_states * dt_RH1
    state_of_groups.addcmul_(inputs_RHD.reshape(*grouped, 1), B.float().reshape(grouped[0], 1, state_size))
    out = state_of_groups.bmm(C.float().reshape(grouped[0], state_size, 1))
    if new_state is not state:
        state.copy_(new_state)
    return _with_skip(out.view(num_rows, num_heads, head_size), hidden_states, D, z)


def mamba_step(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """Returns the output of Mamba for one more token, [R, C]. Changes the state [R, C, N] in place."""
    dt_RC = _time_step(dt, dt_bias, dt_softplus)
    new_state = state.float()  # the same tensor in fp32
    new_state.mul_((dt_RC[..., None] * A).exp_())
    new_state.addcmul_((hidden_states * dt_RC)[..., None], B.float()[:, None])
    out_RC = new_state.bmm(C.float()[..., None])[..., 0]
    if new_state is not state:
        state.copy_(new_state)
    return _with_skip(out_RC, hidden_states, D, z)


def _time_step(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    step = dt.float() if dt_bias is None else dt.float() + dt_bias
    return F.softplus(step) if dt_softplus else step


def _with_skip(out: Tensor, hidden_states: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Returns the output with the inputs that skip the recurrence, gated by z."""
    if D is not None:
        out += hidden_states * D
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)


def delta_rule_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a gated delta rule, [R, T, H, D], and its last state [R, H, N, D].

    The log of the decay is [R, T, H], or [R, T, H, N] for each key channel (Kimi). Chunks are smaller than
    transformers' 64 tokens, because the time within a chunk grows with the square of its size.
    """
    dtype, has_channels = query.dtype, g.ndim == 4
    num_in_chunk = _CHANNEL_CHUNK_TOKENS if has_channels else _CHUNK_TOKENS
    num_rows, num_tokens, _, state_size = key.shape
    num_heads, head_size = value.shape[2:]
    num_padding = -num_tokens % num_in_chunk

    def in_chunks(x_RTHD: Tensor) -> Tensor:
        """Returns a copy [R, H, M, P, D]."""
        padded = F.pad(x_RTHD.float(), (0, 0, 0, 0, 0, num_padding))
        in_order = padded.unflatten(1, (-1, num_in_chunk)).permute(0, 3, 1, 2, 4)
        return in_order.clone(memory_format=torch.contiguous_format)

    query, key, value = in_chunks(query), in_chunks(key), in_chunks(value)
    if use_qk_l2norm_in_kernel:
        query *= torch.rsqrt(query.square().sum(-1, keepdim=True) + 1e-6)
        key *= torch.rsqrt(key.square().sum(-1, keepdim=True) + 1e-6)
    query *= state_size**-0.5
    beta = in_chunks(beta[..., None])
    decay = in_chunks(g if has_channels else g[..., None]).cumsum_(3)
    reads, system = _within_chunks(query, key, decay)
    system *= beta
    if num_heads > key.shape[1]:
        query, key = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (query, key))
    decay_so_far, decay_left = decay.exp(), (decay[:, :, :, -1:] - decay).exp_()
    # Each change to the state depends on those before it in the chunk. Solving for the transpose on the right
    # needs no copy in another layout.
    sides = torch.cat([value * beta, key * decay_so_far * beta], dim=-1)
    solved = torch.linalg.solve_triangular(system.mT, sides.mT, upper=True, left=False, unitriangular=True).mT
    changes, corrections = solved.split([head_size, state_size], dim=-1)
    query *= decay_so_far
    key *= decay_left
    decay_of_chunk = decay_so_far[:, :, :, -1, :, None]
    state = value.new_zeros(num_rows, num_heads, state_size, head_size)
    if initial_state is not None:
        state += initial_state
    out = torch.empty_like(value)
    for chunk in range(value.shape[2]):
        change = changes[:, :, chunk] - corrections[:, :, chunk] @ state
        out[:, :, chunk] = query[:, :, chunk] @ state + reads[:, :, chunk] @ change
        state = (state * decay_of_chunk[:, :, chunk]).add_(key[:, :, chunk].mT @ change)
    return out.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2).to(dtype), state


def _within_chunks(query: Tensor, key: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what each token reads of those up to it in its chunk, and how their keys overlap.

    Both are [R, H, M, P, P]: the product of its query or key with each key, after the decay between the two.
    """
    num_rows, num_key_heads, num_chunks, num_in_chunk, _ = key.shape
    is_later = torch.ones(num_in_chunk, num_in_chunk, dtype=torch.bool).triu_(1)
    if decay.shape[-1] == 1:
        between = (decay - decay.mT).masked_fill_(is_later, -torch.inf).exp_()
        of_key_heads = between.unflatten(1, (num_key_heads, -1))
        reads = (query @ key.mT)[:, :, None] * of_key_heads
        overlaps = of_key_heads.mul_((key @ key.mT)[:, :, None])
        return reads.flatten(1, 2), overlaps.flatten(1, 2)
    products = key.new_empty(num_rows, num_key_heads, num_chunks, num_in_chunk, num_in_chunk, 2)
    for chunk in range(num_chunks):  # one at a time, because each pair of tokens has a decay for each channel
        decay_of_chunk, key_of_chunk = decay[:, :, chunk], key[:, :, chunk]
        between = decay_of_chunk[:, :, :, None] - decay_of_chunk[:, :, None]
        between.masked_fill_(is_later[..., None], -torch.inf).exp_().mul_(key_of_chunk[:, :, None])
        products[:, :, chunk] = between @ torch.stack([query[:, :, chunk], key_of_chunk], dim=-1)
    return products[..., 0], products[..., 1].contiguous()


_CHUNK_TOKENS, _CHANNEL_CHUNK_TOKENS = 32, 16
"""The chunks of a delta rule with a decay for each head and for each channel."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_update": convolution_step,
    "torch_recurrent_gated_delta_rule": delta_rule_step,
    "recurrent_kimi_delta_attention": delta_rule_step,
    "torch_chunk_gated_delta_rule": delta_rule_scan,
    "chunk_kimi_delta_attention": delta_rule_scan,
    "mamba2_selective_state_update": mamba2_step,
    "mamba_selective_state_update": mamba_step,
}
"""By their names in transformers 5.23. A model that has none of these names uses its own functions."""
