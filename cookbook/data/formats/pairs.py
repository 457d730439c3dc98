"""Reads pairs of question and answer: `prompt_completion`, and `alpaca` with its input and history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cookbook.data.columns import unrecorded
from cookbook.data.conversation import (
    Conversation,
    conversation_of,
    first,
    listed,
    message_of,
    messages_of,
    names,
)
from cookbook.errors import DataError
from renderers import Message

PROMPTS = ("prompt", "question", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output", "chosen")
INPUTS = ("input", "context")
_OF_AGENTS = ("intermediate_steps", "chat_history", "trajectory")
OUTPUTS = ("output", "response")


def is_prompt_completion(row: Mapping[str, Any]) -> bool:
    return first(row, PROMPTS) is not None and first(row, COMPLETIONS) is not None


def is_alpaca(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("instruction"), str) and first(row, OUTPUTS) is not None


def read_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """Returns the conversation of a prompt and its completion.

    Each is a list of messages or a string, which is one message of the user or of the assistant. A completion
    may repeat the messages of its prompt, as `chosen` does in preference data. Two strings may also be text
    that a chat template has already printed; the renderer recognises it from `Conversation.pair`.
    """
    prompt = side_of(row, PROMPTS, "user")
    completion = side_of(row, COMPLETIONS, "assistant")
    if completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]
    history = _history(row)
    conversation = conversation_of(row, [*history, *prompt, *completion])
    strings = first(row, PROMPTS), first(row, COMPLETIONS)
    is_pair = all(isinstance(side, str) for side in strings) and len(history + prompt + completion) == 2
    return replace(conversation, pair=strings) if is_pair else conversation


def side_of(row: Mapping[str, Any], keys: Sequence[str], role: str) -> list[Message]:
    """Returns the messages under the first of the `keys` that has a value; a string is one of `role`.

    Raises DataError if there is none, or if it is neither a string nor messages.
    """
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise DataError(f"no `{keys[0]}` (keys: {names(row)}).")
    value = row[key]
    if isinstance(value, Mapping):
        return [message_of(value, f"`{key}`")]
    messages = listed(value)
    if messages and all(isinstance(message, Mapping) for message in messages):
        return messages_of(messages, f" of `{key}`")
    if not isinstance(value, str):
        raise DataError(f"`{key}` is a {type(value).__name__}, not a string or a list of messages.")
    return [{"role": role, "content": value}]


def read_alpaca(row: Mapping[str, Any]) -> Conversation:
    """Returns the conversation of an alpaca row. The user message is the instruction and the input, if any.

    Without a history, the two texts may also be what a chat template has already printed
    (`Conversation.pair`).
    """
    given = next((key for key in INPUTS if row.get(key)), None)
    asked = [_text(row, "instruction"), *([_text(row, given)] if given else [])]
    output = next((key for key in OUTPUTS if row.get(key) is not None), None)
    if output is None:
        raise DataError(f"no `output` (keys: {names(row)}).")
    messages: list[Message] = [
        *_history(row),
        {"role": "user", "content": "\n".join(part for part in asked if part)},
        {"role": "assistant", "content": _text(row, output)},
    ]
    conversation = conversation_of(row, messages)
    if len(messages) > 2:
        return conversation
    return replace(conversation, pair=(str(messages[0]["content"]), str(messages[1]["content"])))


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise DataError(f"no `{key}` (keys: {names(row)}).")
    if not isinstance(value, str):
        raise DataError(f"`{key}` is a {type(value).__name__}, not a string.")
    return value


def _history(row: Mapping[str, Any]) -> list[Message]:
    """Returns the earlier turns of a pair. Raises DataError for steps or messages of an agent beside it."""
    for key in _OF_AGENTS:
        value = unrecorded(row).get(key)
        if isinstance(value, (str, list, tuple, Mapping)) and value:
            raise DataError(
                f"`{key}` is not read in rows of a prompt and its completion, which would train the last "
                "answer without what was said and done before it. Convert the row to `messages`, or remove "
                "the column."
            )
    history = row.get("history")
    turns = listed(history or [])
    if turns is None:
        raise DataError(f"`history` is a {type(history).__name__}, not a list of pairs.")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        match turn:
            case [str() as asked, str() as said]:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            case _:
                raise DataError(f"turn {number} of `history` is not a pair of strings.")
    return messages
