"""Compares passes that are captured and replayed with the same sampling without them, to the bit.

`RecordedGraph` stands for CUDA's graphs: what was captured is replayed on the memory that it read and wrote,
and all that it should not have read is spoiled.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from outside_world import replace_cuda_graphs
from sampled import make_request, moved, prepared_with

from cookbook.engine.model.adapters import Adapter
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling import decode_graphs
from cookbook.engine.sampling.requests import Request
from cookbook.engine.sampling.sampler import Sampler, SamplingLimits


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseModel], None]:
    """Lets the passes of a model be captured."""

    def begin(base: BaseModel) -> None:
        def kept() -> Iterable[torch.Tensor]:
            return [*base.model.parameters(), *base.model.buffers()]

        replace_cuda_graphs(monkeypatch, kept)

    return begin


def requests_of(base: BaseModel, number: int = 14) -> list[Request]:
    """Returns requests of many lengths, which grow out of their length buckets and end at different times."""
    rng = random.Random(0)
    settings: list[dict[str, Any]] = [{"temperature": 0.8}, {"temperature": 0}, {"top_p": 0.5}, {}]
    return [
        make_request(
            base,
            num_samples=rng.choice([1, 1, 3]),
            prompt=[rng.randrange(3, base.vocab_size) for _ in range(rng.choice([1, 5, 58, 62, 120]))],
            max_tokens=rng.choice([3, 12, 24]),
            seed=index,
            stop_token_ids=list(range(0, base.vocab_size, 90)),
            **settings[index % len(settings)],
        )
        for index in range(number)
    ]


def answers(
    base: BaseModel,
    adapter: Adapter | None,
    at_a_time: int = 14,
    limits: SamplingLimits | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Returns the tokens and log-probabilities of all samples. A request arrives at every other token."""
    requests = requests_of(base)
    waiting, asked = requests[at_a_time:], 0

    def take_waiting() -> list[Request]:
        nonlocal asked
        asked += 1
        return [waiting.pop(0)] if waiting and asked % 2 else []

    sampler = Sampler(base, prepared_with(adapter), limits)
    first = requests[1:at_a_time]
    sampler.run(requests[0], lambda: [first.pop() for _ in first[:]] or take_waiting())
    while waiting:
        sampler.run(waiting.pop(0), list)
    found = [sequence for request in requests for sequence in request.future.result(timeout=0).sequences]
    return [(sequence.tokens, sequence.logprobs) for sequence in found]


def counts(base: BaseModel) -> tuple[int, int]:
    return base.decode_graphs.num_captured, base.decode_graphs.num_replays


@pytest.mark.cases(2)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "qwen2", "llama"])
def test_replayed_passes_sample_the_bits_of_passes_that_are_not_captured(
    family: str, tmp_path: Path, capturing: Callable[[BaseModel], None]
) -> None:
    """All requests at once, one after another, and with a cache so small that sequences are preempted."""
    base = BaseModel(str(families.save(family, tmp_path / "model")))
    adapter = moved(base)
    small = SamplingLimits(max_sequences=12, max_prefill_tokens=200, max_cached_tokens=700)
    ways: list[dict[str, Any]] = [{}, {"at_a_time": 3}, {"limits": small}]
    expected = [answers(base, adapter, **way) for way in ways]
    assert base.decode_graphs is None

    capturing(base)
    for way, each in zip(ways, expected, strict=True):
        assert answers(base, adapter, **way) == each
    captured, replays = counts(base)
    assert captured > 1
    assert replays > 3 * captured


def test_each_adapter_is_sampled_with_its_own_weights(
    tiny_qwen3: str, capturing: Callable[[BaseModel], None]
) -> None:
    """The second is put on after the first was captured, and the weights of the first change between."""
    base = BaseModel(tiny_qwen3)
    first = moved(base)
    truth = {"none": answers(base, None), "first": answers(base, first)}
    capturing(base)
    assert answers(base, first) == truth["first"]
    assert answers(base, None) == truth["none"]
    second = base.adapters.add(first.lora)
    with torch.no_grad():
        for name, weight in second.weights.items():
            weight.copy_(-first.weights[name] + 0.01)
    found = answers(base, second)
    assert found not in truth.values()
    assert answers(base, first) == truth["first"]
    with torch.no_grad():
        for name, weight in first.weights.items():
            weight.copy_(second.weights[name])
    assert answers(base, first) == found
    base.adapters.remove(first)
    assert answers(base, second) == found
    assert counts(base)[1] > 80


def test_weights_that_move_are_captured_anew(tiny_qwen3: str, capturing: Callable[[BaseModel], None]) -> None:
    base = BaseModel(tiny_qwen3)
    capturing(base)
    before = answers(base, None)
    layer = base.decoder.layers[0].mlp.down_proj
    kept = layer.weight  # what was captured reads it
    layer.weight = torch.nn.Parameter(kept.detach() * -3, requires_grad=False)
    after = answers(base, None)
    assert after != before
    base.decode_graphs, base.is_captured = None, False
    assert after == answers(base, None)


def test_a_pass_that_asks_the_device_for_a_value_is_not_captured(
    tmp_path: Path, capturing: Callable[[BaseModel], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without grouped products, which a CPU does not have, experts are told the numbers of their rows.

    Rows of padding choose experts too, and products of other numbers of rows round differently.
    """
    base = BaseModel(str(families.save("mixtral", tmp_path / "model")))
    adapter = moved(base)
    expected = answers(base, adapter)
    capturing(base)
    with caplog.at_level(logging.WARNING):
        for found in (answers(base, adapter), answers(base, adapter)):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
            for (_, one), (_, other) in zip(found, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-5)
    said = [each.getMessage() for each in caplog.records if "CUDA graphs" in each.getMessage()]
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]


def test_a_captured_pass_with_another_result_is_not_used(
    tiny_qwen3: str,
    capturing: Callable[[BaseModel], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = BaseModel(tiny_qwen3)
    of_each_pass = [torch.ones(base.model.config.hidden_size) for _ in range(1000)]

    def add(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out + of_each_pass.pop()

    base.decoder.norm.register_forward_hook(add)
    expected = answers(base, None)
    capturing(base)
    with caplog.at_level(logging.WARNING):
        assert answers(base, None) == expected
    assert "a captured pass differs by" in caplog.text
    assert base.decode_graphs is None


def test_models_with_states_are_decoded_as_ever_and_a_line_says_so(
    tmp_path: Path, capturing: Callable[[BaseModel], None], caplog: pytest.LogCaptureFixture
) -> None:
    base = BaseModel(str(families.save("lfm2", tmp_path / "lfm2")))
    expected = answers(base, None)
    capturing(base)
    with caplog.at_level(logging.INFO):
        assert answers(base, None) == expected
        assert answers(base, None) == expected
    said = [each.getMessage() for each in caplog.records if "CUDA graphs" in each.getMessage()]
    assert len(said) == 1
    assert "its layers keep states" in said[0]


def test_training_frees_what_was_captured(tiny_qwen3: str, capturing: Callable[[BaseModel], None]) -> None:
    base = BaseModel(tiny_qwen3)
    capturing(base)
    expected = answers(base, None)
    captured = counts(base)[0]
    base.forget_prompts()
    assert answers(base, None) == expected
    assert counts(base)[0] > captured


@pytest.mark.parametrize(("sequences", "rows"), [(1, 8), (8, 8), (9, 16), (33, 48), (256, 256), (257, 264)])
def test_passes_have_few_sizes(sequences: int, rows: int) -> None:
    assert decode_graphs.num_rows(sequences, 8) == rows
