"""Datasets that read rows as they are needed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from cookbook.data import StreamingSupervisedDatasetFromHFDataset
from cookbook.data.sources import open_source
from cookbook.data.streaming import StreamMixture
from cookbook.errors import ConfigError, DataError
from cookbook.types import Datum, ModelInput


def row_datum(row: dict[str, Any]) -> Datum:
    return Datum(ModelInput.from_ints([row["id"], 0]), {"target_tokens": [1, 1], "weights": [1.0, 1.0]})


def ids_of(batch: list[Datum]) -> list[int]:
    return [datum.model_input.to_ints()[0] for datum in batch]


@pytest.fixture
def numbered() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"id": number} for number in range(10)])


def test_a_stream_yields_its_rows_once_and_skips_to_where_a_run_resumes(
    numbered: datasets.Dataset,
) -> None:
    stream = numbered.to_iterable_dataset()

    def make() -> StreamingSupervisedDatasetFromHFDataset:
        dataset = StreamingSupervisedDatasetFromHFDataset(
            stream, 4, length=10, map_fn=row_datum, buffer_size=3
        )
        dataset.set_epoch(7)
        return dataset

    whole = make()
    batches = [ids_of(whole.get_batch(index)) for index in range(len(whole))]
    assert sorted(itertools.chain(*batches)) == list(range(10))
    assert list(itertools.chain(*batches)) != list(range(10))
    resumed = make()
    assert [ids_of(resumed.get_batch(index)) for index in (1, 2)] == batches[1:]
    assert ids_of(resumed.get_batch(0)) == batches[0]


def test_a_stream_shorter_than_its_length_is_an_error(numbered: datasets.Dataset) -> None:
    dataset = StreamingSupervisedDatasetFromHFDataset(
        numbered.to_iterable_dataset(), 4, length=20, map_fn=row_datum
    )
    with pytest.raises(DataError, match="fewer than length=20 rows"):
        dataset.get_batch(4)


@pytest.mark.parametrize("buffer_size", [1, 3, 4, 100])
def test_a_stream_of_unknown_length_raises_index_error_past_its_end(
    numbered: datasets.Dataset, buffer_size: int
) -> None:
    def make() -> StreamingSupervisedDatasetFromHFDataset:
        stream = numbered.to_iterable_dataset(num_shards=2)
        dataset = StreamingSupervisedDatasetFromHFDataset(
            stream, 4, map_fn=row_datum, buffer_size=buffer_size
        )
        dataset.set_epoch(3)
        return dataset

    with pytest.raises(TypeError):
        len(make())
    dataset = make()
    batches = [ids_of(dataset.get_batch(index)) for index in range(3)]
    assert sorted(itertools.chain(*batches)) == list(range(10))
    with pytest.raises(IndexError):
        dataset.get_batch(3)
    for index in range(3):
        assert ids_of(make().get_batch(index)) == batches[index]
    with pytest.raises(IndexError):
        make().get_batch(3)


def test_every_epoch_of_a_stream_has_a_different_order(numbered: datasets.Dataset) -> None:
    dataset = StreamingSupervisedDatasetFromHFDataset(
        numbered.to_iterable_dataset(), 10, map_fn=row_datum, buffer_size=10
    )
    orders = []
    for seed in (1, 2, 1):
        dataset.set_epoch(seed)
        orders.append(ids_of(dataset.get_batch(0)))
    assert orders[0] == orders[2] != orders[1]


def test_an_index_error_in_a_users_function_does_not_end_the_data(numbered: datasets.Dataset) -> None:
    dataset = StreamingSupervisedDatasetFromHFDataset(
        numbered.to_iterable_dataset(), 4, map_fn=lambda row: [][row["id"]]
    )
    with pytest.raises(DataError, match="A row of batch 0 cannot be turned into Datums: IndexError"):
        dataset.get_batch(0)


def test_a_batch_that_is_rendered_twice_is_counted_once(numbered: datasets.Dataset) -> None:
    dataset = StreamingSupervisedDatasetFromHFDataset(numbered.to_iterable_dataset(), 4, map_fn=row_datum)
    for seed in (1, 1, 2):
        dataset.set_epoch(seed)
        dataset.get_batch(0)
    assert dataset.summary() == {"rows": 8}


def test_rows_and_examples_that_a_stream_skips_are_counted(numbered: datasets.Dataset) -> None:
    def to_datum(row: dict[str, Any]) -> Datum:
        weight = float(row["id"] % 2)
        return Datum(ModelInput.from_ints([row["id"]]), {"target_tokens": [1], "weights": [weight]})

    dataset = StreamingSupervisedDatasetFromHFDataset(numbered.to_iterable_dataset(), 10, map_fn=to_datum)
    assert ids_of(dataset.get_batch(0)) == [1, 3, 5, 7, 9]
    assert dataset.summary() == {"rows": 10, "untrained_examples": 5}


# -- sources side by side ---------------------------------------------------------------------


def mixed(folder: Path, sizes: Sequence[int], weights: list[float] | None, stop_when: Any) -> StreamMixture:
    sources = []
    for which, size in enumerate(sizes):
        path = folder / f"{which}.jsonl"
        path.write_text(
            "".join(json.dumps({"n": [which, number]}) + "\n" for number in range(size)), encoding="utf-8"
        )
        sources.append(open_source(str(path)))
    return StreamMixture(sources, weights, stop_when)


def numbers_of(mixture: StreamMixture, start: int = 0, seed: int = 0) -> list[list[int]]:
    return [row["n"] for row in mixture.rows(start, seed)]  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("stop_when", ["first_exhausted", "all_exhausted"])
def test_a_mixture_of_streams_resumes_at_any_row(tmp_path: Path, stop_when: str) -> None:
    mixture = mixed(tmp_path, [6000, 2500], [3, 1], stop_when)
    whole = numbers_of(mixture)
    for start in (0, 1, 4095, 4096, 4097, 7000, len(whole) - 1, len(whole)):
        assert numbers_of(mixture, start) == whole[start:]
    # There are no batches after the end, even if a source has rows left.
    for start in range(len(whole), len(whole) + 40):
        assert numbers_of(mixture, start) == []


@pytest.mark.slow
def test_a_mixture_of_streams_has_the_right_proportions_order_and_end(tmp_path: Path) -> None:
    first = numbers_of(mixed(tmp_path, [6000, 2500], [3, 1], "first_exhausted"))
    for which in (0, 1):
        numbers = [number for source, number in first if source == which]
        assert numbers == list(range(len(numbers)))
    assert len([1 for source, _ in first if source == 0]) == 6000
    assert 0.22 < np.mean([source for source, _ in first]) < 0.28
    every = numbers_of(mixed(tmp_path, [6000, 2500], [3, 1], "all_exhausted"))
    assert {tuple(row) for row in every} == {(0, n) for n in range(6000)} | {(1, n) for n in range(2500)}
    assert len(every) > len(first)
    again, other = (
        numbers_of(mixed(tmp_path, [60, 25], [3, 1], "all_exhausted"), 0, seed) for seed in (0, 1)
    )
    assert again == numbers_of(mixed(tmp_path, [60, 25], [3, 1], "all_exhausted")) != other


def test_several_streams_need_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights=1,1"):
        mixed(tmp_path, [1, 1], None, "first_exhausted")
