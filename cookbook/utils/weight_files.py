"""Finds the safetensors files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.errors import ModelError
from cookbook.utils import json_files
from cookbook.utils.json_files import JsonOrigin

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
REPAIR = "Copy or download the model again."


def find(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor of a model folder; {} if there is none.

    Raises ModelError if the index names a file that is missing or outside the folder.
    """
    if (folder / INDEX_FILE).is_file():
        shape = {"weight_map": dict[str, str]}
        weight_map = json_files.read_object(folder / INDEX_FILE, ModelError, REPAIR, shape)["weight_map"]
        origin = JsonOrigin(str(folder / INDEX_FILE), ModelError, REPAIR)
        if other := [name for name in weight_map.values() if Path(name).name != name or not name]:
            origin.refuse(f"`weight_map` names {other[0]!r}, which is no file of the folder")
        if missing := [name for name in weight_map.values() if not (folder / name).is_file()]:
            origin.refuse(f"`weight_map` names {missing[0]}, which is not there")
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / WEIGHTS_FILE).is_file():
        return {}
    with open_file(folder / WEIGHTS_FILE) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)


def open_file(path: Path) -> Any:
    """Returns an open safetensors file. Raises ModelError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged: it cannot be read ({error}). {REPAIR}") from error


def dtype_of(file: Any, name: str) -> Any:
    """Returns the type of a tensor in an open file."""
    import torch

    kind = file.get_slice(name).get_dtype()
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known[kind] if kind in known else file.get_tensor(name).dtype


def folder_of(location: str, local_files_only: bool = False) -> Path:
    """Returns the folder itself, or the hub's cache of a model with all its files."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            location, allow_patterns=["*.safetensors", "*.json"], local_files_only=local_files_only
        )
    )
    files = find(folder)
    is_whole = (folder / "config.json").is_file() and all(path.is_file() for path in files.values())
    if not is_whole or (local_files_only and not files):
        raise FileNotFoundError(f"{folder} lacks weights of {location}.")
    return folder  # without safetensors, transformers loads the other files of the repository
