"""Tests of one adapter in training: accumulated gradients, steps, custom losses, and failed passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cookbook.engine.model import packing
from cookbook.engine.model.memory import MicrobatchLimits
from cookbook.errors import TrainingError
from cookbook.types import AdamParams, Datum, ModelInput


def test_gradients_accumulate_over_calls_until_the_step(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, gradients_of: Any, assert_close: Any
) -> None:
    trainer = make_trainer(tiny_qwen3)
    data = make_data(trainer.base.vocab_size, [10, 20])
    trainer.forward_backward(trainer.check(data, "cross_entropy", None))
    together = gradients_of(trainer)
    trainer.discard_gradients()
    for datum in data:
        trainer.forward_backward(trainer.check([datum], "cross_entropy", None))
    for name, gradient in gradients_of(trainer).items():
        assert_close(gradient, together[name])
    trainer.optim_step(AdamParams(learning_rate=1e-3))
    assert not gradients_of(trainer)


def test_steps_equal_those_of_torch_adamw(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, assert_close: Any
) -> None:
    trainer = make_trainer(tiny_qwen3)
    names = list(trainer.adapter.weights)
    mirror = [torch.nn.Parameter(trainer.adapter.weights[name].detach().clone()) for name in names]
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
        trainer.forward_backward(
            trainer.check(make_data(trainer.base.vocab_size, [12], seed=step), "cross_entropy", None)
        )
        for parameter, name in zip(mirror, names, strict=True):
            gradient = trainer.adapter.weights[name].grad
            parameter.grad = None if gradient is None else gradient.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(mirror, 0.5)
        optimizer.param_groups[0].update(
            lr=params.learning_rate, betas=(0.8, 0.9), eps=1e-9, weight_decay=0.1
        )
        optimizer.step()
        norm = float(trainer.optim_step(params).arrays()[0])
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
    for parameter, name in zip(mirror, names, strict=True):
        assert_close(trainer.adapter.weights[name].detach(), parameter.detach(), 1e-6)


def test_a_custom_loss_has_the_gradient_of_its_function(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, gradients_of: Any, assert_close: Any
) -> None:
    """The custom loss -sum(w * logp) equals cross_entropy."""
    trainer = make_trainer(tiny_qwen3)
    data = make_data(trainer.base.vocab_size, [10, 20])
    built_in = trainer.forward_backward(trainer.check(data, "cross_entropy", None)).output()
    expected = gradients_of(trainer)
    trainer.discard_gradients()

    def loss_fn(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [
            -(d.loss_fn_inputs["weights"].to_torch() * lp).sum() for d, lp in zip(data, logprobs, strict=True)
        ]
        return torch.stack(terms).sum(), {"num_terms": len(terms)}

    request = trainer.check(data, "cross_entropy", None)
    output = trainer.forward_backward_custom(data, request, loss_fn).output()
    assert output.loss == pytest.approx(built_in.metrics["loss:sum"], rel=1e-5)
    assert output.metrics["num_terms"] == 2
    for name, gradient in gradients_of(trainer).items():
        assert_close(gradient, expected[name])


def test_a_pass_that_fails_midway_adds_no_gradient(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, gradients_of: Any
) -> None:
    trainer = make_trainer(tiny_qwen3)
    trainer.limits.current = MicrobatchLimits(1, max_tokens_without_checkpointing=2**62)
    data = make_data(trainer.base.vocab_size, [10, 20, 15])
    trainer.forward_backward(trainer.check(data[:1], "cross_entropy", None))
    before = gradients_of(trainer)
    request = trainer.check(data, "cross_entropy", None)
    last = request.sequences[-1]
    broken = packing.TokenSequence(last.tokens_T + 10**6, last.targets_T, last.weights_T, {})
    request.sequences[-1] = broken
    with pytest.raises(TrainingError, match="forward_backward failed"):
        trainer.forward_backward(request)
    assert gradients_of(trainer).keys() == before.keys()
    for name, gradient in gradients_of(trainer).items():
        assert torch.equal(gradient, before[name])


def test_positions_that_are_not_trained_do_not_affect_the_loss(
    tiny_qwen3: str, make_trainer: Any, make_data: Any
) -> None:
    """The ratio to a probability of 0 is infinite, and infinity times a weight of 0 is nan."""
    trainer = make_trainer(tiny_qwen3)
    (datum,) = make_data(trainer.base.vocab_size, [20])
    trained = datum.loss_fn_inputs["weights"].to_numpy() != 0
    inputs = {**datum.loss_fn_inputs, "logprobs": [-6.0 if t else -200.0 for t in trained]}
    request = trainer.check(
        [Datum(datum.model_input, {**inputs, "advantages": [1.0] * 20})], "importance_sampling", None
    )
    forward = trainer.forward(request).output().metrics["loss:sum"]
    assert forward == pytest.approx(trainer.forward_backward(request).output().metrics["loss:sum"], rel=1e-6)


@pytest.mark.parametrize("has_plain_head", [True, False])
def test_a_forward_pass_marks_the_targets_that_are_argmax(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, has_plain_head: bool
) -> None:
    trainer = make_trainer(tiny_qwen3)
    trainer.base.has_plain_head = has_plain_head
    trainer.base.is_packed = has_plain_head
    tokens = np.random.default_rng(0).integers(3, trainer.base.vocab_size, (3, 12))
    with trainer.base.adapters.using(trainer.adapter), torch.no_grad():
        logits = trainer.base.model(torch.from_numpy(tokens)).logits
    targets = logits.argmax(-1).numpy()
    targets[:, ::3] = 5
    expected = (logits.argmax(-1).numpy() == targets).astype(int)
    weights = np.ones_like(targets)
    weights[:, 7:] = 0
    data = [
        Datum(ModelInput.from_ints(row), {"target_tokens": target, "weights": weight})
        for row, target, weight in zip(tokens, targets, weights, strict=True)
    ]
    for trained_only, shown in ((False, expected), (True, expected * weights)):
        request = trainer.check(data, "cross_entropy", None, trained_only, with_argmax=True)
        outputs = trainer.forward(request).output().loss_fn_outputs
        assert [output["is_argmax"].tolist() for output in outputs] == shown.tolist()
    request = trainer.check(data, "cross_entropy", None)
    assert "is_argmax" not in trainer.forward(request).output().loss_fn_outputs[0]


@pytest.mark.parametrize("max_tokens", [16, 10_000])
def test_a_pass_without_log_probabilities_has_the_same_loss_and_gradients(
    tiny_qwen3: str, make_trainer: Any, make_data: Any, gradients_of: Any, assert_close: Any, max_tokens: int
) -> None:
    trainer = make_trainer(tiny_qwen3)
    trainer.limits.current = MicrobatchLimits(max_tokens, max_tokens)
    data = make_data(trainer.base.vocab_size, [10, 20, 4])
    whole = trainer.forward_backward(trainer.check(data, "cross_entropy", None, trained_only=True)).output()
    expected = gradients_of(trainer)
    trainer.discard_gradients()
    request = trainer.check(data, "cross_entropy", None, trained_only=True, loss_only=True)
    found = trainer.forward_backward(request).output()
    for name, gradient in gradients_of(trainer).items():
        assert torch.equal(gradient, expected[name])
    assert found.loss_fn_outputs == []
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert found.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    assert found.metrics["weights:sum"] == whole.metrics["weights:sum"]
    logprobs = np.concatenate([output["logprobs"].to_numpy() for output in whole.loss_fn_outputs])
    weights = np.concatenate([datum.loss_fn_inputs["weights"].to_numpy() for datum in data])
    trained = logprobs[weights != 0]
    assert (found.metrics["logprobs:min"], found.metrics["logprobs:max"]) == (trained.min(), trained.max())


def test_a_pass_without_trained_targets_has_no_smallest_log_probability(
    tiny_qwen3: str, make_trainer: Any
) -> None:
    trainer = make_trainer(tiny_qwen3)
    datum = Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weights": [0.0, 0.0]})
    found = trainer.forward(
        trainer.check([datum], "cross_entropy", None, trained_only=True, loss_only=True)
    ).output()
    assert found.metrics == {"loss:sum": 0.0, "weights:sum": 0.0}
