"""Batches made ahead of need, on a thread of their own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from cookbook.errors import CookbookError, DataError
from cookbook.supervised.types import SupervisedDataset
from cookbook.types import IGNORED_TARGET, Datum, TensorData


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on. `data` weigh 1 in sum; they may be none at all."""

    data: list[Datum]
    num_tokens: int
    num_trained_tokens: int


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
    """The batches of `steps`, in order, made up to `ahead` steps early.

    Step s is batch s % n of epoch s // n, whose order is that of `seed` + epoch, so a batch
    depends on its step alone and a resumed run sees what it would have seen.
    """

    def __init__(self, dataset: SupervisedDataset, steps: range, seed: int, ahead: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch: int | None = None
        self._steps = iter(steps)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._queue: deque[Future[Batch]] = deque()
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

    async def next(self) -> tuple[Batch, float]:
        """The next batch, and the seconds it was waited for."""
        started = time.perf_counter()
        future = self._queue.popleft()
        self._enqueue()
        batch = future.result() if future.done() else await asyncio.wrap_future(future)
        return batch, time.perf_counter() - started

    def _enqueue(self) -> None:
        if (step := next(self._steps, None)) is not None:
            self._queue.append(self._thread.submit(self._make, step))

    def _make(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self._dataset))
        if epoch != self._epoch:
            self._dataset.set_epoch(self._seed + epoch)
            self._epoch = epoch
        try:
            return make_batch(self._dataset.get_batch(index))
        except CookbookError as error:
            error.add_note(f"(batch {index} of epoch {epoch}, step {step})")
            raise

    def _check_that_something_is_trained(self) -> None:
        self._dataset.set_epoch(self._seed)
        if not any(
            make_batch(self._dataset.get_batch(i)).num_trained_tokens for i in range(len(self._dataset))
        ):
            raise DataError(
                f"Not one of {len(self._dataset)} batches has a trained token: nothing would be learned. "
                f"Raise max_length (the replies may all lie past it), or choose another train_on_what."
            )
