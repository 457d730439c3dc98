"""Reads the weights of a published model folder, and writes a changed model with the same tensors.

transformers renames the tensors of some architectures while it loads them, and stacks or splits others (the
experts of a layer become one parameter). A published folder may also have tensors that transformers does not
load, such as heads for multi-token prediction. What is written here has all of them, under their names in the
published files, so that every program takes it that takes the published folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from cookbook.engine import tensor_files
from cookbook.errors import ModelError
from cookbook.utils import files, json_files, weight_files
from cookbook.utils.weight_files import REPAIR

_CODE = ("auto_map", "custom_generate")
"""Keys that name code of the published model, which is not copied."""
_FILES_FOR_MEDIA = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class _TensorGroup:
    """Published tensors, and the parameters that transformers makes of them."""

    tensors: tuple[tuple[str, str], ...]
    """Names in the files, in the order of loading, with the pattern that a converter knows each by."""
    parameter: str
    """The name of the parameter, or of the first one of a converter."""
    converter: Any = None
    """Stacks, splits or transposes the tensors. None if the parameter is the tensor itself."""

    def parameters_of(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Returns the parameters, as transformers makes them of the tensors that `read` returns."""
        if self.converter is None:
            return {self.parameter: read(self.tensors[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.tensors:
            converter.add_tensor(self.parameter, name, pattern, read(name))
        found = converter.convert(self.parameter, model=model, config=model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in found.items()}


class PublishedFiles:
    """The tensors of a model folder by their names there, and how they become the parameters of a model."""

    def __init__(self, folder: Path, model: Any) -> None:
        """`model` may be without memory for its weights. Raises ModelError if the files are damaged."""
        self.files = weight_files.find(folder)
        self.model = model
        self._open: dict[Path, Any] = {}
        groups = _groups(self.files, model)
        self._group_of = {name: group for group in groups for name, _ in group.tensors}
        self._group_of_parameter: dict[str, _TensorGroup] = {}
        for group in groups:
            parameters = [group.parameter]
            if group.converter is not None:
                parameters = list(group.parameters_of(self._shape_on_meta, model))
            self._group_of_parameter |= dict.fromkeys(parameters, group)

    @property
    def parameters(self) -> set[str]:
        """The names of the parameters that the files have."""
        return set(self._group_of_parameter)

    def names_of(self, parameter: str) -> list[str]:
        """Returns the names of the tensors that a parameter is made of."""
        group = self._group_of_parameter.get(parameter)
        return [] if group is None else [name for name, _ in group.tensors]

    def parameter_of(self, name: str) -> str | None:
        """Returns the parameter that a tensor is, or None if it is converted or not loaded."""
        group = self._group_of.get(name)
        return None if group is None or group.converter is not None else group.parameter

    def is_loaded(self, name: str) -> bool:
        """Returns whether transformers loads a tensor."""
        return name in self._group_of

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype_of(self, name: str) -> torch.dtype:
        dtype: torch.dtype = weight_files.dtype_of(self._file_of(name), name)
        return dtype

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor of the files."""
        tensor: Tensor = self._file_of(name).get_tensor(name)
        return tensor

    def parameter(self, name: str) -> Tensor:
        """Returns a parameter of the model, in the type that the files have it in."""
        return self._group_of_parameter[name].parameters_of(self.tensor, self.model)[name]

    def converted_back(self, name: str, changed: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """Returns the tensors that are converted together with `name`, for new values of some parameters.

        The other parameters have the values of the files. Tensors have the type of the new values.
        """
        group = self._group_of[name]
        if group.converter is None:
            return {name: changed[group.parameter]()}
        parameters = [key for key, one in self._group_of_parameter.items() if one is group]
        are_all_changed = all(key in changed for key in parameters)
        old = {} if are_all_changed else group.parameters_of(self.tensor, self.model)
        values = {key: changed[key]() if key in changed else old[key] for key in parameters}
        return self._converted_back(group, values)

    def _converted_back(self, group: _TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of which transformers would make parameters of these values.

        Conversions move numbers and change none. So the places of the numbers are converted, which shows
        where each number came from. Numbers that no parameter has stay as they are.
        """
        shapes = {name: self.shape_of(name) for name, _ in group.tensors}
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        starts = dict(zip(shapes, [0, *torch.tensor([*sizes.values()]).cumsum(0).tolist()], strict=False))

        def places(name: str) -> Tensor:
            kind = torch.int32 if sum(sizes.values()) < 2**31 else torch.int64
            return torch.arange(starts[name], starts[name] + sizes[name], dtype=kind).view(shapes[name])

        dtype = max((value.dtype for value in values.values()), key=lambda kind: kind.itemsize)
        flat = torch.cat([self.tensor(name).reshape(-1).to(dtype) for name in shapes])
        for name, place in group.parameters_of(places, self.model).items():
            flat[place.reshape(-1).long()] = values[name].reshape(-1).to("cpu", dtype)
        return {
            name: flat[starts[name] : starts[name] + sizes[name]].view(shape).clone()
            for name, shape in shapes.items()
        }

    def _shape_on_meta(self, name: str) -> Tensor:
        return torch.empty(self.shape_of(name), device="meta")

    def _file_of(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = weight_files.open_file(path)
        return self._open[path]


def _groups(names: Iterable[str], model: Any) -> list[_TensorGroup]:
    """Returns how transformers makes the parameters of a model of tensors with these names.

    Follows `convert_and_load_state_dict_in_model` of transformers. Tensors that it does not load are in no
    group.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known:
            found.setdefault(renamed, []).append((name, pattern))
    groups = []
    for parameter, tensors in found.items():
        pattern = tensors[0][1]
        converter = None if pattern is None else by_pattern[pattern]
        if converter is None:  # of tensors with one name, transformers takes the last
            tensors = tensors[-1:]
        groups.append(_TensorGroup(tuple((name, one or "") for name, one in tensors), parameter, converter))
    return groups


class ChangedFiles:
    """The tensors of a published model with new values of some parameters, computed when they are read."""

    def __init__(
        self,
        published: PublishedFiles,
        changed: Mapping[str, Callable[[], Tensor]],
        added: Mapping[str, str] | None = None,
    ) -> None:
        """`changed` returns the new value of each changed parameter.

        `added` has the parameters to write that the files lack, by the names of their new tensors.
        """
        self.published = published
        self.names = sorted({*published.files, *(added or ())})
        self._changed = changed
        self._added = dict(added or {})
        self._changed_names = {name for one in changed for name in published.names_of(one)}
        self._ready: dict[str, Tensor] = {}

    def is_changed(self, name: str) -> bool:
        return name in self._changed_names or name in self._added

    def read(self, name: str) -> Tensor:
        """Returns a tensor as the files have it, or in the type of the new values."""
        if name in self._added:
            return self._changed[self._added[name]]()
        if name not in self._changed_names:
            return self.published.tensor(name)
        if name not in self._ready:
            self._ready |= self.published.converted_back(name, self._changed)
        return self._ready.pop(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Returns the type in the files. An added tensor has that of the one it was tied to."""
        if name in self._added:
            own = self.published.model.get_parameter(self._added[name])
            named = self.published.model.named_parameters(remove_duplicate=False)
            names = [key for key, value in named if value is own]
            name = next(one for key in names for one in self.published.names_of(key))
        return self.published.dtype_of(name)

    def outline_of(self, name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Returns a tensor without memory, of the shape and type to write.

        `shapes` are those of changed parameters that may have another shape than in the files.
        """
        parameter = self._added.get(name) or self.published.parameter_of(name)
        shape = shapes.get(parameter or "") or self.published.shape_of(name)
        return torch.empty(shape, dtype=dtype, device="meta")

    def write(self, folder: Path, outline: Mapping[str, Tensor], max_shard_size: str) -> int:
        """Writes all tensors in the types of `outline`.

        Returns the largest number of bytes that were in memory at once.
        """
        plan = split_torch_state_dict_into_shards(dict(outline), max_shard_size=max_shard_size)
        held = 0

        def read(name: str) -> Tensor:
            nonlocal held
            tensor = self.read(name).to(outline[name].dtype)
            held = max(held, tensor.nbytes + sum(other.nbytes for other in self._ready.values()))
            return tensor

        for file_name, names in plan.filename_to_tensors.items():
            shard = {name: outline[name] for name in names}
            tensor_files.write(folder / file_name, shard, read, metadata={"format": "pt"})
        if plan.is_sharded:
            total = sum(tensor.nbytes for tensor in outline.values())
            index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
            files.write(folder / weight_files.INDEX_FILE, json.dumps(index, indent=2) + "\n")
        return held


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a published file without the keys that name code; {} without a file."""
    if not path.exists():
        return {}
    content = json_files.read_object(path, ModelError, REPAIR)
    return {key: value for key, value in content.items() if key not in _CODE}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def set_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key in the config of a model, and in that of its text part if it has one."""
    config[key] = value
    for name in ("text_config", "llm_config", "thinker_config"):
        if isinstance(part := config.get(name), dict):
            part[key] = value


def set_vocabulary(config: dict[str, Any], num_rows: int) -> None:
    """Sets the number of rows of the embeddings in the config of a model."""
    part = config.get("text_config")
    (part if isinstance(part, dict) else config)["vocab_size"] = num_rows


def set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Sets the type of the weights in the config of a model."""
    set_everywhere(config, "dtype", str(dtype).removeprefix("torch."))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("torch_dtype", None)


def write_files_for_media(published_folder: Path, folder: Path) -> None:
    """Writes what a multimodal model's folder has for pictures, videos and sound, without naming code."""
    for name in _FILES_FOR_MEDIA:
        if content := read_json(published_folder / name):
            write_json(folder / name, content)
