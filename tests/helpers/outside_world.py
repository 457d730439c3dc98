"""What lies outside the project, replaced where the project meets it: one function for each such place."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils


@contextlib.contextmanager
def day_of_transformers(now: datetime.datetime) -> Iterator[None]:
    """The clock that transformers' `apply_chat_template` gives a template as `strftime_now`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: now))
        yield
