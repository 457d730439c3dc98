"""Compares a base in 8 bits with plain transformers and PEFT on weights that were rounded by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
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

from cookbook.clients.service import ServiceClient
from cookbook.engine.model import fp8
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.lora import _LoraLinear
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.requests import sample_request, score_request
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError
from cookbook.types import AdamParams, LoraConfig, PeftSettings, SamplingParams

FP8 = EngineOptions(device="cpu", quantization="fp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model_folder: Any) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("fp8") / "qwen3", **SIZES))


def rounded_number(value: float, scale: float) -> float:
    """Returns the nearest number of 3 bits behind the leading one, and of steps of 2^-9 below 2^-6."""
    in_units = abs(value) / scale
    if in_units == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(in_units)), -6) - 3)
    return math.copysign(round(in_units / step) * step * scale, value)  # ties go to even, as on devices


def rounded(weight_RC: Tensor) -> Tensor:
    """Returns a matrix rounded to float8 and back, number by number."""
    rows = []
    for row in weight_RC.tolist():
        scale = 2.0 ** math.ceil(math.log2(max(map(abs, row)) / 448))
        rows.append([rounded_number(value, scale) for value in row])
    return torch.tensor(rows, dtype=weight_RC.dtype)


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [{}, {"train_mlp": False, "train_unembed": False}])
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt_oss", "qwen2"])
def test_gradients_equal_plain_transformers_and_peft_on_rounded_weights(
    family: str, tmp_path: Path, lora: dict[str, bool]
) -> None:
    folder = str(families.save(family, tmp_path / "model"))
    trainer = make_trainer(folder, FP8, **lora)
    trainer.save(tmp_path / "adapter", with_optimizer=False)
    in_8_bits = [w for w in trainer.base.model.model.parameters() if w.dtype == torch.uint8]
    assert len(in_8_bits) == (6 if family in ("mixtral", "gpt_oss") else 7) * len(trainer.base.decoder.layers)

    assert trainer.base.is_packed
    expected = plain_gradients(rounded_model(folder, rounded), tmp_path / "adapter")
    assert_same(gradients_after_a_pass(trainer), expected)


def test_log_probabilities_are_those_of_the_rounded_weights(folder: str) -> None:
    base = BaseModel(folder, FP8)
    tokens = DATA[1].model_input.to_ints()
    found = answer(base, None, score_request(base, tokens))
    with torch.no_grad():
        logits_TV = rounded_model(folder, rounded)(input_ids=torch.tensor([tokens]), use_cache=False).logits[
            0
        ]
    expected_T = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    np.testing.assert_allclose(found[1:], expected_T, rtol=1e-5)
    sampled = answer(base, None, sample_request(base, tokens, 2, SamplingParams(max_tokens=4, seed=0)))
    for sequence in sampled.sequences:
        scored = answer(base, None, score_request(base, tokens + sequence.tokens))
        np.testing.assert_allclose(sequence.logprobs, scored[len(tokens) :], rtol=1e-5)


def test_a_weight_takes_a_byte_and_is_the_same_number_in_every_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(48, 64, generator=generator) * torch.logspace(-6, 1, 48)[:, None]
    weight_OI[3] = 0
    weight_OI[4, 0] = 448 * 2**-5  # the largest number of a scale
    weight_OI[4, 1:] /= weight_OI[4, 1:].abs().max() * 8
    bytes_OI, scale_O1 = fp8.quantize(weight_OI)
    assert (bytes_OI.dtype, bytes_OI.shape, scale_O1.shape) == (torch.uint8, (48, 64), (48, 1))
    assert scale_O1[4] == 2**-5
    found = fp8.dequantized(bytes_OI, scale_O1, torch.float32)
    assert torch.equal(found[4:], rounded(weight_OI[4:]))
    assert found[3].count_nonzero() == 0
    assert torch.equal(fp8.dequantized(bytes_OI, scale_O1, torch.bfloat16).float(), found)
    assert torch.equal(fp8.dequantized(bytes_OI[16:], scale_O1[16:], torch.float16).float(), found[16:])


@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_product_in_8_bits_is_that_of_the_rounded_rows(num_rows: int) -> None:
    """torch has the kernel for a CPU too, which the engine does not use: weights dequantised are exact."""
    generator = torch.Generator().manual_seed(0)
    layer = fp8.Fp8Linear(64, 48, dtype=torch.bfloat16)
    bytes_OI, scale_O1 = fp8.quantize(torch.randn(48, 64, generator=generator))
    layer.weight = nn.Parameter(bytes_OI, requires_grad=False)
    layer.register_buffer("weight_scale", scale_O1)
    x_NI = torch.randn(num_rows, 64, generator=generator).bfloat16()
    x_NI[0, 5] = 300.0  # a large one costs its own row precision, and no other
    found_NO = fp8.scaled_product(x_NI, layer)
    rows = []
    for row in x_NI.tolist():
        scale = max(map(abs, row)) / 448
        rows.append([rounded_number(value, scale) for value in row])
    weight_OI = fp8.dequantized(bytes_OI, scale_O1, torch.float32)
    expected_NO = torch.tensor(rows) @ weight_OI.T + layer.bias.detach().float()
    assert found_NO.dtype == torch.bfloat16
    torch.testing.assert_close(found_NO.float(), expected_NO, rtol=2**-8, atol=2**-8)


def test_a_run_that_is_continued_has_the_bits_of_one_that_was_not_stopped(
    folder: str, tmp_path: Path
) -> None:
    def trained(trainer: Trainer, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            losses.append(trainer.forward_backward(trainer.check(DATA, "cross_entropy", None)).output().loss)
            trainer.optim_step(AdamParams(learning_rate=1e-2))
        return losses

    whole = Trainer(BaseModel(folder, FP8), LoraConfig(rank=4, seed=0))
    losses = trained(whole, 6)
    assert losses[-1] < 0.9 * losses[0]
    first = Trainer(BaseModel(folder, FP8), LoraConfig(rank=4, seed=0))
    half = trained(first, 3)
    first.save(tmp_path / "half", with_optimizer=True)
    second = Trainer(BaseModel(folder, FP8), LoraConfig(rank=4, seed=1))
    second.load(str(tmp_path / "half"), with_optimizer=True)
    assert half + trained(second, 3) == losses
    for name, weight in whole.adapter.weights.items():
        assert torch.equal(second.adapter.weights[name], weight), name


def test_an_adapter_begins_as_it_does_on_unrounded_weights(folder: str) -> None:
    """PEFT makes A in the dtype of the layer, which must not be float8."""
    of_fp8, of_plain = (
        Trainer(BaseModel(folder, options), LoraConfig(rank=4, seed=0)).adapter.weights
        for options in (FP8, EngineOptions(device="cpu"))
    )
    assert of_fp8.keys() == of_plain.keys()
    assert all(torch.equal(of_fp8[name], weight) for name, weight in of_plain.items())


def test_fp8_needs_no_bitsandbytes_and_trains_no_weights(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_package(monkeypatch, "bitsandbytes")
    with pytest.raises(ConfigError, match="quantization=fp8 is not supported with rank=0"):
        ServiceClient(quantization="fp8").create_lora_training_client(folder, rank=0)


def test_dora_is_refused_because_peft_would_read_the_bytes(folder: str) -> None:
    base = BaseModel(folder, FP8)
    names = ("target_parameters", "modules_to_save", "trainable_token_indices")
    explicit: dict[str, Any] = {**dict.fromkeys(names), "use_dora": True, "target_modules": []}
    settings = PeftSettings({}, explicit)
    with pytest.raises(ConfigError, match="use_dora=true is not supported with quantization=fp8"):
        base.adapters.add(LoraConfig(rank=4, peft=settings))


@pytest.mark.parametrize("has_lora", [False, True])
def test_the_output_of_a_layer_may_be_changed_in_place(has_lora: bool) -> None:
    """As Gemma 3n and Llama 4 do with that of a projection."""
    torch.manual_seed(0)
    layer = fp8.Fp8Linear(16, 32, bias=False)
    bytes_OI, scale_O1 = fp8.quantize(torch.randn(32, 16))
    del layer.weight
    layer.register_buffer("weight", bytes_OI)
    layer.register_buffer("weight_scale", scale_O1)
    a_RI, b_OR = torch.randn(4, 16, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    x_BLI = torch.randn(2, 3, 16, requires_grad=True)
    if has_lora:
        out_NO: Tensor = _LoraLinear.apply(x_BLI.reshape(-1, 16), layer, a_RI, b_OR, 2.0, None)
        out = out_NO.view(2, 3, 32)
    else:
        out = layer(x_BLI)
    out *= 3
    out.sum().backward()
    weight_OI = fp8.dequantized(bytes_OI, scale_O1, torch.float32)
    expected_OI = weight_OI + 2 * b_OR @ a_RI if has_lora else weight_OI
    assert x_BLI.grad is not None
    torch.testing.assert_close(x_BLI.grad, 3 * expected_OI.detach().sum(0).expand(2, 3, 16))
