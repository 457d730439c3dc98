"""MLPs of checkpointed layers in tiles of their tokens: the same gradients, and activations of one tile."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from slow import slow_after
from torch import nn

from cookbook.engine.model import estimate, memory
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.memory import ActivationCost, MicrobatchLimits, limits_for
from cookbook.engine.model.tiled_mlp import mlps_in
from cookbook.engine.options import EngineOptions
from cookbook.engine.training import memory_needs
from cookbook.engine.training.trainer import Trainer
from cookbook.types import LoraConfig

ON = EngineOptions(device="cpu", gradient_checkpointing="on")
LENGTHS = [30, 20, 41]
TILE = 16
QUICK = ("qwen3", "mixtral", "zamba2", "gpt_neox")


def run(base: BaseModel, tile: int, make_data: Any, gradients_of: Any, **lora: Any) -> tuple[Any, Any]:
    """Returns log-probabilities and gradients of a pass."""
    base.mlp_tile = tile
    trainer = Trainer(base, LoraConfig(**{"rank": 4, "seed": 0, **lora}))
    generator = torch.Generator().manual_seed(0)
    if not trainer.adapter.is_full:
        with torch.no_grad():
            for weight in trainer.adapter.weights.values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    trainer.limits.current = MicrobatchLimits(128, 0)
    request = trainer.check(make_data(base.vocab_size, LENGTHS), "cross_entropy", None)
    result = trainer.forward_backward(request)
    found = result.logprobs(), gradients_of(trainer)
    base.adapters.remove(trainer.adapter)
    return found


def assert_close(found: tuple[Any, Any], expected: tuple[Any, Any], tolerance: float = 1e-6) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert abs(one - other).max() <= 10 * tolerance
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(found[1][name], gradient, rtol=0, atol=tolerance * max(scale, 1e-3)), name
    assert any(gradient.abs().max() > 0 for gradient in found[1].values())


@pytest.mark.cases(2)
@pytest.mark.parametrize("lora", [{}, {"rank": 0}, {"dropout": 0.3}, {"train_mlp": False}], ids=str)
def test_gradients_are_those_without_tiles(
    lora: dict[str, Any], tiny_qwen3: str, make_data: Any, gradients_of: Any
) -> None:
    options = EngineOptions(device="cpu", gradient_checkpointing="on")
    found, expected = (
        run(BaseModel(tiny_qwen3, options, lora.get("rank") == 0), tile, make_data, gradients_of, **lora)
        for tile in (TILE, 0)
    )
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_after(2, ["gemma3_text", "zamba2", "qwen3_5", "phi3", "mixtral", "gpt_neox"])
)
def test_families_have_the_gradients_of_plain_layers(
    name: str, make_data: Any, gradients_of: Any, tmp_path: Path
) -> None:
    folder = str(families.save(name, tmp_path / "model"))
    found, expected = (run(BaseModel(folder, ON), tile, make_data, gradients_of) for tile in (TILE, 0))
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize(
    "name", slow_after(4, [*QUICK, *(name for name in families.FAMILIES if name not in QUICK)])
)
def test_what_runs_in_tiles_sees_one_token_at_a_time(name: str) -> None:
    """Every module that is found is run on a part of its tokens, for which it has to return the same."""
    model = families.make(name).eval()
    found = [module for layer in memory.decoder_layers(model) for module in mlps_in(layer)]
    for module in found:
        (size, *_) = [child.in_features for child in module.modules() if isinstance(child, nn.Linear)]
        x_1TD = torch.randn(1, 7, size, dtype=next(module.parameters()).dtype)
        with torch.no_grad():
            torch.testing.assert_close(module(x_1TD[:, 3:]), module(x_1TD)[:, 3:])
    if name in ("qwen3", "gpt_neox"):
        assert len(found) == model.config.num_hidden_layers


def test_experts_with_an_adapter_are_no_mlp(make_data: Any, gradients_of: Any, tmp_path: Path) -> None:
    """Phi MoE has nothing else in a block of experts than a linear router."""
    folder = str(families.save("phimoe", tmp_path / "model"))
    with_tiles, without = (run(BaseModel(folder, ON), tile, make_data, gradients_of) for tile in (TILE, 0))
    assert_close(with_tiles, without, 2e-6)


@pytest.fixture(scope="module")
def wide(make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose MLP keeps most of the activations."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return str(make_model_folder(path, "qwen3", num_hidden_layers=2, intermediate_size=1024))


def test_an_mlp_runs_twice_on_each_token_and_not_again_with_its_layer(
    wide: str, make_data: Any, gradients_of: Any
) -> None:
    base = BaseModel(wide, ON)
    num_rows: Counter[int] = Counter()
    for layer in memory.decoder_layers(base.model):
        layer.mlp.down_proj.register_forward_hook(
            lambda module, inputs, output: num_rows.update({inputs[0].numel() // 1024: 1})
        )
    run(base, TILE, make_data, gradients_of, train_mlp=False)
    num_tiles, rest = divmod(sum(LENGTHS), TILE)
    del num_rows[64], num_rows[128]  # passes that measure activations
    assert num_rows == {TILE: 2 * 2 * num_tiles, rest: 2 * 2}


def peak_bytes(work: Callable[[], Any]) -> int:
    """Returns the most bytes that torch has allocated in `work`, by its profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
def test_the_memory_of_a_long_sequence_falls_by_what_the_cost_says(wide: str, make_data: Any) -> None:
    length = 250

    def measured(tile: int) -> tuple[int, float]:
        base = BaseModel(wide, ON)
        base.mlp_tile = tile
        trainer = Trainer(base, LoraConfig(rank=4, seed=0, train_unembed=False))
        trainer.limits.current = MicrobatchLimits(length, 0)
        request = trainer.check(make_data(base.vocab_size, [length]), "cross_entropy", None)
        trainer.forward_backward(request)
        peak = peak_bytes(lambda: trainer.forward_backward(request))
        return peak, memory_needs.activation_cost(base, trainer.adapter).bytes_of(length, True)

    peaks, costs = zip(measured(0), measured(16), strict=True)
    assert costs[1] < 0.45 * costs[0]
    assert peaks[0] - peaks[1] >= costs[0] - costs[1], "gradients of what the MLP keeps are of a tile too"
    assert peaks[1] < 0.6 * peaks[0]


def test_nothing_is_kept_after_the_pass(tiny_qwen3: str, make_data: Any) -> None:
    base = BaseModel(tiny_qwen3, ON)
    base.mlp_tile = TILE
    trainer = Trainer(base, LoraConfig(rank=4, seed=0))
    trainer.limits.current = MicrobatchLimits(128, 0)
    seen: list[Any] = []
    for layer in memory.decoder_layers(base.model):
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(weakref.ref(inputs[0])))
    request = trainer.check(make_data(base.vocab_size, LENGTHS), "cross_entropy", None)
    gc.disable()
    try:
        trainer.forward_backward(request)
        assert seen
        assert [one() for one in seen if one() is not None] == []
    finally:
        gc.enable()


def test_tiles_are_off_where_layers_are_compiled(tiny_qwen3: str) -> None:
    assert BaseModel(tiny_qwen3, EngineOptions(device="cpu")).mlp_tile > 0
    assert BaseModel(tiny_qwen3, EngineOptions(device="cpu", compile=True)).mlp_tile == 0


# -- the memory model ------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [0.0, 0.01])
@pytest.mark.parametrize("room", [5_000, 54_321, 2_000_000])
def test_the_longest_sequence_with_tiles(room: float, squared: float) -> None:
    cost = ActivationCost(1000, 100, 0, squared, tiled=60, tile=128)
    longest = cost.longest_checkpointed(room)
    assert cost.bytes_of(longest, is_checkpointed=True) <= room
    assert cost.bytes_of(longest + 1, is_checkpointed=True) > room


@pytest.mark.slow
def test_the_estimate_counts_tiles_as_the_engine_measures_them(wide: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(wide)
    found = estimate.footprint(config, wide, LoraConfig(rank=4), EngineOptions(), "cpu").activations
    base = BaseModel(wide, EngineOptions(device="cpu"))
    measured = memory_needs.activation_cost(base, Trainer(base, LoraConfig(rank=4)).adapter)
    assert found is not None
    assert found.tile == measured.tile == base.mlp_tile
    assert found.tiled == pytest.approx(measured.tiled, rel=0.03)
    assert found.bytes_of(10_000, True) == pytest.approx(measured.bytes_of(10_000, True), rel=0.03)
    assert found.bytes_of(10_000, True) < 0.5 * (found.checkpointed * 10_000)
    compiled = estimate.footprint(config, wide, LoraConfig(rank=4), EngineOptions(compile=True), "cpu")
    assert compiled.activations is not None
    assert compiled.activations.tiled == 0


def test_auto_takes_longer_sequences_on_the_device_before_it_offloads() -> None:
    plain, tiled = (
        ActivationCost(1000, 100, inputs=40),
        ActivationCost(1000, 100, inputs=40, tiled=50, tile=128),
    )
    limits = [
        limits_for(EngineOptions(), torch.device("cuda"), lambda cost=cost: cost, 1_000_000)
        for cost in (plain, tiled)
    ]
    assert [one.max_tokens_without_offloading for one in limits] == [8000, (800_000 - 50 * 128) // 50]
