"""Compares sampling with packed weights with the model's own forward pass, and lone samples with batches."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from sampled import make_request, moved, plain_logprobs, prepared_with

from cookbook.engine.model import packed_weights
from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.options import EngineOptions
from cookbook.engine.sampling.decoder_probe import make_decoder
from cookbook.engine.sampling.packed_decoder import PackedDecoder
from cookbook.engine.sampling.sampler import Sampler

PROMPTS = [[5, 17, 200], [9], [*range(30, 65)], [8, 8, 8, 8], [77, 3, 1], [4], [*range(70, 82)]]


@pytest.fixture(scope="module", params=["", "lfm2", "qwen3_5", "falcon_h1"])
def base(
    tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> BaseModel:
    """Dense, and with short convolutions, a delta rule (in a multimodal class) and Mamba."""
    folder = tiny_qwen3
    if request.param:
        folder = str(families.save(request.param, tmp_path_factory.mktemp("packed") / request.param))
    base = BaseModel(folder, EngineOptions(device="cpu", pack_weights=True))
    make_decoder(base)
    assert base.packed_weights is not None
    return base


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> Adapter:
    return moved(base)


def sample(base: BaseModel, adapter: Adapter | None, prompts: list[list[int]]) -> list[Any]:
    """Returns a sequence of each prompt. The prompts run at the same time."""
    requests = [make_request(base, prompt=prompt, temperature=1.3, seed=len(prompt)) for prompt in prompts]
    rest = requests[1:]
    Sampler(base, prepared_with(adapter)).run(requests[0], lambda: [rest.pop(0) for _ in rest[:]])
    return [request.future.result(timeout=0).sequences[0] for request in requests]


@pytest.mark.cases(1)
@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_lone_sample_has_the_bits_of_one_in_a_batch(
    base: BaseModel, adapter: Adapter, is_adapted: bool
) -> None:
    """With no more padding than the products need, which the number of tokens that embeddings read shows."""
    used = adapter if is_adapted else None
    sizes: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[-1])
    )
    try:
        alone = [sample(base, used, [prompt])[0] for prompt in PROMPTS]
    finally:
        hook.remove()
    assert base.packed_weights is not None
    multiple = base.packed_weights.row_multiple
    assert {*sizes} == {length + -length % multiple for length in (1, *map(len, PROMPTS))}
    together = sample(base, used, PROMPTS)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
    for prompt, one in zip(PROMPTS, alone, strict=True):
        whole = prompt + one.tokens
        plain = plain_logprobs(base, used, whole)
        expected = [plain[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))]
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_layers_have_their_own_forward_outside_of_sampling(base: BaseModel) -> None:
    sample(base, None, PROMPTS[:1])
    assert not any("forward" in vars(module) for module in packed_weights._linear_layers(base.model))


def test_weights_that_have_changed_are_not_sampled_from_the_copy(tiny_qwen3: str) -> None:
    base = BaseModel(tiny_qwen3, EngineOptions(pack_weights=True))
    sample(base, None, PROMPTS[:1])
    assert base.packed_weights is not None
    assert base.packed_weights.are_current()
    with torch.no_grad():
        for layer in packed_weights._linear_layers(base.model):
            layer.weight.mul_(1.5)
    assert not base.packed_weights.are_current()
    (found,) = sample(base, None, PROMPTS[:1])
    whole = PROMPTS[0] + found.tokens
    plain = plain_logprobs(base, None, whole)
    expected = [plain[t - 1, whole[t]].item() for t in range(len(PROMPTS[0]), len(whole))]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_models_that_cannot_be_packed_are_sampled_with_padding(
    tiny_qwen3: str, make_model_folder: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    mixtral = str(make_model_folder(tmp_path / "mixtral", "mixtral"))
    for folder, options, reason in (
        (mixtral, EngineOptions(pack_weights=True), "is not the weight of a linear layer"),
        (tiny_qwen3, EngineOptions(dtype="bfloat16", pack_weights=True), "they are bfloat16"),
    ):
        base = BaseModel(folder, options)
        assert isinstance(make_decoder(base), PackedDecoder)
        assert base.packed_weights is None
        assert reason in caplog.text
    assert packed_weights.pack(BaseModel(tiny_qwen3).model, torch.float32) is not None
    assert packed_weights.pack(BaseModel(tiny_qwen3).model, torch.float32, share_of_memory=1e-9) is None
    assert "are allowed for it" in caplog.text
