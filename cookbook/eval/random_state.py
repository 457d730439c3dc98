"""Restores the global random generators after an evaluation."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restores the states of the generators of Python, numpy and torch (on the CPU) afterwards.

    Evaluation packages seed these generators, and a user's dataset may draw from them.
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
