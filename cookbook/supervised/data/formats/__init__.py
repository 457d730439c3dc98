"""Any chat data: which format a row has, and the conversations it holds.

A format is told by the keys of a row. The rules of `FORMATS` are tried in their order, and the
first that fits decides; `format=` names one outright. A key whose value is null counts as absent,
and a list may stand as JSON in a string.

    messages           `messages`, `conversations` or `conversation`: a list whose first item has `role`;
                       or `messages`: any list, if the next rule does not fit
    sharegpt           one of these three: a list whose first item has `from`
    trajectory         `rollouts` or `trajectories`: a list of rollouts; or `steps`, `trajectory`, `rollout`,
                       `transitions` or `turns`: a list of objects, or an object that holds one
    alpaca             `instruction` (a string), and `output` or `response`
    prompt_completion  `prompt`, `question`, `query` or `input`, and `completion`, `response`, `answer`,
                       `output` or `chosen`
    text               `text` (a string)

In every format with messages, a row may have `system` or `system_prompt`, used unless the messages begin
with a system message or it is empty, and `tools` or `functions`. Other columns are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cookbook.errors import ConfigError, DataError
from cookbook.nearest import nearest
from cookbook.supervised.data import trajectories
from cookbook.supervised.data.conversation import Conversation, names
from cookbook.supervised.data.formats import chats, pairs

__all__ = ["FORMATS", "Format", "check_format", "conversations_of", "recognise"]


@dataclass(frozen=True)
class Format:
    """`keys` says in words what `fits` looks for."""

    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], float | None], list[Conversation]]
    """The conversations of a row whose reward is not below the second argument."""


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str)


def _read_text(row: Mapping[str, Any]) -> Conversation:
    if not _is_text(row):
        raise DataError(f"no string under `text` (keys: {names(row)}).")
    return Conversation([], text=row["text"])


def _one(
    read: Callable[[Mapping[str, Any]], Conversation],
) -> Callable[[Mapping[str, Any], float | None], list[Conversation]]:
    def read_one(row: Mapping[str, Any], min_reward: float | None) -> list[Conversation]:
        if min_reward is not None:
            reward = trajectories.reward_of([row])
            if reward is not None and reward < min_reward:
                return []
        return [read(row)]

    return read_one


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        "`messages` or `conversations`, items with `role`", chats.is_messages, _one(chats.read_messages)
    ),
    "sharegpt": Format("`conversations`, items with `from`", chats.is_sharegpt, _one(chats.read_sharegpt)),
    "trajectory": Format(
        "`steps`, `trajectory` or `rollouts`", trajectories.is_trajectory, trajectories.read_trajectories
    ),
    "alpaca": Format("`instruction`, `output`", pairs.is_alpaca, _one(pairs.read_alpaca)),
    "prompt_completion": Format(
        "`prompt`, `completion`", pairs.is_prompt_completion, _one(pairs.read_prompt_completion)
    ),
    "text": Format("`text`", _is_text, _one(_read_text)),
}


def recognise(row: Mapping[str, Any]) -> str:
    """The name of the first format whose rule fits the row. The rules stand at the top of this file."""
    for name, format in FORMATS.items():
        if format.fits(row):
            return name
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
    known = "; ".join(f"{name} ({format.keys})" for name, format in FORMATS.items())
    raise DataError(
        f"of no known format (keys: {found}). Formats: {known}. Name one with format=..., rename the "
        "columns, or subclass the dataset builder and read the row yourself."
    )


def check_format(format: str | None) -> None:
    """Raises ConfigError, naming the nearest, for the name of no format. None means to recognise it."""
    if format is not None and format not in FORMATS:
        near = nearest(format, FORMATS)
        hint = "" if near is None else f" The nearest is `{near}`."
        raise ConfigError(f"format={format!r} is unknown.{hint} Formats: {', '.join(FORMATS)}.")


def conversations_of(
    row: Mapping[str, Any], format: str | None = None, min_reward: float | None = None
) -> list[Conversation]:
    """The conversations of a row: one, several where it holds rollouts, none where its reward is too low.

    Raises DataError, with the end of a sentence, for a row that cannot be understood.
    """
    check_format(format)
    return FORMATS[recognise(row) if format is None else format].read(row, min_reward)
