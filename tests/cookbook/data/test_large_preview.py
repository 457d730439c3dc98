"""The preview of a giant message is truncated, with a note of how much."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cookbook.data import preview
from cookbook.data.examples import datum_from_tokens
from cookbook.report import preview_page


@pytest.mark.slow
def test_a_giant_example_is_truncated_with_a_note(tiny_tokenizer: Any) -> None:
    num_tokens = 2_000_000
    datum = datum_from_tokens([65] * num_tokens, np.ones(num_tokens, np.float32), None)
    before = time.process_time()
    example = preview.decode_datum(datum, tiny_tokenizer)
    page = preview_page("What is trained", [], [], [], None, [example])
    console = Console(record=True, width=80, file=io.StringIO())
    preview.print_examples([example], console)
    assert time.process_time() - before < 20
    assert example.num_tokens == num_tokens
    assert len(example.pieces) == preview.SHOWN_FIRST + preview.SHOWN_LAST + 1
    assert len(page) < 3_000_000
    for shown in (page, console.export_text()):
        assert "[1,990,000 tokens are not shown]" in shown


def test_a_shorter_example_is_shown_completely(tiny_tokenizer: Any) -> None:
    tokens = list(range(100, 200)) * 100
    datum = datum_from_tokens(tokens, np.ones(len(tokens), np.float32), None)
    example = preview.decode_datum(datum, tiny_tokenizer)
    assert "".join(piece.text for piece in example.pieces) == tiny_tokenizer.decode(tokens)
    assert sum(len(piece.ids) for piece in example.pieces) == len(tokens)
