"""Tests that files of tensors are those of safetensors, and that one tensor at a time is in memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cookbook.engine import tensor_files

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def make_tensors() -> dict[str, Tensor]:
    """Tensors of every type: a matrix, one that is transposed, a scalar and an empty one."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        matrix = (torch.randn(5, 3, generator=generator) * 3).to(dtype)
        found |= {f"{kind}.ä": matrix, f"a.{kind}": matrix.clone().T}
        found |= {f"{kind}.step": matrix[0, 0].clone(), kind: matrix[:0].clone()}
    return found


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_file_is_that_of_safetensors_to_the_byte(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = make_tensors()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a", metadata)
    tensor_files.write(tmp_path / "b", tensors, lambda name: tensors[name], metadata)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    for name, tensor in load_file(tmp_path / "b").items():
        found, expected = (each.reshape(-1).view(torch.uint8) for each in (tensor, tensors[name]))
        assert torch.equal(found, expected)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    read: list[weakref.ref[Tensor]] = []

    def make(name: str) -> Tensor:
        assert not any(tensor() is not None for tensor in read), "the one before is freed"
        tensor = torch.full((4, 4), float(name))
        read.append(weakref.ref(tensor))
        return tensor

    outline = {str(number): torch.empty(4, 4, device="meta") for number in range(5)}
    tensor_files.write(tmp_path / "file", outline, make)
    assert len(read) == 5
    assert {name: float(tensor[0, 0]) for name, tensor in load_file(tmp_path / "file").items()} == {
        name: float(name) for name in outline
    }
