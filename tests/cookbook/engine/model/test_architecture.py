"""Tests that short sequences show what the windows of a model do, against models with such windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cookbook.engine.model.architecture import short_spans
from cookbook.engine.model.attention import AttentionLayout, packed_attention

INDEXED = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 32,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 64, "moe_layers": [1]}


@pytest.mark.parametrize(
    ("model_type", "span", "config"),
    [
        ("mistral", "sliding_window", {}),
        ("gemma3_text", "sliding_window", {}),
        ("llama4_text", "attention_chunk_size", LLAMA4),
        ("deepseek_v32", "index_topk", INDEXED),
    ],
)
@torch.no_grad()
def test_short_spans_give_the_logits_of_a_model_with_such_spans(
    model_type: str, span: str, config: dict[str, Any], make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=torch.arange(5, 18)[None], use_cache=False).logits
        return found

    def load(length: int) -> Any:
        folder = make_model_folder(tmp_path / str(length), model_type, **config, **{span: length})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    long, short = load(64), load(4)
    before = logits(long)
    with short_spans(long.get_decoder(), long.config):
        shrunk = logits(long)
    torch.testing.assert_close(shrunk, logits(short))
    assert not torch.allclose(shrunk, before, atol=1e-3)
    assert torch.equal(logits(long), before)


def test_a_model_that_gives_its_attention_more_than_is_read_there_is_not_packed() -> None:
    """Such as the indices of chosen keys."""
    one_1111 = torch.ones(1, 1, 1, 1)
    layout = AttentionLayout([(0, 1)], torch.tensor([0, 1]), longest=1, windows_seen=[])
    packed_attention(
        torch.nn.Module(), one_1111, one_1111, one_1111, None, layout=layout, position_ids=torch.zeros(1, 1)
    )
    with pytest.raises(ValueError, match="depends on block_indices too"):
        packed_attention(
            torch.nn.Module(), one_1111, one_1111, one_1111, None, layout=layout, block_indices=one_1111
        )
