"""Loss and gradients against plain transformers + peft, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cookbook.engine import packing
from cookbook.engine.base_model import BaseModel
from cookbook.engine.memory import MicrobatchLimits
from cookbook.engine.projection import BlockSizes
from cookbook.engine.trainer import Trainer
from cookbook.errors import TrainingError
from cookbook.types import AdamParams, Datum, LoraConfig, ModelInput

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory, make_model_folder: Any) -> Any:
    folders: dict[str, Path] = {}

    def folder(family: str) -> str:
        if family not in folders:
            model_type = family.removesuffix("-tied")
            path = tmp_path_factory.mktemp("family") / family
            folders[family] = make_model_folder(path, model_type, **FAMILIES[family])
        return str(folders[family])

    return folder


def make_data(vocab_size: int, lengths: list[int], seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(3, vocab_size, length + 1)
        weights = (rng.random(length) < 0.6).astype(np.float32) * rng.choice([0.5, 1.0, 2.0], length)
        data.append(
            Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


def reference(
    base_folder: str, adapter_folder: Path, data: list[Datum]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Log-probabilities and adapter gradients by plain transformers + peft."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True).eval()
    logprobs = []
    for datum in data:
        logits = peft_model(input_ids=torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        token_logprobs = -F.cross_entropy(logits, targets, reduction="none")
        (-(datum.loss_fn_inputs["weights"].to_torch() * token_logprobs).sum()).backward()
        logprobs.append(token_logprobs.detach().numpy())
    gradients = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if parameter.grad is not None
    }
    return logprobs, gradients


def make_trainer(folder: str, seed: int = 0, **lora: Any) -> Trainer:
    """A trainer whose B matrices are not zero, so that every gradient is in play."""
    made = Trainer(BaseModel(folder), LoraConfig(rank=4, seed=seed, **lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.adapter.weights.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


def gradients_of(made: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in made.adapter.weights.items() if parameter.grad is not None
    }


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    scale = max(float(np.abs(np.asarray(expected)).max()), 1e-6)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_plain_transformers_and_peft(
    family: str, family_folder: Any, tmp_path: Path
) -> None:
    folder = family_folder(family)
    made = make_trainer(folder)
    made.save(tmp_path / "adapter", with_optimizer=False)
    data = make_data(made.base.vocab_size, [5, 30, 1, 17, 12])
    expected_logprobs, expected_gradients = reference(folder, tmp_path / "adapter", data)

    output = made.forward_backward(made.check(data, "cross_entropy", None)).output()

    for found, expected in zip(output.loss_fn_outputs, expected_logprobs, strict=True):
        assert_close(found["logprobs"].to_numpy(), expected)
    gradients = gradients_of(made)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert_close(gradients[name], expected)


def test_models_that_packing_would_change_run_one_sequence_at_a_time(
    family_folder: Any, make_model_folder: Any, tmp_path: Path
) -> None:
    """Mamba carries its state from one token to the next."""
    assert all(BaseModel(family_folder(family)).is_packed for family in FAMILIES)
    assert not BaseModel(str(make_model_folder(tmp_path / "mamba", "mamba", state_size=4))).is_packed


@pytest.mark.parametrize("max_tokens", [1, 20, 64, 10_000])
@pytest.mark.parametrize("order_seed", [0, 1])
def test_packing_order_and_microbatches_leave_every_gradient_as_it_was(
    tiny_qwen3: str, max_tokens: int, order_seed: int
) -> None:
    made = make_trainer(tiny_qwen3)
    data = make_data(made.base.vocab_size, [40, 3, 3, 25, 1, 60, 9])
    for datum in data:
        made.forward_backward(made.check([datum], "cross_entropy", None))
    one_at_a_time = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    made.discard_gradients()

    made._limits = MicrobatchLimits(max_tokens, max_tokens_without_checkpointing=2**62)
    order = np.random.default_rng(order_seed).permutation(len(data))
    made.forward_backward(made.check([data[i] for i in order], "cross_entropy", None))

    for name, gradient in gradients_of(made).items():
        assert_close(gradient, one_at_a_time[name])


def test_chunks_of_the_projection_leave_every_gradient_as_it_was(
    tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer(tiny_qwen3)
    request = made.check(make_data(made.base.vocab_size, [40, 3, 25]), "cross_entropy", None)
    whole = made.forward_backward(request).output()
    expected = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    made.discard_gradients()
    monkeypatch.setattr(BlockSizes, "on", lambda device: BlockSizes(7, 33, 5 * made.base.vocab_size))
    chunked = made.forward_backward(request).output()
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, gradient in gradients_of(made).items():
        assert_close(gradient, expected[name])


def test_changing_one_segment_leaves_the_others_bit_identical(tiny_qwen3: str) -> None:
    made = make_trainer(tiny_qwen3)
    data = make_data(made.base.vocab_size, [20, 20, 20])
    changed = [data[0], make_data(made.base.vocab_size, [20], seed=9)[0], data[2]]
    before = made.forward(made.check(data, "cross_entropy", None)).logprobs()
    after = made.forward(made.check(changed, "cross_entropy", None)).logprobs()
    assert before[0].tobytes() == after[0].tobytes()
    assert before[2].tobytes() == after[2].tobytes()
    assert before[1].tobytes() != after[1].tobytes()


def test_scoring_the_trained_tokens_alone_gives_the_same_gradients(tiny_qwen3: str) -> None:
    made = make_trainer(tiny_qwen3)
    data = make_data(made.base.vocab_size, [20, 33])
    every = made.forward_backward(made.check(data, "cross_entropy", None)).output()
    expected = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    made.discard_gradients()
    trained = made.forward_backward(made.check(data, "cross_entropy", None, trained_only=True)).output()
    assert trained.loss == pytest.approx(every.loss, rel=1e-6)
    for name, gradient in gradients_of(made).items():
        assert_close(gradient, expected[name])
    for datum, one, other in zip(data, every.loss_fn_outputs, trained.loss_fn_outputs, strict=True):
        weighs = datum.loss_fn_inputs["weights"].to_numpy() != 0
        assert_close(other["logprobs"].to_numpy()[weighs], one["logprobs"].to_numpy()[weighs])
        assert not other["logprobs"].to_numpy()[~weighs].any()


def test_gradients_add_up_over_calls_until_the_step(tiny_qwen3: str) -> None:
    made = make_trainer(tiny_qwen3)
    data = make_data(made.base.vocab_size, [10, 20])
    made.forward_backward(made.check(data, "cross_entropy", None))
    together = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    made.discard_gradients()
    for datum in data:
        made.forward_backward(made.check([datum], "cross_entropy", None))
    for name, gradient in gradients_of(made).items():
        assert_close(gradient, together[name])
    made.optim_step(AdamParams(learning_rate=1e-3))
    assert not gradients_of(made)


def test_steps_equal_those_of_torch_adamw(tiny_qwen3: str) -> None:
    made = make_trainer(tiny_qwen3)
    names = list(made.adapter.weights)
    mirror = [torch.nn.Parameter(made.adapter.weights[name].detach().clone()) for name in names]
    optimizer = torch.optim.AdamW(mirror, lr=0.0)
    for step in range(4):
        params = AdamParams(
            learning_rate=10.0 ** -(2 + step),
            beta1=0.8,
            beta2=0.9,
            eps=1e-9,
            weight_decay=0.1,
            grad_clip_norm=0.5,
        )
        made.forward_backward(
            made.check(make_data(made.base.vocab_size, [12], seed=step), "cross_entropy", None)
        )
        for parameter, name in zip(mirror, names, strict=True):
            gradient = made.adapter.weights[name].grad
            parameter.grad = None if gradient is None else gradient.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(mirror, 0.5)
        optimizer.param_groups[0].update(
            lr=params.learning_rate, betas=(0.8, 0.9), eps=1e-9, weight_decay=0.1
        )
        optimizer.step()
        norm = made.optim_step(params).output().metrics["grad_norm"]
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
    for parameter, name in zip(mirror, names, strict=True):
        assert_close(made.adapter.weights[name].detach(), parameter.detach(), 1e-6)


def test_a_custom_loss_gives_the_gradient_of_the_function(tiny_qwen3: str) -> None:
    """-sum(w * logp) as a custom loss is cross_entropy."""
    made = make_trainer(tiny_qwen3)
    data = make_data(made.base.vocab_size, [10, 20])
    built_in = made.forward_backward(made.check(data, "cross_entropy", None)).output()
    expected = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    made.discard_gradients()

    def loss_fn(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [
            -(d.loss_fn_inputs["weights"].to_torch() * lp).sum() for d, lp in zip(data, logprobs, strict=True)
        ]
        return torch.stack(terms).sum(), {"num_terms": len(terms)}

    request = made.check(data, "cross_entropy", None)
    output = made.forward_backward_custom(data, request, loss_fn).output()
    assert output.loss == pytest.approx(built_in.metrics["loss:sum"], rel=1e-5)
    assert output.metrics["num_terms"] == 2
    for name, gradient in gradients_of(made).items():
        assert_close(gradient, expected[name])


def test_a_pass_that_fails_midway_adds_no_gradient(tiny_qwen3: str) -> None:
    made = make_trainer(tiny_qwen3)
    made._limits = MicrobatchLimits(1, max_tokens_without_checkpointing=2**62)
    data = make_data(made.base.vocab_size, [10, 20, 15])
    made.forward_backward(made.check(data[:1], "cross_entropy", None))
    before = {name: gradient.clone() for name, gradient in gradients_of(made).items()}
    request = made.check(data, "cross_entropy", None)
    last = request.sequences[-1]
    broken = packing.TokenSequence(last.tokens_T + 10**6, last.targets_T, last.weights_T, {})
    request.sequences[-1] = broken
    with pytest.raises(TrainingError, match="forward_backward failed"):
        made.forward_backward(request)
    assert gradients_of(made).keys() == before.keys()
    for name, gradient in gradients_of(made).items():
        assert torch.equal(gradient, before[name])
