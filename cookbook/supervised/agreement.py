"""Whether the processes of a run were started alike: on one config, the same versions, the same data."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
from collections.abc import Iterator
from typing import Any

from cookbook.config.config_files import differences
from cookbook.data.types import SupervisedDataset
from cookbook.engine.processes import World, joined
from cookbook.errors import ConfigError, CookbookError, DataError

PACKAGES = ("sft-cookbook", "torch", "transformers", "peft", "datasets", "numpy", "tokenizers")


@contextlib.contextmanager
def joined_alike(config: dict[str, Any]) -> Iterator[World]:
    """The processes of this run. Raises ConfigError where one was started otherwise than the main one."""
    with joined() as world:
        check_same_config(world, config)
        check_same_versions(world)
        yield world


def check_same_config(world: World, config: dict[str, Any]) -> None:
    """Raises ConfigError, naming the process and the keys, where one was started on another config."""
    _check_same(
        world, config, "has another config than process 0", "Start all with one command.", ConfigError
    )


def check_same_versions(world: World) -> None:
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    advice = "Install the same packages everywhere: they need not compute the same."
    _check_same(world, versions, "runs other versions than process 0", advice, ConfigError)


def check_same_data(world: World, train_data: SupervisedDataset, eval_data: SupervisedDataset | None) -> None:
    """Raises DataError where a process would deal out other batches than the main one."""
    found = {
        f"{name} data": {
            "fingerprint": dataset.fingerprint(),
            "batches": dataset.epoch_length(),
            "rows": dataset.summary().get("rows"),
        }
        for name, dataset in (("training", train_data), ("evaluation", eval_data))
        if dataset is not None
    }
    advice = "Give all the same files: a changed copy, or one that is still being written, will not do."
    _check_same(world, found, "sees other data than process 0", advice, DataError)


def _check_same(
    world: World, value: dict[str, Any], what: str, advice: str, error: type[CookbookError]
) -> None:
    for rank, (host, other) in enumerate(world.all_gather_object((socket.gethostname(), value))):
        if rank == 0:
            of_rank0 = other
        elif changed := differences(of_rank0, other):
            lines = [
                f"  {key}: process 0 has {old!r}, process {rank} {new!r}"
                for key, (old, new) in sorted(changed.items())
            ]
            shown = "\n".join(lines)
            raise error(f"Process {rank} of {world.size}, on {host}, {what}:\n{shown}\n{advice}")
