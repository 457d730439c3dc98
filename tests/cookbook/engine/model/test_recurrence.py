"""Tests that recurrent layers keep packed sequences apart, against plain transformers.

Shape suffixes: N tokens of a packed row, D hidden size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import numpy as np
import outside_world
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cookbook.engine.model import prefix_tree
from cookbook.engine.model.attention import AttentionLayout
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.model.recurrence import RecurrentLayers, SplitRow, batches_by_length
from cookbook.engine.options import EngineOptions

FAST = ["qwen3_5", "nemotron_h", "jamba", "lfm2_moe", "minimax"]
"""Gated delta net, Mamba-2, Mamba-1, short convolutions, lightning attention."""
SLOW = [
    "qwen3_5_moe",
    "qwen3_next",
    "olmo_hybrid",
    "kimi_linear",
    "falcon_h1",
    "granitemoehybrid",
    "granitemoehybrid_dense",
    "bamba",
    "zamba2",
    "falcon_mamba",
    "lfm2",
    "lfm3",
]
HYBRIDS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
DELTA_RULES = {"qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_linear"}
LENGTHS = (37, 1, 18, 90, 3, 64)


def make_sequences(lengths: Any = LENGTHS) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 373, length + 1) for length in lengths]
    return [
        TokenSequence(text[:-1], text[1:], rng.choice([0.5, 1.0, 2.0], len(text) - 1).astype(np.float32), {})
        for text in texts
    ]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: families.save(name, folder / name))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients by the names of the text class, and clears them."""
    found = {
        name.replace("language_model.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def plain_gradients(
    folder: Path, sequences: list[TokenSequence], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Returns the sum of the gradients of single sequences, in the published class."""
    model = families.load(folder, dtype)
    model.requires_grad_(True)
    for sequence in sequences:
        logits_TV = model(input_ids=torch.from_numpy(sequence.tokens_T)[None], use_cache=False).logits[0]
        losses_T = nn.functional.cross_entropy(
            logits_TV.float(), torch.from_numpy(sequence.targets_T), reduction="none"
        )
        (losses_T * torch.from_numpy(sequence.weights_T)).sum().backward()
    return gradients(model)


def packed_gradients(
    base: BaseModel, sequences: list[TokenSequence], checkpoint: bool, shares: bool = False
) -> dict[str, Tensor]:
    base.model.requires_grad_(True)
    batch = packed(sequences, shares)
    base.backpropagate(
        batch, lambda logprobs_S, part: -(logprobs_S * batch.weights_P[part]).sum(), checkpoint
    )
    return gradients(base.model)


def packed(sequences: list[TokenSequence], shares: bool) -> PackedBatch:
    found = prefix_tree.families([one.tokens_T for one in sequences], 1 if shares else None)
    return pack(
        [sequences[index] for family in found for index in family.indices],
        torch.device("cpu"),
        trained_only=True,
        families=found,
    )


def error_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Returns the relative error of each gradient that is more than rounding."""
    assert found.keys() >= expected.keys()
    smallest = 1e-5 * max(float(gradient.norm()) for gradient in expected.values())
    return {
        name: float((found[name].double() - gradient.double()).norm() / gradient.double().norm())
        for name, gradient in expected.items()
        if gradient.norm() > smallest
    }


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_gradients_equal_those_of_plain_transformers_one_sequence_at_a_time(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    sequences = make_sequences()
    expected = plain_gradients(folder_of(name), sequences)
    base = BaseModel(str(folder_of(name)), EngineOptions(dtype="float32"))
    assert base.is_packed
    for checkpoint in (False, True):
        errors = error_of(packed_gradients(base, sequences, checkpoint), expected)
        assert len(errors) > 10
        assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


def make_tree() -> list[TokenSequence]:
    """Sequences that branch off from one another at different places, in batches of several lengths."""
    texts = [sequence.tokens_T for sequence in make_sequences((150, 9, 20, 1, 7, 64))]
    stem = texts[0]
    ends = [(texts[0], 0), (texts[1], 37), (texts[2], 90), (texts[3], 90), (texts[4], 12), (texts[5], 0)]
    found = []
    for end, num_shared in ends:
        text = np.concatenate([stem[:num_shared], end])
        found.append(TokenSequence(text, np.roll(text, -1), np.ones(len(text), np.float32), {}))
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", HYBRIDS)
def test_gradients_of_shared_beginnings_equal_those_of_plain_transformers_one_sequence_at_a_time(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """A delta rule rounds differently where its chunks begin elsewhere: gradients of qwen3_5 by transformers
    itself differ by 6e-4 with chunks of 16 tokens. `test_recurrent_trees` compares the rule alone.
    """
    sequences = make_tree()
    tolerance = 1.5e-3 if name in DELTA_RULES else 1e-4
    expected = plain_gradients(folder_of(name), sequences)
    base = BaseModel(str(folder_of(name)), EngineOptions(dtype="float32"))
    assert base.min_shared_tokens is not None
    for checkpoint in (False, True):
        errors = error_of(packed_gradients(base, sequences, checkpoint, shares=True), expected)
        assert len(errors) > 10
        assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "lfm2_moe"])
def test_projections_are_run_once_for_tokens_that_sequences_share(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """Scans are batched products, and do not count as products of two matrices."""
    base = BaseModel(str(folder_of(name)), EngineOptions(dtype="float32"))
    operations, tokens = [], []
    for shares in (True, False):
        batch = packed(make_tree(), shares)
        with FlopCounterMode(display=False) as counter:
            base.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
        counts = counter.get_flop_counts()["Global"]
        operations.append(counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0))
        tokens.append(batch.tokens_1N.shape[1])
    assert tokens == [251, 480]
    assert operations[0] / operations[1] <= 251 / 480, "without sharing, padding is computed too"


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", HYBRIDS)
def test_nan_in_one_packed_sequence_does_not_spread_through_a_recurrent_layer(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    base = BaseModel(str(folder_of(name)), EngineOptions(dtype="float32"))
    sequences = make_sequences((20, 11, 30))
    batch = pack(sequences, base.device, trained_only=False)
    before = batch.layout.split(base.logprobs(batch).numpy())

    def set_nan(module: nn.Module, inputs: Any, embeddings_1ND: Tensor) -> Tensor:
        with_nan_1ND = embeddings_1ND.clone()
        with_nan_1ND[:, 20:31] = torch.nan
        return with_nan_1ND

    with base.model.get_input_embeddings().register_forward_hook(set_nan):
        after = batch.layout.split(base.logprobs(batch).numpy())
    assert np.isnan(after[1]).all()
    for index in (0, 2):
        np.testing.assert_allclose(after[index], before[index], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["qwen3_5", pytest.param("bamba", marks=pytest.mark.slow), pytest.param("lfm2", marks=pytest.mark.slow)],
)
def test_packed_gradients_in_bfloat16_are_as_accurate_as_those_of_plain_transformers(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """The truth is computed in fp32 from the same rounded weights. States are fp32 in both."""
    model, folder = families.make(name), folder_of(name).parent / f"{name}-mild"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1).copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    families.make_tokenizer().save_pretrained(folder)
    sequences = make_sequences((37, 18, 50))
    expected = plain_gradients(folder, sequences)
    plain = error_of(plain_gradients(folder, sequences, torch.bfloat16), expected)
    base = BaseModel(str(folder), EngineOptions(dtype="bfloat16"))
    assert base.is_packed
    packed = error_of(packed_gradients(base, sequences, False), expected)
    assert np.median(list(packed.values())) < 1.5 * np.median(list(plain.values()))


def test_a_model_whose_states_between_layers_are_fp32_is_packed_in_bfloat16(
    folder_of: Callable[[str], Path],
) -> None:
    """Its class converts them before the projection to the vocabulary."""
    folder, sequences = folder_of("falcon_mamba"), make_sequences((37, 18, 50))
    base = BaseModel(str(folder), EngineOptions(dtype="bfloat16"))
    assert base.is_packed
    assert base.packs_all_lengths
    batch = pack(sequences, base.device, trained_only=False)
    with torch.no_grad():
        found = batch.layout.split(base.logprobs(batch).numpy())
        for sequence, logprobs_T in zip(sequences, found, strict=True):
            logits_TV = base.model(torch.from_numpy(sequence.tokens_T)[None]).logits[0].float()
            targets_T = torch.from_numpy(sequence.targets_T)
            expected_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
            np.testing.assert_allclose(logprobs_T, expected_T.numpy(), atol=0.05)


@pytest.mark.slow
def test_without_splitting_a_hybrid_is_padded(folder_of: Callable[[str], Path]) -> None:
    """The fault that splitting repairs: the torch fallbacks run across the borders of sequences."""
    base = BaseModel(str(folder_of("lfm2_moe")), EngineOptions(dtype="float32"))
    batch = pack(make_sequences(), base.device, trained_only=False)
    expected_S = base.logprobs(batch)
    for mixer in base.recurrent.mixers:
        del mixer.forward
    assert (base.logprobs(batch) - expected_S).abs().max() > 0.01
    base.recurrent.mixers.clear()
    base._probe_architecture()
    assert base.is_padded


# -- with kernels ---------------------------------------------------------------------------


WITH_KERNELS = {
    "qwen3_5": ("qwen3_5", {"causal_conv1d_fn", "torch_chunk_gated_delta_rule"}),
    "nemotron_h": ("nemotron_h", {"causal_conv1d_fn", "mamba2_chunk_scan"}),
    "lfm2_moe": ("lfm2_moe", {"causal_conv1d_fn"}),
}


def modeling_file(model_type: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_get_the_borders_and_gradients_equal_those_of_one_sequence_at_a_time(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins for kernels keep sequences apart only by the borders that they get."""
    model_type, functions = WITH_KERNELS[name]
    sequences = make_sequences()
    expected = plain_gradients(folder_of(name), sequences)
    calls = outside_world.install_kernels(monkeypatch, modeling_file(model_type))
    base = BaseModel(str(folder_of(name)), EngineOptions(dtype="float32"))
    assert base.is_packed
    assert base.recurrent.passes_borders
    calls.clear()
    errors = error_of(packed_gradients(base, sequences, checkpoint=False), expected)
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])
    assert set(calls) == functions
    assert len(calls) == len(functions) * len(base.recurrent.mixers)


@pytest.mark.slow
def test_with_kernels_that_ignore_the_borders_rows_are_split(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = make_sequences()
    expected = plain_gradients(folder_of("qwen3_5"), sequences)
    calls = outside_world.install_kernels(monkeypatch, modeling_file("qwen3_5"), keep_apart=False)
    base = BaseModel(str(folder_of("qwen3_5")), EngineOptions(dtype="float32"))
    assert calls, "the kernels were not tried"
    assert base.is_packed
    assert not base.recurrent.passes_borders
    errors = error_of(packed_gradients(base, sequences, checkpoint=False), expected)
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.slow
def test_without_kernels_rows_are_split(folder_of: Callable[[str], Path]) -> None:
    base = BaseModel(str(folder_of("qwen3_5")), EngineOptions(dtype="float32"))
    assert base.is_packed
    assert not base.recurrent.passes_borders


class RunningSum(nn.Module):
    """A mixer whose result at a token is the sum of its sequence so far. It also takes a pair of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1)
        self.shapes: list[tuple[int, ...]] = []

    def forward(
        self, hidden_1ND: Tensor, pair: tuple[Tensor, Tensor], cache: None = None
    ) -> tuple[Tensor, Any]:
        self.shapes.append(tuple(hidden_1ND.shape))
        state = hidden_1ND.sum(1)
        return (hidden_1ND + pair[0] + pair[1][..., None]).cumsum(1), state


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = RunningSum()

    def forward(self, *inputs: Any, layout: Any = None, **arguments: Any) -> Any:
        return self.mixer(*inputs, **arguments)


def test_a_mixer_runs_over_batches_of_similar_lengths_and_its_results_are_joined_in_order() -> None:
    decoder = Decoder()
    RecurrentLayers(decoder)
    batch = pack(make_sequences((700, 2, 690, 1)), torch.device("cpu"), trained_only=False)
    hidden_1ND = torch.randn(1, 1393, 3, dtype=torch.float64)
    pair = (torch.randn(1, 1393, 3), torch.randn(1, 1393))
    found_1ND, state = decoder(hidden_1ND, pair, cache=None, layout=batch.attention)
    total_1ND = hidden_1ND + pair[0] + pair[1][..., None]
    expected = [total_1ND[:, start:stop].cumsum(1) for start, stop in batch.attention.segments]
    torch.testing.assert_close(found_1ND, torch.cat(expected, dim=1))
    assert state is None
    assert sorted(decoder.mixer.shapes) == [(2, 2, 3), (2, 700, 3)]


def test_without_a_layout_a_mixer_runs_as_it_is() -> None:
    """Also after a packed row of the same length."""
    decoder = Decoder()
    RecurrentLayers(decoder)
    hidden_1ND = torch.randn(1, 9, 3)
    inputs = hidden_1ND, (hidden_1ND, hidden_1ND[..., 0])
    decoder(*inputs, layout=pack(make_sequences((5, 4)), torch.device("cpu"), False).attention)
    _, state = decoder(*inputs)
    assert decoder.mixer.shapes == [(2, 5, 3), (1, 9, 3)]
    assert state.shape == (1, 3)


def test_batches_hold_every_sequence_once_and_are_padded_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 200).tolist()
    batches = batches_by_length(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert len(batches) < 40


def test_a_batch_of_several_sequences_is_padded_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 100).tolist()
    batches = batches_by_length(lengths, max_tokens=250)
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert all(
        len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 250 for batch in batches
    )


def test_splitting_and_joining_a_row_gives_the_row() -> None:
    segments = [(0, 5), (5, 400), (400, 403), (403, 404)]
    row = SplitRow.of(AttentionLayout(segments, torch.empty(0), longest=395))
    tokens_1N = torch.arange(1, 405)[None]
    parts = row.split(tokens_1N)
    assert [part.shape for part in parts] == row.shapes
    torch.testing.assert_close(row.join(parts), tokens_1N)
    assert row.split("other") == ["other"] * len(parts)
