"""The standard streams, whatever the encoding of the environment is."""

from __future__ import annotations

import io
import os
import re
import sys

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def replace_unprintable() -> None:
    """Has standard output and error replace what their encoding lacks, which by default is an exception.

    Standard error stays as it is where it escapes such characters already, as Python has it by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def keep_undecodable_input() -> None:
    """Has standard input keep bytes it cannot decode, for `undecodable_byte` to find.

    Where it is ASCII it is read as UTF-8, as all other text is.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = "utf-8" if _is_ascii(sys.stdin.encoding) else sys.stdin.encoding
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def undecodable_byte(text: str) -> tuple[int, int] | None:
    """The first byte of a text that was kept because it could not be decoded, and its index."""
    found = _ESCAPED_BYTE.search(text)
    return None if found is None else (ord(found[0]) - 0xDC00, found.start())


def decoded_argument(argument: str) -> str:
    """The text of a command line argument, which Python leaves undecoded where the environment is ASCII."""
    if undecodable_byte(argument) is None:
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _is_ascii(encoding: str) -> bool:
    return "é".encode(encoding, "replace") == b"?"
