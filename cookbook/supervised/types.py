"""The types of a dataset, under the name that users import them by."""

from cookbook.data.types import *  # noqa: F403
