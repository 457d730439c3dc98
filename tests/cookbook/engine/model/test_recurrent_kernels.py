"""Tests of the faster torch functions for sampling, against those of transformers.

Shape suffixes: R rows, C channels, K kernel size of a convolution, H heads, G groups of heads, D size of a
head, N size of a state.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cookbook.engine.model.recurrent_kernels import _FUNCTIONS, SamplingFunctions

R, C, H, G, D, N = 3, 12, 6, 2, 5, 7


def family(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def steps(
    function: Callable[..., Any], calls: list[dict[str, Any]], state: Tensor, name: str
) -> list[Tensor]:
    """Returns the outputs of several tokens, each with the state of the one before, and the last state."""
    outs, state = [], state.clone()
    for call in calls:
        found = function(**call, **{name: state})
        if isinstance(found, tuple):
            found, state = found
        outs.append(found)
    return [*outs, state]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [None, random(C)], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_convolution_moves_on_by_a_token(bias: Tensor | None, activation: str | None) -> None:
    shared = {"weight": random(C, 4), "bias": bias, "activation": activation}
    calls = [{"hidden_states": random(R, C, 1), **shared} for _ in range(6)]
    expected = steps(family("lfm2").causal_conv1d_update, calls, (state := random(R, C, 4)), "conv_state")
    assert_equal(steps(_FUNCTIONS["causal_conv1d_update"], calls, state, "conv_state"), expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("name", "module", "num_key_heads", "decay_shape"),
    [
        ("torch_recurrent_gated_delta_rule", "qwen3_5", H, (R, 1, H)),
        ("torch_recurrent_gated_delta_rule", "olmo_hybrid", G, (R, 1, H)),
        ("recurrent_kimi_delta_attention", "kimi_linear", H, (R, 1, H, N)),
    ],
)
def test_a_delta_rule_moves_on_by_a_token(
    name: str, module: str, num_key_heads: int, decay_shape: tuple[int, ...], norm: bool
) -> None:
    calls = [
        {
            "query": random(R, 1, num_key_heads, N),
            "key": random(R, 1, num_key_heads, N) / 4,
            "value": random(R, 1, 2 * H, D)[:, :, ::2],
            "g": -torch.rand(decay_shape),
            "beta": torch.rand(R, 1, H),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": norm,
        }
        for _ in range(4)
    ]
    state = random(R, H, N, D)
    expected = steps(getattr(family(module), name), calls, state, "initial_state")
    assert_equal(steps(_FUNCTIONS[name], calls, state, "initial_state"), expected)


def mamba2_calls(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    shared = {
        "A": -torch.rand(H)[:, None, None].expand(-1, D, N),
        "D": random(H, dtype=dtype)[:, None].expand(-1, D),
        "dt_bias": random(H, dtype=dtype)[:, None].expand(-1, D),
        "dt_softplus": True,
    }
    return [
        {
            "hidden_states": random(R, H, D, dtype=dtype),
            "dt": random(R, 1, H, dtype=dtype).transpose(1, 2).expand(-1, -1, D),
            "B": random(R, G, N, dtype=dtype),
            "C": random(R, G, N, dtype=dtype),
            "z": random(R, H, D, dtype=dtype),
            **shared,
        }
        for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_mamba_2_moves_on_by_a_token(dtype: torch.dtype, tolerance: float) -> None:
    calls, state = mamba2_calls(dtype), random(R, H, D, N)
    expected = steps(family("bamba").mamba2_selective_state_update, calls, state, "state")
    found = steps(_FUNCTIONS["mamba2_selective_state_update"], calls, state, "state")
    assert_equal(found, expected, tolerance)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mamba_moves_on_by_a_token(state_dtype: torch.dtype) -> None:
    shared = {"A": -torch.rand(C, N), "D": random(C), "dt_bias": random(C), "dt_softplus": True}
    calls = [
        {
            "hidden_states": random(R, C),
            "dt": random(R, C),
            "B": random(R, N),
            "C": random(R, N),
            "z": random(R, C),
            **shared,
        }
        for _ in range(4)
    ]
    state = random(R, 2, C, N, dtype=state_dtype)[:, 1]  # a slice, as Zamba passes it
    expected = steps(family("jamba").mamba_selective_state_update, calls, state, "state")
    tolerance = 1e-5 if state_dtype == torch.float32 else 0.05
    assert_equal(
        steps(_FUNCTIONS["mamba_selective_state_update"], calls, state, "state"), expected, tolerance
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 32, 77])
@pytest.mark.parametrize(
    ("name", "module", "num_key_heads", "channels"),
    [
        ("torch_chunk_gated_delta_rule", "qwen3_5", G, ()),
        ("chunk_kimi_delta_attention", "kimi_linear", H, (N,)),
    ],
)
def test_a_delta_rule_runs_over_texts(
    name: str, module: str, num_key_heads: int, channels: tuple[int, ...], num_tokens: int, norm: bool
) -> None:
    call = {
        "query": random(R, num_tokens, num_key_heads, N),
        "key": random(R, num_tokens, num_key_heads, N) / 4,
        "value": random(R, num_tokens, 2 * H, D)[:, :, ::2],
        "g": -3 * torch.rand(R, num_tokens, H, *channels) ** 8,
        "beta": torch.rand(R, num_tokens, H),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": norm,
    }
    for initial_state in (None, random(R, H, N, D)):
        given = call | {"initial_state": initial_state}
        assert_equal(_FUNCTIONS[name](**given), getattr(family(module), name)(**given))


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_mamba_runs_over_texts(num_tokens: int) -> None:
    call = {
        "hidden_states": random(R, C, num_tokens),
        "dt": random(R, C, num_tokens),
        "A": -torch.rand(C, N),
        "B": random(R, N, num_tokens),
        "C": random(R, N, num_tokens),
        "D": random(C),
        "z": random(R, C, num_tokens),
        "delta_bias": random(C),
        "delta_softplus": True,
    }
    for with_state in ({"return_last_state": True}, {}):
        expected = family("jamba").mamba_selective_scan(**call, **with_state)
        with functions_of_mamba().in_use():
            found = family("jamba").mamba_selective_scan(**call, **with_state)
        assert_equal(*((x if with_state else [x]) for x in (found, expected)))


def functions_of_mamba() -> SamplingFunctions:
    class Mixer(nn.Module):
        pass

    Mixer.__module__ = family("jamba").__name__
    return SamplingFunctions(Mixer())


@pytest.mark.parametrize("num_heads", [None, 2])
def test_a_scan_of_mamba_continues_a_state(num_heads: int | None) -> None:
    """Zamba has a scan for each head, of which each continues its own."""
    scan, functions = family("jamba").mamba_selective_scan, functions_of_mamba()
    calls = [
        {
            "hidden_states": random(R, C, 9),
            "dt": random(R, C, 9),
            "B": random(R, N, 9),
            "A": -torch.rand(C, N),
            "C": random(R, N, 9),
            "delta_softplus": True,
        }
        for _ in range(num_heads or 1)
    ]
    parts = [
        [
            {k: v[..., part] if k not in ("A", "delta_softplus") else v for k, v in call.items()}
            for call in calls
        ]
        for part in (slice(None, 4), slice(4, None))
    ]
    whole = [scan(**call, return_last_state=True) for call in calls]
    states = [scan(**call, return_last_state=True)[1] for call in parts[0]]
    functions.continue_from(torch.stack(states, 1) if num_heads else states[0])
    with functions.in_use():
        found = [family("jamba").mamba_selective_scan(**call, return_last_state=True) for call in parts[1]]
    for (out, last), (expected, expected_last) in zip(found, whole, strict=True):
        assert_equal([out, last], [expected[..., 4:], expected_last])


def test_a_step_of_mamba_2_bounds_its_time_step_as_the_scan_does() -> None:
    class Mixer(nn.Module):
        time_step_limit = (0.5, 0.7)

    Mixer.__module__ = family("zamba2").__name__
    (call, *_), state = mamba2_calls(), random(R, H, D, N)
    expected, expected_state = family("zamba2").mamba2_chunk_scan(
        **{name: call[name][:, None] for name in ("hidden_states", "B", "C")},
        dt=call["dt"][:, None, :, 0],
        A=call["A"][:, 0, 0],
        D=call["D"][:, 0],
        dt_bias=call["dt_bias"][:, 0],
        dt_softplus=True,
        dt_limit=Mixer.time_step_limit,
        chunk_size=1,
        initial_states=state,
        return_final_states=True,
    )
    with SamplingFunctions(Mixer()).in_use():
        found = family("zamba2").mamba2_selective_state_update(state, **(call | {"z": None}))
    assert_equal([found, state], [expected[:, 0], expected_state])


def test_transformers_has_its_own_functions_again_after_a_pass_that_fails() -> None:
    module = family("qwen3_5")
    theirs = {name: vars(module)[name] for name in _FUNCTIONS if name in vars(module)}
    assert theirs
    mixer = module.Qwen3_5GatedDeltaNet.__new__(module.Qwen3_5GatedDeltaNet)
    nn.Module.__init__(mixer)
    functions = SamplingFunctions(mixer)

    def fail() -> None:
        with functions.in_use():
            assert all(vars(module)[name] is not function for name, function in theirs.items())
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert all(vars(module)[name] is function for name, function in theirs.items())
