"""Dropout of the inputs of a LoRA, with masks that depend on what is dropped and not on how it is computed.

Whether an element is dropped is a hash of the adapter's seed, the optimizer step, the pass since that step,
the place of its token in the data, its layer and its channel. So a resumed run drops what the run would have
dropped, a layer that is run again in the backward pass drops the same, and packing, micro-batches and the
number of processes change nothing. Nothing is dropped outside of training.

Shape suffixes: T tokens of one sequence, N tokens of a packed row, I channels of an input.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cookbook.errors import ConfigError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class PassOfData:
    """One forward and backward pass over data, by what its masks depend on."""

    seed: int
    step: int
    number: int
    """The number of passes since the last step."""

    def keys(self, indices: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Returns a key for each token of a packed row: int32 [N].

        `indices` are the places of the row's sequences in the data, `lengths` their tokens.
        """
        keys = []
        for index, length in zip(indices, lengths, strict=True):
            start = np.uint64(0)
            for part in (self.seed, self.step, self.number, index):
                start = _mixed(start + _GOLDEN + np.array([part % 2**64], np.uint64))
            places_T = np.arange(1, length + 1, dtype=np.uint64)
            keys.append(
                (_mixed(start + places_T * _GOLDEN) >> np.uint64(32)).astype(np.uint32).view(np.int32)
            )
        return np.concatenate(keys)


def _mixed(values: Any) -> Any:
    """Returns hashes of 64 bits: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class DropoutKeys:
    """The keys of the tokens in the pass that runs, or None outside of training."""

    def __init__(self) -> None:
        self.keys_N: Tensor | None = None

    @contextlib.contextmanager
    def set_to(self, keys_N: Tensor | None) -> Iterator[None]:
        self.keys_N = keys_N
        try:
            yield
        finally:
            self.keys_N = None

    @contextlib.contextmanager
    def of_part(self, part: slice) -> Iterator[None]:
        """Sets the keys to those of a part of the tokens, on which a layer runs in the body."""
        whole = self.keys_N
        self.keys_N = None if whole is None else whole[part]
        try:
            yield
        finally:
            self.keys_N = whole


class KeyedDropout(nn.Module):
    """Drops a share of a layer's inputs, and scales up the others, by the keys of their tokens."""

    def __init__(self, share: float, layer: str, keys: DropoutKeys) -> None:
        super().__init__()
        self.share = share
        self.layer = layer
        self._keys = keys
        self._layer_key = zlib.crc32(layer.encode())
        self._channels_I: Tensor | None = None

    @property
    def keys_N(self) -> Tensor | None:
        return self._keys.keys_N

    def forward(self, x_XI: Tensor) -> Tensor:
        if self.keys_N is None:
            return x_XI
        return self.drop(x_XI.reshape(-1, x_XI.shape[-1]), self.keys_N).view(x_XI.shape)

    def drop(self, x_NI: Tensor, keys_N: Tensor) -> Tensor:
        """Returns the inputs with those dropped that the keys of their tokens say. It is linear in `x_NI`."""
        if len(x_NI) != len(keys_N):
            raise ConfigError(
                f"lora_dropout is not supported on {self.layer}, which is run on {len(x_NI)} rows for "
                f"{len(keys_N)} tokens. Skip the layer with lora_targets, or set lora_dropout=0."
            )
        hash_NI = keys_N[:, None] ^ self._channel_keys(x_NI)
        for factor in (-2048144789, -1028477387):  # the finalizer of MurmurHash3
            hash_NI ^= (hash_NI >> 16) & 0xFFFF
            hash_NI *= factor
        hash_NI ^= (hash_NI >> 16) & 0xFFFF
        threshold = round(self.share * 2**32) - 2**31
        return torch.where(hash_NI >= threshold, x_NI * (1 / (1 - self.share)), 0.0)

    def _channel_keys(self, x_NI: Tensor) -> Tensor:
        """Returns a key for each channel of this layer: int32 [I]."""
        if self._channels_I is None or self._channels_I.device != x_NI.device:
            places_I = np.arange(1, x_NI.shape[1] + 1, dtype=np.uint64)
            keys_I = _mixed(np.uint64(self._layer_key) + places_I * _GOLDEN) >> np.uint64(32)
            self._channels_I = torch.from_numpy(keys_I.astype(np.uint32).view(np.int32)).to(x_NI.device)
        return self._channels_I


def install(model: nn.Module, adapter: str, share: float, keys: DropoutKeys) -> None:
    """Puts the dropout on every LoRA of an adapter, in the place of PEFT's."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.lora_dropout[adapter] = KeyedDropout(share, name, keys)
