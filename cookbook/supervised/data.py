"""The ways from rows to Datums, under the name that users import them by."""

from cookbook.data import *  # noqa: F403
from cookbook.data import __all__ as __all__
