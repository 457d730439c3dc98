"""Checks what a run says about the weights without an adapter."""

from __future__ import annotations

from cookbook.supervised.announce import adapter_lines
from cookbook.types import ModelData


def model_with(**shares: float) -> ModelData:
    without = {kind.replace("_", " "): share for kind, share in shares.items()}
    share = 1 - sum(shares.values())
    known = ("", "", 8, 32.0, 1, "llama", "cpu", "float32", 300)
    return ModelData(*known, adapted_share=share, without_adapter=without)


def test_one_line_says_what_share_of_the_weights_carries_an_adapter() -> None:
    assert adapter_lines(model_with(embeddings=0.021, routers=0.003, norms_and_vectors=0.0001)) == [
        "The adapter is on 97.6% of the weights; not on embeddings 2.1%, routers 0.3%."
    ]


def test_weights_that_should_carry_an_adapter_have_a_line_with_the_reason() -> None:
    lines = adapter_lines(model_with(unused_layers=0.9, embeddings=0.02, special_layers=0.001))
    assert lines == [
        "The adapter is on 7.9% of the weights; not on unused layers 90.0%.",
        "  90.0% carry none: they do not run, and get no gradient (unused layers).",
    ]


def test_the_line_fits_into_80_columns() -> None:
    kinds = {f"kind_of_weights_{i}": 0.04 for i in range(20)}
    (line,) = adapter_lines(model_with(**kinds))
    assert len(line) <= 80
    assert line.endswith("kind of weights 0 4.0%.")
