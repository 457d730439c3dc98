"""Tests that modules with fewer kernels compute what those of transformers do, and that others are left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP

from cookbook.engine.model import fused, kernels

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def make_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=dtype)
        for name, weight in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(weight, 1.0, 0.3)
    return model.eval()


def results_of(model: Any) -> dict[str, torch.Tensor]:
    """Returns the logits and the gradients of all weights."""
    tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize(
    ("family", "num_norms", "num_gated"),
    [
        ("qwen3", 9, 2),
        ("llama", 5, 2),
        ("mistral", 5, 2),
        ("gemma3_text", 0, 2),
        ("phi3", 5, 2),
        ("gpt2", 0, 0),
    ],
)
def test_logits_and_gradients_are_those_of_transformers(family: str, num_norms: int, num_gated: int) -> None:
    plain, other = (make_model(family) for _ in range(2))
    assert fused.install(other) == {"norms": num_norms, "gated products": num_gated}
    found = results_of(other)
    for name, expected in results_of(plain).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_has_the_bits_of_the_plain_operations(activation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(7, 5, 16, generator=generator).to(dtype) for _ in range(3))
    results = []

    def plain(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return kernels.ACTIVATIONS[activation](g) * u

    for product in (
        lambda g, u: fused.gated_product(g, u, activation),
        plain,
        lambda g, u: fused.gated_product_of_halves(torch.cat([g, u], -1), activation),
        lambda g, u: plain(*torch.cat([g, u], -1).chunk(2, -1)),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
        out = product(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for found, expected in (results[:2], results[2:]):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


class NormOfMean(Qwen3RMSNorm):
    """A norm of the same parts with another formula."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class RMSNormOfTwo(nn.Module):
    """A norm of the name that takes a gate too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return hidden_states * gate


class NormWithGate(Qwen3RMSNorm):
    """A norm that is a plain one unless it is given a gate."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states) * (1.0 if gate is None else gate)


@pytest.mark.parametrize("norm", [NormOfMean(8), RMSNormOfTwo(), NormWithGate(8)])
def test_a_norm_of_another_formula_is_left_as_it_is(norm: nn.Module) -> None:
    norm.__class__.__name__ = "SomeRMSNorm"
    forward = type(norm).forward
    assert fused.install(nn.ModuleList([norm])) == {"norms": 0, "gated products": 0}
    assert type(norm).forward is forward


def make_mlp(kind: Any, *inputs: Any, **config: Any) -> nn.Module:
    """Returns an MLP of transformers with large weights, so that limits on its activations are reached."""
    settings = {"hidden_size": 32, "intermediate_size": 64, "hidden_act": "silu", "mlp_bias": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = kind(SimpleNamespace(**{**settings, **config}), *inputs)
        for weight in module.parameters():
            nn.init.normal_(weight, std=5.0)
    return module.requires_grad_(False)


def test_limits_on_what_is_multiplied_are_kept() -> None:
    """DeepSeek V4 limits both factors to 10 in all layers, Step 3.7 to 16 in some, which have one class."""
    step = {"swiglu_limits_shared": [0.0, 16.0]}
    mlps = nn.ModuleList([
        make_mlp(DeepseekV4MLP, swiglu_limit=10.0),
        *(make_mlp(Step3p7MLP, number, **step) for number in range(2)),
    ])  # fmt: skip
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    expected = [mlp(x) for mlp in mlps]
    assert fused.install(mlps)["gated products"] == 1
    for mlp, each in zip(mlps, expected, strict=True):
        torch.testing.assert_close(mlp(x), each)


def test_norms_of_one_class_with_and_without_a_weight_are_told_apart() -> None:
    """Gemma 4 has both."""
    norms = nn.ModuleList([Gemma4RMSNorm(8), Gemma4RMSNorm(8, with_scale=False)])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = [norm(x) for norm in norms]
    assert fused.install(norms)["norms"] == 1
    for norm, each in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm(x), each)


def test_a_replaced_module_keeps_its_class_and_its_state(tmp_path: Any) -> None:
    model = make_model("qwen3")
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    state = model.state_dict()
    fused.install(model)
    assert {name: type(module).__name__ for name, module in model.named_modules()} == names
    assert isinstance(model.model.norm, Qwen3RMSNorm)
    assert model.state_dict().keys() == state.keys()


def test_a_norm_in_another_dtype_than_its_input_keeps_the_dtype_of_the_plain_path() -> None:
    norm = Qwen3RMSNorm(8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = norm(x)
    fused.install(nn.ModuleList([norm]))
    assert torch.equal(norm(x), expected)
    assert norm(x).dtype == torch.float32
