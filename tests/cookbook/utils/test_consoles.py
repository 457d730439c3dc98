"""Tests that printed text is neither obeyed by a terminal nor interpreted as markup by Rich."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from cookbook.utils import consoles
from cookbook.utils.rich_console import PlainConsole, make_console, plain, plain_line

HOSTILE = "\x1b]0;owned\x07\x9b2J\u202eevil\u202c\u200b [/INST] [red]not[/red] :smile: https://x.y 42"
"""Sequences that set the window's title, clear the screen or reverse a word, and markup and emoji of Rich."""
SHOWN = "␛]0;owned␇<U+009B>2J<U+202E>evil<U+202C><U+200B> [/INST] [red]not[/red] :smile: https://x.y 42"
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""This project's colours and the cursor movements of a progress bar, the only sequences that Rich writes."""

PROGRAM = """
import logging, sys, threading, warnings
from cookbook.config import cli
from cookbook.errors import DataError
text = sys.argv[2]
def main():
    match sys.argv[1]:
        case "error": raise DataError(f"row 3 of {text} is bad.")
        case "traceback": raise RuntimeError(text)
        case "os error": raise OSError(text)
        case "warning": warnings.warn(text, UserWarning, stacklevel=1)
        case "library": logging.getLogger("some.library").warning("about %s", text)
        case "library with a handler":
            logger = logging.getLogger("another")
            logger.addHandler(logging.StreamHandler())
            try:
                raise RuntimeError(text)
            except RuntimeError:
                logger.exception("about \\x1b[1mthis\\x1b[0m")
        case "thread":
            def fail(): raise RuntimeError(text)
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
with cli.exiting_on_errors():
    main()
"""


def run_program(kind: str, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, text],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("error", 1),
        ("os error", 1),
        ("traceback", 1),
        ("warning", 0),
        ("library", 0),
        ("library with a handler", 0),
        ("thread", 0),
    ],
)
def test_control_characters_in_errors_are_shown(kind: str, code: int) -> None:
    done = run_program(kind, HOSTILE)
    assert done.returncode == code, done.stderr
    assert SHOWN in done.stderr
    assert not UNSEEN.search(done.stderr + done.stdout)


def test_control_characters_in_a_requested_traceback_are_shown() -> None:
    done = run_program("error", HOSTILE, COOKBOOK_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.count(SHOWN) == 2
    assert not UNSEEN.search(done.stderr)


def test_colours_in_the_messages_of_a_library_are_dropped() -> None:
    assert run_program("library with a handler", "it broke").stderr.startswith("about this\nTraceback")


def test_python_s_hooks_are_restored_when_a_program_ends() -> None:
    import logging
    import threading
    import warnings

    before = (logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook)
    with consoles.visible_output():
        assert logging.getLogRecordFactory() is not before[0]
    assert (logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook) == before


# -- Rich -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("console", [Console, lambda **more: PlainConsole(**more)])
def test_any_console_prints_plain_text_unchanged(console: type[Console]) -> None:
    out = io.StringIO()
    table = Table(box=None)
    table.add_column(plain_line(HOSTILE))
    table.add_row(plain_line(f"{HOSTILE}\nforged"))
    printer = console(file=out, width=200, force_terminal=True, color_system="truecolor")
    printer.print(plain(f"{HOSTILE}\nsecond", "yellow"))
    printer.print(table)
    assert out.getvalue().startswith("\x1b[33m"), "one of this project's colours"
    text = OURS.sub("", out.getvalue())
    assert not UNSEEN.search(text)
    assert [line.strip() for line in text.splitlines()] == [SHOWN, "second", SHOWN, f"{SHOWN}␊forged"]


def test_this_project_s_console_interprets_no_markup_in_plain_strings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table(box=None)
    table.add_column("[/INST] :smile:")
    table.add_row("[/INST] [red]x[/red]")
    console = make_console()
    console.print("[/INST] [b]x[/b] :smile:")
    console.print(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["[/INST] [b]x[/b] :smile:", "[/INST] :smile:", "[/INST] [red]x[/red]"]


@pytest.mark.slow
def test_a_program_continues_when_the_reader_of_its_output_is_gone(tmp_path: Path) -> None:
    program = (
        "from cookbook.utils.rich_console import make_console, plain\n"
        "console = make_console()\n"
        "for number in range(15_000): console.print(plain(f'line {number}'))\n"
        f"open({str(tmp_path / 'end')!r}, 'w').close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    assert (tmp_path / "end").exists()


# -- programs in a terminal -----------------------------------------------------------------------


def shown_in_a_terminal(*argv: str, cwd: Path, seconds: float = 200) -> tuple[int, str]:
    """Returns the exit code of a recipe, and everything that it wrote to a terminal of its own."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(cwd)
        os.environ |= {"TERM": "xterm", "COLUMNS": "200", "PYTHONUTF8": "1"}
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-m", *argv])
    written, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the program has ended
                piece = b""
            if not piece:
                break
            written += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), written.decode("utf-8", "surrogateescape")


@pytest.fixture
def hostile_rows(tmp_path: Path) -> Path:
    """Returns rows whose text, roles and file name contain sequences for a terminal and markup for Rich."""
    path = tmp_path / "chats[red]\x1b[2J\u202e[.jsonl"
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"{HOSTILE}\nyes"}]
    rows = [{"messages": turns} for _ in range(6)]
    rows.append({"messages": [{"role": f"[/INST]\x1b[2J\n{'x' * 8}", "content": "?"}, turns[1]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def check(text: str) -> None:
    """Checks that only the sequences written by Rich are left, and that this project's colours are there."""
    assert "\x1b[" in text
    assert "\x1b[2J" not in text
    rest = OURS.sub("", text).replace("\r", "")
    assert not UNSEEN.search(rest), repr(rest)


@pytest.mark.slow
def test_a_preview_in_a_terminal_shows_control_characters_in_the_data(hostile_rows: Path) -> None:
    code, text = shown_in_a_terminal(
        *("recipes.preview", f"dataset={hostile_rows.name}", "on_bad_row=skip", "html=[b]page.html"),
        cwd=hostile_rows.parent,
    )
    assert code == 0, text
    assert "Wrote [b]page.html." in text
    assert "[/INST] [red]not[/red] :smile:" in OURS.sub("", text)
    check(text)
    page = (hostile_rows.parent / "[b]page.html").read_text(encoding="utf-8")
    assert not UNSEEN.search(page)
    assert "&lt;U+202E&gt;" in page


@pytest.mark.slow
def test_a_run_in_a_terminal_shows_control_characters_in_data_names_and_replies(hostile_rows: Path) -> None:
    argv = [
        f"dataset={hostile_rows.name}",
        "on_bad_row=skip",
        "log_path=runs[/INST]\x1b[2J\u202e",
        "max_steps=2",
        "split_by=rows",  # all have the same answer
    ]
    argv += ["batch_size=2", "test_size=2", f"prompts={HOSTILE},b", f"system_prompt={HOSTILE}"]
    code, text = shown_in_a_terminal("recipes.sft", *argv, cwd=hostile_rows.parent)
    assert code == 0, text
    check(text)
    folder = hostile_rows.parent / "runs[/INST]\x1b[2J\u202e"
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "Finished after 2 steps" in log
    assert SHOWN in log
    assert "Everything goes to runs[/INST]␛[2J<U+202E>." in log
    assert not UNSEEN.search(log)
    assert all(re.match(r"\d{4}-\d\d-\d\d |\s", line) or not line for line in log.splitlines())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not UNSEEN.search(page)


@pytest.mark.slow
def test_errors_and_help_in_a_terminal_show_control_characters_in_arguments(tmp_path: Path) -> None:
    for argv in (
        ["recipes.sft", f"system_prompt={HOSTILE}\nlearning_rate=5", "--help"],
        ["recipes.report", HOSTILE],
        ["recipes.jobs", "get", HOSTILE, HOSTILE],
    ):
        _, text = shown_in_a_terminal(*argv, cwd=tmp_path)
        assert not UNSEEN.search(text.replace("\r", "")), argv
        assert "<U+202E>" in text or "\\u202e" in text, text
        assert not any(line.startswith("learning_rate=5") for line in text.splitlines())
