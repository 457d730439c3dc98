"""Finds the data files of each split of a folder.

The rules are those of the Hugging Face hub, taken from the `datasets` library. The first that applies
decides:

1. `save_to_disk` of `datasets`: `dataset_dict.json` lists the splits, `state.json` the files of a split.
2. The `configs` in the YAML at the top of README.md: their `data_files`, or these rules in their `data_dir`.
3. Shards `data/<split>-00000-of-00001.*`.
4. Folders whose names contain a word for a split: train, training; validation, valid, dev, val; test,
   testing, eval, evaluation. Case does not matter.
5. Files whose names contain such a word.
6. Otherwise all files belong to `train`.

Hidden files are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from cookbook.errors import DataError
from cookbook.utils import json_files

TRAIN = "train"
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_LAYOUT_KEYS = ("data_files", "data_dir", "default", "description", "version")
_NUM_NAMED = 8


@dataclass(frozen=True)
class SplitLayout:
    """The data files of one config of a folder, as paths within it. A file may be in several splits."""

    folder: Path
    splits: Mapping[str, Sequence[str]]
    says_splits: bool
    """Whether names or metadata specify the splits."""
    paths: Sequence[str]
    """All files of the folder that are not hidden."""
    config: str | None = None

    def files(self, splits: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(path for split in splits for path in self.splits[split]))

    def evaluation_splits(self) -> list[str]:
        """Returns the splits whose names contain a word for evaluation data."""
        known = evaluation_words()
        return [split for split in self.splits if known & set(re.split(r"[\W_\d]+", split.lower()))]

    def describe(self) -> str:
        """Returns the splits for messages: train (a.jsonl), test (b.jsonl)."""
        found = [f"{split} ({some(files)})" for split, files in self.splits.items()]
        in_config = "" if self.config is None else f" in config {self.config}"
        return f"{', '.join(found)}{in_config}"


def evaluation_words() -> set[str]:
    """Returns the words in names of splits that mark evaluation data."""
    from datasets.data_files import SPLIT_KEYWORDS

    return {word for split, words in SPLIT_KEYWORDS.items() if str(split) != TRAIN for word in words}


def some(names: Sequence[str]) -> str:
    """Returns the first names as text, and the number of the others."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return (", ".join(names[:_NUM_NAMED]) or "nothing") + more


def list_files(folder: Path) -> list[str]:
    """Returns the sorted paths of all files below a folder, without hidden files and `__folders__`.

    A link may lead to a file anywhere, as in the hub's cache, or to a folder within this one. Raises
    DataError for a link to a folder elsewhere, which might contain the entire disk.
    """
    found: list[str] = []
    whole = folder.resolve()
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        if (
            os.path.islink(parent)
            and parent != str(folder)
            and not Path(parent).resolve().is_relative_to(whole)
        ):
            raise DataError(
                f"{parent} is a link to the folder {os.readlink(parent)}, outside of {folder}. Give that "
                "folder as a dataset of its own, or remove the link."
            )
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        inner = Path(parent).relative_to(folder)
        found += [(inner / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def layout_of(folder: Path, is_data: Any, config: str | None = None) -> SplitLayout:
    """Returns the layout of a folder, or of one of its configs. `is_data` recognises data files by path.

    Raises DataError for a config that does not exist, and if none is named and none is the default.
    """
    paths = list_files(folder)
    configs = read_configs(folder)
    if config is not None and config not in configs:
        known = f"Its README.md has {', '.join(configs)}." if configs else "Its README.md defines none."
        raise DataError(f"{folder} has no config {config!r}. {known}")
    if (saved := _saved_splits(folder)) is not None:
        return SplitLayout(folder, saved, _is_dict(folder), paths)
    data = [path for path in paths if is_data(path) and not _is_note(folder, path)]
    if not configs:
        splits, says_splits = _splits_by_name(data)
        return SplitLayout(folder, splits, says_splits, paths)
    config = config or _default_config(folder, configs)
    options = configs[config]
    if unknown := [key for key in options if key not in _LAYOUT_KEYS]:
        raise DataError(
            f"Config {config!r} in {folder}/README.md has `{unknown[0]}`, which is not supported. Remove "
            "it, or give the files themselves."
        )
    inner = str(options.get("data_dir") or ".").strip("/")
    within = [path for path in data if inner == "." or path.startswith(f"{PurePosixPath(inner)}/")]
    if "data_files" in options:
        return SplitLayout(
            folder, _matching(folder, config, options["data_files"], within, inner), True, paths, config
        )
    splits, says_splits = _splits_by_name(within, "" if inner == "." else f"{PurePosixPath(inner)}/")
    return SplitLayout(folder, splits, says_splits, paths, config)


def has_config(folder: Path, name: str) -> bool:
    return name in read_configs(folder)


# -- names ------------------------------------------------------------------------------------


def _splits_by_name(paths: Sequence[str], prefix: str = "") -> tuple[dict[str, list[str]], bool]:
    """Returns the files of each split, and whether the names of files specify the splits.

    All paths begin with `prefix`, which is ignored.
    """
    from datasets.data_files import (
        DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    )

    names = {path: path.removeprefix(prefix) for path in paths}
    shards: dict[str, list[str]] = {}
    for path, name in names.items():
        if (found := _SHARD.fullmatch(name)) is not None:
            shards.setdefault(found[1], []).append(path)
    if shards and all(_SPLIT_NAME.fullmatch(split) for split in shards):
        return _in_usual_order(shards), True
    for rules in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        splits = {
            str(split): [path for path, name in names.items() if _matches_any(name.lower(), patterns)]
            for split, patterns in rules.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}, True
    return {TRAIN: list(paths)}, False


def _in_usual_order(splits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    usual = (TRAIN, "validation", "test")
    names = [*(split for split in usual if split in splits), *sorted(set(splits) - set(usual))]
    return {split: splits[split] for split in names}


def _matches_any(path: str, patterns: Iterable[str]) -> bool:
    return any(_translated(pattern).match(path) for pattern in patterns)


MAX_STARS = 4
"""The maximum number of stars in a part of a pattern. Matching time is exponential in this number."""


@cache
def _translated(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    if max(part.count("*") for part in pattern.split("/")) > MAX_STARS or pattern.count("**") > MAX_STARS:
        raise ValueError(f"{pattern[:100]} has more than {MAX_STARS} stars in one part")
    return re.compile(glob_translate(pattern))


def _is_note(folder: Path, path: str) -> bool:
    """Returns whether a file with a data suffix contains only metadata, such as those of `datasets`."""
    from datasets.data_files import FILES_TO_IGNORE

    file = folder / path
    is_state = file.name == "state.json" and file.with_name("dataset_info.json").is_file()
    return file.name in FILES_TO_IGNORE or is_state


# -- README.md --------------------------------------------------------------------------------


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the configs that README.md (or .huggingface.yaml) defines, by name; empty if there are none."""
    import yaml
    from datasets.utils.metadata import MetadataConfigs

    from cookbook.config.documents import read_yaml

    card: dict[str, Any] = {}
    configs: Mapping[str, Mapping[str, Any]] = {}
    for name in ("README.md", ".huggingface.yaml"):
        if not (folder / name).is_file():
            continue
        text = (folder / name).read_text(encoding="utf-8-sig", errors="replace")
        if name == "README.md":
            found = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
            text = "" if found is None else found[1]
        try:
            values = read_yaml(text)
            card |= values if isinstance(values, dict) else {}
            card["configs"] = [
                {key: value for key, value in config.items() if key != "features"}
                for config in card.get("configs") or []
            ]
            configs = MetadataConfigs.from_dataset_card_data(card)
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = " ".join(str(error).split())
            raise DataError(
                f"The YAML of {folder / name} cannot be read: {said[:300]}. Correct it, or give the files "
                "themselves."
            ) from error
    return {str(name): dict(options) for name, options in configs.items()}


def _default_config(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> str:
    marked = [name for name, options in configs.items() if options.get("default")]
    named = [name for name in configs if name == "default"]
    found = list(configs) if len(configs) == 1 else marked or named
    if len(found) != 1:
        raise DataError(
            f"{folder} has the configs {', '.join(configs)}, and none is the default. "
            f"Name one: {folder}:{next(iter(configs))}"
        )
    return found[0]


def _matching(
    folder: Path, config: str, data_files: Any, paths: Sequence[str], inner: str
) -> dict[str, list[str]]:
    """Returns the splits that `data_files` of a config defines. Patterns match only files in the folder."""
    from datasets.data_files import sanitize_patterns

    splits = {}
    for split, patterns in sanitize_patterns(data_files).items():
        within = [pattern if inner == "." else f"{PurePosixPath(inner)}/{pattern}" for pattern in patterns]
        try:
            splits[split] = [path for path in paths if _matches_any(path, map(_plain, within))]
        except (ValueError, re.error) as error:
            raise DataError(f"Config {config!r} in {folder}/README.md: {error}.") from error
        if not splits[split]:
            raise DataError(
                f"Split {split!r} of config {config!r} in {folder}/README.md is {', '.join(patterns)}, and "
                f"no data file there is called so. It has {some(paths)}."
            )
    return splits


def _plain(pattern: str) -> str:
    return pattern.removeprefix("./")


# -- save_to_disk -----------------------------------------------------------------------------


def _is_dict(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def _saved_splits(folder: Path) -> dict[str, list[str]] | None:
    """Returns the files of a dataset that `save_to_disk` wrote, by split; None for any other folder."""
    if _is_dict(folder):
        splits = _read_note(folder / "dataset_dict.json", "splits", list[str])
        if unclear := [split for split in splits if not _SPLIT_NAME.fullmatch(split)]:
            raise DataError(
                f"{folder / 'dataset_dict.json'} has the split {json_files.shown(unclear[0])}, which names "
                f"no folder. {_COPY_AGAIN}"
            )
        return {str(split): _saved_files(folder, f"{split}/") for split in splits}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {TRAIN: _saved_files(folder, "")}
    return None


def _saved_files(folder: Path, inner: str) -> list[str]:
    state = folder / inner / "state.json"
    files = [inner + file["filename"] for file in _read_note(state, "_data_files", list[Mapping[str, str]])]
    if json_files.read_object(state, DataError, _COPY_AGAIN).get("_indices_data_files"):
        raise DataError(
            f"{state} selects rows by a file of indices. Save the dataset again with datasets 2 or newer."
        )
    for path in files:
        name = path.removeprefix(inner)
        is_name = len(name.encode(errors="replace")) <= 255 and not set(name) & set("/\0")
        if not is_name or not (folder / path).is_file():
            raise DataError(
                f"{state} names {path[:300]}, which is not there. Copy the complete folder again."
            )
    if not files:
        raise DataError(f"{state} names no data files. Save the dataset again.")
    return files


_COPY_AGAIN = "It is written by save_to_disk: copy the complete folder again."


def _read_note(path: Path, key: str, kind: Any) -> Any:
    values = json_files.read_object(path, DataError, _COPY_AGAIN, {key: kind})
    return values[key]
