"""What lies outside the project, replaced where the project meets it: one function for each such place."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from transformers.utils import chat_template_utils


@contextlib.contextmanager
def day_of_transformers(now: datetime.datetime) -> Iterator[None]:
    """The clock that transformers' `apply_chat_template` gives a template as `strftime_now`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: now))
        yield


def let_use_cores(patch: pytest.MonkeyPatch, number: int) -> None:
    """The cores that the operating system lets this process use."""
    patch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))


def replace_hub_datasets(patch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Datasets on the hub, as the `datasets` package loads them by name."""
    patch.setattr(datasets, "load_dataset", load)


def replace_hub_commits(patch: pytest.MonkeyPatch, commits: Iterator[str]) -> None:
    """A hub that is reachable, and names the next of `commits` each time it is asked for a dataset's."""

    class Api:
        def dataset_info(self, hub_id: str) -> Any:
            return huggingface_hub.hf_api.DatasetInfo(id=hub_id, sha=next(commits), tags=[])

    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # behind a proxy only the client can tell
    patch.setattr(huggingface_hub, "HfApi", Api)
