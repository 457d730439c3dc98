"""Writes tensors in the format of safetensors, of which one at a time is in the host's memory.

`safetensors.torch.save_file` takes all tensors on the host. For a full fine-tune on CUDA these are 12 bytes a
weight, which the host has no other use for. The files are the same to the byte.

The format (huggingface.co/docs/safetensors): the length of the header in 8 bytes, the header as JSON, which
has the type, the shape and the place of each tensor, then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cookbook.utils import files

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32",
    torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64",
}  # fmt: skip
_ORDER = [*_NAMES]
"""safetensors writes tensors of the last type first, and those of one type in the order of their names."""
_ALIGNMENT = 8


def write(
    path: Path,
    outline: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file with the tensors that `read` returns, which have the dtypes and shapes of `outline`.

    `read` is called for one tensor after another, which may be on any device.
    """
    names = sorted(outline, key=lambda name: (-_ORDER.index(outline[name].dtype), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + outline[name].numel() * outline[name].element_size()
        kind, shape = _NAMES[outline[name].dtype], list(outline[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = read(name).detach().to("cpu").contiguous()
            assert tensor.dtype == outline[name].dtype
            assert tensor.shape == outline[name].shape
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_all(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file with these tensors."""
    write(path, tensors, lambda name: tensors[name])
