"""A model that reads later tokens cannot be trained to predict them, and is refused when it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForImageTextToText, PaliGemmaConfig

from cookbook import ServiceClient
from cookbook.errors import ModelError


@pytest.fixture(scope="module")
def prefix_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PaliGemma, which attends to the whole of a text that is not marked as a suffix."""
    folder = tmp_path_factory.mktemp("paligemma")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    text = {**sizes, "model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 384}
    vision = {**sizes, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_id=380)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def first_logits_move_with_the_last_token(folder: Path) -> bool:
    """Says so of plain transformers."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = [model(input_ids=torch.tensor([[5, 9, 11, last]])).logits[0, 0] for last in (7, 8)]
    return not torch.allclose(*found, atol=1e-3)


def test_a_model_that_attends_to_later_tokens_is_refused(prefix_model: Path, tmp_path: Path) -> None:
    assert first_logits_move_with_the_last_token(prefix_model)
    service = ServiceClient(checkpoint_dir=tmp_path)
    with pytest.raises(ModelError, match="PaliGemmaForConditionalGeneration.*attends to later tokens"):
        service.create_lora_training_client(str(prefix_model), rank=4)


@pytest.mark.slow
def test_a_multimodal_model_that_reads_only_earlier_tokens_is_loaded(tmp_path: Path) -> None:
    folder = families.save("gemma3", tmp_path / "model")
    assert not first_logits_move_with_the_last_token(folder)
    ServiceClient(checkpoint_dir=tmp_path).create_lora_training_client(str(folder), rank=4).close()
