"""Datasets that read rows as they are needed, for data of any size or of unknown length.

The order of an epoch depends only on its seed, and any batch can be found again by skipping rows, so a
resumed run continues with exactly the rows that it would have read.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from cookbook.data.datasets import is_trained
from cookbook.data.examples import datum_from_tokens
from cookbook.data.mixing import StopWhen
from cookbook.data.rendering import OnBadRow, RowRenderer, bad_row_error, reason_of
from cookbook.data.repeated import NEIGHBOURS, paths_of, row_keys
from cookbook.data.report import DataReport, RowTally
from cookbook.data.sources import BadRow, Chunk, Row, Source
from cookbook.data.sources.base import ListChunk, batched, digest_of
from cookbook.data.types import OnLong, RowCounts, SupervisedDataset
from cookbook.errors import ConfigError, CookbookError, DataError
from cookbook.types import Datum
from cookbook.utils import notes
from cookbook.utils.notes import Note

if TYPE_CHECKING:
    import datasets

_PICKS_AT_ONCE = 4096
NO_KEYS = np.zeros(0, np.uint64)


class StreamedDataset(SupervisedDataset):
    """Batches of `batch_size` rows, shuffled within buffers of `buffer_size` rows.

    A buffer is filled from the stream, read in an order that depends on the seed of the epoch and the number
    of the buffer, and filled again. Batches are usually read in order; for any other batch the stream is
    read again from the buffer in which the batch begins.
    """

    def __init__(self, batch_size: int, buffer_size: int, length: int | None = None) -> None:
        if buffer_size < 1:
            raise ConfigError(f"Invalid buffer_size={buffer_size}: must be >= 1 row (1 keeps their order).")
        self._batch_size = batch_size
        self._buffer_size = buffer_size
        self._length = length
        self._seed: int | None = None
        self._shuffled: Iterator[Any] = iter(())
        self._next_row: int | None = None
        self._num_skipped = 0
        self._tally = RowTally()
        self._num_counted: defaultdict[int | None, int] = defaultdict(int)

    @abstractmethod
    def _rows_from(self, start: int, seed: int | None) -> Iterator[Any]:
        """Returns the rows of the epoch of `seed` before shuffling, without the first `start`."""

    @abstractmethod
    def _datums_of(self, row: Any) -> list[Datum]:
        """Returns the Datums of a row. The caller skips those without a trained token."""

    def set_epoch(self, seed: int = 0) -> None:
        self._seed = seed
        self._next_row = None
        self._num_skipped = 0

    def row_counts(self) -> RowCounts:
        return RowCounts(self._batch_size, self._length)

    def skip_rows(self, num_rows: int) -> None:
        self._num_skipped = num_rows

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("The length of this stream is not known.")
        return -(-self._length // self._batch_size)

    def epoch_length(self) -> int | None:
        return None if self._length is None else len(self)

    def get_batch(self, index: int) -> list[Datum]:
        """Returns batch `index`. Raises IndexError past the end of the stream."""
        batch = next(self.iter_batches(index), None)
        if batch is None:
            raise IndexError(f"The stream has no batch {index}.")
        return batch

    def iter_batches(self, start: int = 0) -> Iterator[list[Datum]]:
        for index in itertools.count(start):
            first_row = self._num_skipped + index * self._batch_size
            if first_row != self._next_row:
                self._seek(first_row)
            wanted = self._batch_size
            if self._length is not None:
                wanted = max(0, min(wanted, self._length - first_row))
            rows = list(islice(self._shuffled, wanted))
            if self._length is not None and len(rows) < wanted:
                raise DataError(
                    f"The stream ended in batch {index} of {len(self)}: it has fewer than "
                    f"length={self._length} rows. Give the number of rows it has, or omit length."
                )
            if not rows:
                return
            self._next_row = first_row + self._batch_size
            # A batch that is rendered again is not counted again, such as the first one, which is also
            # checked before training.
            self._tally.is_open = first_row >= self._num_counted[self._seed]
            self._num_counted[self._seed] = max(self._next_row, self._num_counted[self._seed])
            self._tally.add("rows", len(rows))
            try:
                with notes.collected() as found:
                    datums = [datum for row in rows for datum in self._datums_of(row)]
            except IndexError as error:  # by a user's function; from `get_batch` it would mean the end
                raise DataError(f"A row of batch {index} cannot be turned into Datums: {error!r}") from error
            self._tally.add_notes(found)
            trained = [datum for datum in datums if is_trained(datum)]
            self._tally.add("untrained_examples", len(datums) - len(trained))
            yield trained

    def summary(self) -> dict[str, int]:
        """Returns the counts of what was read so far."""
        return dict(self._tally.counts)

    def notes(self) -> Counter[Note]:
        return self._tally.notes

    def _seek(self, row: int) -> None:
        buffer, offset = divmod(row, self._buffer_size)
        self._shuffled = self._read(buffer)
        self._next_row = row
        next(islice(self._shuffled, offset, offset), None)

    def _read(self, buffer: int) -> Iterator[Any]:
        rows = self._rows_from(buffer * self._buffer_size, self._seed)
        while held := list(islice(rows, self._buffer_size)):
            if self._seed is None:
                yield from held
            else:
                order = np.random.default_rng([self._seed, buffer]).permutation(len(held))
                yield from (held[number] for number in order)
            buffer += 1


class StreamingSupervisedDatasetFromHFDataset(StreamedDataset):
    """A `datasets.IterableDataset`. Give `map_fn(row) -> Datum` or `flatmap_fn(row) -> list[Datum]`.

    `length`, the number of rows in an epoch, may be omitted; a run then needs `max_steps` or a constant
    learning rate. Shards are read in a different order in every epoch.
    """

    def __init__(
        self,
        hf_dataset: datasets.IterableDataset,
        batch_size: int,
        length: int | None = None,
        map_fn: Callable[[dict[str, Any]], Datum] | None = None,
        flatmap_fn: Callable[[dict[str, Any]], list[Datum]] | None = None,
        buffer_size: int = 10_000,
    ) -> None:
        if (map_fn is None) == (flatmap_fn is None):
            raise ConfigError("Give either map_fn or flatmap_fn.")
        super().__init__(batch_size, buffer_size, length)
        self._stream = hf_dataset
        self._to_datums = flatmap_fn or (lambda row: [map_fn(row)])  # type: ignore[misc]

    def _rows_from(self, start: int, seed: int | None) -> Iterator[Any]:
        # With a buffer of one row only the shards are shuffled.
        stream = self._stream if seed is None else self._stream.shuffle(seed=seed, buffer_size=1)
        return iter(stream.skip(start) if start else stream)

    def _datums_of(self, row: Any) -> list[Datum]:
        return self._to_datums(row)


class StreamedConversations(StreamedDataset):
    """Rows of a mixture of sources, rendered as they are read."""

    def __init__(
        self,
        mixture: StreamMixture,
        row_renderer: RowRenderer,
        batch_size: int,
        max_length: int | None,
        on_long: OnLong,
        on_bad_row: OnBadRow,
        buffer_size: int,
        reports: Sequence[DataReport] = (),
        held_out: np.ndarray = NO_KEYS,
    ) -> None:
        """`reports` are those on the first rows of the sources, which were checked before training.

        `held_out` are the keys of rows that are held out; a row that shares one of them is skipped.
        """
        super().__init__(batch_size, buffer_size)
        self._mixture = mixture
        self._row_renderer = row_renderer
        self._max_length = max_length
        self._on_long = on_long
        self._on_bad_row = on_bad_row
        self._reports = reports
        self._held_out = held_out

    def reports(self) -> list[DataReport]:
        return list(self._reports)

    def fingerprint(self) -> str:
        return self._mixture.fingerprint()

    def _rows_from(self, start: int, seed: int | None) -> Iterator[Row | BadRow]:
        return self._mixture.rows(start, seed or 0)

    def _datums_of(self, row: Row | BadRow) -> list[Datum]:
        try:
            if isinstance(row, BadRow):
                raise DataError(row.reason)
            rendered = self._row_renderer.render_row(row)
            if rendered is not None and len(self._held_out):
                paths = paths_of([rendered.conversations], self._row_renderer.train_on_what)
                if np.isin(row_keys(paths).keys_K, self._held_out).any():
                    self._tally.add("held_out_rows")
                    return []
            examples = None if rendered is None else rendered.examples
        except CookbookError as error:
            if self._on_bad_row == "raise":
                raise bad_row_error(row.place, reason_of(error)) from error
            self._tally.add("bad_rows")
            return []
        if examples is None:
            self._tally.add("filtered_rows")
        datums = []
        for example in examples or []:
            if self._max_length is not None and example.num_tokens > self._max_length:
                if self._on_long == "raise":
                    raise DataError(
                        f"{row.place}: an example of {example.num_tokens:,} tokens is longer than max_length="
                        f"{self._max_length}. Raise it, or choose on_long=truncate or on_long=drop."
                    )
                self._tally.add("too_long_examples" if self._on_long == "drop" else "truncated_examples")
                if self._on_long == "drop":
                    continue
            if example.num_tokens < 2:
                self._tally.add("untrained_examples")
                continue
            datums.append(datum_from_tokens(example.tokens_T, example.weights_T, self._max_length))
        return datums


# -- mixtures of sources ----------------------------------------------------------------------


class StreamMixture:
    """Rows of several sources in given proportions, in an order that depends only on the seed."""

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] | None, stop_when: StopWhen
    ) -> None:
        if weights is None and len(sources) > 1:
            raise ConfigError(
                f"{len(sources)} datasets are streamed, and their lengths are unknown: give their "
                f"proportions, weights={','.join(['1'] * len(sources))}."
            )
        self._sources = sources
        self._shares = np.asarray(weights or [1.0], np.float64) / sum(weights or [1.0])
        self._repeats = stop_when == "all_exhausted" and len(sources) > 1
        self._sizes = [_size_of(source) for source in sources] if self._repeats else []

    def fingerprint(self) -> str:
        """Returns a string that changes with the content of a source or the order of the rows."""
        parts = [source.fingerprint() for source in self._sources]
        return digest_of(*parts, str(self._shares.tolist()), str(self._repeats))

    def rows(self, start: int, seed: int) -> Iterator[Row | BadRow]:
        """Returns the rows of an epoch after the first `start`."""
        if len(self._sources) == 1:
            return self._sources[0].rows(start)
        return self._mixed_rows(start, seed)

    def _mixed_rows(self, start: int, seed: int) -> Iterator[Row | BadRow]:
        taken = np.zeros(len(self._sources), np.int64)
        picks = self._picks(seed)
        while start >= _PICKS_AT_ONCE:
            taken += np.bincount(next(picks), minlength=len(taken))
            start -= _PICKS_AT_ONCE
        current = next(picks)
        taken += np.bincount(current[:start], minlength=len(taken))
        if self._repeats and all(taken >= self._sizes):
            return
        # Readers begin one row earlier: if a source lacks that row, the epoch ended before `start`.
        readers = [self._reader(which, max(0, int(count) - 1)) for which, count in enumerate(taken)]
        if any(count and next(reader, None) is None for count, reader in zip(taken, readers, strict=True)):
            return
        rest = current[start:]
        while True:
            for which in rest:
                row = next(readers[which], None)
                if row is None:
                    return
                yield row
                taken[which] += 1
                if self._repeats and all(taken >= self._sizes):
                    return
            rest = next(picks)

    def _picks(self, seed: int) -> Iterator[np.ndarray]:
        """Yields the index of the source of each row, for `_PICKS_AT_ONCE` rows at a time."""
        rng = np.random.default_rng([seed, len(self._sources)])
        while True:
            yield rng.choice(len(self._sources), _PICKS_AT_ONCE, p=self._shares)

    def _reader(self, which: int, start: int) -> Iterator[Row | BadRow]:
        if not self._repeats:
            yield from self._sources[which].rows(start)
            return
        start %= self._sizes[which]
        while True:
            yield from self._sources[which].rows(start)
            start = 0


def _size_of(source: Source) -> int:
    size = source.num_rows()
    if size is None:
        size = sum(len(chunk) for chunk in source.chunks())
    if size == 0:
        raise DataError(f"{source.name} has no rows.")
    return size


class MergedSource(Source):
    """Rows of a stream with what becomes of the history that they share with their neighbours.

    Neighbours are the rows of one run of `NEIGHBOURS`, counted from the first row of the source, so that the
    same rows are merged wherever reading begins.
    """

    def __init__(self, source: Source, row_renderer: RowRenderer) -> None:
        self.name = source.name
        self.files, self.unread = source.files, source.unread
        self._source = source
        self._row_renderer = row_renderer

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def num_rows(self) -> int | None:
        return self._source.num_rows()

    def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
        skipped = start % NEIGHBOURS
        rows = self._source.rows(start - skipped)
        while neighbours := list(islice(rows, NEIGHBOURS)):
            paths = self._row_renderer.read(ListChunk(neighbours))
            tree = self._row_renderer.grow(paths, [row.place for row in neighbours])
            for number, decisions in tree.of_rows(0, len(neighbours)).items():
                row = neighbours[number]
                if isinstance(row, Row):
                    row.decisions = decisions
            yield from (ListChunk(batch) for batch in batched(neighbours[skipped:], size))
            skipped = 0


class Slice(Source):
    """The rows of a source from `first` to `stop` (exclusive)."""

    def __init__(self, source: Source, first: int, stop: int | None = None, name: str | None = None) -> None:
        self.name = name or source.name
        self.files, self.unread = source.files, source.unread
        self._source = source
        self._first = first
        self._stop = stop

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} {self._first} {self._stop}"

    def num_rows(self) -> int | None:
        total = self._source.num_rows()
        if total is None:
            return None
        return max(0, (total if self._stop is None else min(total, self._stop)) - self._first)

    def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
        left = None if self._stop is None else self._stop - self._first - start
        if left is not None and left <= 0:
            return
        for chunk in self._source.chunks(self._first + start, size):
            if left is not None and left <= len(chunk):
                yield ListChunk(chunk.rows()[:left])
                return
            yield chunk
            left = None if left is None else left - len(chunk)
