"""Where rows come from: files, folders of files, and datasets on the hub.

`open_source` finds the source of a name. Rows keep their place (line 7 of chats.jsonl), sources have a
fingerprint, and chunks of rows are decoded where they are used, which may be another process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cookbook import embedded
from cookbook.errors import DataError
from cookbook.nearest import did_you_mean
from cookbook.supervised.data.sources.arrow import ParquetSource
from cookbook.supervised.data.sources.base import BadRow, Chunk, Row, Source, without_nulls
from cookbook.supervised.data.sources.folder import FolderSource
from cookbook.supervised.data.sources.hub import HubName, HubSource, HubStream, open_hub
from cookbook.supervised.data.sources.text_files import (
    CsvSource,
    FileSource,
    JsonLinesSource,
    JsonSource,
    TsvSource,
)

__all__ = [
    "BadRow",
    "Chunk",
    "HubDataset",
    "HubSource",
    "HubStream",
    "KNOWN_DATASETS",
    "Row",
    "Source",
    "known_test_source",
    "open_source",
    "without_nulls",
]


@dataclass(frozen=True)
class HubDataset:
    """A published dataset: its hub id, and how it is usually split."""

    hub_id: str
    train_split: str = "train"
    test_split: str | None = None


KNOWN_DATASETS: Mapping[str, HubDataset] = {
    "no_robots": HubDataset("HuggingFaceH4/no_robots", test_split="test"),
    "tulu3": HubDataset("allenai/tulu-3-sft-mixture"),
    "pirate_ultrachat": HubDataset("winglian/pirate-ultrachat-10k"),
}
"""Short names, next to `pirate`, which is embedded."""

FILE_KINDS: Mapping[str, type[FileSource]] = {
    ".jsonl": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".jsonl.gz": JsonLinesSource,
    ".json": JsonSource,
    ".parquet": ParquetSource,
    ".csv": CsvSource,
    ".tsv": TsvSource,
}


def open_source(spec: str, split: str | None = None, streaming: bool = False) -> Source:
    """The source of a short name, a file, a folder of files, or a dataset on the hub.

    `split` takes the place of the one a hub name says. With `streaming` a dataset on the hub is
    read over the network as it is needed; files always are read as they are needed.
    """
    path = Path(spec).expanduser()
    known = KNOWN_DATASETS.get(spec)
    if known is None and (spec == "pirate" or os.path.exists(path) or _kind_of(path) is not None):
        if split is not None:
            raise DataError(f"{spec} has no splits, and split={split!r} was asked for. Leave it out.")
        return JsonLinesSource(embedded.PIRATE_PATH) if spec == "pirate" else _open_path(path)
    name = HubName.parse(spec) if known is None else HubName(known.hub_id, split=known.train_split)
    if name is None:
        names = ["pirate", *KNOWN_DATASETS]
        hint = did_you_mean(spec, names)
        raise DataError(
            f"dataset={spec!r} is no known name, file or hub id (owner/name).{hint} "
            f"Names: {', '.join(names)}."
        )
    return open_hub(name if split is None else replace(name, split=split), streaming)


def known_test_source(spec: str) -> Source | None:
    """The test split that a short name is known to have."""
    known = KNOWN_DATASETS.get(spec)
    return None if known is None or known.test_split is None else open_source(spec, known.test_split)


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return FolderSource(path, _kind_of, _known_kinds())
    kind = _kind_of(path)
    if kind is None:
        raise DataError(f"{path} is not of a known kind. Give a {_known_kinds()} file.")
    return kind(path)


def _kind_of(path: Path) -> type[FileSource] | None:
    return next((kind for suffix, kind in FILE_KINDS.items() if path.name.lower().endswith(suffix)), None)


def _known_kinds() -> str:
    return ", ".join(FILE_KINDS)
