"""Log-probabilities in chunks equal a softmax over all the logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cookbook.engine import projection
from cookbook.engine.projection import token_logprobs

NUM_POSITIONS, HIDDEN_SIZE, VOCAB_SIZE = 23, 8, 50


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden_SD = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator).to(dtype).requires_grad_()
    targets_S = torch.randint(VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)
    project = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    with torch.no_grad():
        project.weight.copy_(torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator))
    return hidden_SD, targets_S, project.to(dtype)


@pytest.mark.parametrize("chunk_positions", [1, 7, 22, 23, 1000])
def test_chunks_give_the_log_softmax_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk_positions: int
) -> None:
    hidden_SD, targets_S, project = make()
    logits_SV = hidden_SD.double() @ project.weight.double().T + project.bias.double()
    expected_S = logits_SV.log_softmax(-1)[torch.arange(NUM_POSITIONS), targets_S]
    weights_S = torch.linspace(-1, 2, NUM_POSITIONS)
    expected = torch.autograd.grad((weights_S * expected_S).sum(), [hidden_SD, project.weight, project.bias])

    monkeypatch.setattr(projection, "MAX_CHUNK_ELEMENTS", chunk_positions * VOCAB_SIZE)
    found_S = token_logprobs(hidden_SD, targets_S, project, VOCAB_SIZE)
    found = torch.autograd.grad((weights_S * found_S).sum(), [hidden_SD, project.weight, project.bias])

    torch.testing.assert_close(found_S, expected_S.float())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float())


def test_no_more_logits_exist_at_once_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_SD, targets_S, project = make()
    sizes: list[int] = []

    def watched(hidden_CD: Tensor) -> Tensor:
        sizes.append(hidden_CD.shape[0])
        return project(hidden_CD)

    monkeypatch.setattr(projection, "MAX_CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    with torch.no_grad():
        token_logprobs(hidden_SD, targets_S, watched, VOCAB_SIZE)
    assert sizes == [5, 5, 5, 5, 3]


def test_log_probabilities_are_fp32_whatever_the_model_is() -> None:
    hidden_SD, targets_S, project = make(torch.bfloat16)
    found_S = token_logprobs(hidden_SD, targets_S, project, VOCAB_SIZE)
    assert found_S.dtype == torch.float32
    expected_S = project(hidden_SD).float().log_softmax(-1)[torch.arange(NUM_POSITIONS), targets_S]
    torch.testing.assert_close(found_S, expected_S)


def test_a_chunk_has_one_position_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_SD, targets_S, project = make()
    whole_S = token_logprobs(hidden_SD, targets_S, project, VOCAB_SIZE)
    monkeypatch.setattr(projection, "MAX_CHUNK_ELEMENTS", VOCAB_SIZE - 1)
    torch.testing.assert_close(token_logprobs(hidden_SD, targets_S, project, VOCAB_SIZE), whole_S)
