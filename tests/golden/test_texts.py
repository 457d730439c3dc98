"""Texts for users equal the golden files, which `make golden` writes, so that a diff shows each change."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from programs import Programs

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("golden_texts", HERE / "texts.py")
assert spec is not None
assert spec.loader is not None
texts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(texts)


@pytest.mark.cases(6)
@pytest.mark.parametrize("recipe", texts.RECIPES)
def test_help_equals_the_golden_file(recipe: str, programs: Programs) -> None:
    done = programs.run(f"recipes.{recipe}", "--help", cwd=texts.ROOT, environment=texts.ENVIRONMENT)
    assert texts.kept(done.stdout) == (HERE / "help" / f"{recipe}.txt").read_text(encoding="utf-8")


def test_errors_and_log_messages_equal_the_golden_file() -> None:
    assert texts.messages() == (HERE / "messages.txt").read_text(encoding="utf-8")
