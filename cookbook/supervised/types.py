"""The types of a dataset, under the name that users import them by."""

from cookbook.data.types import (
    ChatDatasetBuilder,
    ChatDatasetBuilderCommonConfig,
    OnLong,
    Origin,
    RowCounts,
    SupervisedDataset,
    SupervisedDatasetBuilder,
)

__all__ = [
    "ChatDatasetBuilder",
    "ChatDatasetBuilderCommonConfig",
    "OnLong",
    "Origin",
    "RowCounts",
    "SupervisedDataset",
    "SupervisedDatasetBuilder",
]
