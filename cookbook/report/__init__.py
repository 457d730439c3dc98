"""Pages and pictures of runs: report.html, curves.png, and several runs laid over each other."""

from __future__ import annotations

from cookbook.report.comparison import compare
from cookbook.report.run_page import write_report

__all__ = ["compare", "write_report"]
