"""Tests that trials in 16 bits tell a model's own rounding from a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.rounding_noise import tolerance_in_16_bits
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.decoder_probe import make_decoder
from cookbook.engine.sampling.packed_decoder import PackedDecoder


def load(name: str, folder: Path) -> BaseModel:
    return BaseModel(str(families.save(name, folder / name)), EngineOptions(dtype="bfloat16"))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name",
    ["gpt_oss"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("qwen3_5", "qwen3_5_moe", "qwen3_next", "zamba2", "jamba", "gemma4_e2b", "falcon_mamba")
    ],
)
def test_models_that_round_to_other_experts_and_states_are_packed_in_bfloat16(
    name: str, tmp_path: Path
) -> None:
    """Each of them failed a trial in bfloat16 whose tolerance was the same for all models."""
    base = load(name, tmp_path)
    assert base.is_packed
    assert not base.is_padded
    assert isinstance(make_decoder(base), PackedDecoder)
    assert base.reuses_prompts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2_moe", "nemotron_h", "falcon_h1", "bamba"])
def test_states_that_cross_the_borders_of_sequences_are_found_in_bfloat16(name: str, tmp_path: Path) -> None:
    base = load(name, tmp_path)
    for mixer in base.recurrent.mixers:
        del mixer.forward  # transformers' own runs across borders
    base.recurrent.mixers.clear()
    base._probe_architecture()
    assert not base.is_packed or base.is_padded


@pytest.mark.parametrize("name", ["llama3", "gpt_oss", "qwen3_moe"])
def test_wrong_positions_are_found_in_bfloat16(name: str, tmp_path: Path) -> None:
    """They change all results a little, and nothing leaks from one sequence into another."""
    base = load(name, tmp_path)

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        is_packed = kwargs.get("layout") is not None
        return args, kwargs | ({"position_ids": 3 * kwargs["position_ids"]} if is_packed else {})

    base.decoder.register_forward_pre_hook(move, with_kwargs=True)
    base._probe_architecture()
    assert base.is_padded


def test_the_tolerance_is_a_multiple_of_what_the_last_bits_of_the_embeddings_change() -> None:
    embeddings = nn.Embedding(8, 16, dtype=torch.bfloat16)
    tokens = torch.arange(8)
    before = embeddings(tokens).float()
    found: list[float] = []

    def own_difference() -> float:
        after = embeddings(tokens).float()
        found.append(((after - before).abs() / before.abs()).max().item())
        return found[-1]

    tolerance = tolerance_in_16_bits(0.001, embeddings, own_difference)
    eps = torch.finfo(torch.bfloat16).eps
    assert len(found) == 3
    assert all(eps / 2 <= each <= 2 * eps for each in found)
    assert tolerance == pytest.approx(4 * max(found))
    assert tolerance_in_16_bits(0.5, embeddings, own_difference) == 0.5
    assert torch.equal(embeddings(tokens).float(), before), "nothing stays behind"
