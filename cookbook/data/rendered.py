"""Datasets of rendered examples: truncation, skipped examples, and the rows of an epoch.

Shape suffixes: E examples of a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from cookbook.data.examples import datum_from_tokens
from cookbook.data.mixing import StopWhen, order_of_epoch, rows_per_epoch
from cookbook.data.report import DataReport
from cookbook.data.sources.base import digest_of
from cookbook.data.store import ExampleStore
from cookbook.data.types import OnLong, Origin, RowCounts, SupervisedDataset
from cookbook.errors import DataError
from cookbook.types import Datum


class TrainableRows:
    """The examples of a store that can be trained on at a given length, and a report about the others."""

    def __init__(self, store: ExampleStore, max_length: int | None, on_long: OnLong = "truncate") -> None:
        """Raises DataError for an example longer than `max_length` if `on_long` is `raise`."""
        self.store = store
        self._max_length = max_length
        lengths_E = store.lengths_E
        is_long_E = np.zeros(len(lengths_E), bool) if max_length is None else lengths_E > max_length
        if on_long == "raise" and is_long_E.any():
            first = int(np.argmax(is_long_E))
            place = store.place_of_row(int(store.row_of_E[first]))
            raise DataError(
                f"{place}: an example of {lengths_E[first]:,} tokens "
                f"is longer than max_length={max_length}, as {int(is_long_E.sum()) - 1:,} others are. Raise "
                f"max_length, or choose on_long=truncate or on_long=drop."
            )
        trained_E = store.trained_tokens_E(max_length)
        too_long_E = is_long_E & (on_long == "drop")
        self._is_kept_E = (trained_E > 0) & ~too_long_E
        kept_E = self._is_kept_E
        self.rows = np.unique(store.row_of_E[kept_E])
        """The rows that have an example to train on, ascending."""
        meta = store.meta
        self.report = DataReport(
            name=store.name,
            max_length=max_length,
            rows=meta.num_rows_read,
            bad=meta.num_bad_rows,
            filtered=meta.num_filtered,
            examples=int(kept_E.sum()),
            tokens=int(np.minimum(lengths_E, max_length or np.inf)[kept_E].sum()),
            trained_tokens=int(trained_E[kept_E].sum()),
            computed_tokens=self._computed_tokens(),
            longest=int(lengths_E.max(initial=0)),
            truncated=int((is_long_E & kept_E).sum()),
            too_long=int(too_long_E.sum()),
            untrained=int(((trained_E == 0) & ~too_long_E).sum()),
            bad_rows=meta.bad_rows,
            lengths=lengths_E[kept_E],
            notes=meta.notes,
        )

    def _computed_tokens(self) -> int:
        """Returns the tokens of the kept examples, counting once what one shares with another."""
        kept_E = self._is_kept_E
        bases_E, num_shared_E = self.store.shared_E.T
        base_E, shared_E = bases_E.copy(), num_shared_E.copy()
        while (is_lost_E := (shared_E > 0) & ~kept_E[base_E]).any():
            # What a skipped example shares with another one, those that begin like it share too.
            lost_E = base_E[is_lost_E]
            shared_E[is_lost_E] = np.minimum(shared_E[is_lost_E], num_shared_E[lost_E])
            base_E[is_lost_E] = bases_E[lost_E]
        lengths_E = np.minimum(self.store.lengths_E, self._max_length or np.inf)
        return int(np.maximum(lengths_E - shared_E, 0)[kept_E].sum())

    def datums_of(self, row: int) -> list[Datum]:
        """Returns the Datums of a row of the store."""
        store, max_length = self.store, self._max_length
        return [
            datum_from_tokens(store.tokens[example], store.weights_T(example), max_length)
            for example in self.kept_examples_of(row)
        ]

    def kept_examples_of(self, row: int) -> list[int]:
        """Returns the examples of a row that can be trained on."""
        return [example for example in self.store.examples_of_row(row) if self._is_kept_E[example]]


def check_that_something_is_left(parts: Sequence[TrainableRows]) -> None:
    """Raises DataError, with the full report, if nothing is left to train on."""
    if not any(len(part.rows) for part in parts):
        lines = [line for part in parts for line in part.report.lines()]
        raise DataError(
            "Nothing is left to train on.\n"
            + "\n".join(lines)
            + "\nRaise max_length (all replies may be past "
            "it), or choose another train_on_what."
        )


@dataclass(frozen=True)
class RowSubset:
    """The rows of a source that a dataset draws from."""

    source: TrainableRows
    rows: np.ndarray


class RenderedDataset(SupervisedDataset):
    """Batches of `batch_size` rows from several sources, in proportions that hold in every epoch."""

    def __init__(
        self,
        parts: Sequence[RowSubset],
        batch_size: int,
        weights: Sequence[float] | None = None,
        stop_when: StopWhen = "first_exhausted",
    ) -> None:
        self._parts = parts
        self._batch_size = batch_size
        self._sizes = [len(part.rows) for part in parts]
        self._counts = rows_per_epoch(self._sizes, weights, stop_when)
        self._first_of_part = np.concatenate([[0], np.cumsum(self._sizes)])
        self._order = np.arange(sum(self._sizes))
        self._num_skipped = 0
        self.set_epoch()

    @property
    def rows_per_epoch(self) -> list[int]:
        """The number of rows that an epoch takes from each part."""
        return self._counts

    def set_epoch(self, seed: int = 0) -> None:
        self._order = order_of_epoch(self._sizes, self._counts, seed)
        self._num_skipped = 0

    def row_counts(self) -> RowCounts:
        return RowCounts(self._batch_size, sum(self._counts))

    def skip_rows(self, num_rows: int) -> None:
        self._num_skipped = num_rows

    def __len__(self) -> int:
        return -(-sum(self._counts) // self._batch_size)

    def get_batch(self, index: int) -> list[Datum]:
        return [datum for number in self._numbers(index) for datum in self._datums_of(number)]

    def origins(self, index: int) -> list[Origin]:
        found = []
        for number in self._numbers(index):
            source, row = self._place_of(number)
            found += [Origin(source.store.name, number)] * len(source.kept_examples_of(row))
        return found

    def _numbers(self, index: int) -> list[int]:
        """Returns the rows of a batch, numbered across all parts."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        start = self._num_skipped + index * self._batch_size
        return self._order[start : start + self._batch_size].tolist()

    def _datums_of(self, number: int) -> list[Datum]:
        source, row = self._place_of(number)
        return source.datums_of(row)

    def _place_of(self, number: int) -> tuple[TrainableRows, int]:
        which = int(np.searchsorted(self._first_of_part, number, side="right")) - 1
        part = self._parts[which]
        return part.source, int(part.rows[number - self._first_of_part[which]])

    def summary(self) -> dict[str, int]:
        return {"rows": sum(self._counts), "batches": len(self)}

    def reports(self) -> list[DataReport]:
        return [part.source.report for part in self._parts]

    def fingerprint(self) -> str:
        parts = [
            (part.source.store.meta.digest, part.rows.astype("<i8").tobytes().hex()) for part in self._parts
        ]
        return digest_of(*chain.from_iterable(parts), str(self._counts))
