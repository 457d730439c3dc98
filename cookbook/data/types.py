"""The interfaces of datasets of Datums, and of the builders that configs name."""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import chz

from cookbook import models
from cookbook.errors import ConfigError
from cookbook.types import Datum, check_tokens
from cookbook.utils.notes import Note
from renderers import TrainOnWhat, get_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cookbook.data.report import DataReport
    from renderers import Renderer

OnLong: TypeAlias = Literal["truncate", "drop", "raise", "window"]

SKIPPED = (
    "truncated_examples",
    "too_long_examples",
    "untrained_examples",
    "bad_rows",
    "filtered_rows",
    "held_out_rows",
)
"""The keys of `SupervisedDataset.summary` that are reported when a run ends."""


class Origin(NamedTuple):
    """The source of a Datum."""

    source: str
    """The dataset it was read from."""
    row: int
    """The number of its row. The Datums of a row are consecutive and belong to one conversation."""


class RowCounts(NamedTuple):
    """The numbers of rows in a batch and in an epoch."""

    per_batch: int
    per_epoch: int | None
    """None if it is unknown."""


class SupervisedDataset(ABC):
    """Batches of Datums by index. The same index gives the same batch until `set_epoch` is called."""

    @abstractmethod
    def get_batch(self, index: int) -> list[Datum]:
        """Returns batch `index`, 0 <= index < len(self). Called ahead of time from a separate thread.

        A batch may be shorter than the others, or empty if no example has a trained token left.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of batches in an epoch. Raises TypeError if it is unknown."""

    def epoch_length(self) -> int | None:
        """Returns the number of batches in an epoch; None if it is unknown.

        A dataset of unknown length overrides this method and `iter_batches`, or raises TypeError in `__len__`
        and IndexError in `get_batch` past the last batch. Only these two methods rely on the exceptions.
        """
        try:
            return len(self)
        except TypeError:
            return None

    def iter_batches(self, start: int = 0) -> Iterator[list[Datum]]:
        """Yields the batches of the epoch from batch `start` to the last."""
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
        """Returns the origin of each Datum of batch `index`; None if it is unknown."""
        return None

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffles the examples with `seed`. By default the order never changes."""

    def row_counts(self) -> RowCounts | None:
        """Returns the number of rows per batch and per epoch; None if it is unknown."""
        return None

    def skip_rows(self, num_rows: int) -> None:
        """Makes batch 0 begin after this many rows of the epoch, until the next `set_epoch`.

        Called if `row_counts` is known and an epoch continues with a different batch size.
        """
        raise NotImplementedError(f"{type(self).__name__} has row_counts, but no skip_rows.")

    def summary(self) -> dict[str, int]:
        """Returns counts to report: the rows, and the rows and examples that were skipped so far."""
        return {}

    def notes(self) -> Mapping[Note, int]:
        """Returns further counts, beyond those in `reports`, that were made while batches were created."""
        return {}

    def reports(self) -> Sequence[DataReport]:
        """Returns what is known about each source before training."""
        return ()

    def fingerprint(self) -> str | None:
        """Returns a string that changes with the content or the order of the data; None if it is unknown."""
        return None


def row_counts_of(dataset: SupervisedDataset) -> RowCounts | None:
    """Returns the dataset's `row_counts`; None if its length shows that an epoch skips rows."""
    counts = dataset.row_counts()
    if counts is not None and counts.per_epoch is not None:
        is_whole = dataset.epoch_length() == -(-counts.per_epoch // counts.per_batch)
        return counts if is_whole else None
    return counts


class _DeclaresItself:
    """Allows subclasses of a chz class without `@chz.chz`, which may override a field by plain assignment.

    The decorator declares chz fields. A class without it is declared when it is first instantiated, and an
    assignment to an inherited field becomes its new default.
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
        """Returns whether there will be evaluation data; None if it is unknown before the data are read."""
        return None

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """Returns the training dataset, and one to evaluate on (or None)."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


@chz.chz(typecheck=True)
class ChatDatasetBuilderCommonConfig:
    """The settings with which conversations are turned into batches."""

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
        default="truncate",
        doc="what happens to a longer example: truncate (from the right), drop, raise, or window: a "
        "long conversation becomes windows that keep its system prompt and train each turn once",
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
    template_kwargs: Mapping[str, Any] | None = chz.field(
        default=None, doc="variables of the chat template in every conversation; those of a row win"
    )

    add_tokens: list[str] = chz.field(
        default_factory=list, doc="tokens to add to the tokenizer; default: those of the run"
    )

    @chz.validate
    def _check(self) -> None:
        check_tokens(self.add_tokens)
        if self.on_long == "window" and self.train_on_what == TrainOnWhat.ALL_TOKENS:
            raise ConfigError(
                "on_long=window trains the messages of a conversation once each, and train_on_what="
                "all_tokens trains no messages. Choose all_messages."
            )
        if self.batch_size < 1:
            raise ConfigError(f"Invalid batch_size={self.batch_size}: must be >= 1 conversation.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length={self.max_length} leaves nothing to train: a token is predicted from one before."
            )


@chz.chz
class ChatDatasetBuilder(SupervisedDatasetBuilder):
    """The base class of builders for chat data, with a tokenizer and a renderer."""

    common_config: ChatDatasetBuilderCommonConfig

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        config = self.common_config
        return models.get_tokenizer(config.model_name_for_tokenizer, tuple(config.add_tokens))

    @property
    def renderer(self) -> Renderer:
        renderer_name = self.common_config.renderer_name
        assert renderer_name is not None  # the munger chose one
        config = self.common_config
        return get_renderer(
            renderer_name,
            self.tokenizer,
            config.system_prompt,
            config.tools_in_system,
            config.template_kwargs,
        )
