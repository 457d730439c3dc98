"""Layers of one input that run together compute what PEFT's own layers do, each on its own.

They run together on CUDA alone; here they are made to on a CPU.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from cookbook.engine.model import dropout
from cookbook.engine.model.input_groups import noting_groups
from cookbook.engine.model.lora import fuse, unfuse

RANK = 3
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
QKV = ("q_proj", "k_proj", "v_proj")


def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Returns PEFT's model of a family, with random weights in A and B."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=dtype)
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "target_modules": "all-linear"}
        config = LoraConfig(**settings | {"init_lora_weights": False} | options)
        return PeftModel(model, config).eval()


def together(peft_model: Any) -> Any:
    """Returns a copy whose layers of one input run together, also on a CPU."""
    fused = copy.deepcopy(peft_model)
    model = fused.base_model.model
    fuse(model, groups_of(model), groups_run_on=("cpu",))
    return fused


def groups_of(model: Any) -> set[tuple[str, ...]]:
    """Returns the groups that a pass without adapters shows, as at loading."""
    bare = AutoModelForCausalLM.from_config(model.config)
    with noting_groups(bare, bare.get_decoder()) as groups, torch.no_grad():
        bare(TOKENS, use_cache=False)
    return groups


def results_of(model: Any) -> dict[str, Tensor]:
    """Returns the logits, and the gradients of the embeddings and of the adapters."""
    model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(TOKENS, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **found}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        difference = (found[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)
        assert difference < tolerance, name


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


def num_products(run: Callable[[], Any]) -> int:
    with Products() as products:
        run()
    return products.number


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", [3, 2]), ("llama", [3, 2]), ("gemma3_text", [3, 2]), ("olmo2", [3, 2]), ("cohere", [3, 2]),
        ("phi", [3]), ("phi3", []),
    ],
)  # fmt: skip
def test_results_and_gradients_are_those_of_peft(family: str, sizes: list[int]) -> None:
    plain = make(family)
    assert sorted(map(len, groups_of(plain.base_model.model)), reverse=True) == sorted(
        2 * sizes, reverse=True
    )
    fused = together(plain)
    assert_equal(results_of(fused), results_of(plain))
    alone = copy.deepcopy(plain)
    fuse(alone.base_model.model)
    saved = num_products(lambda: results_of(alone)) - num_products(lambda: results_of(fused))
    # A of each layer but one: forward, its gradient, and its product in the gradient of the input
    assert saved == 2 * 3 * sum(size - 1 for size in sizes)


@pytest.mark.parametrize("part", [("q_proj", "v_proj"), ("k_proj",), ("gate_proj", "o_proj")])
def test_adapters_may_be_on_some_layers_of_a_group(part: tuple[str, ...]) -> None:
    plain = make("qwen3", target_modules=list(part))
    assert_equal(results_of(together(plain)), results_of(plain))


def test_ranks_and_scalings_may_differ() -> None:
    plain = make("qwen3", rank_pattern={"q_proj": 5, "up_proj": 1}, alpha_pattern={"k_proj": 1})
    assert_equal(results_of(together(plain)), results_of(plain))


def test_in_bfloat16_the_error_is_that_of_rounding() -> None:
    plain = make("llama", torch.bfloat16)
    exact = results_of(copy.deepcopy(plain).double())
    alone = copy.deepcopy(plain)
    fuse(alone.base_model.model)
    expected, found = results_of(alone), results_of(together(plain))
    errors = [
        sum(float((one[name].double() - truth).norm() / truth.norm()) for name, truth in exact.items())
        for one in (found, expected)
    ]
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.02 * len(exact)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_adapters_of_other_formulas_run_alone(options: dict[str, Any]) -> None:
    plain = make("llama", **options)
    fused = together(plain)
    assert_equal(results_of(fused), results_of(plain))


def test_layers_with_masks_of_dropout_of_their_own_run_alone() -> None:
    plain = make("llama")
    results: list[dict[str, Tensor]] = []
    for fused in (copy.deepcopy(plain), together(plain)):
        keys = dropout.DropoutKeys()
        dropout.install(fused.base_model.model, "default", 0.5, keys)
        if results:
            fuse(fused.base_model.model, groups_of(fused.base_model.model), groups_run_on=("cpu",))
        else:
            fuse(fused.base_model.model)
        fused.train()
        with keys.set_to(torch.arange(TOKENS.numel())):
            results.append(results_of(fused))
    assert_equal(results[1], results[0], tolerance=1e-12)


def test_checkpointed_layers_give_the_same_bits() -> None:
    fused = together(make("qwen3"))
    expected = results_of(fused)
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = results_of(fused.train())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_disabled_adapter_and_another_one_are_not_mixed_up() -> None:
    plain = make("llama")
    with torch.random.fork_rng():
        plain.add_adapter(
            "other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        )
    fused = together(plain)
    for model in (plain, fused):
        model.set_adapter("other")
    assert_equal(results_of(fused), results_of(plain))
    with plain.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        assert torch.equal(fused(TOKENS).logits, plain(TOKENS).logits)


class Changing(nn.Module):
    """Gives its layers one input, or two equal ones, and may not call the second or not use its result."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, how: str = "together") -> Tensor:
        first: Tensor = self.one(x)
        if how == "without the second":
            return first
        second: Tensor = self.two(x.clone() if how == "another tensor" else x)
        return first if how == "second unused" else first * second


@pytest.mark.parametrize("how", ["together", "another tensor", "without the second", "second unused"])
def test_later_passes_may_differ_from_the_trial(how: str) -> None:
    model: Any = Changing()
    with noting_groups(model, model) as groups:
        model(torch.zeros(1, 8))
    assert groups == {("one", "two")}
    plain = PeftModel(model, LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    fused: Any = copy.deepcopy(plain)
    fuse(fused.base_model.model, groups, groups_run_on=("cpu",))
    results = []
    for each in (plain, fused):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = each(x, how=how)
        out.square().sum().backward()
        grads = {name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None}
        results.append({"out": out.detach(), "x": x.grad, **grads})
    assert_equal(results[1], results[0])


def test_layers_that_a_module_calls_differently_from_pass_to_pass_are_no_group() -> None:
    model: Any = Changing()
    with noting_groups(model, model) as groups:
        for how in ("together", "another tensor"):
            model(torch.zeros(1, 8), how)
    assert groups == set()


def test_without_adapters_nothing_of_a_group_is_left() -> None:
    fused = together(make("llama"))
    unfuse(fused.base_model.model)
    assert not any("input_group" in vars(module) for module in fused.modules())
    assert_equal(results_of(fused), results_of(make("llama")))
