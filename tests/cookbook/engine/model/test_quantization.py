"""Compares a 4-bit base with plain transformers and PEFT in 4 bits, and with its dequantised weights."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from outside_world import remove_package
from quantized import (
    DATA,
    SIZES,
    answer,
    assert_same,
    gradients_after_a_pass,
    make_trainer,
    plain_gradients,
    rounded_model,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from cookbook.clients.service import ServiceClient
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.expert_forms import num_flat_experts
from cookbook.engine.model.packing import TokenSequence, pack
from cookbook.engine.model.stacked_4bit import StackedIn4Bits
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.requests import sample_request, score_request
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import AdamParams, LoraConfig, SamplingParams

NF4 = EngineOptions(device="cpu", quantization="nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model_folder: Any) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("quantized") / "qwen3", **SIZES))


def in_4_bits(folder: str, compute_dtype: torch.dtype = torch.float32) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.cases(2)
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("lora", [{}, {"train_mlp": False, "train_unembed": False}])
def test_gradients_equal_plain_transformers_and_peft_on_the_same_4_bits(
    folder: str, tmp_path: Path, lora: dict[str, bool], checkpointing: Any
) -> None:
    options = EngineOptions(device="cpu", quantization="nf4", gradient_checkpointing=checkpointing)
    trainer = make_trainer(folder, options, **lora)
    trainer.save(tmp_path / "adapter", with_optimizer=False)

    assert trainer.base.is_packed
    assert_same(gradients_after_a_pass(trainer), plain_gradients(in_4_bits(folder), tmp_path / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_gradients_equal_those_of_a_model_with_the_dequantised_weights(
    family: str, make_model_folder: Any, tmp_path: Path
) -> None:
    folder = str(make_model_folder(tmp_path / "model", family, **SIZES))
    unpacked = in_4_bits(folder).dequantize()
    trainer = make_trainer(folder, NF4)
    trainer.save(tmp_path / "adapter", with_optimizer=False)

    assert_same(gradients_after_a_pass(trainer), plain_gradients(unpacked, tmp_path / "adapter"))


def test_linear_layers_take_half_a_byte_per_weight_and_embeddings_are_unchanged(folder: str) -> None:
    model = BaseModel(folder, NF4).model
    layers = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        num_bytes = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        assert num_bytes < 0.52 * layer.in_features * layer.out_features
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert end.weight.dtype == torch.float32
        assert end.weight.shape == (model.config.vocab_size, 64)


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_a_head_inside_the_decoder_is_not_quantised(quantization: Any, tmp_path: Path) -> None:
    folder = families.save("nemotron_h_omni", tmp_path)
    base = BaseModel(str(folder), EngineOptions(device="cpu", quantization=quantization))
    head = base.model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.dtype == torch.float32
    assert any(weight.dtype == torch.uint8 for weight in base.model.parameters())


@pytest.mark.slow
def test_a_dequantised_weight_is_freed_after_its_product(folder: str) -> None:
    trainer = make_trainer(folder, NF4)
    tokens_T = np.arange(13)
    batch = pack([TokenSequence(tokens_T, tokens_T, np.ones(13, np.float32), {})], torch.device("cpu"), True)
    layers = [m for m in trainer.base.model.model.modules() if hasattr(m, "quant_state")]
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    before = tensors_of(shapes)
    with trainer.base.adapters.using(trainer.adapter):
        hidden_ND = trainer.base.hidden_of(
            batch.tokens_1N, batch.positions_1N, batch.attention
        )  # the graph keeps everything that the backward pass needs

    assert hidden_ND.requires_grad
    assert len(shapes) == 4
    assert len(tensors_of(shapes)) == len(before)


def tensors_of(shapes: set[tuple[int, int]]) -> list[torch.Tensor]:
    return [x for x in gc.get_objects() if type(x) is torch.Tensor and tuple(x.shape) in shapes]


@pytest.mark.slow
def test_a_repeated_pass_is_bit_identical_whatever_was_sampled_in_between(folder: str) -> None:
    trainer = make_trainer(folder, NF4)
    once = gradients_after_a_pass(trainer)
    for adapter in (trainer.adapter, None):
        request = sample_request(trainer.base, [5, 6, 7], 2, SamplingParams(max_tokens=5))
        answer(trainer.base, adapter, request)
    again = gradients_after_a_pass(trainer)
    for name, gradient in once.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("with_adapter", [True, False])
def test_sampled_log_probabilities_equal_a_forward_pass(folder: str, with_adapter: bool) -> None:
    trainer = make_trainer(folder, NF4)
    adapter = trainer.adapter if with_adapter else None
    prompt = [5, 6, 7]
    request = sample_request(trainer.base, prompt, 3, SamplingParams(max_tokens=8, seed=0))
    for sequence in answer(trainer.base, adapter, request).sequences:
        scored = answer(trainer.base, adapter, score_request(trainer.base, prompt + sequence.tokens))
        np.testing.assert_allclose(sequence.logprobs, scored[len(prompt) :], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_goes_down(folder: str, dtype: str) -> None:
    options = EngineOptions(device="cpu", dtype=dtype, quantization="nf4")
    trainer = Trainer(BaseModel(folder, options), LoraConfig(rank=4, seed=0))
    losses = []
    for _ in range(20):
        losses.append(trainer.forward_backward(trainer.check(DATA, "cross_entropy", None)).output().loss)
        trainer.optim_step(AdamParams(learning_rate=1e-2))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_checkpoint_loads_onto_the_full_precision_model(folder: str, tmp_path: Path) -> None:
    trainer = make_trainer(folder, NF4)
    trainer.save(tmp_path / "adapter", with_optimizer=True)

    full = Trainer(BaseModel(folder, EngineOptions(device="cpu")), LoraConfig(rank=4, seed=1))
    full.load(str(tmp_path / "adapter"), with_optimizer=True)

    assert full.adapter.weights.keys() == trainer.adapter.weights.keys()
    for name, weight in trainer.adapter.weights.items():
        assert torch.equal(full.adapter.weights[name], weight), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == folder


@pytest.mark.slow
def test_a_model_published_in_4_bits_is_trained_in_the_dtype_of_the_engine(
    folder: str, tmp_path: Path
) -> None:
    """Such files name a dtype to compute in. The weights are the same."""
    packed = tmp_path / "packed"
    in_4_bits(folder, compute_dtype=torch.bfloat16).save_pretrained(packed)
    for file in Path(folder).glob("tokenizer*"):
        (packed / file.name).write_bytes(file.read_bytes())
    found = gradients_after_a_pass(make_trainer(str(packed), EngineOptions(device="cpu")))
    assert_same(found, gradients_after_a_pass(make_trainer(folder, NF4)))


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_package(monkeypatch, "bitsandbytes")
    with pytest.raises(ConfigError, match=r"not installed. Run: pip install 'sft-cookbook\[qlora\]'"):
        ServiceClient(quantization="nf4")


def test_an_unknown_quantization_is_refused_naming_the_supported_ones() -> None:
    with pytest.raises(ConfigError, match=r"quantization='int4' is not known. Use nf4, fp8, or remove it"):
        ServiceClient(quantization="int4")  # type: ignore[arg-type]


def test_a_model_whose_weights_are_mostly_experts_of_unknown_form_is_refused(tmp_path: Path) -> None:
    folder = families.save("inkling_text", tmp_path / "whole")
    config = AutoConfig.from_pretrained(folder)
    config.n_shared_experts = 64  # which are in three stacked weights
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    service = ServiceClient(device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match=r"Those are [0-9,]+ of the [0-9,]+ weights in the layers of"):
        service.create_lora_training_client(str(folder))


def test_weights_of_towers_do_not_count(tmp_path: Path) -> None:
    """Most weights of this small model are convolutions of its encoder of pictures."""
    made = BaseModel(str(families.save("janus", tmp_path)), NF4, None).model
    assert any(isinstance(module, nn.Conv2d) for module in made.modules())


def test_training_weights_in_4_bits_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="quantization=nf4 is not supported with rank=0"):
        ServiceClient(quantization="nf4").create_lora_training_client(folder, rank=0)


def rounded(weight: Tensor) -> Tensor:
    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [{}, {"train_mlp": False, "train_unembed": False}])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_with_experts_in_4_bits_equal_plain_transformers_and_peft_on_rounded_weights(
    family: str, tmp_path: Path, lora: dict[str, bool]
) -> None:
    folder = str(families.save(family, tmp_path / "model"))
    trainer = make_trainer(folder, NF4, **lora)
    trainer.save(tmp_path / "adapter", with_optimizer=False)
    in_4_bits = [w for w in trainer.base.model.parameters() if isinstance(w, StackedIn4Bits)]
    assert len(in_4_bits) == 2 * trainer.base.model.config.num_hidden_layers

    expected = plain_gradients(rounded_model(folder, rounded), tmp_path / "adapter")
    assert_same(gradients_after_a_pass(trainer), expected)


def test_experts_whose_matrices_are_one_below_the_other_are_held_in_4_bits_and_not_kept_dequantised(
    tmp_path: Path,
) -> None:
    folder = str(families.save("dbrx", tmp_path / "model"))
    trainer = make_trainer(folder, NF4)
    trainer.save(tmp_path / "adapter", with_optimizer=False)
    in_4_bits = [w for w in trainer.base.model.parameters() if isinstance(w, StackedIn4Bits)]
    assert len(in_4_bits) == 3 * trainer.base.model.config.n_layers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    with torch.no_grad():
        for name, module in model.transformer.named_modules():
            if isinstance(module, nn.Linear) and "router" not in name:
                module.weight.copy_(rounded(module.weight))
            if name.endswith("experts.mlp"):
                for weight in module.parameters():
                    for matrix in weight.view(module.moe_num_experts, -1, weight.shape[1]):
                        matrix.copy_(rounded(matrix))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = gradients_after_a_pass(trainer)
    assert_same(found, plain_gradients(model, tmp_path / "adapter"))
    for weight in in_4_bits:
        for expert in range(len(weight.states)):
            matrix = weight.matrix(expert)
            assert not any(torch.equal(each, matrix) or torch.equal(each, matrix.T) for each in kept)


def test_a_router_is_not_taken_for_such_experts() -> None:
    found = {
        name: {type(module).__name__ for module in families.make(name).modules() if num_flat_experts(module)}
        for name in ("dbrx", "minimax_m2", "lfm2_moe")
    }
    assert found == {"dbrx": {"DbrxExpertGLU"}, "minimax_m2": set(), "lfm2_moe": set()}


def test_experts_take_half_a_byte_per_weight_and_are_not_read_as_a_whole(tmp_path: Path) -> None:
    model = BaseModel(str(families.save("mixtral", tmp_path / "model")), NF4).model
    stacked = [weight for weight in model.parameters() if isinstance(weight, StackedIn4Bits)]
    assert len(stacked) == 2 * model.config.num_hidden_layers
    for weight in stacked:
        num_bytes = weight.packed_EB.nbytes + sum(
            state.absmax.nbytes + state.state2.absmax.nbytes for state in weight.states
        )
        assert num_bytes < 0.53 * weight.numel()
    with pytest.raises(TypeError, match="read one expert at a time"):
        stacked[0].sum()
