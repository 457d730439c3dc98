"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cookbook.runs.checkpoints import Checkpoint


@dataclass(frozen=True)
class RunSummary:
    """The result of a run. `metrics` are from the evaluation of the finished model."""

    log_path: Path
    is_finished: bool
    num_steps: int
    checkpoint_path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    stopped_by: int | None = None
    """The number of the signal that stopped the run."""
    stopped_early: bool = False
    """Whether early stopping ended the run."""
    best: Checkpoint | None = None
    """The checkpoint of the best evaluation, at `log_path / best.path`; None if none is kept."""

    def _repr_html_(self) -> str | None:
        """Returns the run's report, which a notebook shows below the cell."""
        import html

        page = self.log_path / "report.html"
        if not page.is_file():
            return None
        text = html.escape(page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 720px; border: 0"></iframe>'
