"""Tests that states are handed to the branches of a row, against each sequence alone.

Shape suffixes: N tokens of the row, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from cookbook.engine.model import prefix_tree, recurrent_trees
from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.model.packing import TokenSequence, pack
from cookbook.engine.model.recurrence import batches_by_length
from cookbook.engine.model.recurrent_trees import StateTree, TreeFunctions
from cookbook.engine.options import EngineOptions

CPU = torch.device("cpu")


def packed(texts: list[list[int]]) -> Any:
    """Returns the row of these texts, with what they share once."""
    sequences = [
        TokenSequence(np.array(text), np.array(text), np.ones(len(text), np.float32), {}) for text in texts
    ]
    found = prefix_tree.families([sequence.tokens_T for sequence in sequences], 1)
    ordered = [sequences[index] for family in found for index in family.indices]
    return pack(ordered, CPU, trained_only=True, families=found)


def paths_of(layout: Any) -> list[Tensor]:
    """Returns the places in the row of each segment with all before it."""
    ranges = [
        [*ancestors, segment]
        for ancestors, segment in zip(layout.tree.ancestors, layout.tree.segments, strict=True)
    ]
    return [torch.cat([torch.arange(*part) for part in path]) for path in ranges]


@st.composite
def trees(draw: st.DrawFn) -> list[list[int]]:
    """Texts of which each but the first begins with a part of another one."""
    texts = [[0, *range(1, draw(st.integers(1, 45)))]]
    for number in range(1, draw(st.integers(2, 5))):
        stem = draw(st.sampled_from(texts))
        kept = draw(st.integers(1, len(stem)))
        texts.append(stem[:kept] + [100 * number + i for i in range(draw(st.integers(0, 40)))])
    return texts


def random_inputs(num_tokens: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, num_tokens, *shape, generator=generator) for shape in shapes]


def gated_delta_rule(functions: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    scan = functions("torch_chunk_gated_delta_rule", qwen3_next.torch_chunk_gated_delta_rule)
    out, _ = scan(q, k, v, g=-F.softplus(g), beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True)
    return out


def kimi_delta_rule(functions: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    scan = functions("chunk_kimi_delta_attention", kimi.chunk_kimi_delta_attention)
    out, _ = scan(q, k, v, g=-F.softplus(g), beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True)
    return out


def mamba2_scan(functions: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The limits of the time step keep padding from being without effect, if it is limited too."""
    return functions("mamba2_chunk_scan", mamba2.mamba2_chunk_scan)(
        x,
        dt,
        -torch.arange(1.0, 5.0),
        B,
        C,
        chunk_size=16,
        D=torch.ones(4),
        dt_bias=torch.full([4], 0.1),
        dt_softplus=True,
        dt_limit=(0.05, 0.9),
    )


def mamba_scan(functions: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
    return functions("mamba_selective_scan", mamba.mamba_selective_scan)(
        x.mT,
        dt.mT,
        -torch.arange(1.0, 25.0).view(8, 3),
        B.mT,
        C.mT,
        D=torch.ones(8),
        z=z.mT,
        delta_bias=torch.full([8], 0.1),
        delta_softplus=True,
    ).mT


def mamba_scan_on_a_cpu(functions: Any, *inputs: Tensor) -> Tensor:
    return mamba_scan(functions, *inputs)


def short_convolution(functions: Any, x: Tensor) -> Tensor:
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    return functions("causal_conv1d_fn", mamba2.causal_conv1d_fn)(
        x.mT, weight, torch.ones(8), activation="silu"
    ).mT


KINDS: dict[Callable[..., Tensor], list[tuple[int, ...]]] = {
    gated_delta_rule: [(2, 8), (2, 8), (4, 8), (4,), (4,)],
    kimi_delta_rule: [(4, 8), (4, 8), (4, 8), (4, 8), (4,)],
    mamba2_scan: [(4, 8), (4,), (2, 6), (2, 6)],
    mamba_scan: [(8,), (8,), (3,), (3,), (8,)],
    mamba_scan_on_a_cpu: [(8,), (8,), (3,), (3,), (8,)],
    short_convolution: [(8,)],
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("run", KINDS, ids=lambda run: run.__name__)
@settings(deadline=None)
@given(texts=trees())
def test_a_row_with_a_tree_has_the_outputs_and_gradients_of_each_sequence_alone(
    run: Callable[..., Tensor], texts: list[list[int]]
) -> None:
    layout = packed(texts).attention
    if layout.tree is None:  # the texts are one
        return
    num_tokens = layout.segments[-1][1]
    inputs = [each.requires_grad_() for each in random_inputs(num_tokens, *KINDS[run])]
    functions = TreeFunctions(torch.nn.Identity())
    functions.is_on_cpu = run is mamba_scan_on_a_cpu
    functions.tree = StateTree.of(layout.tree, batches_by_length, CPU)

    def for_rows(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: recurrent_trees._FUNCTIONS[name](functions, theirs, *args, **kwargs)

    found = run(for_rows, *inputs)
    expected = torch.empty_like(found)
    for path, (start, stop) in zip(paths_of(layout), layout.tree.segments, strict=True):
        alone = run(lambda name, theirs: theirs, *(each[:, path] for each in inputs))
        expected[:, start:stop] = alone[:, len(path) - (stop - start) :]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    of_found = torch.autograd.grad((found * weights).sum(), inputs)
    of_expected = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, other in zip((found, *of_found), (expected, *of_expected), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-5 * max(1.0, float(other.detach().abs().max()))
        )


def test_a_stem_is_cut_where_branches_leave_it_and_pieces_follow_one_another() -> None:
    stem = list(range(40))
    layout = packed([stem, [*stem[:10], 50], [*stem[:30], 60, 61]]).attention
    pieces, parents = recurrent_trees._pieces(layout.tree)
    assert pieces == [(0, 10), (10, 30), (30, 40), (40, 42), (42, 43)]
    assert parents == [None, 0, 1, 1, 0]
    tree = StateTree.of(layout.tree, batches_by_length, CPU)
    assert [[batch.shape for batch in batches] for batches in tree.levels] == [
        [(1, 10)],
        [(2, 20)],
        [(2, 10)],
    ]


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h"])
def test_a_recurrent_layer_runs_once_over_what_sequences_share(name: str, tmp_path: Path) -> None:
    base = BaseModel(str(families.save(name, tmp_path)), EngineOptions(dtype="float32"))
    assert base.recurrent.hands_states_on
    stem = list(range(3, 203))
    batch = packed([stem[: 20 * number] + [300 + number] * 20 for number in range(1, 11)])
    num_tokens = batch.tokens_1N.shape[1]
    assert num_tokens == 200 + 10 * 20
    sizes = []

    def count(mixer: Any, inputs: Any) -> None:
        sizes.append(inputs[0].shape[1])

    for mixer in base.recurrent.mixers:
        for child in mixer.modules():
            if isinstance(child, torch.nn.Linear):
                child.register_forward_pre_hook(count)
    base.hidden_of(batch.tokens_1N, batch.positions_1N, batch.attention)
    assert set(sizes) == {num_tokens}
