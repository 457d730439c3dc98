"""What the tests of runs share."""

from __future__ import annotations

import pytest
from outside_world import draw_blank_pictures


@pytest.fixture(autouse=True)
def _blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end sooner. `tests/cookbook/report` looks at pictures."""
    draw_blank_pictures(monkeypatch)
