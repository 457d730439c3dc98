"""Lists of messages: `messages`, as OpenAI writes them, and `sharegpt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cookbook.errors import DataError
from cookbook.supervised.data.conversation import (
    Conversation,
    linked,
    listed,
    message_of,
    messages_of,
    names,
    role_of,
    tools_of,
    with_system,
)
from renderers import Message

LISTS = ("messages", "conversations", "conversation")


def is_messages(row: Mapping[str, Any]) -> bool:
    is_list = listed(row.get("messages")) is not None
    return any(_kind(row, key) == "role" for key in LISTS) or (is_list and not is_sharegpt(row))


def is_sharegpt(row: Mapping[str, Any]) -> bool:
    return any(_kind(row, key) == "from" for key in LISTS)


def _kind(row: Mapping[str, Any], key: str) -> str | None:
    items = listed(row.get(key))
    if items and isinstance(items[0], Mapping):
        return next((kind for kind in ("role", "from") if items[0].get(kind) is not None), None)
    return None


def _items(row: Mapping[str, Any], kind: str) -> list[Any]:
    """The list whose items are of this kind, else the first list there is."""
    keys = [key for key in LISTS if listed(row.get(key)) is not None]
    if not keys:
        raise DataError(
            f"no list of `{'messages' if kind == 'role' else 'conversations'}` (keys: {names(row)})."
        )
    key = next((key for key in keys if _kind(row, key) == kind), keys[0])
    items = listed(row[key])
    if not items:
        raise DataError(f"`{key}` is empty.")
    return items


def read_messages(row: Mapping[str, Any]) -> Conversation:
    return Conversation(linked(with_system(row, messages_of(_items(row, "role")))), tools_of(row))


def read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    """Calls in a row (`function_call`, JSON of one or of several) are one message of the assistant."""
    messages: list[Message] = []
    after_call = False
    for number, item in enumerate(_items(row, "from"), 1):
        where = f"message {number}"
        if not isinstance(item, Mapping) or not isinstance(item.get("from"), str):
            raise DataError(f"{where} is not an object with `from` and `value`.")
        others = {key: value for key, value in item.items() if key not in ("from", "value")}
        message = message_of({**others, "role": item["from"], "content": item.get("value")}, where)
        is_call = role_of(item["from"]) == "function_call"
        if is_call and not message.get("tool_calls"):
            raise DataError(f"{where} is a function call without a call in its `value`.")
        if is_call and after_call and message.keys() == {"role", "tool_calls"}:
            messages[-1]["tool_calls"] = [*(messages[-1]["tool_calls"] or ()), *(message["tool_calls"] or ())]
        else:
            messages.append(message)
        after_call = is_call
    return Conversation(linked(with_system(row, messages)), tools_of(row))
