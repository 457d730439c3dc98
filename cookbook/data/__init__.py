"""Rows to Datums.

sources/        rows: files, folders, the hub          -> Row
formats/        what a row says                        -> Conversation
rendering.py     renderers over all rows of a source    -> ExampleStore, on disk
rendered.py      lengths, splits, mixtures, epochs      -> SupervisedDataset
streaming.py     the same without a store
datasets.py      rows that a function of the user's maps
builders.py      the configs that put these together
"""

from cookbook.data.builders import ConversationBuilder, FromConversationFileBuilder, NamedChatDatasetBuilder
from cookbook.data.conversation import Conversation
from cookbook.data.datasets import SupervisedDatasetFromHFDataset, SupervisedDatasetFromRows
from cookbook.data.examples import conversation_to_datum, datum_from_tokens
from cookbook.data.streaming import StreamingSupervisedDatasetFromHFDataset

__all__ = [
    "Conversation",
    "ConversationBuilder",
    "FromConversationFileBuilder",
    "NamedChatDatasetBuilder",
    "StreamingSupervisedDatasetFromHFDataset",
    "SupervisedDatasetFromHFDataset",
    "SupervisedDatasetFromRows",
    "conversation_to_datum",
    "datum_from_tokens",
]
