"""Recognises the format of a row and reads the conversations in it.

A format is recognised by the keys of a row. The rules of `FORMATS` are tried in order and the first that
fits decides; `format=` names a format explicitly. A key whose value is null counts as absent, and a list may
be given as JSON in a string.

    messages           `messages`, `conversations` or `conversation`: a list whose first item has `role`;
                       or `messages`: any list, if the next rule does not fit
    sharegpt           one of the same three keys: a list whose first item has `from`
    trajectory         `rollouts` or `trajectories`: a list of rollouts; or `steps`, `trajectory`, `rollout`,
                       `transitions` or `turns`: a list of objects, or an object that holds one
    alpaca             `instruction` (a string), and `output` or `response`
    prompt_completion  `prompt`, `question`, `query` or `input`, and `completion`, `response`, `answer`,
                       `output` or `chosen`
    text               `text` (a string)

In every format with messages, a row may also have:

    system, system_prompt   used if it is not empty and the messages do not begin with a system message
    chat_template_kwargs    variables for the chat template
    the tools               under `tools`, `functions`, `tool_defs`, `tool_definitions`, `tool_schemas`,
                            `available_tools`, `available_functions`, `function_definitions` or
                            `function_schemas`

Other columns are not read, and the report lists them. Columns that hold images, audio or video are refused in
every format.

A message is not trained if it has `train`, `training`, `trainable` or `loss` false, `mask` true, or `weight`
or `loss_weight` 0. An assistant message that holds only calls is joined with the assistant message before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cookbook.data.columns import Recorded
from cookbook.data.conversation import Conversation, listed, names
from cookbook.data.formats import chats, pairs
from cookbook.data.formats.foreign import how_to_convert
from cookbook.data.importers import IMPORTERS, importer_of, marked
from cookbook.data.importers.base import ForeignRow, Imported
from cookbook.data.importers.steps import is_trajectory
from cookbook.data.media import check_no_media
from cookbook.data.selection import (
    ReadingOptions,
    check_one_conversation,
    found_at,
    is_selected,
    reward_in,
    with_mask,
    with_step_rewards,
    without_thinking,
)
from cookbook.data.unread import check_unread
from cookbook.errors import ConfigError, DataError
from cookbook.utils import notes
from cookbook.utils.nearest import unknown_name

__all__ = ["FORMATS", "Format", "check_format", "conversations_of", "format_names", "recognise"]


@dataclass(frozen=True)
class Format:
    """`keys` describes in words what `fits` looks for."""

    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Conversation] | None
    """None where an importer reads it."""


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str)


def _read_text(row: Mapping[str, Any]) -> Conversation:
    if not _is_text(row):
        raise DataError(f"no string under `text` (keys: {names(row)}).")
    return Conversation([], text=row["text"])


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        "`messages` or `conversations`, items with `role`", chats.is_messages, chats.read_messages
    ),
    "sharegpt": Format("`conversations`, items with `from`", chats.is_sharegpt, chats.read_sharegpt),
    "trajectory": Format("`steps`, `trajectory` or `rollouts`", is_trajectory, None),
    "alpaca": Format("`instruction`, `output`", pairs.is_alpaca, pairs.read_alpaca),
    "prompt_completion": Format(
        "`prompt`, `completion`", pairs.is_prompt_completion, pairs.read_prompt_completion
    ),
    "text": Format("`text`", _is_text, _read_text),
}
"""The formats of rows, which are recognised by their keys."""


def format_names() -> list[str]:
    """Returns the names that `format` takes: formats of rows, and importers."""
    return list(dict.fromkeys([*FORMATS, *IMPORTERS]))


def recognise(row: Mapping[str, Any]) -> str:
    """Returns the name of the first format whose rule fits the row. The rules are in the module docstring.

    Raises DataError for a row of a format that is read only where it is named, and for an unknown one.
    """
    importer = marked(row)
    if importer is not None:
        raise DataError(
            f"it is {importer.title}, and which of its turns are trained is not guessed. Read it with "
            f"format={importer.name}."
        )
    for name, format in FORMATS.items():
        if format.fits(row) and not (name == "text" and how_to_convert(row)):
            return name
    if (advice := how_to_convert(row)) is not None:
        raise DataError(f"{advice} Its keys: {names(row)}.")
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
    known = "; ".join(f"{name} ({format.keys})" for name, format in FORMATS.items())
    others = ", ".join(name for name in IMPORTERS if name not in FORMATS)
    raise DataError(
        f"its format is unknown (keys: {found}). Formats: {known}; rollouts and logs: {others}. Name one "
        f"with format=..., rename the columns, or subclass the dataset builder and read the row yourself."
        f"{_how_to_unwrap(row)}"
    )


def _how_to_unwrap(row: Mapping[str, Any]) -> str:
    """Returns advice for an object that holds the rows, or the messages of one, in a list."""
    lists = [
        key for key, items in row.items() if isinstance(items, list) and items and isinstance(items[0], dict)
    ]
    if len(lists) == 1 and not {"role", "from"}.isdisjoint(row[lists[0]][0]):
        return f" If its messages are those under `{lists[0]}`, name that column `messages`."
    return f" The rows may be those under `{lists[0]}`: jq '.[\"{lists[0]}\"]'" if len(lists) == 1 else ""


def _with_advice(error: DataError, row: Mapping[str, Any]) -> DataError:
    """Returns the error, which also says what to do with a row that a known tool wrote."""
    advice = how_to_convert(row)
    return error if advice is None else DataError(f"{error} It seems that {advice}")


def check_format(format: str | None) -> None:
    """Raises ConfigError, naming the nearest format, for an unknown name. None means to recognise it."""
    if format is not None and format not in format_names() and ":" not in format:
        raise ConfigError(unknown_name("format", format, format_names()))


def conversations_of(
    row: Mapping[str, Any], format: str | None = None, options: ReadingOptions | None = None
) -> list[Conversation]:
    """Returns the conversations of a row: one, several for rollouts, none if its reward is not selected.

    The format, the columns that were not read and what an importer dropped are counted
    (`cookbook.utils.notes`). Raises DataError, whose message is the end of a sentence, for a row that cannot
    be understood.
    """
    options = options or ReadingOptions()
    check_format(format)
    name = recognise(row) if format is None else format
    importer = importer_of(name, options)
    is_foreign = importer is not None and name not in FORMATS
    if importer is not None and isinstance(row, ForeignRow):
        notes.count("time", "Left out of rollouts", f"rows of the folder that are not {importer.title}")
        return []
    columns = Recorded(row)
    if not is_foreign:
        check_no_media(row)
    notes.count("document" if is_foreign else "row", "Read as", name)
    is_wanted = True
    if importer is None and options.selects:
        is_wanted = is_selected(reward_in([columns], options), row, options)
    try:
        if importer is not None:
            found = importer.read(row if is_foreign else columns)
        else:
            read = FORMATS[name].read
            assert read is not None  # the others have importers
            found = Imported([read(columns)] if is_wanted else [])
    except DataError as error:
        raise _with_advice(error, row) from error
    for what, number in found.dropped.items():
        notes.count("time", "Left out of rollouts", what, number)
    kept = found.conversations
    if importer is not None:
        kept = [each for each in kept if is_selected(each.reward, row, options)]
    if options.drop_thinking:
        kept = [without_thinking(conversation) for conversation in kept]
    if importer is None and options.min_step_reward is not None:
        kept = [with_step_rewards(conversation, options.min_step_reward) for conversation in kept]
    if options.mask_key is not None:
        if listed(found_at(row, options.mask_key)) is not None:
            check_one_conversation(found.conversations, options.mask_key)
        kept = [with_mask(conversation, columns, options.mask_key) for conversation in kept]
    if kept:
        check_unread({} if is_foreign else row, options, kept[0].messages)
    if kept and not is_foreign:
        columns.count_unread("row", "Columns not read")
    return kept
