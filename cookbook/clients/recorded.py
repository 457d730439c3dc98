"""The samples whose log-probabilities are kept for the loss `stable_reinforce`, by their ids."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cookbook.errors import RequestError
from cookbook.types import Datum, SampledProvenanceSpan, SampledSequence, TensorData

SECONDS_KEPT = 24 * 3600
"""How long a sample is kept after it was drawn, or after a request last used it."""


@dataclass(frozen=True)
class _Sample:
    tokens_T: np.ndarray
    logprobs_T: np.ndarray
    time: float


class RecordedSamples:
    """The samples of this process that were drawn with `record_stability_info`. Thread-safe."""

    def __init__(self, seconds_kept: float = SECONDS_KEPT) -> None:
        self._seconds_kept = seconds_kept
        self._samples: OrderedDict[str, _Sample] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, sequences: Iterable[SampledSequence]) -> None:
        for one in sequences:
            assert one.logprobs is not None
            self._put(one.sequence_id, np.array(one.tokens, np.int64), np.array(one.logprobs, np.float32))

    def _put(self, sequence_id: str, tokens_T: np.ndarray, logprobs_T: np.ndarray) -> None:
        now = time.monotonic()
        with self._lock:
            self._samples.pop(sequence_id, None)
            self._samples[sequence_id] = _Sample(tokens_T, logprobs_T, now)
            while self._samples and next(iter(self._samples.values())).time < now - self._seconds_kept:
                self._samples.popitem(last=False)

    def _of(self, sequence_id: str) -> _Sample:
        with self._lock:
            sample = self._samples.get(sequence_id)
        if sample is None:
            raise RequestError(
                f"The sequence {sequence_id!r} is not recorded. Sample with record_stability_info=True, in "
                f"this process, and train within a day."
            )
        self._put(sequence_id, sample.tokens_T, sample.logprobs_T)
        return sample

    def complete(self, datum: Datum) -> Datum:
        """Returns the datum with the recorded log-probabilities of its sampled targets.

        The weights of other targets become 0.

        Raises RequestError for a datum without provenance, and for targets that are not those sampled.
        """
        if datum.loss_fn_input_spans is None:
            raise RequestError(
                "The loss stable_reinforce needs the sampled sequence of every target: "
                "datum.with_provenance(...)."
            )
        inputs = datum.loss_fn_inputs
        if (targets := inputs.get("target_tokens")) is None:
            raise RequestError("loss_fn_inputs lacks target_tokens. Add one value per input token.")
        assert isinstance(targets, TensorData)
        targets_T = targets.to_numpy()
        given = inputs.get("weights")
        weights_T = np.ones(len(targets_T), np.float32) if given is None else TensorData(given).to_numpy()
        logprobs_T = np.zeros(len(targets_T), np.float32)
        is_sampled_T = np.zeros(len(targets_T), bool)
        stop = 0
        for span in datum.loss_fn_input_spans:
            start, stop = stop, stop + span.length
            if not isinstance(span, SampledProvenanceSpan):
                continue
            sample, part = self._of(span.sequence_id), slice(span.offset, span.offset + span.length)
            if not np.array_equal(sample.tokens_T[part], targets_T[start:stop]):
                raise RequestError(
                    f"The targets {start} to {stop - 1} are not the tokens {part.start} to {part.stop - 1} "
                    f"of the sampled sequence {span.sequence_id!r}, as loss_fn_input_spans say."
                )
            logprobs_T[start:stop] = sample.logprobs_T[part]
            is_sampled_T[start:stop] = True
        trained = {"weights": weights_T * is_sampled_T, "logprobs": logprobs_T}
        return Datum(datum.model_input, {**inputs, **trained})


RECORDED = RecordedSamples()
