"""Rows from files and from the hub, each of which knows where it came from."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cookbook import hub
from cookbook.errors import DataError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class Row(dict[str, Any]):
    """A row of a dataset. `place` says where it stands, for error messages."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def read_rows(path: Path, on_bad_row: Literal["raise", "skip"] = "raise") -> list[Row]:
    """The rows of a JSONL, JSON (a list of objects) or Parquet file.

    Raises DataError for a file that is missing, empty or of another kind, and, unless bad rows
    are to be skipped, for the first line that is not a JSON object.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give a .jsonl, .json or .parquet file in it.")
    if not path.is_file():
        raise DataError(f"Dataset file {path} does not exist.")
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path, on_bad_row)
    elif path.suffix == ".json":
        rows = _as_rows(_read_json(path), path, on_bad_row)
    elif path.suffix == ".parquet":
        rows = _as_rows(_read_parquet(path), path, on_bad_row)
    else:
        raise DataError(f"{path} is not of a known kind. Give a .jsonl, .json or .parquet file.")
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows


def _read_jsonl(path: Path, on_bad_row: Literal["raise", "skip"]) -> list[Row]:
    rows: list[Row] = []
    num_bad = 0
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(_as_row(json.loads(line.strip()), f"line {number} of {path.name}"))
                except (json.JSONDecodeError, DataError) as error:
                    reason = _json_reason(error) if isinstance(error, json.JSONDecodeError) else str(error)
                    if on_bad_row == "raise":
                        raise DataError(
                            f"line {number} of {path} {reason}\n"
                            f"Mend the line, or leave such lines out with on_bad_row=skip."
                        ) from error
                    num_bad += 1
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    if num_bad:
        logger.warning("Left out %d lines of %s that are not JSON objects.", num_bad, path)
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = _json_reason(error) if isinstance(error, json.JSONDecodeError) else f"is not UTF-8: {error}."
        raise DataError(f"{path} {reason}") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a JSON {type(values).__name__}. Give a list of objects.")
    return values


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error


def _as_rows(values: list[Any], path: Path, on_bad_row: Literal["raise", "skip"]) -> list[Row]:
    rows: list[Row] = []
    for number, value in enumerate(values):
        try:
            rows.append(_as_row(value, f"row {number} of {path.name}"))
        except DataError as error:
            if on_bad_row == "raise":
                raise DataError(
                    f"row {number} of {path} {error}\nMend it, or leave such rows out with on_bad_row=skip."
                ) from error
            logger.warning("Left out row %d of %s: it %s", number, path, error)
    return rows


def _as_row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"is a JSON {type(value).__name__}, not an object.")
    return Row(value, place)


def _json_reason(error: json.JSONDecodeError) -> str:
    where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return f"is not JSON: {error.msg} at {where}."


class Selection(Sequence[Row]):
    """Some rows of a sequence, in an order of their own, read when asked for."""

    def __init__(self, rows: Sequence[Row], indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selection(self._rows, self._indices[index])
        return self._rows[int(self._indices[index])]


class HubRows(Sequence[Row]):
    """One split of a hub dataset, read from its memory-mapped files when asked for."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selection(self, np.arange(len(self))[index])
        return Row(self._dataset[index], f"row {index} of {self._name}")


def load_hub_rows(hub_id: str, train_split: str, test_split: str | None) -> tuple[HubRows, HubRows | None]:
    """The rows of a dataset on the hub, or in its cache on this machine."""
    train = _load_hub_split(hub_id, train_split)
    return train, None if test_split is None else _load_hub_split(hub_id, test_split)


def _load_hub_split(hub_id: str, split: str) -> HubRows:
    import datasets

    reason = hub.why_unreachable()
    try:
        with contextlib.nullcontext() if reason is None else hub.datasets_offline():
            dataset = datasets.load_dataset(hub_id, split=split)
    except Exception as error:  # datasets, the hub and Arrow raise many kinds for a bad dataset
        reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"Cannot load split {split!r} of dataset {hub_id!r}: {reason}\n"
            f"On a machine with network access run `hf download --repo-type dataset {hub_id}`, or give a "
            f"file: dataset=/path/to/chats.jsonl. The embedded dataset works offline: dataset=pirate."
        ) from error
    return HubRows(dataset, f"{hub_id} ({split})")
