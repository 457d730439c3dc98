"""Datasets of Datums, and the builders that configs name."""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import chz

from cookbook import models
from cookbook.errors import ConfigError
from cookbook.types import Datum
from cookbook.utils.notes import Note
from renderers import Renderer, TrainOnWhat, get_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cookbook.data.report import DataReport

OnLong: TypeAlias = Literal["truncate", "drop", "raise"]

SKIPPED = ("truncated_examples", "too_long_examples", "untrained_examples", "bad_rows", "filtered_rows")
"""The keys of `SupervisedDataset.summary` that are reported when a run ends."""


class Origin(NamedTuple):
    """The source of a Datum."""

    source: str
    """The dataset it was read from."""
    row: int
    """Tells rows apart. The Datums of a row follow one another: they are one conversation."""


class RowCounts(NamedTuple):
    """The numbers of rows in the successive batches of an epoch."""

    per_batch: int
    per_epoch: int | None
    """None where it is not known."""


class SupervisedDataset(ABC):
    """Batches of Datums by index. The same index gives the same batch until `set_epoch`."""

    @abstractmethod
    def get_batch(self, index: int) -> list[Datum]:
        """Batch `index`, 0 <= index < len(self). Called from a thread of its own, ahead of need.

        A batch may be shorter than the others, or empty where no example kept a trained token.
        """

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in an epoch. Raises TypeError where it is unknown, as `len` does."""

    def epoch_length(self) -> int | None:
        """The number of batches in an epoch; None where it is unknown.

        A dataset of unknown length overrides this and `iter_batches`, or raises TypeError in `__len__` and
        IndexError in `get_batch` past the last batch: these two methods alone read it from the exceptions.
        """
        try:
            return len(self)
        except TypeError:
            return None

    def iter_batches(self, start: int = 0) -> Iterator[list[Datum]]:
        """The batches of the epoch from batch `start` to the last one."""
        length = self.epoch_length()
        for index in itertools.count(start) if length is None else range(start, length):
            try:
                batch = self.get_batch(index)
            except IndexError:
                if length is not None:
                    raise
                return
            yield batch

    def origins(self, index: int) -> Sequence[Origin] | None:
        """Returns the origin of each Datum of batch `index`; None where it is unknown."""
        return None

    def set_epoch(self, seed: int = 0) -> None:
        """Puts the examples into the order of `seed`. By default the order never changes."""

    def row_counts(self) -> RowCounts | None:
        """Returns the numbers of rows of an epoch's batches, in their order; None if unknown."""
        return None

    def skip_rows(self, num_rows: int) -> None:
        """Makes batch 0 begin after this many rows of the epoch, until the next `set_epoch`.

        Called where `row_counts` is known and an epoch continues in batches of a different size.
        """
        raise NotImplementedError(f"{type(self).__name__} has row_counts, but no skip_rows.")

    def summary(self) -> dict[str, int]:
        """Counts to report: rows, and what was skipped so far."""
        return {}

    def notes(self) -> Mapping[Note, int]:
        """Returns what was counted while the batches so far were created, beyond what `reports` has."""
        return {}

    def reports(self) -> Sequence[DataReport]:
        """Returns what is known of the data before training, source by source."""
        return ()

    def fingerprint(self) -> str | None:
        """Changes with the content or the order of the data; None where that is not known."""
        return None


def row_counts_of(dataset: SupervisedDataset) -> RowCounts | None:
    """The dataset's `row_counts`; None where its length shows that an epoch skips rows."""
    counts = dataset.row_counts()
    if counts is not None and counts.per_epoch is not None:
        is_whole = dataset.epoch_length() == -(-counts.per_epoch // counts.per_batch)
        return counts if is_whole else None
    return counts


class _DeclaresItself:
    """Lets a subclass of a chz class go without `@chz.chz`, and override a field by plain assignment.

    chz fields are declared by the decorator; here a class that lacks it is declared when it is
    first instantiated, and an assignment to an inherited field counts as its new default.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if "__chz_fields__" not in cls.__dict__:
            inherited = chz.chz_fields(cls)
            assigned = {name: inherited[name].x_type for name in inherited.keys() & cls.__dict__.keys()}
            cls.__annotations__ = inspect.get_annotations(cls) | assigned
            chz.chz(cls)
        return super().__new__(cls)


@chz.chz
class SupervisedDatasetBuilder(_DeclaresItself):
    """A config that creates datasets."""

    def has_eval_data(self) -> bool | None:
        """Returns whether there will be data to evaluate on; None where that is known when they are read."""
        return None

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """The training dataset, and one to evaluate on (or None)."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


@chz.chz(typecheck=True)
class ChatDatasetBuilderCommonConfig:
    """How conversations are turned into batches."""

    model_name_for_tokenizer: str = chz.field(doc="model whose tokenizer is used")
    renderer_name: str | None = chz.field(
        default=None,
        doc="chat format; default: chosen from the model",
        munger=chz.mungers.if_none(lambda self: models.recommended_renderer(self.model_name_for_tokenizer)),
    )
    batch_size: int = chz.field(default=32, doc="conversations per optimizer step")
    max_length: int | None = chz.field(
        default=2048, doc="maximum number of tokens of an example; None: no limit"
    )
    on_long: OnLong = chz.field(
        default="truncate", doc="what happens to a longer example: truncate (from the right), drop or raise"
    )
    train_on_what: TrainOnWhat = chz.field(
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES, doc="which messages' tokens count in the loss"
    )
    system_prompt: str | None = chz.field(default=None, doc="put before every conversation")
    tools_in_system: bool = chz.field(
        default=False,
        doc="describe tools in the system message and write calls and results as text, for a chat template "
        "without a place for them",
    )

    @chz.validate
    def _check(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"Invalid batch_size={self.batch_size}: must be >= 1 conversation.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length={self.max_length} leaves nothing to train: a token is predicted from one before."
            )


@chz.chz
class ChatDatasetBuilder(SupervisedDatasetBuilder):
    """Base of builders for chat data: adds the tokenizer and the renderer."""

    common_config: ChatDatasetBuilderCommonConfig

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return models.get_tokenizer(self.common_config.model_name_for_tokenizer)

    @property
    def renderer(self) -> Renderer:
        renderer_name = self.common_config.renderer_name
        assert renderer_name is not None  # the munger chose one
        config = self.common_config
        return get_renderer(renderer_name, self.tokenizer, config.system_prompt, config.tools_in_system)
