"""A console of Rich, and texts for it, which print any text unchanged.

It is apart from `consoles.py` because `--help` needs no Rich.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.text import Text

from cookbook.utils.consoles import discard_output, replace_unprintable
from cookbook.utils.control_characters import visible, visible_line


def make_console(is_quiet: bool = False) -> PlainConsole:
    """Returns a console for standard output, which wraps lines only for a terminal.

    Characters that standard output cannot encode are replaced. Neither markup nor the names of emoji are
    interpreted, and nothing is highlighted. If the reader closes the pipe, as `head` does, a run or a sweep
    continues without printing.
    """
    replace_unprintable()
    return PlainConsole(
        soft_wrap=not sys.stdout.isatty(), quiet=is_quiet, markup=False, emoji=False, highlight=False
    )


class PlainConsole(Console):
    """A console that knows when it last printed, and what its program is doing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.printed_at = time.monotonic()
        self.activity = "starting"

    def print(self, *objects: Any, **options: Any) -> None:
        self.printed_at = time.monotonic()
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Overrides Rich's method, which would end the program."""
        self.quiet = True
        discard_output()


def plain(text: object, style: str = "") -> Text:
    """Returns a text that any Rich console prints unchanged, over as many lines as it has."""
    return Text(visible(text), style)


def plain_line(text: object, style: str = "") -> Text:
    """Returns the same for a text of one line, such as a title, a cell of a table or a short message."""
    return Text(visible_line(text), style)
