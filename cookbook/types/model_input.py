"""The input of a model: chunks, of which only those of tokens can be used."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from cookbook.errors import RequestError
from cookbook.types.tensor_data import TensorData
from cookbook.types.values import Value


class EncodedTextChunk(Value):
    """A run of token ids, copied from a list, an array or a tensor.

    Raises RequestError unless they are one row of whole numbers.
    """

    __slots__ = ("_tokens_T", "type")

    def __init__(
        self, tokens: Sequence[int] | np.ndarray, type: Literal["encoded_text"] = "encoded_text"
    ) -> None:
        is_whole = isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu"
        self._tokens_T = np.array(tokens, np.int64) if is_whole else TensorData(tokens, "int64")._array
        self._tokens_T.setflags(write=False)
        self.type = type
        if self._tokens_T.ndim != 1:
            raise RequestError(f"Invalid tokens of shape {[*self._tokens_T.shape]}: must be one row of ids.")

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        return ("tokens", "type")

    @property
    def tokens(self) -> list[int]:
        """The token ids as a new list."""
        return self._tokens_T.tolist()

    @property
    def length(self) -> int:
        return len(self._tokens_T)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedTextChunk) and np.array_equal(self._tokens_T, other._tokens_T)

    def __repr__(self) -> str:
        return f"EncodedTextChunk(tokens={self.tokens})"


@dataclass(frozen=True)
class ImageChunk(Value):
    """An image among the tokens. It exists so that programs can name it: models here read text only."""

    data: bytes = field(repr=False)
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", base64.b64decode(self.data))

    @property
    def length(self) -> int:
        return _expected_length(self)


@dataclass(frozen=True)
class ImageAssetPointerChunk(Value):
    """The place of an image among the tokens. Models here read text only, and refuse it."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        return _expected_length(self)


@dataclass(frozen=True)
class DmelChunk(Value):
    """Audio among the tokens. Models here read text only, and refuse it."""

    dmel: bytes = field(repr=False)
    type: Literal["dmel"] = "dmel"

    @property
    def length(self) -> int:
        raise RequestError("The length of a DmelChunk is not known: models here read text only.")


def _expected_length(chunk: ImageChunk | ImageAssetPointerChunk) -> int:
    if chunk.expected_tokens is None:
        raise RequestError(f"The length of an {type(chunk).__name__} without expected_tokens is not known.")
    return chunk.expected_tokens


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk

_CHUNKS: dict[str, type[ModelInputChunk]] = {
    "encoded_text": EncodedTextChunk,
    "image": ImageChunk,
    "image_asset_pointer": ImageAssetPointerChunk,
    "dmel": DmelChunk,
}
_KINDS_OF_CHUNKS = tuple(_CHUNKS.values())


@dataclass(frozen=True)
class ModelInput(Value):
    """The input of a model: chunks of token ids, in order. The list of chunks is copied.

    A chunk may be given as a mapping of its fields.
    """

    chunks: Sequence[ModelInputChunk] = ()

    def __post_init__(self) -> None:
        given: list[Any] = list(self.chunks)
        for number, chunk in enumerate(given):
            if isinstance(chunk, Mapping):
                kind = chunk.get("type", "encoded_text")
                if kind not in _CHUNKS:
                    raise RequestError(f"Unknown type of chunk {kind!r}. There are: {', '.join(_CHUNKS)}.")
                given[number] = _CHUNKS[kind].model_validate(chunk)
            elif not isinstance(chunk, _KINDS_OF_CHUNKS):
                raise RequestError(
                    f"{chunk!r} is not a chunk of a ModelInput. Use EncodedTextChunk(tokens=[...])."
                )
        object.__setattr__(self, "chunks", given)

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | np.ndarray) -> ModelInput:
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    def to_ints(self) -> list[int]:
        """Returns the token ids of all chunks as a new list."""
        return self.to_numpy().tolist()

    def to_numpy(self) -> np.ndarray:
        """Returns the token ids of all chunks as an int64 array [T], which may be read-only.

        Raises RequestError for a chunk that is not text.
        """
        parts = []
        for number, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise RequestError(
                    f"Chunk {number} of the model input is an {type(chunk).__name__}, and models here read "
                    f"text only. Use EncodedTextChunk."
                )
            parts.append(chunk._tokens_T)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk([int(token)]))

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def __len__(self) -> int:
        return self.length
