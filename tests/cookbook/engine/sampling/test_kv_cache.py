"""Compares the KV cache with attention over each complete sequence."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cookbook.engine.model.attention import AttentionLayout, packed_attention
from cookbook.engine.sampling.kv_cache import KVCache, capacity_for
from cookbook.engine.sampling.sequence import Sequence

NUM_HEADS, NUM_QUERY_HEADS, HEAD_SIZE = 2, 4, 8
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 5},
    {"softcap": 0.7},
    {"s_aux": SINKS, "scaling": 0.3},
]


class Uncached:
    """A sequence without a cache: its queries, keys and values at all positions, [H, T, D]."""

    def __init__(self, length: int) -> None:
        request: Any = SimpleNamespace(prompt_T=np.zeros(length))
        self.sequence = Sequence(request, 0, np.random.default_rng(0))
        self.tensors = [torch.randn(heads, length, HEAD_SIZE) for heads in (NUM_QUERY_HEADS, 2, 2)]

    def grow(self) -> None:
        self.sequence.length += 1
        for number, tensor in enumerate(self.tensors):
            self.tensors[number] = torch.cat([tensor, torch.randn(len(tensor), 1, HEAD_SIZE)], dim=1)

    def copy(self) -> Uncached:
        other = Uncached(self.sequence.length)
        other.tensors = list(self.tensors)
        return other

    def attend(self, options: dict[str, Any]) -> Tensor:
        """Returns attention at every position: [T, query heads, D]."""
        out, _ = packed_attention(nn.Module(), *(tensor[None] for tensor in self.tensors), None, **options)
        return out[0]


def begin(cache: KVCache, groups: list[list[Sequence]]) -> None:
    """Begins a prefill of a row in which each group has a segment."""
    ends = np.cumsum([group[0].length for group in groups]).tolist()
    cache.begin_prefill(groups, [[segment] for segment in zip([0, *ends[:-1]], ends, strict=True)], [])


def run_pass(layer: nn.Module, cache: KVCache, parts: list[list[Tensor]], options: dict[str, Any]) -> Tensor:
    """Runs a row of query, key and value parts, with one position of padding at the end."""
    parts = [*parts, [torch.full((heads, 1, HEAD_SIZE), 9.0) for heads in (NUM_QUERY_HEADS, 2, 2)]]
    ends = torch.tensor([part[0].shape[1] for part in parts]).cumsum(0).tolist()
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    layout = AttentionLayout(segments, torch.tensor([0, *ends], dtype=torch.int32), max(ends), cache=cache)
    query, key, value = (torch.cat(tensors, dim=1)[None] for tensors in zip(*parts, strict=True))
    return packed_attention(layer, query, key, value, None, layout=layout, **options)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_every_new_position_sees_exactly_the_earlier_ones_of_its_sequence(options: dict[str, Any]) -> None:
    """Sequences are added, copied, moved to larger buckets and removed in a random order, in two layers."""
    torch.manual_seed(0)
    rng = random.Random(0)
    cache, layers = KVCache(), [nn.Module(), nn.Module()]
    there: list[Uncached] = []
    most_buckets = 0
    for number in range(60):
        if number % 5 == 0:
            arriving = []
            for length in (rng.randint(1, 10), rng.choice([60, 63, 64, 65, 95, 120])):
                first = Uncached(length)
                arriving.append([first, *(first.copy() for _ in range(rng.randint(0, 2)))])
            begin(cache, [[each.sequence for each in copies] for copies in arriving])
            for layer in layers:
                found = run_pass(layer, cache, [copies[0].tensors for copies in arriving], options)
                expected = torch.cat([copies[0].attend(options) for copies in arriving])
                torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-5, atol=1e-6)
            there += [each for copies in arriving for each in copies]
        rng.shuffle(there)
        for each in there:
            each.grow()
        order = cache.begin_decode([each.sequence for each in there])
        for layer in layers:
            last = [[tensor[:, -1:] for tensor in there[index].tensors] for index in order]
            found = run_pass(layer, cache, last, options)
            for place, index in enumerate(order):
                expected = there[index].attend(options)[-1]
                torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-6)
        most_buckets = max(most_buckets, len(cache._buckets))
        while len(there) > rng.randint(3, 12):
            cache.remove(there.pop().sequence)
    assert most_buckets >= 3
    for each in there:
        cache.remove(each.sequence)
    assert not cache._buckets, "empty buckets are freed"


def test_no_row_is_padded_by_more_than_half_and_short_ones_at_most_to_twice_their_length() -> None:
    for length in range(1, 20_000):
        assert length <= capacity_for(length) <= max(64, (1.5 if length > 256 else 2) * length)


@pytest.mark.parametrize("options", OPTIONS)
def test_nan_from_a_removed_row_does_not_reach_later_rows(options: dict[str, Any]) -> None:
    """Neither in its place, nor in the place of a moved row, nor in a bucket that a sequence grows into."""
    torch.manual_seed(0)
    cache, layer = KVCache(), nn.Module()

    def arrive(*arriving: Uncached) -> None:
        begin(cache, [[each.sequence] for each in arriving])
        run_pass(layer, cache, [each.tensors for each in arriving], options)

    def step(there: list[Uncached]) -> None:
        for each in there:
            each.grow()
        order = cache.begin_decode([each.sequence for each in there])
        last = [[tensor[:, -1:] for tensor in there[index].tensors] for index in order]
        found = run_pass(layer, cache, last, options)
        for place, index in enumerate(order):
            torch.testing.assert_close(found[place], there[index].attend(options)[-1], rtol=1e-5, atol=1e-6)

    def with_nan(length: int) -> Uncached:
        sequence = Uncached(length)
        sequence.tensors = [tensor * torch.nan for tensor in sequence.tensors]
        return sequence

    broken, long, grown = with_nan(60), with_nan(90), Uncached(62)
    first = [broken, Uncached(20), long, Uncached(70), grown]
    arrive(*first)
    for each in (broken, long):
        cache.remove(each.sequence)
    there = [first[1], first[3], grown]
    for _ in range(4):  # `grown` moves to the bucket that held `long`
        step(there)
    there += [Uncached(5), Uncached(66)]
    arrive(*there[-2:])
    step(there)
