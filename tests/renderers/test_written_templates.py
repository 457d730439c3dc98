"""Templates as authors of models write them are served as transformers prints them (`written_templates`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slow import slow_except

NAMES = json.loads((Path(__file__).parent / "templates" / "tokens.json").read_text(encoding="utf-8"))
FEW = ("command_plain_thinking", "ernie45_thinking", "openchat")
"""Tags of a thought that are words, text in front of a reply, a prompt that differs in white space."""


@pytest.fixture(scope="module")
def written() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import written_templates

        yield written_templates


@pytest.mark.parametrize("name", slow_except(FEW, NAMES))
def test_a_template_is_served_as_transformers_prints_it(name: str, written: Any) -> None:
    lines = written.lines_of(name)
    assert not [line for line in lines if "WRONG" in line]
    assert "\n".join(lines) + "\n" in written.CELLS.read_text(encoding="utf-8")


def test_every_template_has_its_cells(written: Any) -> None:
    listed = [line for line in written.CELLS.read_text(encoding="utf-8").splitlines() if line[:1].strip()]
    assert listed == list(NAMES)
    assert "WRONG" not in written.CELLS.read_text(encoding="utf-8")
