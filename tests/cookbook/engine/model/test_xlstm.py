"""xLSTM trains texts of any length, and in 16 bits, where transformers does not."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import TokenSequence, pack
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.types import LoraConfig

LONGEST_IN_EVALUATION = 32
TOKENS_T = np.random.default_rng(0).integers(3, 300, 50)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = families.save("xlstm", tmp_path_factory.mktemp("models") / "xlstm")
    config = AutoConfig.from_pretrained(folder)
    config.max_inference_chunksize = LONGEST_IN_EVALUATION
    config.save_pretrained(folder)
    return folder


def logprobs(folder: Path, dtype: str, lengths: tuple[int, ...]) -> torch.Tensor:
    base = BaseModel(str(folder), EngineOptions(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    texts = [TOKENS_T[: length + 1] for length in lengths]
    rows = [TokenSequence(text[:-1], text[1:], np.ones(len(text) - 1, np.float32), {}) for text in texts]
    with torch.no_grad():
        return base.logprobs(pack(rows, base.device, trained_only=True, is_padded=base.is_padded))


def test_a_text_longer_than_evaluation_mode_takes_at_once_is_trained(published: Path, tmp_path: Path) -> None:
    base = BaseModel(str(published), EngineOptions(device="cpu"))
    assert base.model.config.max_inference_chunksize == LONGEST_IN_EVALUATION
    Trainer(base, LoraConfig(rank=0))
    text = TokenSequence(TOKENS_T[:-1], TOKENS_T[1:], np.ones(len(TOKENS_T) - 1, np.float32), {})
    batch = pack([text], base.device, trained_only=True, is_padded=base.is_padded)
    base.backpropagate(batch, lambda logprobs_S, part: -logprobs_S.sum(), checkpoint_layers=False)

    plain = AutoModelForCausalLM.from_pretrained(published).train()  # it has no dropout
    logits_TV = plain(input_ids=torch.from_numpy(text.tokens_T)[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits_TV, torch.from_numpy(text.targets_T), reduction="sum").backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    assert len(expected) > 20
    for name, weight in base.model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)

    base.model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.max_inference_chunksize == LONGEST_IN_EVALUATION


def test_in_bfloat16_its_error_is_no_larger_than_with_the_cache_of_transformers(published: Path) -> None:
    """Without a cache transformers fails in 16 bits: its states are float32 from the first chunk on."""
    length = len(TOKENS_T) - 1
    exact, found = (logprobs(published, dtype, (length,)) for dtype in ("float32", "bfloat16"))
    plain = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    tokens = torch.from_numpy(TOKENS_T)
    with torch.no_grad():
        logits_TV = plain(input_ids=tokens[None, :-1], use_cache=True).logits[0].float()
    theirs = logits_TV.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    assert 0 < (found - exact).norm() < (theirs - exact).norm()
