"""The report about a source that is printed before training: what was read, rendered and skipped."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from cookbook.data.store import BadRowNote
from cookbook.utils import notes
from cookbook.utils.control_characters import visible, visible_line
from cookbook.utils.notes import Note, counted_noun

MAX_BARS = 60
"""The maximum number of bars in the histogram of lengths."""
NUM_NAMED_FILES = 8

Role: TypeAlias = Literal["training", "evaluation"]


class RowTally:
    """Counts rows read, and rows and examples skipped or truncated, while batches are rendered.

    The keys are those of `SupervisedDataset.summary`. For a store the `DataReport` has these counts.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: Counter[Note] = Counter()
        self.is_open = True
        """False while a batch is rendered again, so that it is not counted twice."""
        self._seen: set[tuple[str, str]] = set()

    def add(self, key: str, number: int = 1) -> None:
        if number and self.is_open:
            self.counts[key] += number

    def add_notes(self, found: Mapping[Note, int]) -> None:
        if self.is_open:
            self.notes.update(found)

    def is_new(self, key: str, place: str) -> bool:
        """Returns whether a row is counted under the key for the first time; epochs repeat rows."""
        is_new = (key, place) not in self._seen
        self._seen.add((key, place))
        return is_new


@dataclass(frozen=True, eq=False)
class DataReport:
    """Counts for one source. Tokens are counted after truncation, and without skipped examples."""

    name: str
    """The name of the source."""
    max_length: int | None
    rows: int
    """Rows read, including those skipped."""
    bad: int
    """Rows skipped because they could not be read or rendered."""
    filtered: int
    """Rows skipped by their reward."""
    examples: int
    """Examples that are trained on."""
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest example, before truncation."""
    truncated: int
    """Examples truncated to `max_length`."""
    too_long: int
    """Examples skipped because they are longer than `max_length`."""
    untrained: int
    """Examples skipped because no trained token is left in them."""
    bad_rows: Sequence[BadRowNote] = field(default_factory=tuple)
    """The first bad rows."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens of every example that is trained on, before truncation."""
    notes: Mapping[Note, int] = field(default_factory=dict)
    """Counts made while the rows were read and rendered."""
    computed_tokens: int = 0
    """Tokens left when what examples of a row share is counted once, as it is computed; 0 if unknown."""
    role: Role = "training"
    """The purpose of the source: training or evaluation."""
    files: Sequence[str] = ()
    """The files of a folder that were read; empty if `name` identifies the source."""
    unread: Sequence[str] = ()
    """The other files of that folder."""

    @property
    def longest_kept(self) -> int:
        """Tokens of the longest example that is trained on, after truncation."""
        longest = int(self.lengths.max(initial=0))
        return longest if self.max_length is None else min(longest, self.max_length)

    def to_json(self) -> dict[str, Any]:
        """Returns all counts, with the lengths as a histogram."""
        values = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "lengths"}
        values["notes"] = [{**note._asdict(), "count": number} for note, number in self.notes.items()]
        if len(self.lengths):
            values["length_histogram"] = self._histogram()
        values["files"], values["unread"] = list(self.files), list(self.unread)
        values["bad_rows"] = [note._asdict() for note in self.bad_rows]
        return values

    def _histogram(self) -> dict[str, list[int]]:
        """Returns the number of examples with `edges[i]` to `edges[i + 1] - 1` tokens; all bars are equal."""
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        width = -(-(longest - shortest + 1) // MAX_BARS)
        edges = np.arange(shortest, longest + width + 1, width)
        return {"edges": edges.tolist(), "counts": np.histogram(self.lengths, edges)[0].tolist()}

    def lines(self) -> list[str]:
        """Returns the printed report, in 80 columns unless names or reasons are longer."""
        share = f" ({self.trained_tokens / self.tokens:.0%})" if self.tokens else ""
        lines = [
            f"{visible_line(self.name)}: {counted_noun(self.rows, 'row')} read, "
            f"{counted_noun(self.examples, 'example')} rendered.",
            f"  {self.tokens:,} tokens, {self.trained_tokens:,} of them trained{share}; "
            f"the longest example has {self.longest:,}.",
        ]
        if 0 < self.computed_tokens < self.tokens:
            lines.append(f"  {self.computed_tokens:,} tokens when what examples share is counted once.")
        lines += _file_lines(f"{self.role} files", self.files) + _file_lines(
            f"not read for {self.role}", self.unread
        )
        skipped = [
            (self.truncated, "example", f"truncated to max_length={self.max_length}"),
            (self.too_long, "example", f"skipped: longer than max_length={self.max_length}"),
            (self.untrained, "example", "skipped: no trained token in it"),
            (self.filtered, "row", "without a conversation to train on"),
            (self.bad, "bad row", "skipped:"),
        ]
        lines += [f"  {counted_noun(count, noun)} {what}" for count, noun, what in skipped if count]
        for place, reason in self.bad_rows:
            reason = visible(reason).replace("\n", "\n      ")
            lines.append(f"    {visible_line(place)}: {reason}")
        if self.bad > len(self.bad_rows):
            lines.append(f"    and {self.bad - len(self.bad_rows):,} more")
        return lines + note_lines(self.notes)


def note_lines(found: Mapping[Note, int]) -> list[str]:
    """Returns the notes as a report prints them, in 80 columns unless names are longer."""
    # Lines are not broken within "(3 rows)".
    texts = [re.sub(r"(\([\d,]+) ", "\\1\N{NO-BREAK SPACE}", text) for text in notes.lines(found)]
    return [
        line.replace("\N{NO-BREAK SPACE}", " ")
        for text in texts
        for line in textwrap.wrap(
            text, 80, initial_indent="  ", subsequent_indent="    ", break_long_words=False
        )
    ]


def _file_lines(what: str, files: Sequence[str]) -> list[str]:
    if not files:
        return []
    more = f" and {len(files) - NUM_NAMED_FILES:,} more" if len(files) > NUM_NAMED_FILES else ""
    text = f"{what}: {', '.join(files[:NUM_NAMED_FILES])}{more}"
    return textwrap.wrap(
        *(text, 80),
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
