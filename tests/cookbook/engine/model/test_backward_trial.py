"""A model's backward pass is tried when it is loaded: one that fails, or has other gradients, is not used."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions

LONGEST_ALONE = 13
"""The length of the longer one of the sequences of a trial. A row with both is longer."""


class _LongRowsFail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_BTD: Tensor) -> Tensor:
        return states_BTD.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if grads[0].shape[1] > LONGEST_ALONE:
            raise RuntimeError("this kernel has no backward pass for such rows")
        return grads[0]


class _LongRowsAreWrong(_LongRowsFail):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].roll(1, dims=1) if grads[0].shape[1] > LONGEST_ALONE else grads[0]


class _NoRowHasOne(_LongRowsFail):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("this kernel has no backward pass")


class WithKernel(BaseModel):
    """A model whose first layer ends with this function."""

    def __init__(self, model_name: str, kernel: type[torch.autograd.Function]) -> None:
        self._kernel = kernel
        super().__init__(model_name, EngineOptions(device="cpu"))

    def _load(self, is_trained: bool) -> Any:
        model = super()._load(is_trained)

        def end(module: nn.Module, inputs: Any, out: Any) -> Any:
            return self._kernel.apply(out)

        model.model.layers[0].register_forward_hook(end)
        return model


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (_LongRowsFail, "this kernel has no backward pass for such rows"),
        (_LongRowsAreWrong, "its gradients would move by"),
    ],
)
def test_sequences_do_not_share_a_row_whose_backward_pass_fails_or_is_wrong(
    tiny_qwen3: str, caplog: pytest.LogCaptureFixture, kernel: Any, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        base = WithKernel(tiny_qwen3, kernel)
    assert base.is_padded, "a padded batch has rows of 13 tokens, which this kernel can run"
    assert base.min_shared_tokens is None
    (warning,) = [text for text in caplog.messages if "falls back to a slower way" in text]
    assert reason in warning
    assert "in one row" in warning


def test_a_model_without_a_backward_pass_is_packed_for_sampling_and_a_warning_says_so(
    tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = WithKernel(tiny_qwen3, _NoRowHasOne)
    assert base.is_packed
    assert not base.is_padded
    assert "cannot be trained here: its backward pass fails in a trial" in caplog.text


def test_a_model_with_a_backward_pass_is_packed_without_a_warning(
    tiny_qwen3: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = BaseModel(tiny_qwen3, EngineOptions(device="cpu"))
    assert base.is_packed
    assert not base.is_padded
    assert not caplog.messages
    assert all(weight.grad is None for weight in base.model.parameters())
