"""The memory of this process, counted in one way for every side: pages that are in memory, in bytes."""

from __future__ import annotations

import resource
from pathlib import Path


def resident_bytes() -> int:
    return _status("VmRSS")


def begin_peak() -> None:
    """Forgets the highest resident size so far, where the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_bytes() -> int:
    """The highest resident size since `begin_peak`; since the process began where that is not kept."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
