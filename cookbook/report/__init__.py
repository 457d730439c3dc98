"""Pages and pictures of runs: report.html, curves.png, and several runs laid over each other."""

from __future__ import annotations
