"""Compares the grouped LoRA of a layer of experts with PEFT's, which adds B A to all experts' weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from cookbook.engine.model import expert_lora, stacked_4bit
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.stacked_4bit import StackedIn4Bits
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import AdamParams, LoraConfig

NUM_EXPERTS, HIDDEN, INNER, TOP_K, RANK = 5, 16, 8, 2, 3


class Settings:
    _experts_implementation = "grouped_mm"


def experts_class(**flags: bool) -> Any:
    """Returns a class of experts with transposed weights, biases, no gate or a last norm."""
    gated = flags.get("has_gate", True)
    outputs = 2 * INNER if gated else INNER

    @use_experts_implementation(**flags)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = NUM_EXPERTS
            first, second = (NUM_EXPERTS, outputs, HIDDEN), (NUM_EXPERTS, HIDDEN, INNER)
            if flags.get("is_transposed"):
                first, second = (NUM_EXPERTS, HIDDEN, outputs), (NUM_EXPERTS, INNER, HIDDEN)
            name = "gate_up_proj" if gated else "up_proj"
            self.register_parameter(name, nn.Parameter(torch.randn(first) * 0.3))
            self.down_proj = nn.Parameter(torch.randn(second) * 0.3)
            if flags.get("has_bias"):
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(NUM_EXPERTS, outputs)))
                self.down_proj_bias = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(HIDDEN)
            self.act_fn = nn.SiLU()

        def forward(self, *inputs: Tensor) -> Tensor:
            raise NotImplementedError("transformers computes it")

    return Experts


class Layer(nn.Module):
    def __init__(self, **flags: bool) -> None:
        super().__init__()
        self.experts = experts_class(**flags)(Settings())

    def forward(self, tokens_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        out: Tensor = self.experts(tokens_ND, chosen_NK, weights_NK)
        return out


def peft_layer(seed: int, parameters: list[str], dtype: torch.dtype = torch.float32, **flags: bool) -> Any:
    torch.manual_seed(seed)
    config = PeftLoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=parameters, init_lora_weights=False
    )
    model = PeftModel(Layer(**flags).to(dtype).requires_grad_(False), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def inputs_of(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, their experts (never the last one, which gets no rows) and the weights of those."""
    generator = torch.Generator().manual_seed(1)
    tokens_ND = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    scores_NE = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
    weights_NK, chosen_NK = scores_NE.topk(TOP_K)
    return tokens_ND, chosen_NK, weights_NK.to(dtype).requires_grad_()


def results_of(model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns the result and the gradients of a squared loss."""
    tokens_ND, chosen_NK, weights_NK = (one.detach().clone() for one in inputs)
    tokens_ND.requires_grad_()
    weights_NK.requires_grad_()
    out_ND = model(tokens_ND, chosen_NK, weights_NK)
    out_ND.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert tokens_ND.grad is not None
    assert weights_NK.grad is not None
    return {"out": out_ND.detach(), "tokens": tokens_ND.grad, "weights": weights_NK.grad, **gradients}


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ({}, BOTH),
        ({}, BOTH[:1]),
        ({}, BOTH[1:]),
        ({"is_transposed": True}, BOTH),
        ({"is_transposed": True, "has_bias": True}, BOTH),
        ({"has_bias": True}, BOTH),
        ({"has_gate": False}, ["experts.up_proj", "experts.down_proj"]),
        ({"has_post_expert_norm": True}, BOTH),
    ],
)
def test_a_grouped_lora_has_the_results_and_gradients_of_peft(
    flags: dict[str, bool], parameters: list[str]
) -> None:
    inputs = inputs_of(17)
    expected = results_of(peft_layer(0, parameters, **flags), inputs)
    model = peft_layer(0, parameters, **flags)
    expert_lora.fuse(model)
    found = results_of(model, inputs)
    assert found.keys() == expected.keys()
    assert sum("lora_" in name for name in found) == 2 * len(parameters)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def other_experts(name: str) -> tuple[Any, tuple[Any, ...], list[str]]:
    """Returns experts that do not describe themselves, their inputs, and the names of their weights."""
    tokens_ND, chosen_NK, weights_NK = inputs_of(17)
    if name == "jetmoe":
        experts: Any = JetMoeParallelExperts(NUM_EXPERTS, HIDDEN, INNER)
        return experts, (tokens_ND, [3, 0, 9, 4, 1]), ["weight"]
    sizes = {"hidden_size": HIDDEN, "hidden_act": "silu", "num_local_experts": NUM_EXPERTS}
    if name == "llama4":
        experts = Llama4TextExperts(SimpleNamespace(**sizes, intermediate_size=INNER))
        return experts, (tokens_ND[:15],), ["down_proj", "gate_up_proj"]
    if name == "step3p7":
        experts = Step3p7Experts(SimpleNamespace(**sizes, moe_intermediate_size=INNER), swiglu_limit=0.5)
    else:
        others = {"expert_ffn_hidden_size": INNER, "n_routed_experts": NUM_EXPERTS - 2, "zero_expert_num": 3}
        experts = LongcatFlashExperts(SimpleNamespace(**sizes, **others))
    return experts, (tokens_ND, chosen_NK, weights_NK), ["down_proj", "gate_up_proj"]


class Around(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        for weight in experts.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, *inputs: Any) -> Tensor:
        out: Tensor = self.experts(*inputs)
        return out


def adapted(experts: nn.Module, weights: list[str]) -> Any:
    torch.manual_seed(0)
    config = PeftLoraConfig(
        r=RANK,
        target_modules=[],
        target_parameters=[f"experts.{weight}" for weight in weights],
        init_lora_weights=False,
    )
    return PeftModel(Around(experts).requires_grad_(False), config)


@pytest.mark.parametrize("is_in_4_bits", [False, True])
@pytest.mark.parametrize("name", ["jetmoe", "llama4", "longcat", "step3p7"])
def test_experts_that_do_not_describe_themselves_have_the_results_and_gradients_of_peft(
    name: str, is_in_4_bits: bool
) -> None:
    results = []
    for is_ours in (False, True):
        experts, inputs, weights = other_experts(name)
        model = adapted(experts, weights)
        for weight in weights if is_in_4_bits else ():
            stacked = getattr(experts, weight).data
            values: Any = stacked_4bit.quantize(
                stacked, stacked.dtype, quant_type="nf4", compress_statistics=True
            )
            if not is_ours:
                values = torch.stack([rounded(matrix) for matrix in stacked])
                values = nn.Parameter(values, requires_grad=False)
            setattr(experts, weight, values)
        if is_ours:
            expert_lora.run_quantized(model)
            expert_lora.fuse(model)
        floats = [
            i.detach().requires_grad_() for i in inputs if isinstance(i, Tensor) and i.is_floating_point()
        ]
        others = iter(floats)
        inputs = tuple(next(others) if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs)
        out = model(*inputs)
        out.square().sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        assert len(named) == 2 * len(weights)
        results.append({"out": out.detach(), **{str(i): x.grad for i, x in enumerate(floats)}, **named})
        assert any("forward" in vars(module) for module in model.modules()) == is_ours
    expected, found = results
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=key
        )


@pytest.mark.parametrize("name", ["step3p7", "longcat_flash", "llama4", "jetmoe"])
def test_frozen_experts_with_a_loop_of_their_own_run_in_groups(
    name: str,
) -> None:
    """Trained ones get their gradients from the loop. Llama 4 and JetMoE have none."""
    experts, inputs, _ = other_experts(name)
    torch.manual_seed(0)
    model = Around(experts).requires_grad_(False)
    own_class: Any = type(experts)
    loops: list[str] = []
    expected = model(*inputs)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), inputs[0])
    model.requires_grad_(True)
    expected_weight, *_ = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))

    class Counted(own_class):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            loops.append(name)
            out: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return out

    experts.__class__ = Counted if name in ("step3p7", "longcat_flash") else own_class
    expert_lora.run_grouped(model)
    assert (type(experts) is own_class) == (name in ("llama4", "jetmoe"))
    if type(experts) is own_class:
        return
    loops.clear()
    model.requires_grad_(False)
    found = model(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (found_grad,) = torch.autograd.grad(found.square().sum(), inputs[0])
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-4, atol=1e-4)
    assert not loops
    model.requires_grad_(True)
    found_weight, *_ = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found_weight, expected_weight)
    assert loops == [name]


class SquaredExperts(Step3p7Experts):
    """Has the weights of other experts, and computes something else."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states, top_k_index, top_k_weights**2)
        return out


def test_experts_that_compute_something_else_are_left_to_peft() -> None:
    sizes = {"hidden_size": HIDDEN, "hidden_act": "silu", "num_local_experts": NUM_EXPERTS}
    experts = SquaredExperts(SimpleNamespace(**sizes, moe_intermediate_size=INNER))
    model = adapted(experts, ["down_proj", "gate_up_proj"])
    expert_lora.fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(
        name in results_of(model, inputs_of(9)) for name, _ in model.named_parameters() if "lora" in name
    )


def test_bfloat16_results_are_as_accurate_as_those_of_peft() -> None:
    inputs, exact = inputs_of(64, torch.bfloat16), inputs_of(64, torch.bfloat16)
    truth = results_of(
        peft_layer(0, BOTH, torch.bfloat16).float(),
        (exact[0].float(), exact[1], exact[2].float()),
    )
    of_peft = results_of(peft_layer(0, BOTH, torch.bfloat16), inputs)
    model = peft_layer(0, BOTH, torch.bfloat16)
    expert_lora.fuse(model)
    found = results_of(model, inputs)
    for name, value in truth.items():
        assert (found[name] - value).norm() < 1.5 * (of_peft[name] - value).norm(), name


def test_autograd_keeps_routed_rows_of_the_first_product_and_of_the_rank_only() -> None:
    model, (tokens_ND, chosen_NK, weights_NK) = peft_layer(0, BOTH), inputs_of(64)
    expert_lora.fuse(model)
    kept: dict[int, int] = {}
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens_ND, chosen_NK, weights_NK)
    num_rows = 64 * TOP_K
    inputs = 4 * 64 * (HIDDEN + TOP_K)
    order = 2 * 8 * num_rows
    assert sum(kept.values()) == inputs + order + 4 * num_rows * (2 * INNER + 2 * RANK)
    out.sum().backward()


def test_no_gradient_reaches_the_weights_of_experts_without_rows() -> None:
    model = peft_layer(0, BOTH)
    expert_lora.fuse(model)
    for name, gradient in results_of(model, inputs_of(9)).items():
        if "lora_A" in name:
            by_expert = gradient.view(NUM_EXPERTS, RANK, -1)
            assert by_expert[-1].abs().max() == 0
            assert by_expert[0].abs().max() > 0


@pytest.mark.slow
def test_a_snapshot_and_a_second_adapter_leave_the_first_as_it_was(
    tmp_path: Path, make_trainer: Any, make_data: Any
) -> None:
    base = BaseModel(str(families.save("mixtral", tmp_path / "model")), EngineOptions(device="cpu"))
    first: Trainer = make_trainer(base)
    data = make_data(300, [20, 9])
    before = first.forward(first.check(data, "cross_entropy", None)).output().metrics["loss:sum"]
    snapshot = base.adapters.clone(first.adapter)
    second = Trainer(base, LoraConfig(rank=2, seed=3))
    second.forward_backward(second.check(data, "cross_entropy", None))
    second.optim_step(AdamParams(learning_rate=0.1))
    attention_only = Trainer(base, LoraConfig(rank=4, train_mlp=False, train_unembed=False))
    attention_only.forward(attention_only.check(data, "cross_entropy", None))
    assert first.forward(first.check(data, "cross_entropy", None)).output().metrics["loss:sum"] == before

    first.forward_backward(first.check(data, "cross_entropy", None))
    first.optim_step(AdamParams(learning_rate=0.1))
    assert first.forward(first.check(data, "cross_entropy", None)).output().metrics["loss:sum"] != before
    for name, weight in snapshot.weights.items():
        assert "experts" not in name or not torch.equal(weight, first.adapter.weights[name])
    for adapter in (attention_only.adapter, second.adapter, snapshot, first.adapter):
        base.adapters.remove(adapter)
    assert not any("lora" in name for name, _ in base.model.named_parameters())


ON = {
    "first": ("gate_up_proj", "q_proj"),
    "second": ("down_proj",),
    "both": ("gate_up_proj", "down_proj"),
    "none": ("q_proj",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [("second", "first"), ("first", "second", "both"), ("none", "second", "both")]
)
def test_adapters_on_other_weights_of_the_same_experts_are_as_they_are_alone(
    order: tuple[str, ...], tmp_path: Path, make_data: Any
) -> None:
    folder, data = families.save("mixtral", tmp_path / "model"), make_data(300, [20, 9])

    def trained(base: BaseModel, names: tuple[str, ...]) -> dict[str, Trainer]:
        trainers = {name: Trainer(base, LoraConfig(rank=2, seed=3, targets=ON[name])) for name in names}
        for trainer in 2 * [*trainers.values()]:
            trainer.forward_backward(trainer.check(data, "cross_entropy", None))
            trainer.optim_step(AdamParams(learning_rate=0.1))
        return trainers

    options = EngineOptions(device="cpu")
    for name, trainer in trained(BaseModel(str(folder), options), order).items():
        alone = trained(BaseModel(str(folder), options), (name,))[name].adapter.weights
        assert trainer.adapter.weights.keys() == alone.keys()
        assert all(torch.equal(weight, alone[key]) for key, weight in trainer.adapter.weights.items())
        (tmp_path / name).mkdir()
        trainer.base.adapters.write(trainer.adapter, tmp_path / name)
        model = PeftModel.from_pretrained(families.make("mixtral"), str(tmp_path / name))
        read = get_peft_model_state_dict(model)
        assert read.keys() == alone.keys()
        assert all(torch.equal(weight, alone[key]) for key, weight in read.items())


def test_dropout_on_experts_is_refused(tmp_path: Path) -> None:
    base = BaseModel(str(families.save("mixtral", tmp_path / "model")), EngineOptions(device="cpu"))
    with pytest.raises(ConfigError, match=r"lora_dropout=0.1 is not supported on the stacked weights"):
        Trainer(base, LoraConfig(rank=2, dropout=0.1))
    Trainer(base, LoraConfig(rank=2, dropout=0.1, train_mlp=False))


def rounded(weight: Tensor) -> Tensor:
    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


def quantized_layer(**flags: bool) -> tuple[Any, Any]:
    """Returns a layer of experts with a LoRA in 4 bits, and one with the rounded weights."""
    layers = [peft_layer(0, BOTH, **flags) for _ in range(2)]
    for layer in layers:
        experts = next(m for m in layer.modules() if hasattr(m, "has_gate") and not hasattr(m, "lora_A"))
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).data
            value = stacked_4bit.quantize(weight, weight.dtype, quant_type="nf4", compress_statistics=True)
            if layer is layers[1]:
                value = nn.Parameter(torch.stack([rounded(matrix) for matrix in weight]), requires_grad=False)
            setattr(experts, name, value)
        expert_lora.run_quantized(layer)
        expert_lora.fuse(layer)
    return layers[0], layers[1]


@pytest.mark.parametrize("flags", [{}, {"is_transposed": True, "has_bias": True}])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_layer_has_the_results_of_rounded_weights_and_reads_only_experts_with_rows(
    flags: dict[str, bool], is_on: bool
) -> None:
    layer, expected = quantized_layer(**flags)
    for weight in layer.parameters():
        if isinstance(weight, StackedIn4Bits):
            weight.states[NUM_EXPERTS - 1] = None  # reading it would fail
    if is_on:
        found, expected = results_of(layer, inputs_of(64)), results_of(expected, inputs_of(64))
    else:
        with layer.disable_adapter(), expected.disable_adapter():
            found, expected = results_of(layer, inputs_of(64)), results_of(expected, inputs_of(64))
    assert found.keys() == expected.keys()
    assert any("lora" in name for name in found) == is_on
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("is_on", [True, False])
def test_autograd_keeps_no_dequantised_weights(is_on: bool) -> None:
    layer, rounded_layer = quantized_layer()
    kept: list[int] = []
    for one in (layer, rounded_layer):
        inputs = inputs_of(64)
        held = {w.data_ptr() for w in one.parameters() if not isinstance(w, StackedIn4Bits)}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, held: set[int] = held, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in held:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        if not is_on:
            one.base_model.disable_adapter_layers()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = one(*inputs)
        kept.append(sum(sizes.values()))
        out.sum().backward()
    assert kept[0] <= kept[1]
