"""Inputs of checkpointed layers in host memory: the same gradients to the bit, and fewer on the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from slow import slow_after
from torch import Tensor

from cookbook.engine.model import estimate, memory
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.estimate import Footprint
from cookbook.engine.model.memory import NEVER, ActivationCost, checkpointed_layers, limits_for
from cookbook.engine.model.offloading import NUM_ON_DEVICE, InputsOnHost
from cookbook.engine.options import EngineOptions
from cookbook.engine.training.trainer import Trainer
from cookbook.errors import TrainingError
from cookbook.types import LoraConfig
from cookbook.utils import pretrained

CPU = torch.device("cpu")


class Offloading(BaseModel):
    """A model whose inputs of layers are copied on a CPU too, in memory that may be too small."""

    can_offload = True  # type: ignore[assignment]
    room = NEVER
    """The tokens that fit if a pass does not offload."""
    room_offloaded = NEVER

    def __init__(self, *arguments: Any) -> None:
        self.passes: list[tuple[bool, bool]] = []
        super().__init__(*arguments)
        self.passes.clear()

    def backpropagate(  # type: ignore[override]
        self,
        batch: Any,
        token_loss: Any,
        checkpoint_layers: bool,
        prepare: Any = None,
        offload_inputs: bool = False,
    ) -> Any:
        self.passes.append((checkpoint_layers, offload_inputs))
        if batch.tokens_1N.numel() > (self.room_offloaded if offload_inputs else self.room):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().backpropagate(batch, token_loss, checkpoint_layers, prepare, offload_inputs)


@pytest.fixture(scope="module")
def folder(make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("offloaded") / "model"
    return str(make_model_folder(path, "qwen3", num_hidden_layers=5))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("model_type", slow_after(1, ["qwen3", "gemma3_text", "zamba2"]))
def test_gradients_are_the_same_to_the_bit(
    model_type: str,
    rank: int,
    make_model_folder: Any,
    make_data: Any,
    gradients_of: Any,
    tmp_path: Path,
) -> None:
    if model_type == "zamba2":  # whose kinds of layers are listed
        path = str(families.save(model_type, tmp_path / "model"))
    else:
        path = str(make_model_folder(tmp_path / "model", model_type, num_hidden_layers=5))
    found = []
    for limit in (NEVER, 0):
        base = Offloading(path, EngineOptions(gradient_checkpointing="on"), rank == 0)
        trainer = Trainer(base, LoraConfig(rank=rank, seed=0))
        trainer.limits.current = memory.MicrobatchLimits(64, 0, max_tokens_without_offloading=limit)
        request = trainer.check(make_data(base.vocab_size, [30, 20, 40]), "cross_entropy", None)
        result = trainer.forward_backward(request)
        assert set(base.passes) == {(True, limit == 0)}
        found.append((result.logprobs(), gradients_of(trainer)))
    (logprobs, gradients), (offloaded_logprobs, offloaded) = found
    assert all((one == other).all() for one, other in zip(logprobs, offloaded_logprobs, strict=True))
    assert gradients.keys() == offloaded.keys()
    assert all(torch.equal(gradients[name], offloaded[name]) for name in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_at_most_two_inputs_are_on_the_device(folder: str) -> None:
    """Plain transformers with an observer of each layer, in both directions."""
    model = pretrained.load_causal_lm(folder).eval()
    layers = memory.decoder_layers(model)
    on_host, counts, alive = InputsOnHost(CPU), [], []

    def observe(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        alive.append(weakref.ref(inputs[0]))
        counts.append(on_host.num_on_device())

    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
    with checkpointed_layers(model, True, on_host):
        hidden_BTD = model.model(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state
    assert counts == [0] + [1] * 4, "when a layer begins, the input of the layer before is still kept"
    assert on_host.num_on_device() == 1
    inputs = [kept.on_host for kept in on_host._inputs]
    assert len(inputs) == len(layers)
    for handle in handles:
        handle.remove()
    again: list[int] = []
    for layer in layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: again.append(on_host.num_on_device()))
    hidden_BTD.sum().backward()
    assert again == [1, 1, 1, 1, 0], "besides the input that the layer uses, the one below was fetched"
    assert max(again) + 1 <= NUM_ON_DEVICE
    assert on_host.num_on_device() == 0


def test_inputs_are_released_after_the_pass(folder: str) -> None:
    model = pretrained.load_causal_lm(folder).eval()
    on_host = InputsOnHost(CPU)
    with checkpointed_layers(model, True, on_host):
        hidden_BTD = model.model(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state
    held = weakref.ref(on_host)
    gc.disable()
    try:
        hidden_BTD.sum().backward()
        del hidden_BTD, on_host
        assert held() is None, "there is no cycle that only the garbage collector would find"
    finally:
        gc.enable()


# -- when ------------------------------------------------------------------------------------


COST = ActivationCost(full=1000, checkpointed=100, inputs=80)


@pytest.mark.parametrize(
    ("checkpointing", "device", "wanted", "expected"),
    [
        ("auto", "cuda", None, (8000, 8000)),
        ("auto", "cpu", None, (4096, NEVER)),
        ("auto", "cuda", 50, (50, 8000)),
        ("on", "cuda", None, (8000, NEVER)),
        ("off", "cuda", None, (800, NEVER)),
        ("offload", "cuda", None, (16384, 0)),
        ("offload", "cuda", 50, (50, 0)),
        ("offload", "cpu", None, (4096, NEVER)),
    ],
)
def test_when_inputs_are_offloaded(
    checkpointing: Any, device: str, wanted: int | None, expected: tuple[int, int]
) -> None:
    options = EngineOptions(gradient_checkpointing=checkpointing, max_tokens_per_microbatch=wanted)
    limits = limits_for(options, torch.device(device), lambda: COST, 1_000_000)
    assert (limits.max_tokens, limits.max_tokens_without_offloading) == expected


@pytest.mark.parametrize("squared", [0.0, 2.5])
def test_the_longest_sequence_with_checkpointing(squared: float) -> None:
    cost = ActivationCost(1000, 100, 0, squared)
    longest = cost.longest_checkpointed(54_321)
    assert cost.bytes_of(longest, is_checkpointed=True) <= 54_321
    assert cost.bytes_of(longest + 1, is_checkpointed=True) > 54_321


@pytest.mark.slow
def test_a_sequence_that_does_not_fit_with_checkpointed_layers_is_offloaded(
    folder: str, make_data: Any, gradients_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    base = Offloading(folder, EngineOptions())
    trainer = Trainer(base, LoraConfig(rank=4, seed=0))
    base.room = 30
    request = trainer.check(make_data(base.vocab_size, [20, 40]), "cross_entropy", None)
    trainer.forward_backward(request)
    plain = (False, False)
    both, in_turn = [plain], [[plain, plain], [plain, (True, False)], [plain, (True, True)]]
    assert base.passes == sum(in_turn, both)
    assert "host memory" in caplog.text
    truth = Trainer(BaseModel(folder, EngineOptions(max_tokens_per_microbatch=1)), LoraConfig(rank=4, seed=0))
    truth.forward_backward(request)
    for name, gradient in gradients_of(truth).items():
        assert torch.allclose(gradients_of(trainer)[name], gradient, atol=1e-6)
    assert trainer.limits.saved()[0] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "advice"), [("auto", "Use a smaller"), ("on", "checkpointing=auto")]
)
def test_what_does_not_fit_even_so_is_an_error(
    checkpointing: Any, advice: str, folder: str, make_data: Any
) -> None:
    base = Offloading(folder, EngineOptions(gradient_checkpointing=checkpointing))
    trainer = Trainer(base, LoraConfig(rank=4, seed=0))
    base.room = base.room_offloaded = 30
    with pytest.raises(TrainingError, match=advice) as raised:
        trainer.forward_backward(trainer.check(make_data(base.vocab_size, [40]), "cross_entropy", None))
    assert "with their inputs in host memory" in str(raised.value)
    assert ((True, True) in base.passes) == (checkpointing == "auto")


# -- the estimate ----------------------------------------------------------------------------


def test_the_estimate_counts_inputs_in_host_memory() -> None:
    found = Footprint(
        num_weights=0, num_active=0, num_head=0, num_trained=0, weights=0.0, adapter=0, training=0,
        undo=0, blocks=0, activations=ActivationCost(2.0**20, 2.0**15, inputs=2.0**14), heads_times_size=0,
    )  # fmt: skip
    room = (2 * 2**30 * 0.9 - estimate.BYTES_OF_CUDA) / memory.MARGIN
    lengths = {
        checkpointing: estimate.longest_sequence(
            found, EngineOptions(gradient_checkpointing=checkpointing), "cuda", 2 * 2.0**30, 10**6
        )
        for checkpointing in ("off", "on", "offload", "auto")
    }  # type: ignore[arg-type]
    assert lengths == {
        "off": int(room / 2**20),
        "on": int(room / 2**15),
        "offload": int(room / 2**14),
        "auto": int(room / 2**14),
    }
    plan = estimate.plan(found, EngineOptions(), "cuda", 2 * 2.0**30, lengths["auto"])
    assert plan.on_host == plan.tokens * 2**14
    assert plan.activations == plan.tokens * 2**14
    assert estimate.plan(found, EngineOptions(), "cuda", 2 * 2.0**30, 1024).on_host == 0
    on_cpu = estimate.longest_sequence(found, EngineOptions(), "cpu", 2 * 2.0**30, 10**6)
    assert on_cpu == int(2 * 2**30 * 0.5 / memory.MARGIN / 2**15)
