"""Tests that dropout of a LoRA depends on what is dropped, and not on how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cookbook import AdamParams, LoraConfig, ServiceClient
from cookbook.engine.model.dropout import DropoutKeys, KeyedDropout, PassOfData
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import ConfigError

LENGTHS = (9, 4, 13, 6, 2)
STEP = AdamParams(1e-2, eps=1e-6)


def make(
    make_trainer: Callable[..., Trainer], model: str, dropout: float = 0.3, seed: int = 5, **options: Any
) -> Trainer:
    return make_trainer(model, seed=seed, options=options, dropout=dropout)


def gradients(trainer: Trainer, data: Any) -> dict[str, Tensor]:
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    return {name: weight.grad.clone() for name, weight in trainer.adapter.weights.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=2e-4)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "options",
    [{"max_tokens_per_microbatch": 1}, {"max_tokens_per_microbatch": 15}, {"gradient_checkpointing": "on"}],
    ids=["one at a time", "two at a time", "layers run again"],
)
def test_packing_and_checkpointing_drop_the_same(
    make_trainer: Callable[..., Trainer], make_data: Any, tiny_qwen3: str, options: dict[str, Any]
) -> None:
    together, apart = make(make_trainer, tiny_qwen3), make(make_trainer, tiny_qwen3, **options)
    data = make_data(together.base.vocab_size, LENGTHS)
    expected = gradients(together, data)
    assert_equal(gradients(apart, data), expected)
    none = gradients(make(make_trainer, tiny_qwen3, dropout=0.0), data)
    assert any((none[name] - expected[name]).abs().max() > 1e-2 * none[name].abs().max() for name in none)


@pytest.mark.slow
def test_padding_drops_the_same(
    make_trainer: Callable[..., Trainer], make_data: Any, make_model_folder: Any, tmp_path: Path
) -> None:
    folder = str(make_model_folder(tmp_path / "stablelm", "stablelm"))
    together = make(make_trainer, folder)
    apart = make(make_trainer, folder, max_tokens_per_microbatch=1)
    data = make_data(together.base.vocab_size, LENGTHS)
    assert together.base.is_padded
    assert_equal(gradients(apart, data), gradients(together, data))


def test_the_gradient_is_that_of_autograd_with_the_same_masks(
    make_trainer: Callable[..., Trainer], make_data: Any, tiny_qwen3: str
) -> None:
    """PEFT's own forward pass runs the same dropout modules, and torch differentiates all of it."""
    trainer = make(make_trainer, tiny_qwen3)
    (datum,) = make_data(trainer.base.vocab_size, (12,))
    expected = gradients(trainer, [datum])
    trainer.discard_gradients()
    base, (sequence,) = trainer.base, trainer.check([datum], "cross_entropy", None).sequences
    for module in base.model.modules():
        vars(module).pop("forward", None)  # the fused forward pass
    keys = PassOfData(5, 0, 0).keys([0], [12])
    with base.adapters.using(trainer.adapter), base.dropping(keys), torch.enable_grad():
        logits = base.model(input_ids=torch.tensor([sequence.tokens_T.tolist()])).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(sequence.targets_T), reduction="none"
        )
        (losses * torch.from_numpy(sequence.weights_T)).sum().backward()
    found = {name: weight.grad for name, weight in trainer.adapter.weights.items()}
    assert_equal(found, expected)


@pytest.mark.slow
def test_each_pass_step_and_seed_drops_something_else(
    make_trainer: Callable[..., Trainer], make_data: Any, tiny_qwen3: str
) -> None:
    trainer = make(make_trainer, tiny_qwen3)
    data = make_data(trainer.base.vocab_size, LENGTHS)
    first = gradients(trainer, data)
    second = {name: both - first[name] for name, both in gradients(trainer, data).items()}
    name = max(first, key=lambda one: float(first[one].abs().max()))
    assert not torch.allclose(first[name], second[name], rtol=1e-2)
    other = gradients(make(make_trainer, tiny_qwen3, seed=6), data)
    assert not torch.allclose(first[name], other[name], rtol=1e-2)


@pytest.mark.slow
def test_a_resumed_run_drops_the_same(tiny_qwen3: str, make_data: Any, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(tiny_qwen3, LoraConfig(4, seed=0, dropout=0.4))
    data = make_data(32, LENGTHS)
    for step in range(4):
        client.forward_backward(data)
        client.optim_step(STEP).result()
        if step == 1:
            middle = client.save_state("middle").result().path
    resumed = service.create_training_client_from_state_with_optimizer(middle)
    for _ in range(2):
        resumed.forward_backward(data)
        resumed.optim_step(STEP).result()
    expected = client._trainer.adapter.weights
    for name, weight in resumed._trainer.adapter.weights.items():
        assert torch.equal(weight, expected[name])
    service.close()


def test_nothing_is_dropped_in_evaluation(tiny_qwen3: str, make_data: Any, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(tiny_qwen3, LoraConfig(4, seed=0, dropout=0.4))
    data = make_data(32, LENGTHS)
    client.forward_backward(data)
    client.optim_step(STEP)
    path = client.save_state("a").result().path
    plain = service.create_training_client(tiny_qwen3, LoraConfig(4, seed=0))
    plain.load_state(path).result()
    for found, expected in zip(
        client.forward(data).result().loss_fn_outputs,
        plain.forward(data).result().loss_fn_outputs,
        strict=True,
    ):
        assert found["logprobs"].tolist() == expected["logprobs"].tolist()
    service.close()


def test_a_custom_loss_is_differentiated_at_the_log_probabilities_that_it_was_given(
    make_trainer: Callable[..., Trainer], make_data: Any, tiny_qwen3: str
) -> None:
    trainer = make(make_trainer, tiny_qwen3)
    data = make_data(trainer.base.vocab_size, LENGTHS)
    expected = gradients(trainer, data)
    trainer.discard_gradients()

    def weighted(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        terms = [
            (-torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy()) * each).sum()
            for datum, each in zip(data, logprobs, strict=True)
        ]
        return torch.stack(terms).sum(), {}

    trainer.forward_backward_custom(data, trainer.check(data, "cross_entropy", None), weighted)
    assert_equal({name: weight.grad for name, weight in trainer.adapter.weights.items()}, expected)


def test_the_share_is_dropped_and_the_mean_stays() -> None:
    state = DropoutKeys()
    keys = torch.from_numpy(PassOfData(1, 2, 3).keys([4, 9], [300, 200]))
    layers = [KeyedDropout(0.25, name, state) for name in ("a", "b")]
    x_NI = torch.ones(500, 64)
    masks = torch.stack([layer.drop(x_NI, keys) for layer in layers])
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(masks.mean()) == pytest.approx(1, abs=0.01)
    assert float(masks.mean((0, 1)).std()) < 0.03
    assert float(masks.mean((0, 2)).std()) < 0.08
    assert np.corrcoef(masks.flatten(1).numpy())[0, 1] == pytest.approx(0, abs=0.02)
    by_token = np.corrcoef(masks[0].numpy())
    assert np.abs(by_token - np.eye(500)).mean() < 0.12  # 0.1 for independent rows of 64
    with state.set_to(keys):
        assert torch.equal(layers[0](x_NI[None])[0], masks[0])
    assert layers[0](x_NI) is x_NI


def test_a_layer_that_is_not_run_on_every_token_is_named() -> None:
    layer = KeyedDropout(0.1, "mlp.expert_3.up_proj", DropoutKeys())
    with pytest.raises(ConfigError, match=r"lora_dropout is not supported on mlp.expert_3.up_proj.*5 rows"):
        layer.drop(torch.ones(5, 4), torch.zeros(8, dtype=torch.int32))


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_an_invalid_share_is_refused(tiny_qwen3: str, share: float) -> None:
    service = ServiceClient(device="cpu")
    with pytest.raises(ConfigError, match="Invalid lora_dropout="):
        service.create_training_client(tiny_qwen3, LoraConfig(4, dropout=share))
    with pytest.raises(ConfigError, match="lora_dropout is a setting of a LoRA"):
        service.create_training_client(tiny_qwen3, LoraConfig(0, dropout=0.1))
    service.close()
