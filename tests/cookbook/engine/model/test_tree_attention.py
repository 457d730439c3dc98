"""Compares attention over a tree with a plain softmax under the dense mask of its paths.

Shape suffixes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from outside_world import run_varlen_attention_on_the_cpu
from slow import slow_after
from torch import Tensor, nn

from cookbook.engine.model import attention
from cookbook.engine.model.attention import AttentionLayout, packed_attention
from cookbook.engine.model.packing import PackedBatch, TokenSequence, pack
from cookbook.engine.model.prefix_tree import families

HEAD_SIZE = 8


def packed(texts: list[np.ndarray]) -> PackedBatch:
    found = families(texts, min_shared=1)
    sequences = [
        TokenSequence(texts[index], texts[index], np.ones(len(texts[index]), np.float32), {})
        for family in found
        for index in family.indices
    ]
    return pack(sequences, torch.device("cpu"), trained_only=True, families=found)


def make_layout(seed: int = 0) -> tuple[AttentionLayout, list[list[int]]]:
    """Returns a layout of a random tree, and for each token of the row the places that it sees."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1000, size=30)]
    for length in (9, 1, 0, 14, 3, 30):
        other = texts[rng.integers(len(texts))]
        kept = other[: rng.integers(1, len(other) + 1)]
        texts.append(np.concatenate([kept, rng.integers(1000, size=length)]))
    texts.append(rng.integers(1000, 2000, size=12))  # shares nothing
    batch = packed(texts)
    row = batch.tokens_1N[0].tolist()
    assert len(row) < sum(map(len, texts))
    seen: list[list[int]] = [[] for _ in row]
    assert batch.attention.tree is not None
    for (start, stop), ancestors in zip(
        batch.attention.segments, batch.attention.tree.ancestors, strict=True
    ):
        path = [place for begin, end in [*ancestors, (start, stop)] for place in range(begin, end)]
        for place in range(start, stop):
            seen[place] = path[: path.index(place) + 1]
    for text in texts:  # the paths are those of the sequences
        assert any([row[place] for place in places] == text.tolist() for places in seen)
    return batch.attention, seen


def dense(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, seen: list[list[int]], **options: Any
) -> Tensor:
    window, cap, sinks = options.get("sliding_window"), options.get("softcap"), options.get("s_aux")
    out = torch.zeros_like(query_BHTD)
    for head in range(query_BHTD.shape[1]):
        kv_head = head * key_BHTD.shape[1] // query_BHTD.shape[1]
        for token, places in enumerate(seen):
            places = places if window is None else places[-window:]
            scores = key_BHTD[0, kv_head, places] @ query_BHTD[0, head, token] / HEAD_SIZE**0.5
            scores = scores if cap is None else cap * (scores / cap).tanh()
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out[0, head, token] = weights @ value_BHTD[0, kv_head, places] / total
    return out.transpose(1, 2)


def make(num_tokens: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, num_tokens, HEAD_SIZE, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def compare(layout: AttentionLayout, seen: list[list[int]], qkv: list[Tensor], **options: Any) -> None:
    tolerance = 2e-2 if qkv[0].dtype == torch.bfloat16 else 1e-9 if qkv[0].dtype == torch.float64 else 2e-5
    out, _ = packed_attention(nn.Module(), *qkv, None, layout=layout, **options)
    plain = [tensor.detach().double().requires_grad_() for tensor in qkv]
    expected = dense(*plain, seen, **options)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, qkv, given.to(out.dtype))
    wanted = torch.autograd.grad(expected, plain, given)
    for gradient, other in zip(gradients, wanted, strict=True):
        size = other.abs().max().clamp(min=1e-3)  # a query over one key has no gradient
        torch.testing.assert_close(gradient.double() / size, other / size, rtol=0, atol=4 * tolerance)


@pytest.mark.cases(3)
@pytest.mark.parametrize("seed", slow_after(2, range(4)))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_sees_its_ancestors_and_its_own_branch_up_to_itself(
    seed: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    layout, seen = make_layout(seed)
    compare(layout, seen, make(len(seen), num_heads, num_kv_heads, dtype))


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "options",
    [
        *({"sliding_window": window} for window in (1, 4, 13, 29, 1000)),
        {"softcap": 2.0},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
        {"softcap": 1.0, "sliding_window": 5},
    ],
    ids=str,
)
def test_windows_caps_and_sinks_over_a_tree(options: dict[str, Any]) -> None:
    layout, seen = make_layout()
    dtype = torch.float32 if "softcap" in options or "s_aux" in options else torch.float64
    compare(layout, seen, make(len(seen), 4, 2, dtype), **options)


def test_blocks_of_ancestors_are_shared_by_neighbours() -> None:
    """Branches of 40 samples of one prompt take one call over the prompt instead of 40."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1000, size=1100)
    texts = [np.concatenate([prompt, [number, 5]]) for number in range(40)]
    layout = packed(texts).attention
    assert layout.tree is not None
    over_ancestors = [call for call in layout.tree.calls if not call.is_causal]
    assert [(call.keys.start, call.keys.stop) for call in over_ancestors] == [
        (0, 512),
        (512, 1024),
        (1024, 1100),
    ]
    assert len(layout.tree.calls) == 40 + 3


@pytest.mark.cases(3)
@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_variable_length_kernel_gets_the_keys_of_each_path(seed: int, sliding_window: int | None) -> None:
    """The kernel is torch's on CUDA; a stand-in on the CPU computes what its documentation says."""
    layout, seen = make_layout(seed)
    qkv = make(len(seen), 4, 2, torch.float64)
    with run_varlen_attention_on_the_cpu():
        out = attention._varlen(*qkv, layout, None, sliding_window)
        given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(out, qkv, given)
    expected = dense(*qkv, seen, sliding_window=sliding_window)
    torch.testing.assert_close(out, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, qkv, given), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("sizes", [(8, 5), (5, 8)])
def test_heads_of_values_may_have_another_size(sizes: tuple[int, int]) -> None:
    """Those of DeepSeek do, and the kernel takes heads of one size."""
    layout, seen = make_layout(0)
    query, key, value = (tensor.detach() for tensor in make(len(seen), 4, 2, torch.float64))
    parts = query[..., : sizes[0]], key[..., : sizes[0]], value[..., : sizes[1]]
    qkv = [tensor.clone().requires_grad_() for tensor in parts]
    with run_varlen_attention_on_the_cpu():
        out = attention._varlen(qkv[0], qkv[1], qkv[2], layout, None, None)
        given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(out, qkv, given)
    keys, values = (tensor.repeat_interleave(2, dim=1) for tensor in qkv[1:])
    is_seen = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    for place, places in enumerate(seen):
        is_seen[place, places] = True
    expected = F.scaled_dot_product_attention(qkv[0], keys, values, attn_mask=is_seen).transpose(1, 2)
    assert out.shape[-1] == sizes[1]
    torch.testing.assert_close(out, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, qkv, given), strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_kernels_of_torch_have_the_signatures_that_are_called() -> None:
    """They are private to torch. Checked with torch 2.13."""
    import torch.nn.attention.varlen

    schemas = {
        name: str(getattr(getattr(torch.ops, namespace), name).default._schema)
        for namespace, name in [
            ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
            ("aten", "_scaled_dot_product_flash_attention_for_cpu_backward"),
            ("torch_attn", "_varlen_attn"),
            ("torch_attn", "_varlen_attn_backward"),
        ]
    }
    starts = {
        "_scaled_dot_product_flash_attention_for_cpu": "Tensor query, Tensor key, Tensor value, "
        "float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor output, Tensor logsumexp)",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "Tensor grad_out, Tensor query, Tensor key, "
        "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, "
        "Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
        "_varlen_attn": "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, "
        "SymInt max_q, SymInt max_k, bool is_causal=False, float? scale=None, "
        "SymInt[]? window_size=None, bool enable_gqa=False",
        "_varlen_attn_backward": "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, SymInt max_k, bool is_causal, "
        "Tensor rng_state, float? scale=None, SymInt[]? window_size=None",
    }
    for name, start in starts.items():
        assert schemas[name].partition("(")[2].startswith(start), schemas[name]
