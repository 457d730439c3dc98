"""Decoders that fail or count, to replace a model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cookbook.engine.model.base_model import BaseModel
from cookbook.engine.sampling.packed_decoder import PackedDecoder

NEVER = 2**62


@contextlib.contextmanager
def decoding_with(base: BaseModel, make_decoder: Callable[[BaseModel], Any]) -> Iterator[None]:
    """Makes the model sample with this decoder in the body."""
    usual, base.make_decoder = base.make_decoder, make_decoder
    try:
        yield
    finally:
        base.make_decoder = usual


class TightDecoder(PackedDecoder):
    """Runs out of memory if more sequences run, or more tokens are prefilled, than allowed."""

    def __init__(self, base: BaseModel, max_sequences: int = NEVER, max_prefill_tokens: int = NEVER) -> None:
        super().__init__(base)
        self._max_sequences, self._max_prefill_tokens = max_sequences, max_prefill_tokens

    def prefill(self, groups: Any) -> Tensor:
        if sum(group[0].length for group in groups) > self._max_prefill_tokens:
            raise torch.OutOfMemoryError("no room")
        return super().prefill(groups)

    def decode(self, sequences: Any) -> Tensor:
        if len(sequences) > self._max_sequences:
            raise torch.OutOfMemoryError("no room")
        return super().decode(sequences)


class FailingDecoder(PackedDecoder):
    """Fails after the first token."""

    def decode(self, sequences: Any) -> Tensor:
        raise ZeroDivisionError("in the middle")


class CountingDecoder(PackedDecoder):
    """Records how many sequences take part in each decode pass."""

    def __init__(self, base: BaseModel, counts: list[int]) -> None:
        super().__init__(base)
        self._counts = counts

    def decode(self, sequences: Any) -> Tensor:
        self._counts.append(len(sequences))
        return super().decode(sequences)
