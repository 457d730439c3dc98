"""The files of a folder, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cookbook.errors import DataError
from cookbook.supervised.data.sources.base import AnyRow, Chunk, Source, digest_of
from cookbook.supervised.data.sources.text_files import FileSource


@dataclass(frozen=True)
class JoinedChunk(Chunk):
    """Rows from the end of one file and the beginning of the next."""

    parts: list[Chunk]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self) -> list[AnyRow]:
        return [row for part in self.parts for row in part.rows()]


class FolderSource(Source):
    """Files of one kind in the order of their names. Hidden files are none of them."""

    def __init__(self, path: Path, kind_of: Callable[[Path], type[FileSource] | None], known: str) -> None:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        kinds = {kind_of(entry) if entry.is_file() else None for entry in entries}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None:
            found = ", ".join(entry.name + "/" * entry.is_dir() for entry in entries[:8]) or "nothing"
            more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
            raise DataError(
                f"{path} is a folder, and not of data files of one kind: it has {found}{more}. "
                f"Give a file in it, or a folder of nothing but files of one kind ({known})."
            )
        self.name = path.name or str(path)
        self._files = [kind(entry, f"{self.name}/{entry.name}") for entry in entries]
        self._sizes: dict[int, int] = {}

    def fingerprint(self) -> str:
        return digest_of("folder", *(file.fingerprint() for file in self._files))

    def num_rows(self) -> int | None:
        sizes = [file.num_rows() for file in self._files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def chunks(self, start: int = 0, size: int = 256) -> Iterator[Chunk]:
        number = 0
        while number < len(self._files) and start and start >= self._size(number):
            start -= self._size(number)
            number += 1
        held: list[Chunk] = []
        missing = size
        for file in self._files[number:]:
            if missing < size:
                # The last file ended within a chunk, and this one has the rest of it.
                first = next(file.chunks(0, missing))
                held.append(first)
                missing -= len(first)
                start = len(first)
                if missing == 0:
                    yield JoinedChunk(held)
                    held, missing = [], size
                else:
                    continue
            for chunk in file.chunks(start, size):
                if len(chunk) == size:
                    yield chunk
                else:
                    held, missing = [chunk], size - len(chunk)
            start = 0
        if held:
            yield JoinedChunk(held)

    def _size(self, number: int) -> int:
        """The rows of one file, counted once if it does not say."""
        if number not in self._sizes:
            known = self._files[number].num_rows()
            self._sizes[number] = self._files[number].count_rows() if known is None else known
        return self._sizes[number]
