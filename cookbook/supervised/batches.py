"""Batches made ahead of need, on a thread of their own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from cookbook.data.types import SupervisedDataset, num_batches_of, row_counts_of
from cookbook.errors import CookbookError, DataError
from cookbook.types import IGNORED_TARGET, Datum, TensorData


class Position(NamedTuple):
    """The batch behind `batch` others of epoch `epoch`, which is counted from 0."""

    epoch: int
    batch: int
    row: int | None = None
    """The rows of the epoch that lie before it; None where the dataset has no `row_counts`."""


BEGINNING = Position(0, 0, 0)


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on. `data` weigh 1 in sum; they may be none at all."""

    data: list[Datum]
    num_tokens: int
    num_trained_tokens: int


@dataclass(frozen=True)
class PlacedBatch:
    """A batch, the epoch it is from, and what comes behind it."""

    batch: Batch
    epoch: int
    next_position: Position
    rendering: tuple[float, float] = (0.0, 0.0)
    """When it was begun and when it was ready, by `time.perf_counter`."""


def make_batch(data: list[Datum]) -> Batch:
    """Scales the weights to a sum of 1, which makes the summed loss the mean over trained tokens.

    A batch whose weights cancel to nothing has no mean and is left as it is.
    """
    weights = [_weights_of(datum) for datum in data]
    total = float(sum(weights_T.sum(dtype=np.float64) for weights_T in weights))
    scale = 1.0 / total if total > 0 else 1.0
    scaled = [
        Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": (weights_T * scale).astype(np.float32)})
        for datum, weights_T in zip(data, weights, strict=True)
    ]
    return Batch(
        data=scaled,
        num_tokens=sum(datum.model_input.length for datum in data),
        num_trained_tokens=sum(int(np.count_nonzero(weights_T)) for weights_T in weights),
    )


def _weights_of(datum: Datum) -> np.ndarray:
    inputs = datum.loss_fn_inputs
    targets, weights = inputs["target_tokens"], inputs.get("weights")
    assert isinstance(targets, TensorData)
    trained_T = targets.to_numpy() != IGNORED_TARGET
    if weights is None:
        return trained_T.astype(np.float32)
    assert isinstance(weights, TensorData)
    return weights.to_numpy() * trained_T


class BatchQueue:
    """The batches of a run from `start` on, in order, made up to `ahead` steps early.

    The order of epoch e is that of `seed` + e, so a batch depends on its position alone and a
    resumed run sees what it would have seen, also one that continues with another batch size: its
    batches then begin at the row behind the last that was trained on. It ends after `num_epochs` or
    `num_steps`, whichever comes first.
    """

    def __init__(
        self,
        dataset: SupervisedDataset,
        seed: int,
        ahead: int,
        num_epochs: int,
        num_steps: int | None = None,
        start: Position = BEGINNING,
    ) -> None:
        self._dataset = dataset
        self._num_batches = num_batches_of(dataset)
        self._row_counts = row_counts_of(dataset)
        self._seed = seed
        self._num_epochs = num_epochs
        self._steps_left = num_steps
        self._position = start
        self._epoch: int | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._queue: deque[Future[PlacedBatch | None]] = deque()
        self._checked = self._thread.submit(self._check_that_something_is_trained)
        for _ in range(ahead):
            self._enqueue()

    def __enter__(self) -> BatchQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def check(self) -> None:
        """Raises DataError if no example of an epoch keeps a trained token."""
        await asyncio.wrap_future(self._checked)

    async def next(self) -> PlacedBatch | None:
        """The next batch; None when there are no more."""
        future = self._queue.popleft()
        self._enqueue()
        return future.result() if future.done() else await asyncio.wrap_future(future)

    def _enqueue(self) -> None:
        self._queue.append(self._thread.submit(self._make_next))

    def _make_next(self) -> PlacedBatch | None:
        if self._steps_left == 0 or self._position.epoch >= self._num_epochs:
            return None
        started = time.perf_counter()
        position = self._position
        if position.epoch != self._epoch:
            self._dataset.set_epoch(self._seed + position.epoch)
            self._epoch = position.epoch
            self._skip_rows_before(position)
        try:
            batch = make_batch(self._dataset.get_batch(self._index_of(position)))
        except CookbookError as error:
            error.add_note(f"(batch {position.batch} of epoch {position.epoch})")
            raise
        except IndexError:
            if self._num_batches is not None or position.batch == 0:
                raise
            self._position = self._first_of(position.epoch + 1)
            return self._make_next()
        self._position = self._behind(position)
        if self._steps_left is not None:
            self._steps_left -= 1
        return PlacedBatch(batch, position.epoch, self._position, (started, time.perf_counter()))

    def _skip_rows_before(self, position: Position) -> None:
        """Shifts the batches of an epoch that was begun in batches of another size."""
        if self._row_counts is not None and position.row is not None:
            self._dataset.skip_rows(position.row % self._row_counts.per_batch)

    def _index_of(self, position: Position) -> int:
        if self._row_counts is None or position.row is None:
            return position.batch
        return position.row // self._row_counts.per_batch

    def _first_of(self, epoch: int) -> Position:
        return Position(epoch, 0, None if self._row_counts is None else 0)

    def _behind(self, position: Position) -> Position:
        counts = self._row_counts
        if counts is None or position.row is None:
            is_last, row = position.batch + 1 == self._num_batches, None
        else:
            row = position.row + counts.per_batch
            is_last = counts.per_epoch is not None and row >= counts.per_epoch
        if is_last:
            return self._first_of(position.epoch + 1)
        return Position(position.epoch, position.batch + 1, row)

    def _check_that_something_is_trained(self) -> None:
        self._dataset.set_epoch(self._seed)
        index = 0
        while self._num_batches is None or index < self._num_batches:
            try:
                batch = make_batch(self._dataset.get_batch(index))
            except IndexError:
                if self._num_batches is not None:
                    raise
                break
            if batch.num_trained_tokens:
                return
            index += 1
        raise DataError(
            f"Not one of {index} batches has a trained token: nothing would be learned. Raise max_length "
            f"(the replies may all lie past it), or choose another train_on_what."
        )
