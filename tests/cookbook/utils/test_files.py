"""Tests of writing and removing files."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cookbook.errors import FileError
from cookbook.utils import files, jsonl


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    earlier = os.umask(request.param)
    yield request.param
    os.umask(earlier)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, outside of an untrusted folder that holds links to it."""
    path = tmp_path / "victim"
    path.write_text("dear to its user", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


# -- files ------------------------------------------------------------------------------------


def test_a_link_is_replaced_and_its_target_is_unchanged(folder: Path, victim: Path) -> None:
    for target in (victim, folder.parent / "missing", folder):
        (folder / "page").symlink_to(target)
        files.write(folder / "page", "new")
        assert not (folder / "page").is_symlink()
        assert (folder / "page").read_bytes() == b"new"
        (folder / "page").unlink()
    assert victim.read_text(encoding="utf-8") == "dear to its user"
    assert not (folder.parent / "missing").exists()


def test_a_hard_link_is_replaced_and_the_other_name_is_unchanged(folder: Path, victim: Path) -> None:
    (folder / "page").hardlink_to(victim)
    files.write(folder / "page", "new")
    assert victim.read_text(encoding="utf-8") == "dear to its user"


def test_a_device_or_a_pipe_is_not_replaced(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(FileError, match=f"Cannot write {folder / name}: it is a (pipe|device)"):
            files.write(folder / name, "new")
    assert names_in(folder) == ["null", "pipe"]


def test_a_failed_write_changes_no_file_and_leaves_none(folder: Path) -> None:
    files.write(folder / "page", "old")

    def fill() -> None:
        with files.replacing(folder / "page") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert names_in(folder) == ["page"]
    assert (folder / "page").read_bytes() == b"old"


def test_the_name_of_a_file_may_have_the_maximum_length(folder: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        files.write(folder / name, "text")
        assert (folder / name).read_bytes() == b"text"


def test_files_and_folders_have_the_modes_of_the_umask(folder: Path, umask: int) -> None:
    files.write(folder / "written", "text")
    files.appending(folder / "appended").close()
    files.locked(folder / "lock").close()
    with files.writing_folder(folder / "new") as new:
        (new / "inner").mkdir(mode=0o700)
        for path in (new / "of a library", new / "inner" / "of a library"):
            path.touch(mode=0o600)
    for path in folder.rglob("*"):
        assert mode_of(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_nothing_is_appended_through_a_link(folder: Path, victim: Path) -> None:
    (folder / "link").symlink_to(victim)
    (folder / "dangling").symlink_to(folder.parent / "missing")
    for name, target in (("link", victim), ("dangling", folder.parent / "missing")):
        with pytest.raises(FileError) as refused:
            jsonl.append(folder / name, {"step": 1})
        assert f"{folder / name} is a link to {str(target)!r}" in str(refused.value)
        with pytest.raises(FileError, match="is a link to"):
            files.locked(folder / name)
    assert victim.read_text(encoding="utf-8") == "dear to its user"
    assert not (folder.parent / "missing").exists()


def test_nothing_is_appended_to_a_file_with_a_second_name(folder: Path, victim: Path) -> None:
    (folder / "rows").hardlink_to(victim)
    with pytest.raises(FileError, match=r"one of 2 names of a file \(hard links\)"):
        files.appending(folder / "rows")


def test_a_pipe_a_device_or_a_folder_is_neither_appended_to_nor_read(folder: Path) -> None:
    """Opened normally, a pipe blocks forever, and /dev/zero has no end."""
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "inner"):
        for refusing in (files.appending, files.locked, files.read):
            with pytest.raises(FileError, match="it is a (pipe|folder), not a file"):
                refusing(folder / name)
    with pytest.raises(FileError, match="it is a device, not a file"):
        jsonl.read(folder / "zero")


def test_a_file_is_read_through_a_link(folder: Path, victim: Path) -> None:
    (folder / "link").symlink_to(victim)
    assert files.read(folder / "link") == b"dear to its user"


def test_a_lock_excludes_others_and_does_not_change_the_file(folder: Path) -> None:
    (folder / "lock").write_text("kept", encoding="utf-8")
    with files.locked(folder / "lock"), pytest.raises(BlockingIOError):
        files.locked(folder / "lock")
    files.locked(folder / "lock").close()
    assert (folder / "lock").read_text(encoding="utf-8") == "kept"


WRITER = """
import sys
from pathlib import Path
from cookbook.utils import files
print("ready", flush=True)
sys.stdin.readline()
for number in range(400):
    files.write(Path(sys.argv[1]), sys.argv[2] * 200_000)
"""


@pytest.mark.slow
def test_two_processes_that_write_one_file_never_collide(folder: Path) -> None:
    page = folder / "page"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(page), letter],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for letter in "ab"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        files.remove_abandoned(folder)  # as a run that starts meanwhile
        if page.exists():
            assert page.read_bytes() in (b"a" * 200_000, b"b" * 200_000)
    for writer in writers:
        assert writer.wait() == 0, writer.stderr.read() if writer.stderr else ""
    assert names_in(folder) == ["page"]


# -- folders ----------------------------------------------------------------------------------


def test_a_folder_appears_completely_or_not_at_all(folder: Path) -> None:
    def fill(content: str, fails: bool, replace: bool) -> None:
        with files.writing_folder(folder / "new", replace=replace, sync=True) as new:
            (new / "file").write_text(content, encoding="utf-8")
            if fails:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fill("first", fails=True, replace=False)
    assert names_in(folder) == []
    fill("second", fails=False, replace=False)
    with pytest.raises(OSError, match="not empty"):
        fill("third", fails=False, replace=False)
    with pytest.raises(OSError, match="the disk is full"):
        fill("fourth", fails=True, replace=True)
    assert (folder / "new" / "file").read_text(encoding="utf-8") == "second"
    fill("fifth", fails=False, replace=True)
    assert (folder / "new" / "file").read_text(encoding="utf-8") == "fifth"
    assert names_in(folder) == ["new"]


def test_removing_follows_no_link(folder: Path, victim: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("dear", encoding="utf-8")
    (folder / "to a folder").symlink_to(outside)
    (folder / "to a file").symlink_to(victim)
    (folder / "inner").mkdir()
    (folder / "inner" / "to a folder").symlink_to(outside)
    for name in (*names_in(folder), "missing"):
        files.remove(folder / name)
    assert names_in(folder) == []
    assert victim.exists()
    assert (outside / "file").read_text(encoding="utf-8") == "dear"


def test_a_folder_without_the_expected_files_is_neither_removed_nor_replaced(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").touch()
    with pytest.raises(FileError, match=r"mine was not changed: it holds no state.json"):
        files.remove(folder / "mine", must_hold=["state.json"])
    with (
        pytest.raises(FileError, match=r"it holds no state.json"),
        files.writing_folder(folder / "mine", replace=True, must_hold=["state.json"]),
    ):
        pass
    assert names_in(folder / "mine") == ["notes"]
    (folder / "mine" / "state.json").touch()
    files.remove(folder / "mine", must_hold=["state.json"])
    assert names_in(folder) == []


def test_no_folder_is_created_at_a_link(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)
    with pytest.raises(FileError, match="is a link to"):
        files.make_folder(folder / "link")
    assert files.make_folder(folder / "link", may_be_link=True) == folder / "link"


# -- unfinished work of killed processes -----------------------------------------------------------

WORKERS = {
    "file": "with files.replacing(path) as file:\n    file.write(b'half')\n    wait()",
    "folder": "with files.writing_folder(path) as new:\n    (new / 'file').touch()\n    wait()",
    "temporary": "with files.temporary_folder(path) as new:\n    (new / 'file').touch()\n    wait()",
}
WAIT = """
import signal, sys
from pathlib import Path
from cookbook.utils import files
path = Path(sys.argv[1])
def wait():
    print("working", flush=True)
    signal.pause()  # until it is killed
"""


@pytest.mark.parametrize("kind", WORKERS)
def test_work_of_a_live_process_stays_and_that_of_a_killed_one_is_removed(folder: Path, kind: str) -> None:
    command = [sys.executable, "-c", WAIT + WORKERS[kind], str(folder / "new")]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "working\n"
        files.remove_abandoned(folder)
        assert len(names_in(folder)) == 1
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    files.remove_abandoned(folder, "other")
    assert len(names_in(folder)) == 1
    files.remove_abandoned(folder)
    assert names_in(folder) == []


def name_of_killed(folder: Path, name: str, what: str = "writing") -> str:
    """Returns a name of work by a process that has ended, and whose number now belongs to this process."""
    with files.temporary_folder(folder / name) as temporary:
        parts = temporary.name.replace(".writing-", f".{what}-").split("-")
    return "-".join([*parts[:-2], "1", parts[-1]])


def test_a_folder_that_was_about_to_be_replaced_is_restored(folder: Path) -> None:
    """Simulates a kill between the two renames, and a kill right after them."""
    for is_replaced in (False, True):
        (folder / "new").mkdir()
        (folder / "new" / "old").touch()
        (folder / "new").rename(folder / name_of_killed(folder, "new", "replaced"))
        if is_replaced:
            (folder / "new").mkdir()
        files.remove_abandoned(folder)
        assert names_in(folder) == ["new"]
        assert names_in(folder / "new") == ([] if is_replaced else ["old"])
        files.remove(folder / "new")


def test_a_partly_removed_folder_is_removed(folder: Path) -> None:
    half = folder / name_of_killed(folder, "new", "removing")
    half.mkdir()
    (half / "file").touch()
    files.remove_abandoned(folder)
    assert names_in(folder) == []


def test_work_that_another_machine_changed_within_a_day_stays(folder: Path) -> None:
    """Whether its process is alive cannot be known here."""
    machine, process, start, number = name_of_killed(folder, "new").split("-")[-4:]
    work = folder / f".new.writing-{'0' * 8}-{process}-{start}-{number}"
    assert machine != "0" * 8
    work.mkdir()
    (work / "file").touch()
    files.remove_abandoned(folder)
    assert names_in(folder) == [work.name]
    for path in (work / "file", work):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    files.remove_abandoned(folder)
    assert names_in(folder) == []


def test_other_hidden_files_and_folders_are_not_removed_as_abandoned(folder: Path, victim: Path) -> None:
    for name in (".git", ".new.writing-mine", "new.writing-00000000-0000000000000000"):
        (folder / name).mkdir()
        (folder / name / "lock").touch()
    (folder / name_of_killed(folder, "new")).symlink_to(victim.parent)
    before = names_in(folder)
    files.remove_abandoned(folder)
    assert names_in(folder) == before
    assert victim.exists()


@pytest.mark.parametrize("name", [".", ".."])
def test_an_invalid_name_does_not_end_the_removal(folder: Path, name: str) -> None:
    for what in ("replaced", "removing"):
        (folder / f".{name}.{what}-00000000-1-1-0123456789abcdef").touch()
        os.utime(folder / f".{name}.{what}-00000000-1-1-0123456789abcdef", (0, 0))
    files.remove_abandoned(folder)
    assert names_in(folder) == []


def test_the_error_for_a_link_to_itself_names_it(tmp_path: Path) -> None:
    loop = tmp_path / "metrics.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(FileError, match="leads to itself"):
        files.read(loop)


def test_errors_of_the_system_name_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    """Not the file beside it that is filled first; and a full disk, whose error names none, names it too."""
    missing = tmp_path / "missing" / "report.html"
    with pytest.raises(FileNotFoundError) as found:
        files.write(missing, "text")
    assert str(found.value) == f"[Errno 2] No such file or directory: '{missing}'"
    target = tmp_path / "report.html"
    with pytest.raises(OSError, match="No space left") as full, files.replacing(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(full.value) == f"[Errno 28] No space left on device: '{target}'"
    assert not any(tmp_path.iterdir())
    beneath = tmp_path / "file"
    beneath.write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError) as refused, files.writing_folder(beneath / "exported"):
        pass
    assert str(refused.value).endswith(f": '{beneath / 'exported'}'")
