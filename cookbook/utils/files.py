"""Writes and removes files completely or not at all, and never through a link.

A folder from elsewhere may hold links to the user's own files. So a file is created exclusively under an
unpredictable name and renamed over its target, which replaces a link and never follows it. Lock files and
files that are appended to are opened only if they are regular files with a single name. Removing a link
removes only the link. The path that the user names may itself be a link, but paths inside the folder may not.
The mode of a file is the one that the umask gives, also if a library wrote the file.

Work in progress is named `.<name>.<what>-<machine>-<process>-<its start>-<random>`, where <what> is

    writing     a file or folder that will replace <name>
    replaced    the previous folder, between two renames
    removing    a folder that is being removed

`remove_abandoned` removes the work of processes that no longer run, and needs no locks for that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
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
from typing import IO

from cookbook.errors import FileError

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A name that can neither lead out of its folder nor be hidden in it."""

_WORK = re.compile(
    r"\.(?P<name>.+)\.(?P<what>writing|replaced|removing)"
    r"-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-(?P<start>\d+)-[0-9a-f]{16}",
    re.DOTALL,
)
_SECONDS_OF_OTHER_MACHINES = 24 * 3600
"""Whether a process on another machine is alive is unknown, so its work is kept for this long."""


# -- files ------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str) -> None:
    """Replaces a file or a link by a file with this content. A reader sees the old file or the new one.

    Text is written in UTF-8. Lone surrogates, as from a file name that is not UTF-8, are written as
    `\\udc80`.
    """
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def create(path: Path, content: bytes | str) -> None:
    """Writes a new file in a folder that is not yet in its place (`writing_folder`)."""
    with os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file to fill, which replaces `path` when the body succeeds. If it fails, nothing is left."""
    _check_replaceable(path)
    with _named_in_errors(path):
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


_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a write, which name no file."""


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Makes errors of the system name `path` where they name no file, or one at work for it."""
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in _OF_A_DISK
        if not is_unnamed and ".writing-" not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_replaceable(path: Path) -> None:
    """Raises FileError for a folder, a device or a pipe, or a link to one, such as /dev/stdout."""
    try:
        status = path.stat()
    except OSError:  # there is nothing, or a dangling link
        return
    if not stat.S_ISREG(status.st_mode) and not (stat.S_ISDIR(status.st_mode) and path.is_symlink()):
        raise FileError(
            f"Cannot write {path}: it is {_kind(status)}. Remove it, or choose another name for the file."
        )


def _new_file(path: Path) -> tuple[Path, IO[bytes]]:
    """Returns a new file beside `path`, with its path."""
    temporary = _place_of_work(path, "writing")
    return temporary, os.fdopen(_open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def copy(path: Path, new: Path) -> None:
    """Writes a new file with the content of another."""
    with path.open("rb") as source, replacing(new) as file:
        shutil.copyfileobj(source, file)


def appending(path: Path) -> IO[bytes]:
    """Returns a file opened for appending, which is created if there is none.

    Raises FileError for a link, for a file with a second name, and for anything that is not a file.
    """
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, is_changed=True), "ab")


def locked(path: Path, must_exist: bool = False) -> IO[bytes]:
    """Returns a lock file, locked until it is closed. Raises BlockingIOError if another process holds it."""
    flags = os.O_RDWR if must_exist else os.O_RDWR | os.O_CREAT
    file = os.fdopen(_open_own(path, flags, is_changed=False), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def read(path: Path) -> bytes:
    """Returns the content of a file. Links are followed. Raises FileError for a pipe or a device."""
    with reading(path) as file:
        return file.read()


def reading(path: Path) -> IO[bytes]:
    """Returns a file opened for reading. Links are followed. Raises FileError for a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileError(f"Cannot read {path}: it is a link that leads to itself. Remove it.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileError(f"Cannot read {path}: it is {_kind(status)}, not a file. Remove it.")
    return os.fdopen(descriptor, "rb")


def _open_own(path: Path, flags: int, is_changed: bool) -> int:
    """Opens a regular file that is not a link. If it `is_changed`, it must have no second name either."""
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
            f"others would change too. Replace it by a copy."
        )


def refuse_link(path: Path) -> None:
    """Raises FileError if there is a link at `path`."""
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
    """Creates a folder and its parents if there is none. Returns its path.

    Raises FileError if `path` is a link, unless the user named it.
    """
    if not may_be_link:
        refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be created in a folder."""
    temporary, file = _new_file(folder / "test")
    file.close()
    temporary.unlink()


@contextlib.contextmanager
def writing_folder(
    path: Path, replace: bool = False, sync: bool = False, must_hold: Sequence[str] = ()
) -> Iterator[Path]:
    """Yields a folder to fill, also by a library, which replaces `path` when the body succeeds.

    Its files get the modes that the umask gives. With `sync` they are on disk before the rename. `replace`
    allows an existing folder. If that folder is not empty and holds none of the files `must_hold`, it is not
    the intended one, and FileError is raised.
    """
    with temporary_folder(path) as new:
        yield new
        _set_modes(new)
        if sync:
            for found in [*new.rglob("*"), new]:
                _sync(found)
        _put_into_place(new, path, replace, must_hold)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path`, which is removed after the body."""
    folder = _place_of_work(path, "writing")
    with _named_in_errors(path):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_into_place(new: Path, path: Path, replace: bool, must_hold: Sequence[str]) -> None:
    if not (replace and os.path.lexists(path)):
        os.rename(new, path)
        return
    _check_holds(path, must_hold)
    replaced = _place_of_work(path, "replaced")
    os.rename(path, replaced)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(replaced, path)
        raise
    _remove_all(replaced)


def remove(path: Path, must_hold: Sequence[str] = ()) -> None:
    """Removes a file, a link, or a folder with its content. Does nothing if there is none.

    No link is followed. A folder disappears at once; its files are removed afterwards. If a folder is not
    empty and holds none of the files `must_hold`, it is not the intended one, and FileError is raised.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    _check_holds(path, must_hold)
    removed = _place_of_work(path, "removing")
    os.rename(path, removed)
    shutil.rmtree(removed)


def _remove_all(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def rename(path: Path, new: Path) -> None:
    """Renames a file or folder to a name that is not taken."""
    if os.path.lexists(new):
        raise FileError(f"{path} cannot be called {new}: that name exists already.")
    os.rename(path, new)


def _check_holds(path: Path, names: Sequence[str]) -> None:
    if not names or path.is_symlink() or (path.is_dir() and not any(path.iterdir())):
        return
    if not any((path / name).is_file() for name in names):
        raise FileError(f"{path} was not changed: it holds no {' or '.join(names)}. Move it elsewhere.")


def _set_modes(folder: Path) -> None:
    """Sets all modes in a folder to those the umask gives: some libraries write for the owner alone."""
    for_folders = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            path.chmod(for_folders)
        elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            path.chmod(for_folders & 0o666)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- work in progress -------------------------------------------------------------------------


def _place_of_work(path: Path, what: str) -> Path:
    shortened = os.fsdecode(os.fsencode(path.name)[:150])  # a file name has at most 255 bytes
    process = os.getpid()
    return path.with_name(
        f".{shortened}.{what}-{_machine()}-{process}-{_start_of(process) or 0}-{secrets.token_hex(8)}"
    )


def remove_abandoned(folder: Path, name: str | None = None, earlier: str | None = None) -> None:
    """Removes what killed processes left unfinished in a folder, for `name` alone or for any name.

    The work of a live process stays, and so does work of another machine that changed within a day. A folder
    that was about to be replaced gets its name back. `earlier` is a pattern of folders that earlier versions
    left, in which a file `lock` shows whether the process is alive. What cannot be removed stays.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _WORK.fullmatch(path.name)
        with contextlib.suppress(OSError):  # it was finished meanwhile, or is another user's
            if match is not None and name in (None, match["name"]) and not _is_at_work(match, path):
                target = folder / match["name"]
                if match["what"] == "replaced" and not os.path.lexists(target):
                    os.rename(path, target)
                elif not path.is_symlink():
                    _remove_all(path)
            elif match is None and earlier is not None and path.match(earlier):
                with locked(path / "lock", must_exist=True):
                    shutil.rmtree(path)


def _is_at_work(work: re.Match[str], path: Path) -> bool:
    if work["machine"] != _machine():
        last = max(found.lstat().st_mtime for found in [path, *path.rglob("*")])
        return time.time() - last < _SECONDS_OF_OTHER_MACHINES
    process = int(work["process"])
    start = _start_of(process)
    if start is not None:
        return start == work["start"]
    try:  # the process does not exist, or this system does not show its start
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _start_of(process: int) -> str | None:
    """Returns when a process of this machine started, in ticks of the kernel, or None if that is unknown.

    For a process that has ended but that its parent has not yet waited for, it returns "ended".
    """
    try:
        state, *values = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return "ended" if state in (b"Z", b"X") else values[18].decode()


@functools.cache
def _machine() -> str:
    """Returns a text that changes with the meaning of process numbers: by machine, container and boot."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\n".join(parts).encode(errors="surrogateescape"), digest_size=4).hexdigest()
