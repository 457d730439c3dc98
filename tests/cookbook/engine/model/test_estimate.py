"""Compares estimates from a config with loaded models: weights, optimizer, and what autograd keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cookbook.engine.cards import CARDS
from cookbook.engine.model import estimate, memory
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.estimate import Footprint
from cookbook.engine.options import EngineOptions
from cookbook.engine.training import memory_needs
from cookbook.engine.training.trainer import Trainer
from cookbook.types import LoraConfig

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folder_of(
    make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    root, made = tmp_path_factory.mktemp("estimated"), {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = str(make_model_folder(root / kind, kind, **KINDS[kind]))
        return made[kind]

    return folder


def footprint_of(folder: str, rank: int, **options: Any) -> Footprint:
    config = AutoConfig.from_pretrained(folder)
    return estimate.footprint(config, folder, LoraConfig(rank=rank), EngineOptions(**options), "cpu")


@pytest.mark.cases(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 0])
def test_weights_and_training_state_are_those_of_a_loaded_model(
    kind: str, rank: int, folder_of: Callable[[str], str]
) -> None:
    found = footprint_of(folder_of(kind), rank)
    base = BaseModel(folder_of(kind), is_trained=rank == 0)
    num_weights = sum(weight.numel() for weight in base.model.parameters())
    trainer = Trainer(base, LoraConfig(rank=rank))
    trained = trainer.adapter.weights.values()
    assert found.num_weights == num_weights
    assert found.weights == 4 * num_weights
    assert found.num_trained == sum(weight.numel() for weight in trained)
    assert found.adapter == (sum(weight.nbytes for weight in trained) if rank else 0)
    assert found.fixed == memory_needs.reserved_bytes(base, trainer.adapter)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rank", [4, 0])
def test_activations_are_those_that_autograd_keeps_of_a_loaded_model(
    kind: str, rank: int, folder_of: Callable[[str], str]
) -> None:
    found = footprint_of(folder_of(kind), rank).activations
    base = BaseModel(folder_of(kind), is_trained=rank == 0)
    measured = memory_needs.activation_cost(base, Trainer(base, LoraConfig(rank=rank)).adapter)
    assert found is not None
    assert found.bytes_of(256) == pytest.approx(measured.bytes_of(256), rel=0.03)
    assert found.bytes_of(256, True) == pytest.approx(measured.bytes_of(256, True), rel=0.03)


def test_weights_in_4_bits_take_what_bitsandbytes_holds(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llama")
    found = footprint_of(folder, 4, quantization="nf4")
    model = BaseModel(folder, EngineOptions(quantization="nf4")).model
    held = 0.0
    for weight in model.parameters():
        held += weight.nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:
            held += state.absmax.nbytes
            if state.nested:
                held += state.state2.absmax.nbytes
    assert found.weights == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_weights_in_8_bits_take_a_byte_and_the_scale_of_their_row(
    kind: str, folder_of: Callable[[str], str]
) -> None:
    model = BaseModel(folder_of(kind), EngineOptions(device="cpu", quantization="fp8")).model
    scales = [buffer for name, buffer in model.named_buffers() if name.endswith("_scale")]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *scales))
    assert footprint_of(folder_of(kind), 4, quantization="fp8").weights == held


# -- plans ------------------------------------------------------------------------------------


@pytest.fixture
def found() -> Footprint:
    """A model of 100 MiB whose tokens keep 1 MiB each, and 32 KiB where layers run again."""
    return Footprint(
        num_weights=0, num_active=0, num_head=0, num_trained=0, weights=100 * 2.0**20, adapter=0, training=0,
        undo=0, blocks=0, activations=memory.ActivationCost(2.0**20, 2.0**15), heads_times_size=0,
    )  # fmt: skip


def plan_on(
    found: Footprint, gib: float, longest: int = 1024, batch: int | None = None
) -> estimate.MemoryPlan:
    return estimate.plan(found, EngineOptions(), "cuda", gib * 2**30, longest, batch)


def test_a_micro_batch_is_what_the_engine_plans(found: Footprint) -> None:
    plan = plan_on(found, 12)
    room = 12 * 2**30 * 0.9 - 100 * 2**20
    assert plan.tokens == pytest.approx(room / memory.MARGIN / 2**20, abs=2)
    assert (plan.is_checkpointed, plan.fits) == (False, True)
    assert plan.activations == pytest.approx(plan.tokens * 2**20)


def test_layers_run_again_where_memory_needs_it(found: Footprint) -> None:
    plan = plan_on(found, 1.4)
    assert plan.is_checkpointed
    assert plan.fits
    assert plan.activations == pytest.approx(plan.tokens * 2**15)


def test_a_model_that_is_too_large_does_not_fit(found: Footprint) -> None:
    assert not plan_on(dataclasses.replace(found, weights=2.0**31), 1.5).fits


def test_a_sequence_that_only_fits_with_checkpointed_layers_is_planned_with_them(found: Footprint) -> None:
    """Blocks of logits are not counted in the limits, so the plan may exceed the memory."""
    plan = plan_on(dataclasses.replace(found, blocks=3 * 2**30), 6, longest=3000)
    assert (plan.tokens, plan.is_checkpointed, plan.fits) == (3000, True, True)


@pytest.mark.parametrize(
    ("gib", "context", "squared"), [(1.4, 30_000, 0.0), (1.4, 500, 0.0), (0.5, 500, 0.0), (2, 30_000, 9.5)]
)
def test_the_longest_sequence_is_the_last_that_fits(
    gib: float, context: int, squared: float, found: Footprint
) -> None:
    cost = memory.ActivationCost(2.0**20, 2.0**15, 20 * squared, squared)
    found = dataclasses.replace(found, activations=cost)
    longest = estimate.longest_sequence(found, EngineOptions(), "cuda", gib * 2**30, context)
    room = (gib * 2**30 * 0.9 - estimate.BYTES_OF_CUDA - 100 * 2**20) / memory.MARGIN
    expected = 0
    while expected < context and (expected + 1) * 2**15 + (expected + 1) ** 2 * squared <= room:
        expected += 1
    assert longest == expected


def test_a_small_batch_takes_no_more_than_its_tokens(found: Footprint) -> None:
    assert plan_on(found, 40, longest=100, batch=300).activations == pytest.approx(300 * 2**20)


def test_scores_that_are_kept_grow_with_the_square_of_a_sequence(found: Footprint) -> None:
    eager = dataclasses.replace(found, activations=memory.ActivationCost(2.0**20, 2.0**15, 2.0**10, 0.0))
    plan = plan_on(eager, 60, longest=2048, batch=4096)
    assert plan.activations == pytest.approx(2 * (2048 * 2**20 + 2048**2 * 2**10))


def test_cards_have_less_memory_than_their_names_say() -> None:
    for card in CARDS.values():
        assert card.memory < float(card.name.split()[-2]) * 2**30
