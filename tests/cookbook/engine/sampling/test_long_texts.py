"""Texts longer than what a model's attention chooses or sees are sampled exactly, too."""

from __future__ import annotations

from pathlib import Path

import family_checks
import pytest
from slow import slow_after


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, ["deepseek_v32", "deepseek_v4"]))
def test_texts_beyond_an_index_and_a_compressed_window_are_sampled_as_plain_transformers_does(
    name: str, tmp_path: Path
) -> None:
    assert family_checks.sampling(family_checks.Subject(name, tmp_path)) == "yes"
