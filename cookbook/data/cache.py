"""Files kept between runs, all of which can be created again: deleting the folder costs only time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from cookbook.errors import DataError
from cookbook.utils import files, json_files

RENDERED, FINGERPRINTS = "rendered", "fingerprints"
_SETTLED_SECONDS = 2.0
"""A file system's clock is coarse: a file changed later than this may change again unseen."""


def cache_folder() -> Path:
    """$COOKBOOK_CACHE, or ~/.cookbook/cache. It need not exist."""
    named = os.environ.get("COOKBOOK_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cookbook" / "cache"


def remove_abandoned() -> None:
    """Removes what killed runs left half written in the cache; what live ones are at work on stays."""
    for name in (RENDERED, FINGERPRINTS):
        files.remove_abandoned(cache_folder() / name, earlier=".*.*")


def file_digest(path: Path) -> str:
    """A digest of a file's content, remembered for as long as its size and time of change stay."""
    path = path.resolve()
    before = _signature(path)
    note = cache_folder() / FINGERPRINTS / f"{hashlib.blake2b(bytes(path), digest_size=16).hexdigest()}.json"
    known = _read_note(note)
    if known is not None and known[0] == before:
        return known[1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    is_settled = time.time_ns() - before[1] > _SETTLED_SECONDS * 1e9
    if is_settled and _signature(path) == before:
        values = {"path": str(path), "size": before[0], "mtime_ns": before[1], "digest": digest}
        with contextlib.suppress(OSError, UnicodeEncodeError):  # the next run computes it again
            files.make_folder(note.parent)
            files.write(note, json.dumps(values))
    return digest


def _signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_note(note: Path) -> tuple[tuple[int, int], str] | None:
    """None for a note that is missing or damaged."""
    if not note.exists():
        return None
    try:
        shape = {"size": int, "mtime_ns": int, "digest": str}
        values = json_files.read_object(note, DataError, "", shape)
    except DataError:
        return None
    return (values["size"], values["mtime_ns"]), values["digest"]
