"""Restores global random numbers, so that they continue as if nothing had been drawn."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Puts the generators of Python, numpy and torch (on the CPU) back where they were.

    Evaluation packages seed them; a user's dataset may draw from them.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
