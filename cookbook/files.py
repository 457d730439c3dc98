"""How this project writes and removes files: whole or not at all, and through no link.

A folder that somebody else filled may hold links to the user's own files. So a file is written under a name
that nobody can predict, created exclusively, and renamed over its target, which replaces a link and never
follows it. Files that are appended to and locks are opened only where they are regular files of one name.
Removing a link removes the link. The path that the user names may itself be a link; what lies in the folder
may not. The mode of a file is what the umask gives, also where a library wrote it.

A folder is called `.<name>.removing-<machine>-<random>` while it is removed. Work in progress is called
`.<name>.writing-<machine>-<random>`: a file, or a folder of these:

    lock            locked by the process at work, so that others see whether it still lives
    new             what will take the place of <name>
    old-<name>      what was there before, between two renames

`remove_abandoned` removes what no live process holds. On file systems without locks nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cookbook.errors import FileError

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A name that cannot lead out of its folder, nor be hidden in it."""

_WORK = re.compile(r"\..+\.(?P<what>writing|removing)-(?P<machine>[0-9a-f]{8})-[0-9a-f]{16}", re.DOTALL)
_LOCK, _NEW, _OLD = "lock", "new", "old-"
_SECONDS_OF_OTHER_MACHINES = 24 * 3600
"""Locks of another machine cannot be seen on every file system: its work is left alone for this long."""


# -- files ------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str) -> None:
    """Replaces a file, or a link, by one with this content. A reader sees the old file or the new one.

    Text is written in UTF-8; halves of characters, as in a file name that is no UTF-8, as `\\udc80`.
    """
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def create(path: Path, content: bytes | str) -> None:
    """Writes a file that does not exist yet, in a folder that is not in its place yet (`writing_folder`)."""
    with os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, which takes the place of `path` when the body ends well. Else nothing is left of it."""
    _check_replaceable(path)
    temporary, file = _new_file(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    """Raises FileError for a folder, and for a device or a pipe or a link to one, such as /dev/stdout."""
    try:
        status = path.stat()
    except OSError:  # there is nothing, or a link to nothing
        return
    if not stat.S_ISREG(status.st_mode) and not (stat.S_ISDIR(status.st_mode) and path.is_symlink()):
        raise FileError(
            f"Cannot write {path}: it is {_kind(status)}. Remove it, or choose another name for the file."
        )


def _new_file(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked."""
    while True:
        temporary = path.with_name(_name_of_work(path))
        file = os.fdopen(_open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b")
        if _is_ours(file):
            return temporary, file
        file.close()


def copy(path: Path, new: Path) -> None:
    """Writes a file with the content of another."""
    with path.open("rb") as source, replacing(new) as file:
        shutil.copyfileobj(source, file)


def appending(path: Path) -> IO[bytes]:
    """A file opened to be appended to, created where there is none.

    Raises FileError for a link, for a file with a second name, and for what is no file.
    """
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, is_changed=True), "ab")


def locked(path: Path) -> IO[bytes]:
    """A lock file, locked until it is closed. Raises BlockingIOError where another process holds it."""
    file = os.fdopen(_open_own(path, os.O_RDWR | os.O_CREAT, is_changed=False), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def read(path: Path) -> bytes:
    """The content of a file, wherever a link leads. Raises FileError for a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileError(f"Cannot read {path}: it is {_kind(status)}, not a file. Remove it.")
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _open_own(path: Path, flags: int, is_changed: bool) -> int:
    """Opens a regular file that is no link; one that `is_changed` has no other name either."""
    with contextlib.suppress(FileNotFoundError):
        _check_own(path, path.lstat(), is_changed)
    descriptor = _open(path, flags)
    try:
        _check_own(path, os.fstat(descriptor), is_changed)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _check_own(path: Path, status: os.stat_result, is_changed: bool) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _link_error(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"Cannot write {path}: it is {_kind(status)}, not a file. Remove it.")
    if is_changed and status.st_nlink > 1:
        raise FileError(
            f"Cannot append to {path}: it is one of {status.st_nlink} names of a file (hard links), and the "
            f"others would change too. Put a copy of it in its place."
        )


def refuse_link(path: Path) -> None:
    """Raises FileError where there is a link at `path`."""
    if path.is_symlink():
        raise _link_error(path)


def _link_error(path: Path) -> FileError:
    return FileError(
        f"{path} is a link to {os.readlink(path)!r}, and nothing is written through a link. Remove it, or "
        f"put what it leads to in its place."
    )


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _kind(status: os.stat_result) -> str:
    return next((kind for is_such, kind in _KINDS if is_such(status.st_mode)), "no file")


# -- folders ----------------------------------------------------------------------------------


def make_folder(path: Path, may_be_link: bool = False) -> Path:
    """Creates a folder, and those above it, where there is none. Returns its path.

    Raises FileError where `path` is a link, unless the user named it.
    """
    if not may_be_link:
        refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be created in a folder."""
    temporary, file = _new_file(folder / "test")
    file.close()
    temporary.unlink()


@contextlib.contextmanager
def writing_folder(
    path: Path, replace: bool = False, sync: bool = False, must_hold: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder to fill, by a library too, which takes the place of `path` when the body ends well.

    Its files get the modes that the umask gives; with `sync` they are on disk before the rename. `replace`
    allows that there is a folder already. If that is not empty and holds none of the files `must_hold`, it
    is not what was meant, and FileError is raised.
    """
    with _work_on(path) as work:
        new = work / _NEW
        new.mkdir()
        yield new
        _set_modes(new, of=work)
        if sync:
            for found in [*new.rglob("*"), new]:
                _sync(found)
        _put_into_place(work, path, replace, must_hold)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that goes again with the body."""
    with _work_on(path) as work:
        (work / _NEW).mkdir()
        yield work / _NEW


def _put_into_place(work: Path, path: Path, replace: bool, must_hold: Sequence[str]) -> None:
    if not (replace and os.path.lexists(path)):
        os.rename(work / _NEW, path)
        return
    _check_holds(path, must_hold)
    os.rename(path, work / f"{_OLD}{path.name}")  # where the next rename fails, `_clear` puts it back
    os.rename(work / _NEW, path)


def remove(path: Path, must_hold: Sequence[str] = ()) -> None:
    """Removes a file, a link or a folder with all that is in it; nothing where there is none.

    No link is followed. A folder disappears at once, and then its files. One that is not empty and holds
    none of the files `must_hold` is not what was meant: FileError.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    _check_holds(path, must_hold)
    removed = path.with_name(_name_of_work(path, "removing"))
    os.rename(path, removed)
    shutil.rmtree(removed)


def rename(path: Path, new: Path) -> None:
    """Gives a file or folder another name, where nothing has that name."""
    if os.path.lexists(new):
        raise FileError(f"{path} cannot be called {new}: there is something of that name.")
    os.rename(path, new)


def _check_holds(path: Path, names: Sequence[str]) -> None:
    if not names or path.is_symlink() or (path.is_dir() and not any(path.iterdir())):
        return
    if not any((path / name).is_file() for name in names):
        raise FileError(f"{path} is left as it is: it holds no {' or '.join(names)}. Move it elsewhere.")


def _set_modes(folder: Path, of: Path) -> None:
    """Gives files and folders the modes of the folder `of` and of its lock, which the umask gave those.

    Some libraries leave what they write to its owner alone.
    """
    for_folders, for_files = (stat.S_IMODE(path.lstat().st_mode) for path in (of, of / _LOCK))
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            path.chmod(for_folders)
        elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            path.chmod(for_files)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- work in progress -------------------------------------------------------------------------


@contextlib.contextmanager
def _work_on(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked, which goes again with the body."""
    work, lock = _new_work(path)
    with lock:
        try:
            yield work
        finally:
            _clear(work)


def _clear(work: Path) -> None:
    """Puts back what was to be replaced and was not, and removes the rest."""
    for old in work.glob(f"{_OLD}*"):
        target = os.path.join(work.parent, old.name.removeprefix(_OLD))
        if not os.path.lexists(target):
            os.rename(old, target)
    shutil.rmtree(work, ignore_errors=True)


def _new_work(path: Path) -> tuple[Path, IO[bytes]]:
    while True:
        work = path.with_name(_name_of_work(path))
        work.mkdir(parents=True)
        try:
            lock = os.fdopen(_open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b")
        except (FileExistsError, FileNotFoundError):  # somebody took it for abandoned between two calls
            continue
        if _is_ours(lock):
            return work, lock
        lock.close()


def _is_ours(file: IO[Any]) -> bool:
    """Locks a file just created. False where somebody took it for abandoned and removed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where nothing is taken for abandoned
        return True
    return os.fstat(file.fileno()).st_nlink > 0


def _name_of_work(path: Path, what: str = "writing") -> str:
    shortened = os.fsdecode(os.fsencode(path.name)[:150])  # a name has 255 bytes at most
    return f".{shortened}.{what}-{_machine()}-{secrets.token_hex(8)}"


def _machine() -> str:
    return hashlib.blake2b(os.fsencode(socket.gethostname()), digest_size=4).hexdigest()


def remove_abandoned(folder: Path, name: str | None = None, earlier: str | None = None) -> None:
    """Removes what killed processes left half written in a folder: for `name` alone, or for any.

    What was being removed is removed. What a live process holds locked stays, and so does what another
    machine changed within a day. A folder that was about to be replaced is put back. `earlier` is a pattern
    of the folders that earlier versions left, in which a file `lock` tells the same. What cannot be removed
    stays.
    """
    starts = (".",) if name is None else (f".{name}.writing-", f".{name}.removing-")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _WORK.fullmatch(path.name)
        is_work = match is not None and path.name.startswith(starts)
        is_earlier = earlier is not None and path.match(earlier) and (path / _LOCK).is_file()
        if is_work or is_earlier:
            with contextlib.suppress(OSError):  # it is done meanwhile, or another user's
                if match is not None and match["what"] == "removing":
                    shutil.rmtree(path)
                else:
                    _remove_if_abandoned(path, match is not None and match["machine"] != _machine())


def _remove_if_abandoned(path: Path, is_other_machine: bool) -> None:
    if is_other_machine and time.time() - _last_change(path) < _SECONDS_OF_OTHER_MACHINES:
        return
    is_folder = stat.S_ISDIR(path.lstat().st_mode)
    # Without a lock file a folder was left, or made, at this very moment: its process sees that it is gone.
    descriptor = _open(path / _LOCK, os.O_RDWR | os.O_CREAT) if is_folder else _open(path, os.O_RDWR)
    with os.fdopen(descriptor, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            return
        if is_folder:
            _clear(path)
        else:
            path.unlink()


def _last_change(path: Path) -> float:
    return max(found.lstat().st_mtime for found in [path, *path.rglob("*")])
