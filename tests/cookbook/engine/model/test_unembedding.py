"""Tests that blockwise log-probabilities and gradients equal those of a softmax over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from cookbook.engine.model.architecture import LogitScaling, logit_scaling
from cookbook.engine.model.unembedding import (
    BlockSizes,
    Head,
    LoraOnHead,
    score,
    score_and_backpropagate,
    score_and_compare,
    score_top,
)

NUM_POSITIONS, HIDDEN_SIZE, VOCAB_SIZE, RANK = 23, 8, 50, 3
SCALING = 0.5


SMALL_BLOCKS = BlockSizes(positions=7, vocabulary=11, kept_elements=4 * VOCAB_SIZE)


def make_head(
    *,
    lora: bool = False,
    bias: bool = False,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    blocks: BlockSizes = SMALL_BLOCKS,
    **rest: Any,
) -> Head:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    adapter = LoraOnHead(
        draw(RANK, HIDDEN_SIZE).requires_grad_(), draw(VOCAB_SIZE, RANK).requires_grad_(), SCALING
    )
    return Head(
        draw(VOCAB_SIZE, HIDDEN_SIZE).to(dtype).requires_grad_(full),
        blocks,
        draw(VOCAB_SIZE).to(dtype).requires_grad_(full) if bias else None,
        adapter if lora else None,
        **rest,
    )


def make_positions(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_SD = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator).to(dtype)
    targets_S = torch.randint(VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)
    return hidden_SD, targets_S, torch.linspace(-1, 2, NUM_POSITIONS)


def by_autograd(head: Head, hidden_SD: Tensor, targets_S: Tensor, weights_S: Tensor) -> dict[str, Tensor]:
    """Computes all logits at once, in double precision, with torch's autograd."""
    leaves = {"hidden": hidden_SD, "weight": head.weight_VD}
    if head.bias_V is not None:
        leaves["bias"] = head.bias_V
    if head.lora is not None:
        leaves |= {"a": head.lora.a_RD, "b": head.lora.b_VR}
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    logits_SV = leaves["hidden"] @ leaves["weight"].T
    if head.lora is not None:
        logits_SV = logits_SV + SCALING * leaves["hidden"] @ leaves["a"].T @ leaves["b"].T
    if head.bias_V is not None:
        logits_SV = logits_SV + leaves["bias"]
    logits_SV = logits_SV * head.scale
    if head.softcap is not None:
        logits_SV = head.softcap * torch.tanh(logits_SV / head.softcap)
    if targets_S.ndim == 2:
        logprobs_S = logits_SV.log_softmax(-1).gather(1, targets_S)
    else:
        logprobs_S = logits_SV.log_softmax(-1)[torch.arange(len(targets_S)), targets_S]
    loss = -(weights_S * logprobs_S).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {
        "logprobs": logprobs_S.detach(),
        "loss": loss.detach(),
        **dict(zip(leaves, gradients, strict=True)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("keeps_fp32", [True, False])
def test_the_gradient_of_a_half_precision_head_is_summed_in_fp32(keeps_fp32: bool) -> None:
    """1,000 positions with one target: in bfloat16 each term would be rounded away against the sum."""
    generator = torch.Generator().manual_seed(0)
    head = make_head(full=True, bias=True, dtype=torch.bfloat16)
    trained = [head.weight_VD, head.bias_V]
    if keeps_fp32:
        for parameter in trained:
            parameter.grad_dtype = torch.float32
    hidden_SD = (torch.randn(1, HIDDEN_SIZE, generator=generator).expand(1000, -1) * 0.1).bfloat16()
    targets_S, weights_S = torch.full((1000,), 7), torch.ones(1000)
    expected = by_autograd(head, hidden_SD, targets_S, weights_S)
    score_and_backpropagate(head, hidden_SD, targets_S, lambda logprobs, part: -logprobs.sum())
    for parameter, name in zip(trained, ("weight", "bias"), strict=True):
        assert parameter.grad.dtype == (torch.float32 if keeps_fp32 else torch.bfloat16)
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_blocks_compute_the_log_softmax_and_every_gradient(
    softcap: float | None, scale: float, lora: bool, bias: bool, full: bool
) -> None:
    head = make_head(lora=lora, bias=bias, full=full, scale=scale, softcap=softcap)
    hidden_SD, targets_S, weights_S = make_positions()
    expected = by_autograd(head, hidden_SD, targets_S, weights_S)

    logprobs_S, loss, grad_SD = score_and_backpropagate(
        head, hidden_SD, targets_S, lambda logprobs_C, part: -(weights_S[part] * logprobs_C).sum()
    )

    found = {"logprobs": logprobs_S, "loss": loss, "hidden": grad_SD}
    if full:
        found["weight"] = head.weight_VD.grad
        if head.bias_V is not None:
            found["bias"] = head.bias_V.grad
    else:
        assert head.weight_VD.grad is None
    if head.lora is not None:
        found |= {"a": head.lora.a_RD.grad, "b": head.lora.b_VR.grad}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(score(head, hidden_SD, targets_S), logprobs_S)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_several_targets_of_a_position_have_the_gradient_of_their_weighted_sum(
    softcap: float | None, lora: bool, full: bool
) -> None:
    """Also if a target is there twice, or has weight 0."""
    head = make_head(lora=lora, bias=True, full=full, scale=0.5, softcap=softcap)
    hidden_SD, _, _ = make_positions()
    generator = torch.Generator().manual_seed(3)
    targets_SJ = torch.randint(VOCAB_SIZE, (NUM_POSITIONS, 4), generator=generator)
    targets_SJ[:, 3] = targets_SJ[:, 0]
    weights_SJ = torch.rand(NUM_POSITIONS, 4, generator=generator) * (torch.arange(4) != 2)
    expected = by_autograd(head, hidden_SD, targets_SJ, weights_SJ)
    logprobs_SJ, loss, grad_SD = score_and_backpropagate(
        head, hidden_SD, targets_SJ, lambda logprobs_CJ, part: -(weights_SJ[part] * logprobs_CJ).sum()
    )
    found = {"logprobs": logprobs_SJ, "loss": loss, "hidden": grad_SD}
    if full:
        found |= {"weight": head.weight_VD.grad, "bias": head.bias_V.grad}
    if head.lora is not None:
        found |= {"a": head.lora.a_RD.grad, "b": head.lora.b_VR.grad}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(score(head, hidden_SD, targets_SJ), logprobs_SJ)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_most_likely_tokens_are_those_of_all_logits(softcap: float | None) -> None:
    head = make_head(lora=True, bias=True, softcap=softcap)
    hidden_SD, targets_S, _ = make_positions()
    with torch.no_grad():
        columns = [score(head, hidden_SD, torch.full_like(targets_S, v)) for v in range(VOCAB_SIZE)]
    best_SV, tokens_SV = torch.stack(columns, 1).sort(dim=1, descending=True)
    for count in (1, 5, 20, VOCAB_SIZE):
        tokens_SJ, logprobs_SJ = score_top(head, hidden_SD, count)
        torch.testing.assert_close(logprobs_SJ, best_SV[:, :count], rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens_SJ, tokens_SV[:, :count])


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 2000))
def test_the_block_size_does_not_change_the_results(positions: int, vocabulary: int, kept: int) -> None:
    head = make_head(lora=True, blocks=BlockSizes(positions, vocabulary, kept))
    hidden_SD, targets_S, weights_S = make_positions()
    expected = by_autograd(head, hidden_SD, targets_S, weights_S)
    logprobs_S, _, grad_SD = score_and_backpropagate(
        head, hidden_SD, targets_S, lambda logprobs_C, part: -(weights_S[part] * logprobs_C).sum()
    )
    assert head.lora is not None
    found = {"logprobs": logprobs_S, "hidden": grad_SD, "a": head.lora.a_RD.grad, "b": head.lora.b_VR.grad}
    for name, value in found.items():
        assert value is not None
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_nonlinear_loss_is_differentiated_at_the_log_probabilities() -> None:
    head = make_head(lora=True)
    hidden_SD, targets_S, weights_S = make_positions()
    leaf_SD = hidden_SD.clone().requires_grad_()
    assert head.lora is not None
    weight_VD = head.weight_VD + SCALING * head.lora.b_VR @ head.lora.a_RD
    logprobs_S = (leaf_SD @ weight_VD.T).log_softmax(-1)[torch.arange(NUM_POSITIONS), targets_S]
    expected = torch.autograd.grad((weights_S * logprobs_S.exp()).sum(), [leaf_SD, head.lora.b_VR])

    _, _, grad_SD = score_and_backpropagate(
        head, hidden_SD, targets_S, lambda logprobs_C, part: (weights_S[part] * logprobs_C.exp()).sum()
    )
    torch.testing.assert_close(grad_SD, expected[0])
    torch.testing.assert_close(head.lora.b_VR.grad, expected[1])


def test_gradients_are_added_to_existing_ones() -> None:
    head = make_head(lora=True)
    hidden_SD, targets_S, _ = make_positions()
    assert head.lora is not None
    for _ in range(2):
        score_and_backpropagate(head, hidden_SD, targets_S, lambda logprobs_C, part: -logprobs_C.sum())
    twice = head.lora.b_VR.grad
    head.lora.b_VR.grad = None
    score_and_backpropagate(head, hidden_SD, targets_S, lambda logprobs_C, part: -logprobs_C.sum())
    assert twice is not None
    assert head.lora.b_VR.grad is not None
    torch.testing.assert_close(twice, 2 * head.lora.b_VR.grad)


class Products(TorchDispatchMode):
    """Records the shape of every matrix product that torch computes in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(result.shape))
        return result


def test_at_most_one_block_of_logits_exists_at_a_time() -> None:
    hidden_SD, targets_S, _ = make_positions()
    with Products() as products:
        score_and_backpropagate(make_head(), hidden_SD, targets_S, lambda logprobs_C, part: logprobs_C.sum())
    assert sum(positions * width for positions, width in products.shapes) == NUM_POSITIONS * VOCAB_SIZE
    assert max(positions for positions, _ in products.shapes) <= 7
    assert max(width for _, width in products.shapes) <= 11


def test_log_probabilities_are_fp32_whatever_the_model_is() -> None:
    head = make_head(dtype=torch.bfloat16)
    hidden_SD, targets_S, _ = make_positions(torch.bfloat16)
    found_S = score(head, hidden_SD, targets_S)
    assert found_S.dtype == torch.float32
    expected_S = (hidden_SD.float() @ head.weight_VD.float().T).log_softmax(-1)[
        torch.arange(NUM_POSITIONS), targets_S
    ]
    torch.testing.assert_close(found_S, expected_S, rtol=0.02, atol=0.02)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    head = make_head()
    hidden_SD, targets_S, weights_S = make_positions()
    far = Head(head.weight_VD * 300, SMALL_BLOCKS)
    expected = by_autograd(far, hidden_SD, targets_S, weights_S)
    logprobs_S, _, grad_SD = score_and_backpropagate(
        far, hidden_SD, targets_S, lambda logprobs_C, part: -(weights_S[part] * logprobs_C).sum()
    )
    torch.testing.assert_close(logprobs_S.double(), expected["logprobs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_SD.double(), expected["hidden"], rtol=1e-4, atol=1e-3)


def test_no_positions_have_no_log_probabilities() -> None:
    assert score(make_head(), torch.zeros(0, HIDDEN_SIZE), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("lora", [False, True])
def test_is_argmax_equals_the_argmax_over_all_logits(
    lora: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    head = make_head(lora=lora, softcap=softcap, dtype=dtype)
    hidden_SD, targets_S, _ = make_positions(dtype)
    logits_SV = head.queries(hidden_SD) @ head.keys(slice(None)).T
    argmax_S = logits_SV.argmax(1)
    mixed_S = torch.where(torch.arange(NUM_POSITIONS) % 2 == 0, argmax_S, targets_S)
    logprobs_S, is_argmax_S = score_and_compare(head, hidden_SD, mixed_S)
    assert is_argmax_S.tolist() == (mixed_S == argmax_S).tolist()
    assert 0 < int(is_argmax_S.sum()) < NUM_POSITIONS
    torch.testing.assert_close(logprobs_S, score(head, hidden_SD, mixed_S), rtol=0, atol=0)


def test_a_target_that_ties_for_the_maximum_is_not_argmax_in_any_block() -> None:
    head = make_head()
    hidden_SD, _, _ = make_positions()
    hidden_SD = (4 * hidden_SD).round() / 4  # so that every CPU's logits of the block tie exactly
    weight_VD = head.weight_VD.clone()
    weight_VD[[3, 25, 49]] = 20 * hidden_SD[0]
    targets = torch.tensor([3, 25, 49, 4])
    hidden_SD = hidden_SD[:1].expand(4, -1)
    assert (
        score_and_compare(Head(weight_VD, SMALL_BLOCKS), hidden_SD, targets).is_argmax_S.tolist()
        == [False] * 4
    )
    weight_VD[25] *= 1.01
    _, is_argmax = score_and_compare(Head(weight_VD, SMALL_BLOCKS), hidden_SD, targets)
    assert is_argmax.tolist() == [False, True, False, False]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equal_logits_and_nan_have_no_argmax(softcap: float | None) -> None:
    """No token is an argmax: not the first, not the last, and not one in a block of its own."""
    head = make_head(softcap=softcap)
    targets = torch.arange(len(head.weight_VD))
    for value in (0.0, torch.nan):
        hidden_SD = torch.full((len(head.weight_VD), HIDDEN_SIZE), value)
        assert not score_and_compare(head, hidden_SD, targets).is_argmax_S.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.3, 20.0])
def test_a_cap_of_the_config_is_found_in_small_logits_too(dtype: torch.dtype, size: float) -> None:
    config = PreTrainedConfig(final_logit_softcapping=30.0, attn_logit_softcapping=50.0, capacity_factor=1.0)
    projection_SV = (size * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    capped_SV = 30 * torch.tanh(projection_SV / 30)
    assert logit_scaling(config, projection_SV, capped_SV, dtype) == LogitScaling(1.0, 30.0)


def test_a_cap_that_a_model_does_not_apply_is_not_used() -> None:
    config = PreTrainedConfig(final_logit_softcapping=30.0)
    projection_SV = 5 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert logit_scaling(config, projection_SV, projection_SV, torch.float32) == LogitScaling(1.0, None)
