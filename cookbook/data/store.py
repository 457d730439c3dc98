"""Rendered examples on disk, which are read through memory maps, so that data need not fit into memory.

A store contains the untruncated examples of one source; readers choose lengths and batches.

    tokens.bin          the own tokens of all examples, concatenated
    examples.npy        the start of each example's own tokens and trained runs      E + 1, 2
    shared.npy          the example that each begins like (-1: none), and for how    E, 2
                        many tokens: those are not stored again
    runs.npy            start and end of each run of tokens of one weight            R, 2
    run_weights.npy     the weight of each run                                       R
    rows.npy            the start of each row's examples                             N + 1
    keys.npy            what rows share with others: answers and what they answer    K
    key_rows.npy        where each row's keys begin                                  N + 1
    places.txt          the place of each row in the source, one per line
    meta.json           counts made during rendering, and a digest of the content

Shape suffixes: E examples, K keys, N rows, R runs, T tokens of one example.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cookbook.data.repeated import EMPTY, Paths, RowKeys, Tree, row_keys
from cookbook.errors import DataError
from cookbook.utils import files, json_files
from cookbook.utils.json_files import Count, JsonOrigin
from cookbook.utils.notes import Note
from renderers.rendering import Example

TOKEN_DTYPE = np.dtype("<i4")
_NO_TOKENS, _NO_SIZES = np.zeros(0, TOKEN_DTYPE), np.zeros(0, np.int64)
_NO_RUNS, _NO_WEIGHTS = np.zeros((0, 2), np.int32), np.zeros(0, np.float32)

NUM_NAMED_BAD_ROWS = 5
"""The maximum number of bad rows that are listed; all are counted."""


class BadRowNote(NamedTuple):
    """A row that was skipped: its place and the reason."""

    place: str
    reason: str


@dataclass
class Block:
    """The examples of consecutive rows in the layout of the store, to be passed between processes."""

    tokens: np.ndarray
    own_lengths: np.ndarray
    shared: np.ndarray
    """As in the store; examples are numbered within the block."""
    run_counts: np.ndarray
    runs: np.ndarray
    run_weights: np.ndarray
    examples_per_row: np.ndarray
    places: list[str]
    bad_rows: list[BadRowNote]
    num_filtered: int = 0
    notes: Counter[Note] = field(default_factory=Counter)
    paths: Paths = field(default_factory=lambda: EMPTY)
    """The conversations of all rows; bad and filtered rows have none."""
    are_good_R: Sequence[bool] = ()
    """Which of all rows are stored."""


def make_block(
    rows: Iterable[tuple[str, Sequence[Example]]],
    bad_rows: list[BadRowNote],
    num_filtered: int,
    notes: Counter[Note] | None = None,
    paths: Paths = EMPTY,
    are_good_R: Sequence[bool] = (),
) -> Block:
    """Returns a block of the (place, examples) of some rows."""
    places: list[str] = []
    per_row: list[int] = []
    examples: list[Example] = []
    for place, row_examples in rows:
        places.append(place)
        per_row.append(len(row_examples))
        examples += row_examples
    numbers: dict[Example | None, int] = {None: -1}
    shared: list[tuple[int, int]] = []
    for number, example in enumerate(examples):
        shared.append((numbers[example.base], example.num_shared))  # the base is of the same row
        numbers[example] = number
    runs = [run for example in examples for run in example.runs]
    if not len(are_good_R):
        are_good_R = [True] * len(places)
        paths = replace(EMPTY, num_conversations_R=np.zeros(len(places), np.int64))
    return Block(
        tokens=np.concatenate([_NO_TOKENS, *(example.own_T for example in examples)], dtype=TOKEN_DTYPE),
        own_lengths=np.asarray([len(example.own_T) for example in examples], np.int64),
        shared=np.asarray([*shared], np.int64).reshape(-1, 2),
        run_counts=np.asarray([len(example.runs) for example in examples], np.int64),
        runs=np.asarray([run[:2] for run in runs], np.int32).reshape(-1, 2),
        run_weights=np.asarray([weight for _, _, weight in runs], np.float32),
        examples_per_row=np.asarray(per_row, np.int64),
        places=places,
        bad_rows=bad_rows,
        num_filtered=num_filtered,
        notes=notes or Counter(),
        paths=paths,
        are_good_R=are_good_R,
    )


@dataclass
class SharedTokens:
    """The tokens of examples that are stored without what they share with earlier ones."""

    own: bytes | mmap.mmap | np.ndarray
    """The own tokens of all examples."""
    starts_E: np.ndarray
    """Where those of each example begin; one more than there are examples."""
    shared: np.ndarray
    """As in the store."""
    latest: tuple[int, np.ndarray] = (-1, _NO_TOKENS)
    """The example that was joined last, and its tokens."""

    @property
    def lengths_E(self) -> np.ndarray:
        """The number of tokens of each example, with those that it shares."""
        return np.diff(self.starts_E) + self.shared[:, 1]

    def __getitem__(self, example: int) -> np.ndarray:
        """Returns all tokens of an example. It is quickest behind the example that it begins like."""
        pieces: list[np.ndarray] = []
        number = example
        end = int(self.starts_E[example + 1] - self.starts_E[example] + self.shared[example, 1])
        latest, tokens_T = self.latest
        while number >= 0 and end > 0:
            if number == latest:
                pieces.append(tokens_T[:end])
                break
            base, num_shared = self.shared[number].tolist()
            if (num_own := end - num_shared) > 0:
                start = int(self.starts_E[number]) * TOKEN_DTYPE.itemsize
                pieces.append(np.frombuffer(self.own, TOKEN_DTYPE, num_own, start))
                end = num_shared
            number = base
        if len(pieces) == 1:
            return pieces[0]
        tokens_T = np.concatenate([_NO_TOKENS, *reversed(pieces)])
        self.latest = (example, tokens_T)
        return tokens_T


@dataclass
class StoreMeta:
    """Counts made while a store was written."""

    num_rows_read: int = 0
    num_filtered: int = 0
    num_bad_rows: int = 0
    bad_rows: list[BadRowNote] = field(default_factory=list)
    digest: str = ""
    notes: Counter[Note] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Returns the counts as `from_json` reads them."""
        return {**vars(self), "notes": [[*note, number] for note, number in self.notes.items()]}

    @classmethod
    def from_json(cls, values: dict[str, Any], origin: JsonOrigin) -> StoreMeta:
        """Returns the counts in `values`. Raises the error of `origin` for values of other types."""
        json_files.check(values, _META_SHAPE, origin)
        for *note, number in values["notes"]:
            json_files.check({"notes": note}, {"notes": list[str]}, origin)
            json_files.check({"notes": number}, {"notes": Count}, origin)
        bad_rows = [BadRowNote(*note) for note in values["bad_rows"]]
        if len(bad_rows) != min(values["num_bad_rows"], NUM_NAMED_BAD_ROWS):
            origin.refuse(f"num_bad_rows is {values['num_bad_rows']}, and {len(bad_rows)} are named")
        notes = Counter({Note(*note): number for *note, number in values["notes"]})
        return cls(**{**values, "bad_rows": bad_rows, "notes": notes})


_META_SHAPE = {
    **dict.fromkeys(("num_rows_read", "num_filtered", "num_bad_rows"), Count),
    "bad_rows": list[list[str]],
    "digest": str,
    "notes": list[list[Any]],
}


class StoreWriter:
    """Writes a store block by block. When the context ends without error, the complete store is at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        files.make_folder(path.parent)
        files.remove_abandoned(path.parent, path.name, earlier=f".{path.name}.*")
        self._work = ExitStack()
        self._folder = self._work.enter_context(files.writing_folder(path))
        self._open_files = self._work.enter_context(ExitStack())
        self._tokens = self._open_files.enter_context(files.replacing(self._folder / "tokens.bin"))
        self._places = self._open_files.enter_context(files.replacing(self._folder / "places.txt"))
        self._digest = hashlib.blake2b(digest_size=16)
        self._blocks: list[Block] = []
        self.meta = StoreMeta()
        self.tree: Tree | None = None
        """What became of conversations that share history."""

    def restart(self) -> None:
        """Forgets what was appended."""
        for file in (self._tokens, self._places):
            file.seek(0)
            file.truncate()
        self._digest = hashlib.blake2b(digest_size=16)
        self._blocks = []
        self.meta = StoreMeta()

    def paths(self) -> Paths:
        """The paths of the conversations of all rows so far."""
        return Paths.concatenated([block.paths for block in self._blocks])

    def append(self, block: Block) -> None:
        self._tokens.write(block.tokens.tobytes())
        # The digest is that of all tokens of all examples: it does not depend on what is stored once.
        starts_E, begun = _starts(block.own_lengths), 0
        all_tokens = SharedTokens(block.tokens, starts_E, block.shared)
        for example in np.flatnonzero(block.shared[:, 1]).tolist():
            self._digest.update(block.tokens[begun : starts_E[example]].tobytes())
            self._digest.update(all_tokens[example][: block.shared[example, 1]].tobytes())
            begun = starts_E[example]
        self._digest.update(block.tokens[begun:].tobytes())
        places = "".join(" ".join(place.split("\n")) + "\n" for place in block.places)
        self._places.write(places.encode(errors="surrogateescape"))
        meta = self.meta
        meta.num_rows_read += len(block.places) + len(block.bad_rows) + block.num_filtered
        meta.num_filtered += block.num_filtered
        meta.num_bad_rows += len(block.bad_rows)
        meta.bad_rows += block.bad_rows[: NUM_NAMED_BAD_ROWS - len(meta.bad_rows)]
        meta.notes.update(block.notes)
        block.tokens, block.places, block.bad_rows = block.tokens[:0], [], []
        self._blocks.append(block)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._work.__exit__(kind, error, trace)
            return
        try:
            with self._work:
                self._finish()
        except OSError:  # another process was faster, with the same content
            if not (self._path / "meta.json").is_file():
                raise

    def _finish(self) -> None:
        self._open_files.close()
        blocks = self._blocks
        own_lengths = np.concatenate([_NO_SIZES, *(block.own_lengths for block in blocks)])
        counts = np.concatenate([_NO_SIZES, *(block.run_counts for block in blocks)])
        per_row = np.concatenate([_NO_SIZES, *(block.examples_per_row for block in blocks)])
        firsts = _starts(np.asarray([len(block.shared) for block in blocks], np.int64)).tolist()
        shared = [np.zeros((0, 2), np.int64)]
        for first, block in zip(firsts, blocks, strict=False):
            shared.append(block.shared + np.where(block.shared[:, :1] >= 0, [first, 0], 0))
        shared_E = np.concatenate(shared)
        self._save("examples", np.stack([_starts(own_lengths), _starts(counts)], axis=1), is_content=False)
        self._save("shared", shared_E, is_content=False)
        lengths = own_lengths + shared_E[:, 1]
        self._digest.update(np.stack([_starts(lengths), _starts(counts)], axis=1).tobytes())
        self._save("runs", np.concatenate([_NO_RUNS, *(block.runs for block in blocks)]))
        weights = [_NO_WEIGHTS, *(block.run_weights for block in blocks)]
        self._save("run_weights", np.concatenate(weights))
        self._save("rows", _starts(per_row))
        keys, num_keys_R = row_keys(self.paths(), self.tree)
        are_good_R = np.asarray([is_good for block in blocks for is_good in block.are_good_R], bool)
        self._save("keys", keys, is_content=False)
        self._save("key_rows", _starts(num_keys_R[are_good_R]), is_content=False)
        self.meta.digest = self._digest.hexdigest()
        files.write(self._folder / "meta.json", json.dumps(self.meta.to_json()))

    def _save(self, name: str, array: np.ndarray, is_content: bool = True) -> None:
        with files.replacing(self._folder / f"{name}.npy") as file:
            np.save(file, array)
        if is_content:
            self._digest.update(array.tobytes())


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


class ExampleStore:
    """The examples of one source. Examples and rows are numbered from 0 in the order of the source."""

    def __init__(self, path: Path, name: str, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        """`name` is that of the source. A temporary `folder` of the store is removed with this object.

        Raises an error (`open_store` lists them) for a store that is missing or damaged.
        """
        self.name = name
        self._path = path
        self._folder = folder
        meta = path / "meta.json"
        self.meta = StoreMeta.from_json(
            json_files.read_object(meta, DataError, ""), JsonOrigin(str(meta), DataError, "")
        )
        examples = _load(path / "examples.npy", np.int64, num_axes=2)
        self._starts_E, self._run_starts_E = examples[:, 0], examples[:, 1]
        self._runs_R = _load(path / "runs.npy", np.int32, num_axes=2)
        self._run_weights_R = _load(path / "run_weights.npy", np.float32, num_axes=1)
        self._row_starts_N = _load(path / "rows.npy", np.int64, num_axes=1)
        self.keys_K = _load(path / "keys.npy", np.uint64, num_axes=1)
        self._key_starts_N = _load(path / "key_rows.npy", np.int64, num_axes=1)
        self.shared_E = _load(path / "shared.npy", np.int64, num_axes=2)
        """The example that each begins like (-1: none), and for how many tokens."""
        with files.reading(path / "tokens.bin") as file:  # mapped now: the cache may be deleted during a run
            is_empty = file.seek(0, os.SEEK_END) == 0  # an empty file cannot be mapped
            tokens = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sizes = (
            *(len(tokens) / TOKEN_DTYPE.itemsize, len(self._runs_R), self.num_examples),
            len(self.keys_K),
        )
        starts = (self._starts_E, self._run_starts_E, self._row_starts_N, self._key_starts_N)
        are_in_order = all(each[0] == 0 and (np.diff(each) >= 0).all() for each in starts)
        are_pairs = examples.shape[1] == 2 == self._runs_R.shape[1]
        has_weights = len(self._run_weights_R) == len(self._runs_R)
        has_weights = has_weights and len(self._key_starts_N) == len(self._row_starts_N)
        if not (are_in_order and are_pairs and has_weights) or sizes != tuple(
            int(each[-1]) for each in starts
        ):
            raise ValueError(f"{path} does not match its own description.")
        if self.shared_E.shape != (self.num_examples, 2):
            raise ValueError(f"{path} does not match its own description.")
        self.tokens = SharedTokens(tokens, self._starts_E, self.shared_E)
        """All tokens of each example [T], by its number."""
        bases_E, num_shared_E = self.shared_E.T
        firsts_E = self._row_starts_N[self.row_of_E]
        own_row_or_none_E = (bases_E == -1) | (
            (bases_E >= firsts_E) & (bases_E < np.arange(self.num_examples))
        )
        most_E = np.where(bases_E >= 0, self.lengths_E[bases_E], 0)
        if not (own_row_or_none_E.all() and (num_shared_E >= 0).all() and (num_shared_E <= most_E).all()):
            raise ValueError(f"{path} does not match its own description.")

    @property
    def num_rows(self) -> int:
        return len(self._row_starts_N) - 1

    @property
    def num_examples(self) -> int:
        return len(self._starts_E) - 1

    @property
    def lengths_E(self) -> np.ndarray:
        """The number of tokens of each example."""
        return self.tokens.lengths_E

    @property
    def row_of_E(self) -> np.ndarray:
        """The row of each example."""
        return np.repeat(np.arange(self.num_rows), np.diff(self._row_starts_N))

    def trained_tokens_E(self, max_length: int | None) -> np.ndarray:
        """Returns the number of trained tokens of each example if it is truncated to `max_length`.

        The first token of an example is never trained, since there is nothing to predict it from.
        """
        starts = np.maximum(self._runs_R[:, 0], 1).astype(np.int64)
        ends = self._runs_R[:, 1].astype(np.int64)
        if max_length is not None:
            ends = np.minimum(ends, max_length)
        total = np.concatenate([[0], np.cumsum(np.maximum(ends - starts, 0))])
        return total[self._run_starts_E[1:]] - total[self._run_starts_E[:-1]]

    def keys_of_rows(self, rows: np.ndarray) -> RowKeys:
        """Returns what some rows share with others."""
        num_keys_N = np.diff(self._key_starts_N)
        chosen_N = np.zeros(self.num_rows, bool)
        chosen_N[rows] = True
        return RowKeys(self.keys_K[np.repeat(chosen_N, num_keys_N)], num_keys_N[chosen_N])

    def examples_of_row(self, row: int) -> range:
        return range(int(self._row_starts_N[row]), int(self._row_starts_N[row + 1]))

    def weights_T(self, example: int) -> np.ndarray:
        """Returns the weight of each token of an example, in a new array."""
        num_own = self._starts_E[example + 1] - self._starts_E[example]
        weights_T = np.zeros(num_own + self.shared_E[example, 1], np.float32)
        runs = slice(*self._run_starts_E[example : example + 2])
        for (start, end), weight in zip(self._runs_R[runs], self._run_weights_R[runs], strict=True):
            weights_T[start:end] = weight
        return weights_T

    def place_of_row(self, row: int) -> str:
        return self._places[row] if row < len(self._places) else f"row {row + 1}"

    @cached_property
    def _places(self) -> list[str]:
        places = files.read(self._path / "places.txt")
        return places.decode("utf-8", errors="surrogateescape").split("\n")


def _load(path: Path, dtype: type[np.generic], num_axes: int) -> np.ndarray:
    """Returns an array of a store. Raises ValueError for an array of another type; nothing is unpickled."""
    with files.reading(path) as file:  # a pipe is refused, not waited for
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path} is not an array of a store.")
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        is_whole = math.prod(shape) * found.itemsize == path.stat().st_size - file.tell()
    if found != dtype or len(shape) != num_axes or not is_whole:
        raise ValueError(f"{path} is damaged.")
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def open_store(path: Path, name: str) -> ExampleStore | None:
    """Returns the store at a path; None if it is missing or damaged."""
    try:
        return ExampleStore(path, name)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
