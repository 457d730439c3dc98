"""The number of threads that a step uses on a CPU.

Threads that wait for each other are slowed down by every core that another program uses: with as many
threads as cores on a busy machine, a step takes several times as long.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads_for(num_cores: int, load: float) -> int:
    """Returns this program's fair share of the cores, given the load before it runs; all if that is below
    the cores."""
    if load <= num_cores:
        return num_cores
    return max(1, int(num_cores / (1 + load / num_cores)))


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_threads() -> int:
    """Returns the number of threads of a step on a CPU."""
    import torch

    return torch.get_num_threads()


def limit_threads(recorded: int | None = None) -> int | None:
    """Makes torch use fewer threads on a busy machine, unless the environment sets their number.

    `recorded` is the number that an earlier process of the same run used. It is used again, because sums in
    another order would differ in their last bits. Returns the number if it was set here, else None.
    """
    if any(os.environ.get(name) for name in VARIABLES) or not hasattr(os, "getloadavg"):
        return None
    import torch

    cores, load = num_cores(), os.getloadavg()[0]
    wanted = threads_for(cores, load) if recorded is None else recorded
    if wanted >= torch.get_num_threads():
        return None
    torch.set_num_threads(wanted)
    threads = "1 thread" if wanted == 1 else f"{wanted} threads"
    if recorded is None:
        logger.info(
            "This machine is busy (load %.1f on %d cores): a step uses %s. OMP_NUM_THREADS sets the number.",
            load,
            cores,
            threads,
        )
    else:
        logger.info("A step uses %s, as it did when the run began.", threads)
    return wanted
