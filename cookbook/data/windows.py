"""Long conversations in windows: each turn trained once, with the context before it that fits.

A window is the system prompt and a run of later messages that begins at a turn. If it begins within the tool
calls that answer a message of the user, that message stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from renderers import Message
from renderers.rendering import Example

Render = Callable[[Sequence[Message], Mapping[int, float]], list[Example]]
"""Renders messages, training those at some positions with their weights."""


def windows(
    messages: Sequence[Message], weights: Mapping[int, float], max_length: int, render: Render
) -> list[Example]:
    """Returns the examples of the windows of a conversation, of at most `max_length` tokens each.

    `weights` are those of the messages to train, by their position. A turn that does not fit with the system
    prompt alone is in a longer example. A window begins so that about half of it is context, which makes all
    windows about twice the tokens of the conversation.
    """
    cut = _Cut(messages, weights, max_length, render)
    examples: list[Example] = []
    while cut.first < len(cut.turns):
        examples += cut.next_window()
    return examples


class _Cut:
    """A conversation that is being cut: `first` is the number of the next turn to train."""

    def __init__(
        self, messages: Sequence[Message], weights: Mapping[int, float], max_length: int, render: Render
    ) -> None:
        self.turns = sorted(weights)
        self.first = 0
        self._messages = messages
        self._weights = weights
        self._max_length = max_length
        self._render = render
        self._starts = _starts(messages)
        self._start = 0
        """The number of the start of the window before: the next one does not begin earlier."""

    def next_window(self) -> list[Example]:
        """Returns the examples of the window that trains the next turn, and as many turns after it as fit."""
        first, last = self.first, self.first
        examples = self._with_context(first)
        if _longest(examples) <= self._max_length:
            step, is_growing = 1, True
            while step and last + 1 < len(self.turns):
                end = min(last + step, len(self.turns) - 1)
                more = self._rendered(self._start, end)
                if _longest(more) <= self._max_length:
                    examples, last = more, end
                    step = step * 2 if is_growing else step
                else:
                    is_growing = False
                    step //= 2
        self.first = last + 1
        return examples

    def _with_context(self, turn: int) -> list[Example]:
        """Returns the examples of a turn after the earliest start that leaves half a window to others."""
        limit = self._max_length if turn == len(self.turns) - 1 else self._max_length // 2
        num_starts = sum(start <= self.turns[turn] for start in self._starts)
        low, high, step = self._start, max(self._start, num_starts - 1), 1
        examples = self._rendered(low, turn)
        if _longest(examples) <= limit or low == high:
            return examples
        # Starts from `low` on are tried at growing distances, then between the last two.
        while low + step < high and _longest(self._rendered(low + step, turn)) > limit:
            low, step = low + step, step * 2
        high = min(low + step, high)
        while low + 1 < high:
            middle = (low + high) // 2
            if _longest(self._rendered(middle, turn)) <= limit:
                high = middle
            else:
                low = middle
        self._start = high
        return self._rendered(high, turn)

    def _rendered(self, start: int, last: int) -> list[Example]:
        """The examples of the turns from the next one to number `last`, after a start of that number."""
        at = self._starts[start] if self._starts else 0
        chosen = [*_kept_before(self._messages, at), *range(at, self.turns[last] + 1)]
        places = {number: place for place, number in enumerate(chosen)}
        trained = {places[turn]: self._weights[turn] for turn in self.turns[self.first : last + 1]}
        return self._render([self._messages[number] for number in chosen], trained)


def _longest(examples: Sequence[Example]) -> int:
    return max(example.num_tokens for example in examples)


def _starts(messages: Sequence[Message]) -> list[int]:
    """Returns where a window may begin: at messages of the user, and at replies to results of tools."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] in ("user", "assistant")
        and (number == 0 or message["role"] != "assistant" or messages[number - 1]["role"] != "user")
    ]


def _kept_before(messages: Sequence[Message], start: int) -> list[int]:
    """Returns the positions of the messages before a window: the system prompt, and what it answers."""
    head = []
    for number, message in enumerate(messages[:start]):
        if message["role"] not in ("system", "developer"):
            break
        head.append(number)
    if start < len(messages) and messages[start]["role"] == "assistant":
        users = [number for number in range(len(head), start) if messages[number]["role"] == "user"]
        head += users[-1:]
    return head
