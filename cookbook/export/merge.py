"""Merges an adapter into the weights of its base model, one tensor at a time.

The updates are computed from the base model's files. An adapter on one of several tied weights, such as a
head and the embeddings, or blocks that layers of Zamba2 share, leaves the others as they are: the merged
model has a tensor for each, and its config unties them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cookbook import models
from cookbook.engine.model import peft_settings
from cookbook.engine.model.peft_names import own_layer_names
from cookbook.engine.model.published_files import ChangedFiles, PublishedFiles
from cookbook.engine.model.text_part import by_published_names
from cookbook.errors import CheckpointError, ModelError
from cookbook.export.updates import LowRank, ReplacedRows, StackedLowRank, Update, read_updates
from cookbook.runs.find import TrainedModel
from cookbook.utils import json_files, pretrained
from cookbook.utils.weight_files import REPAIR


class MergedWeights:
    """The weights of a merged model by their names in the base model's files, computed when read."""

    def __init__(self, base_folder: Path, updates: Mapping[str, Update]) -> None:
        """`updates` are by the name of the parameter. Raises CheckpointError if they do not fit the model."""
        model = pretrained.empty_causal_lm(models.load_config(str(base_folder)))
        self.published = PublishedFiles(base_folder, model)
        layers = own_layer_names(model, (name.removesuffix(".weight") for name in updates))
        named = {
            layers[name.removesuffix(".weight")] + (".weight" if name.endswith(".weight") else ""): update
            for name, update in updates.items()
        }
        self.updates = with_layouts(named, model)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        shared = _names_of_shared(model)
        changed: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, update in self.updates.items():
            origin = _origin(name, shared, self.published)
            shape = update.shape_on(shapes[name]) if name in shapes else None
            if shape is None or origin not in self.published.parameters:
                raise CheckpointError(
                    f"The adapter does not fit its base model: {name} is {shapes.get(name, 'nothing')} "
                    f"there, and {update.shape} in the adapter. Give base_model= with the one that it was "
                    "trained on."
                )
            changed[name] = functools.partial(self._updated, update, origin)
            self._shapes[name] = shape
        for name, update in self.updates.items():
            for copy in shared.get(name, ()) if isinstance(update, ReplacedRows) else ():
                changed.setdefault(copy, changed[name])
                self._shapes.setdefault(copy, self._shapes[name])
        self.is_untied = any(unties(self.updates, names) for names in shared.values())
        added = {}
        for name in shared if self.is_untied else ():  # a config unties all of a model's weights, or none
            origin = _origin(name, shared, self.published)
            changed.setdefault(name, functools.partial(self._copy, origin))
            self._shapes.setdefault(name, shapes[name])
            if name not in self.published.parameters:
                added[_published_name(self.published, name, origin)] = name
        self._changed = ChangedFiles(self.published, changed, added)
        self.names = self._changed.names

    def _updated(self, update: Update, origin: str) -> Tensor:
        return update.added_to(self.published.parameter(origin))

    def _copy(self, origin: str) -> Tensor:
        return self.published.parameter(origin).clone()  # copies in one file must not share memory

    @property
    def num_rows(self) -> int:
        """The number of rows of the embeddings that an adapter with trained rows needs; else 0."""
        rows = [name for name, update in self.updates.items() if isinstance(update, ReplacedRows)]
        return max((self._shapes[name][0] for name in rows), default=0)

    @property
    def are_renamed(self) -> bool:
        """Whether transformers gives some of the weights other names than the files do."""
        return any(
            self.published.is_loaded(name) and self.published.parameter_of(name) != name
            for name in self.published.files
        )

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._changed.outline_of(name, torch.float32, self._shapes).shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the type in the base model's files."""
        return self._changed.stored_dtype(name)

    def read(self, name: str) -> Tensor:
        """Returns a weight as it is stored, or in float32 with its update."""
        return self._changed.read(name)

    def write(
        self, folder: Path, dtype_of: Callable[[str], torch.dtype], max_shard_size: str
    ) -> tuple[int, int]:
        """Returns the number of bytes written, and the largest number that was in memory at once."""
        outline = {name: self._changed.outline_of(name, dtype_of(name), self._shapes) for name in self.names}
        held = self._changed.write(folder, outline, max_shard_size)
        merging = max(
            (2 * 4 * outline[name].numel() for name in self.names if self._changed.is_changed(name)),
            default=0,
        )
        return sum(tensor.nbytes for tensor in outline.values()), held + merging

    def is_of_base(self, copy: Tensor, module: str) -> bool:
        """Returns whether `copy` equals the weight of a module in the base model."""
        (name,) = by_published_names(self.published.model, {f"{module}.weight": None})
        name = _origin(name, _names_of_shared(self.published.model), self.published)
        return name in self.published.parameters and peft_settings.is_same(
            copy, self.published.parameter(name)
        )


def merged_weights(source: TrainedModel, base_folder: Path) -> MergedWeights:
    """Returns the merged weights, read from the files of a base model."""
    merged = MergedWeights(base_folder, read_updates(source))
    peft_settings.check_frozen(source.folder, merged.is_of_base)
    return merged


def with_layouts(updates: Mapping[str, Update], model: Any) -> dict[str, Update]:
    """Returns the updates, which know the weights that are stacked, or stored transposed, as in GPT-2.

    The shape does not show it if the weight is square. The names of JetMoE's stacked weights are those of
    linear layers.
    """
    stacked = {name for name, weight in model.named_parameters() if weight.ndim == 3}
    updates = {
        name: StackedLowRank(update.a_RI, update.b_OR, update.scaling)
        if name in stacked and isinstance(update, LowRank)
        else update
        for name, update in updates.items()
    }
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    transposed |= {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        for weight, _ in module.named_parameters(recurse=False)
        if getattr(module, "is_transposed", False)
    }
    return {
        name: replace(update, is_transposed=True)
        if name in transposed and isinstance(update, LowRank | StackedLowRank)
        else update
        for name, update in updates.items()
    }


def unties(updates: Mapping[str, Update], names: Sequence[str]) -> bool:
    """Returns whether updates make weights differ that are one and the same in the base model.

    `names` are those of one weight. Trained rows of the embeddings are also those of a head that is tied to
    them.
    """
    return any(name in updates and not isinstance(updates[name], ReplacedRows) for name in names)


def _names_of_shared(model: Any) -> dict[str, list[str]]:
    """Returns the names of each weight that has several, by each of them."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _origin(name: str, shared: Mapping[str, Sequence[str]], published: PublishedFiles) -> str:
    """Returns the name under which the published files have a parameter, or else its own name."""
    known = (one for one in (name, *shared.get(name, ())) if one in published.parameters)
    return next(known, name)


def tied_weights(model: Any) -> tuple[str | None, str | None]:
    """Returns the weight names of a head and of the embeddings it is tied to, or (None, None)."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return None, None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(head)]}.weight", f"{names[id(embeddings)]}.weight"


def _published_name(published: PublishedFiles, name: str, origin: str) -> str:
    """Returns the name for a copy of the parameter `origin`, of which published files have only that one."""
    (first, *_) = published.names_of(origin)
    if name.endswith("lm_head.weight") and first.startswith("language_model.model."):
        return "language_model.lm_head.weight"
    return name


def base_model_folder(source: TrainedModel) -> Path:
    """Returns the folder of the base model's files, downloaded from the hub if needed.

    Raises ModelError if it is unavailable, or if its weights are stored quantized.
    """
    folder = models.model_folder(source.base_model)
    config = json_files.read_object(folder / "config.json", ModelError, REPAIR)
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"The weights of {source.base_model!r} are stored quantized ({method}); "
            f"no adapter can be merged there. Give base_model= with the model they were quantized from."
        )
    return folder
