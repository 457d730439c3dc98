"""Finds for each beginning of a conversation what the printing of its messages depends on besides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, TypeVar

from renderers.messages import PlainMessage

State = TypeVar("State")


class Beginnings(Generic[State]):
    """The states of the beginnings of one conversation, which is read once for all of them."""

    def __init__(self, find: Callable[[Sequence[PlainMessage]], Sequence[State]]) -> None:
        """`find` returns for each n the state behind the first n messages."""
        self._find = find
        self._whole: Sequence[PlainMessage] = ()
        self._found: Sequence[State] = find(())
        self._latest: Sequence[PlainMessage] = ()
        """The latest messages, which are a beginning of the whole ones."""

    def of(self, messages: Sequence[PlainMessage]) -> Sequence[State]:
        """Returns for each n the state behind the first n messages."""
        if self._latest is not messages:
            if len(messages) > len(self._whole) or not all(map(is_, messages, self._whole)):
                self._whole, self._found = messages, self._find(messages)
            self._latest = messages
        return self._found


def last_of_each(is_searched: Callable[[PlainMessage], bool], messages: Sequence[PlainMessage]) -> list[int]:
    """Returns for each n the last message searched for among the first n messages; -1 if there is none."""
    found = [-1]
    for index, message in enumerate(messages):
        found.append(index if is_searched(message) else found[-1])
    return found


class LastQueries(Beginnings[int]):
    """The position of the last query of each beginning."""

    def num_alike(self, few: Sequence[PlainMessage], more: Sequence[PlainMessage]) -> int:
        """Returns how many first messages are printed alike in both. The fewer messages begin the others."""
        found = self.of(more)
        before, after = found[len(few)], found[len(more)]
        return min(len(few) - 1, len(few) if before == after else before + 1)
