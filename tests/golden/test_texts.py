"""What users read is changed on purpose only: `make golden` writes these files, and the diff shows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("golden_texts", HERE / "texts.py")
assert spec is not None
assert spec.loader is not None
texts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(texts)


@pytest.mark.parametrize("recipe", texts.RECIPES)
def test_help_reads_as_the_golden_file(recipe: str) -> None:
    assert texts.help_of(recipe) == (HERE / "help" / f"{recipe}.txt").read_text(encoding="utf-8")


def test_errors_and_log_messages_read_as_the_golden_file() -> None:
    assert texts.messages() == (HERE / "messages.txt").read_text(encoding="utf-8")
