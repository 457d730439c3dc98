"""Trains: `main` runs a `Config`.

The loop itself is in `cookbook/supervised/loop.py`. It is imported when a run begins, because `--help` and
what only reads configs need none of it.
"""

from __future__ import annotations

from cookbook.supervised.config import Config
from cookbook.supervised.run_summary import RunSummary

__all__ = ["Config", "RunSummary", "main", "run"]


async def main(config: Config) -> RunSummary:
    """Runs a config to its end. Resumes an earlier run in its folder, unless `if_log_path_exists` is set."""
    from cookbook.supervised import loop

    return await loop.main(config)


def run(config: Config) -> RunSummary:
    """Does what `main` does, in a program or in a notebook, where an event loop runs already.

    Beside a running loop the run has a thread with a loop of its own, and Ctrl-C (in a notebook: the button
    that interrupts) stops it after the running step, as in a terminal. Before the first step, and the second
    time, it ends the run at once.
    """
    from cookbook.supervised import loop

    return loop.run(config)
