"""Merges an adapter into the weights of its base model, one tensor at a time.

The updates are computed from the base model's files. An adapter on a head that is tied to the embeddings does
not change the embeddings: the merged model has separate tensors for both, and its config unties them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cookbook import models
from cookbook.engine.model import peft_settings
from cookbook.errors import CheckpointError, ModelError
from cookbook.export.updates import LowRank, ReplacedRows, Update, read_updates
from cookbook.runs.find import TrainedModel
from cookbook.utils import json_files, pretrained
from cookbook.utils.json_files import JsonOrigin

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_REPAIR = "Copy or download the model again."

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class MergedWeights:
    """The weights of a merged model. Each is computed when it is read."""

    files: dict[str, Path]
    """The file of each weight of the base model."""
    adapter: dict[str, Update]
    """The updates by the name of the weight."""
    untied: dict[str, str] = field(default_factory=dict)
    """For a head that is untied by the merge, the embeddings that its weight is copied from."""

    def __post_init__(self) -> None:
        self._open_files: dict[Path, Any] = {}
        self.names = sorted({*self.files, *self.untied})
        for name, update in self.adapter.items():
            shape = tuple(self._stored(name).get_shape())
            if update.shape_on(shape) is None:
                raise CheckpointError(
                    f"The adapter does not fit its base model: {name} is {shape} there, and "
                    f"{update.shape} in the adapter. Give base_model= with the one that it was trained on."
                )

    def shape_of(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._stored(name).get_shape())
        return shape if name not in self.adapter else self.adapter[name].shape_on(shape) or shape

    @property
    def num_rows(self) -> int:
        """The number of rows of the embeddings that an adapter with trained rows needs; else 0."""
        rows = [name for name, update in self.adapter.items() if isinstance(update, ReplacedRows)]
        return max((self.shape_of(name)[0] for name in rows), default=0)

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the type in the base model's files."""
        kind = self._stored(name).get_dtype()
        return _FLOATS[kind] if kind in _FLOATS else self.read(name).dtype

    def read(self, name: str) -> Tensor:
        """Returns a weight as it is stored, or in float32 with its update."""
        origin = self.untied.get(name, name)
        weight: Tensor = self._file_of(origin).get_tensor(origin)
        return self.adapter[name].added_to(weight) if name in self.adapter else weight

    def is_of_base(self, copy: Tensor, module: str) -> bool:
        """Returns whether `copy` equals the weight of a module in the base model."""
        origin = self.untied.get(f"{module}.weight", f"{module}.weight")
        if origin not in self.files:
            return False
        return peft_settings.is_same(copy, self._file_of(origin).get_tensor(origin))

    def _stored(self, name: str) -> Any:
        origin = self.untied.get(name, name)
        return self._file_of(origin).get_slice(origin)

    def _file_of(self, origin: str) -> Any:
        path = self.files[origin]
        if path not in self._open_files:
            self._open_files[path] = _open(path)
        return self._open_files[path]


def merged_weights(source: TrainedModel, base_folder: Path) -> MergedWeights | None:
    """Returns the merged weights, read from the files of a base model.

    Returns None if the files are not safetensors, or do not name weights as the loaded modules do:
    transformers renames the weights of some architectures while it loads them.
    """
    updates = read_updates(source)
    updates = with_transposed(updates, base_folder)
    files = weight_files(base_folder)
    head, embeddings = tied_weights(base_folder)
    is_untied = head is not None and embeddings in files and unties(updates, head, str(embeddings))
    untied = {str(head): str(embeddings)} if is_untied else {}
    if not files or updates.keys() - files.keys() - untied.keys():
        return None
    if head in files and not untied and isinstance(updates.get(str(embeddings)), ReplacedRows):
        del files[head]  # a copy of the embeddings
    merged = MergedWeights(files, updates, untied)
    peft_settings.check_frozen(source.folder, merged.is_of_base)
    return merged


def with_transposed(updates: Mapping[str, Update], base_folder: Path) -> dict[str, Update]:
    """Returns the updates, which know the weights that are stored transposed, as in GPT-2.

    The shape does not show it if the weight is square.
    """
    if not updates:
        return {}
    model = pretrained.empty_causal_lm(models.load_config(str(base_folder)))
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return {
        name: replace(update, is_transposed=True)
        if name in transposed and isinstance(update, LowRank)
        else update
        for name, update in updates.items()
    }


def unties(updates: Mapping[str, Update], head: str, embeddings: str) -> bool:
    """Returns whether updates make a head differ from the embeddings that it is tied to.

    Trained rows of the embeddings are also those of a head that is tied to them.
    """
    update = updates.get(embeddings)
    return head in updates or (update is not None and not isinstance(update, ReplacedRows))


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns the safetensors file of each weight of a model folder; {} if there is none.

    Raises ModelError if the index names a file that is missing or outside the folder.
    """
    if (folder / INDEX_FILE).is_file():
        shape = {"weight_map": dict[str, str]}
        weight_map = json_files.read_object(folder / INDEX_FILE, ModelError, _REPAIR, shape)["weight_map"]
        origin = JsonOrigin(str(folder / INDEX_FILE), ModelError, _REPAIR)
        if other := [name for name in weight_map.values() if Path(name).name != name or not name]:
            origin.refuse(f"`weight_map` names {other[0]!r}, which is no file of the folder")
        if missing := [name for name in weight_map.values() if not (folder / name).is_file()]:
            origin.refuse(f"`weight_map` names {missing[0]}, which is not there")
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / WEIGHTS_FILE).is_file():
        return {}
    with _open(folder / WEIGHTS_FILE) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged: it cannot be read ({error}). {_REPAIR}") from error


def tied_weights(folder: Path) -> tuple[str | None, str | None]:
    """Returns the weight names of a head and of the embeddings it is tied to, or (None, None)."""
    config = models.load_config(str(folder))
    if not config.get_text_config().tie_word_embeddings:
        return None, None
    model = pretrained.empty_causal_lm(config)
    names = {id(module): name for name, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names[id(head)]}.weight", f"{names[id(embeddings)]}.weight"


def base_model_folder(source: TrainedModel) -> Path:
    """Returns the folder of the base model's files, downloaded from the hub if needed.

    Raises ModelError if it is unavailable, or if its weights are stored quantized.
    """
    folder: Path = models.load_from_hub_or_disk("weights", source.base_model, _folder_of)
    config = json_files.read_object(folder / "config.json", ModelError, _REPAIR)
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"The weights of {source.base_model!r} are stored quantized ({method}); "
            f"no adapter can be merged there. Give base_model= with the model they were quantized from."
        )
    return folder


def _folder_of(location: str, local_files_only: bool = False) -> Path:
    """Returns the folder itself, or the hub's cache of a model with all its files."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            location, allow_patterns=["*.safetensors", "*.json"], local_files_only=local_files_only
        )
    )
    files = weight_files(folder)
    is_whole = (folder / "config.json").is_file() and all(path.is_file() for path in files.values())
    if not is_whole or (local_files_only and not files):
        raise FileNotFoundError(f"{folder} lacks weights of {location}.")
    return folder  # without safetensors, transformers loads the other files of the repository
