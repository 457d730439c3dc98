"""Tests that the tiny models of `families` are saved as their families are published."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
import transformers


def assert_is_published_as_it_was_made(name: str, folder: Path) -> None:
    made = families.make(name)
    (class_name,) = json.loads((families.save(name, folder) / "config.json").read_text(encoding="utf-8"))[
        "architectures"
    ]
    assert class_name == type(made).__name__
    loaded, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_1T = torch.arange(3, 33)[None]
    with torch.no_grad():
        found = loaded.eval()(tokens_1T, use_cache=False).logits
        torch.testing.assert_close(found, made(tokens_1T, use_cache=False).logits, rtol=0, atol=1e-4)
    assert found.std() > 0.05


@pytest.mark.parametrize("name", ["qwen3_5_moe", "gpt_oss", "gemma3"])
def test_a_tiny_model_is_saved_in_its_published_class_with_all_its_weights(name: str, tmp_path: Path) -> None:
    assert_is_published_as_it_was_made(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_tiny_model_is_saved_in_its_published_class(name: str, tmp_path: Path) -> None:
    assert_is_published_as_it_was_made(name, tmp_path)


def test_making_a_tiny_model_leaves_the_random_numbers_of_others_as_they_were() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    families.make("qwen3")
    assert torch.rand(1) == expected
