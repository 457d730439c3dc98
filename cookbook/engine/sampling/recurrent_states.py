"""The states of recurrent layers over several sequences, one row for each.

Shape suffixes: R rows. A state is [R, ...]: the last inputs of a convolution, or the state of a recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cookbook.engine.model.packing import copy_to


class RecurrentStates:
    """The states of the recurrent layers of a model. To its layers it is a cache of transformers."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, int, int], Tensor] = {}
        """By the kind of state, the layer, and the number of the state in the layer."""

    @classmethod
    def gathered(
        cls,
        sources: Sequence[tuple[RecurrentStates, dict[Any, int]]],
        order: Sequence[Any],
        num_rows: int,
    ) -> RecurrentStates:
        """Returns the states with the rows of `order`, then rows of 0 up to `num_rows`.

        Each source has states and the rows of its members in them.
        """
        firsts, total = [], 0
        for states, _ in sources:
            firsts.append(total)
            total += states.num_rows
        rows = [
            next(
                first + rows[member]
                for first, (_, rows) in zip(firsts, sources, strict=True)
                if member in rows
            )
            for member in order
        ]
        rows += [total] * (num_rows - len(rows))
        found, rows_R = cls(), None
        for key, state in sources[0][0]._states.items():
            parts = [states._states[key] for states, _ in sources]
            everything = torch.cat([*parts, torch.zeros_like(state[:1])])
            rows_R = copy_to(state.device, np.array(rows)) if rows_R is None else rows_R
            gathered = everything[rows_R]
            found._states[key] = _by_token(gathered) if key[0] == "conv" else gathered
        return found

    def row(self, row: int) -> RecurrentStates:
        """Returns a copy of the states of one row."""
        found = RecurrentStates()
        for key, state in self._states.items():
            one = state[row : row + 1]
            found._states[key] = _by_token(one) if key[0] == "conv" else one.clone()
        return found

    @property
    def num_rows(self) -> int:
        return len(next(iter(self._states.values()), ()))

    @property
    def num_bytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    # -- as transformers' caches ------------------------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **unused: Any,
    ) -> Tensor:
        """Keeps the last inputs of a convolution. Returns all it has to see, from the first kept before."""
        key, old = ("conv", layer_idx, state_idx), self.get_conv_state(layer_idx, state_idx)
        size = conv_kernel_size or (conv_states if old is None else old).shape[-1]
        full = conv_states if old is None else torch.cat([old, conv_states], dim=-1)
        full = F.pad(full, (max(0, size - full.shape[-1]), 0))
        self._states[key] = _by_token(full[..., -size:])
        return full

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **unused: Any
    ) -> Tensor:
        state = recurrent_states.contiguous()  # a view would keep all chunks of a scan in memory
        self._states["recurrent", layer_idx, state_idx] = state
        return state

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self._states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


def _by_token(conv_state: Tensor) -> Tensor:
    """Returns a copy in which the inputs of each token are together in memory, as its step reads them."""
    return conv_state.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
