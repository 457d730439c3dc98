"""Makes the standard streams and the terminal safe for any text and any encoding.

`rich_console.py` does so for what Rich prints.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from cookbook.utils.control_characters import visible, visible_entry, visible_line

_COLOUR = re.compile("\x1b\\[[0-9;]*m")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def replace_unprintable() -> None:
    """Makes standard output and error replace characters that their encoding lacks.

    Standard error is not changed if it already escapes such characters, which is Python's default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """Discards all further output, after the reader of standard output has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_undecodable_input() -> None:
    """Makes standard input keep bytes that it cannot decode, for `undecodable_byte` to find.

    If its encoding is ASCII it is read as UTF-8, like all other text.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = "utf-8" if _is_ascii(sys.stdin.encoding) else sys.stdin.encoding
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def undecodable_byte(text: str) -> tuple[int, int] | None:
    """Returns the index and the value of the first byte that could not be decoded, or None."""
    found = _ESCAPED_BYTE.search(text)
    return None if found is None else (ord(found[0]) - 0xDC00, found.start())


def decoded_argument(argument: str) -> str:
    """Returns the text of a command line argument, which Python does not decode in an ASCII environment."""
    if undecodable_byte(argument) is None:
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _is_ascii(encoding: str) -> bool:
    return "é".encode(encoding, "replace") == b"?"


# -- what others print --------------------------------------------------------------------------------


class VisibleFormatter(logging.Formatter):
    """Formats log entries so that text in them cannot forge another entry."""

    def format(self, record: logging.LogRecord) -> str:
        return visible_entry(super().format(record))


class _VisibleRecord(logging.LogRecord):
    """A record that every handler, also of another library, prints with control characters shown.

    Colours that a library adds to its messages are dropped, because text in them may hold the same sequences.
    """

    def __init__(self, *values: Any, **more: Any) -> None:
        super().__init__(*values, **more)
        if self.exc_info is not None and self.exc_info[0] is not None:
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        message = super().getMessage()
        return visible(message if self.name.startswith("cookbook.") else _COLOUR.sub("", message))


@contextlib.contextmanager
def visible_output() -> Iterator[None]:
    """Makes Python and all libraries print warnings, logs and tracebacks with control characters shown.

    Tracebacks of errors that end the program are printed after the body, so their hook stays installed.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    thread_hook = threading.excepthook
    logging.setLogRecordFactory(_VisibleRecord)
    # `warnings` calls the function of this name
    warnings.formatwarning = lambda *about, **more: visible(format_warning(*about, **more))
    threading.excepthook = _print_traceback_of_thread
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning
        threading.excepthook = thread_hook


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


def _print_traceback_of_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        name = "a thread" if failure.thread is None else failure.thread.name
        sys.stderr.write(f"Exception in {visible_line(name)}:\n")
        _print_traceback(failure.exc_type, failure.exc_value, failure.exc_traceback)
