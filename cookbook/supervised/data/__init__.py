"""Rows to Datums: the datasets and builders for chat data."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import chz
import numpy as np

from cookbook import embedded
from cookbook.errors import ConfigError, CookbookError, DataError
from cookbook.supervised.data._old_sources import Row, Selection, load_hub_rows, read_rows
from cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset
from cookbook.types import Datum, ModelInput
from renderers import Message, Renderer, TrainOnWhat

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["raise", "skip"]


# -- one example ------------------------------------------------------------------------------


def datum_from_tokens(tokens: Sequence[int], weights: np.ndarray, max_length: int | None) -> Datum:
    """A rendered example, cut to `max_length` tokens from the right, then shifted by one.

    `weights[t]` says whether token t is trained; the Datum has it where token t is the target.
    """
    tokens, weights = tokens[:max_length], weights[:max_length]
    if len(tokens) < 2:
        raise DataError(f"An example of {len(tokens)} token has nothing to predict. It needs two at least.")
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.asarray(tokens[1:], dtype=np.int64),
            "weights": np.asarray(weights[1:], dtype=np.float32),
        },
    )


def conversation_to_datum(
    messages: Sequence[Message],
    renderer: Renderer,
    max_length: int | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
) -> Datum:
    """One conversation as one Datum."""
    model_input, weights = renderer.build_supervised_example(messages, train_on_what)
    return datum_from_tokens(model_input.to_ints(), weights, max_length)


def messages_of(row: Row, train_on_what: TrainOnWhat) -> list[Message]:
    """The conversation of a row. Raises DataError where there is none that could be trained on."""
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"no list of `messages` (keys: {', '.join(map(str, row)) or 'none'}).")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {number} is a {type(message).__name__}, not an object with role and content."
            )
    # Arrow fills the keys that a message lacks with None.
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    roles = [str(message.get("role")) for message in cleaned]
    if "assistant" not in roles and train_on_what in _NEEDS_ASSISTANT:
        raise DataError(f"no assistant message (roles: {', '.join(roles)}).")
    return cleaned  # type: ignore[return-value]


def bad_row(place: str, error: CookbookError) -> DataError:
    return DataError(f"{place}: {error}\nMend the row, or leave such rows out with on_bad_row=skip.")


_NEEDS_ASSISTANT = {
    TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    TrainOnWhat.LAST_ASSISTANT_TURN,
    TrainOnWhat.ALL_ASSISTANT_MESSAGES,
}


# -- datasets ---------------------------------------------------------------------------------


class SupervisedDatasetFromRows(SupervisedDataset):
    """Any sequence of rows, turned into Datums batch by batch.

    Give `map_fn(row) -> Datum` or `flatmap_fn(row) -> list[Datum]`. A batch is `batch_size` rows;
    the last one of an epoch has what is left. Datums without a trained token are left out and
    counted. A row that cannot be turned into a Datum is an error, or with `on_bad_row="skip"`
    left out and counted.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        batch_size: int,
        map_fn: Callable[[Any], Datum] | None = None,
        flatmap_fn: Callable[[Any], list[Datum]] | None = None,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        if (map_fn is None) == (flatmap_fn is None):
            raise ConfigError("Give either map_fn or flatmap_fn.")
        self._rows = rows
        self._batch_size = batch_size
        self._to_datums = flatmap_fn or (lambda row: [map_fn(row)])  # type: ignore[misc]
        self._on_bad_row = on_bad_row
        self._order: np.ndarray = np.arange(len(rows))
        self._places: defaultdict[str, set[str]] = defaultdict(set)

    def set_epoch(self, seed: int = 0) -> None:
        self._order = np.random.default_rng(seed).permutation(len(self._rows))

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def get_batch(self, index: int) -> list[Datum]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        numbers = self._order[index * self._batch_size : (index + 1) * self._batch_size].tolist()
        batch: list[Datum] = []
        for number, row in zip(numbers, self._read(numbers), strict=True):
            batch += self._datums_of(number, row)
        return batch

    def summary(self) -> dict[str, int]:
        left_out = {name: len(places) for name, places in self._places.items()}
        return {"rows": len(self._rows), "batches": len(self), **left_out}

    def note(self, name: str, place: str, message: str) -> None:
        """Counts a row under one of `LEFT_OUT`, once however often it is met; warns of the first."""
        if not self._places[name]:
            logger.warning("%s: %s Further ones are only counted.", place, message)
        self._places[name].add(place)

    def _read(self, numbers: list[int]) -> list[Any]:
        return [self._rows[number] for number in numbers]

    def _datums_of(self, number: int, row: Any) -> list[Datum]:
        place = row.place if isinstance(row, Row) else f"row {number}"
        try:
            datums = self._to_datums(row)
        except CookbookError as error:
            if self._on_bad_row == "skip":
                self.note("bad_rows", place, f"left out. {error}")
                return []
            raise bad_row(place, error) from error
        trained = [datum for datum in datums if np.any(datum.loss_fn_inputs["weights"].to_numpy())]  # type: ignore[union-attr]
        if len(trained) < len(datums):
            self.note("untrained_examples", place, "left out, no trained token is left.")
        return trained


class SupervisedDatasetFromHFDataset(SupervisedDatasetFromRows):
    """A `datasets.Dataset`, rendered batch by batch; see `SupervisedDatasetFromRows`."""

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        batch_size: int,
        map_fn: Callable[[dict[str, Any]], Datum] | None = None,
        flatmap_fn: Callable[[dict[str, Any]], list[Datum]] | None = None,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        super().__init__(hf_dataset, batch_size, map_fn, flatmap_fn, on_bad_row)
        self._hf_dataset = hf_dataset

    def _read(self, numbers: list[int]) -> list[Any]:
        return self._hf_dataset.select(numbers).to_list()


class StreamingSupervisedDatasetFromHFDataset(SupervisedDataset):
    """A `datasets.IterableDataset`, read once from front to back in each epoch.

    `length` is the number of rows in an epoch, which a stream cannot tell. Batches are asked for
    in rising order; skipping ahead, as a resumed run does, reads and drops what lies between.
    Shuffling is by a buffer of `buffer_size` rows.
    """

    def __init__(
        self,
        hf_dataset: datasets.IterableDataset,
        batch_size: int,
        length: int,
        map_fn: Callable[[dict[str, Any]], Datum] | None = None,
        flatmap_fn: Callable[[dict[str, Any]], list[Datum]] | None = None,
        buffer_size: int = 10_000,
    ) -> None:
        if (map_fn is None) == (flatmap_fn is None):
            raise ConfigError("Give either map_fn or flatmap_fn.")
        self._stream = hf_dataset
        self._batch_size = batch_size
        self._length = length
        self._to_datums = flatmap_fn or (lambda row: [map_fn(row)])  # type: ignore[misc]
        self._buffer_size = buffer_size
        self._seed: int | None = None
        self._rewind()

    def set_epoch(self, seed: int = 0) -> None:
        self._seed = seed
        self._rewind()

    def _rewind(self) -> None:
        stream = self._stream
        if self._seed is not None:
            stream = stream.shuffle(seed=self._seed, buffer_size=self._buffer_size)
        self._rows: Iterator[dict[str, Any]] = iter(stream)
        self._next_index = 0

    def __len__(self) -> int:
        return -(-self._length // self._batch_size)

    def get_batch(self, index: int) -> list[Datum]:
        if index < self._next_index:
            self._rewind()
        rows: list[dict[str, Any]] = []
        while self._next_index <= index:
            wanted = min(self._batch_size, self._length - self._next_index * self._batch_size)
            rows = list(itertools.islice(self._rows, wanted))
            if len(rows) < wanted:
                raise DataError(
                    f"The stream ended in batch {self._next_index} of {len(self)}: it has fewer than length="
                    f"{self._length} rows. Give the number of rows it has."
                )
            self._next_index += 1
        datums = [datum for row in rows for datum in self._to_datums(row)]
        return [datum for datum in datums if np.any(datum.loss_fn_inputs["weights"].to_numpy())]  # type: ignore[union-attr]

    def summary(self) -> dict[str, int]:
        return {"rows": self._length, "batches": len(self)}


# -- builders ---------------------------------------------------------------------------------


@chz.chz
class ConversationBuilder(ChatDatasetBuilder):
    """Base of builders whose rows are conversations: split, render, batch."""

    test_size: int | None = chz.field(
        default=None,
        doc="rows held out for evaluation; default: the dataset's own test split, else 1 in 20, at most 256",
    )
    shuffle_seed: int = chz.field(default=0, doc="seed of the split and of the order of rows")
    on_bad_row: OnBadRow = chz.field(
        default="raise", doc="what a row that cannot be rendered does: raise or skip"
    )

    @chz.validate
    def _check_test_size(self) -> None:
        if self.test_size is not None and self.test_size < 0:
            raise ConfigError(f"test_size={self.test_size}. Give a number of rows, or 0 for none.")
        if self.shuffle_seed < 0:
            raise ConfigError(f"shuffle_seed={self.shuffle_seed}. Give 0 or more.")

    def rows(self) -> tuple[Sequence[Row], Sequence[Row] | None]:
        """The training rows, and test rows where the source brings its own."""
        raise NotImplementedError(f"{type(self).__name__} does not define rows().")

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train_rows, test_rows = self.rows()
        train_rows = self._checked(train_rows)
        if test_rows is None:
            train_rows, test_rows = self._split(train_rows)
        else:
            test_rows = self._checked(test_rows)[: self.test_size]
        return self._dataset(train_rows), self._dataset(test_rows) if len(test_rows) else None

    def _checked(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Looks at every row that is in memory anyway; those on disk are looked at when rendered."""
        if not isinstance(rows, list):
            return rows
        good = []
        renderer = self.renderer
        for row in rows:
            try:
                renderer.check_messages(messages_of(row, self.common_config.train_on_what))
                good.append(row)
            except CookbookError as error:
                if self.on_bad_row == "raise":
                    raise bad_row(row.place, error) from error
        if not good:
            raise DataError(f"Not one of {len(rows)} rows can be trained on: see {rows[0].place}.")
        if len(good) < len(rows):
            logger.warning(
                "Left out %d of %d rows that cannot be trained on.", len(rows) - len(good), len(rows)
            )
        return good

    def _split(self, rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
        size = min(256, len(rows) // 20) if self.test_size is None else self.test_size
        if size >= len(rows):
            raise DataError(
                f"test_size={size} leaves nothing to train on: there are {len(rows)} rows. Lower it."
            )
        order = np.random.default_rng(self.shuffle_seed).permutation(len(rows))
        return Selection(rows, order[size:]), Selection(rows, order[:size])

    def _dataset(self, rows: Sequence[Row]) -> SupervisedDataset:
        config, renderer = self.common_config, self.renderer

        def to_datums(row: Row) -> list[Datum]:
            messages = messages_of(row, config.train_on_what)
            examples = renderer.build_supervised_examples(messages, config.train_on_what)
            longest = max((model_input.length for model_input, _ in examples), default=0)
            if config.max_length is not None and longest > config.max_length:
                dataset.note(
                    "truncated_examples", row.place, f"cut from {longest} tokens to {config.max_length}."
                )
            return [
                datum_from_tokens(model_input.to_ints(), weights, config.max_length)
                for model_input, weights in examples
            ]

        dataset = SupervisedDatasetFromRows(
            rows, config.batch_size, flatmap_fn=to_datums, on_bad_row=self.on_bad_row
        )
        dataset.set_epoch(self.shuffle_seed)
        return dataset


@chz.chz
class FromConversationFileBuilder(ConversationBuilder):
    """Conversations from a file: JSONL, JSON or Parquet rows with `messages`."""

    file_path: str = chz.field(doc="the file")

    def rows(self) -> tuple[Sequence[Row], None]:
        return read_rows(Path(self.file_path).expanduser(), self.on_bad_row), None


class HubDataset:
    """A published dataset: its hub id, and how it is usually split and trained."""

    def __init__(self, hub_id: str, train_split: str = "train", test_split: str | None = None) -> None:
        self.hub_id = hub_id
        self.train_split = train_split
        self.test_split = test_split


KNOWN_DATASETS: Mapping[str, HubDataset] = {
    "no_robots": HubDataset("HuggingFaceH4/no_robots", test_split="test"),
    "tulu3": HubDataset("allenai/tulu-3-sft-mixture"),
    "pirate_ultrachat": HubDataset("winglian/pirate-ultrachat-10k"),
}


@chz.chz
class NamedChatDatasetBuilder(ConversationBuilder):
    """Conversations by name: a short name, a file, or a hub id."""

    dataset: str = chz.field(
        default="pirate",
        doc=f"pirate (embedded), {', '.join(KNOWN_DATASETS)}, a file (.jsonl, .json, .parquet) or a hub id",
    )

    def rows(self) -> tuple[Sequence[Row], Sequence[Row] | None]:
        if self.dataset == "pirate":
            return read_rows(embedded.PIRATE_PATH, self.on_bad_row), None
        if self.dataset in KNOWN_DATASETS:
            known = KNOWN_DATASETS[self.dataset]
            return load_hub_rows(known.hub_id, known.train_split, known.test_split)
        path = Path(self.dataset).expanduser()
        if path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
            return read_rows(path, self.on_bad_row), None
        if self.dataset.count("/") != 1:
            raise DataError(
                f"dataset={self.dataset!r} is no known name, file or hub id (owner/name). "
                f"Names: pirate, {', '.join(KNOWN_DATASETS)}."
            )
        return load_hub_rows(self.dataset, "train", None)
