"""Converts messages, calls and tools from any common spelling to those of `renderers`.

The message of a DataError is the end of a sentence; the caller begins it with the place of the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from cookbook.data.columns import EMPTY, unrecorded
from cookbook.data.media import WRITTEN, check_no_files, check_no_media, text_of
from cookbook.errors import DataError, RendererError
from renderers import Message
from renderers.messages import THINKING_KEYS, one_text_of_thinking
from renderers.training_flags import FINER_KEYS, TRAINING_KEYS, refuse_on_part, training_of

ToolCall: TypeAlias = dict[str, Any]
T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Conversation:
    """The content of a row: messages with the tools they may call, or plain text.

    Consecutive assistant messages that are parts of one are joined: the second of two messages if it holds
    only calls, or if the first holds only a thought. Raises DataError, with both messages, for any other
    pair, and if their training flags differ.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """OpenAI function schemas."""
    text: str | None = None
    """Plain text; `messages` is empty then."""
    template_kwargs: dict[str, Any] | None = None
    """Values for variables of the chat template, such as `enable_thinking`."""
    pair: tuple[str, str] | None = None
    """The prompt and the completion of a row that has them as two strings. They are the texts of `messages`,
    unless the renderer finds that a chat template has already printed the prompt."""
    reward: float | None = None
    """The reward of its rollout, where the format has one."""
    is_rollout: bool = False
    """Whether it is of an agent's rollout or a log of calls, which may repeat the history before it."""

    def __post_init__(self) -> None:
        joined: list[Message] = []
        for number, message in enumerate(self.messages, 1):
            if joined and joined[-1].get("role") == message.get("role") == "assistant":
                joined[-1] = _join(joined[-1], message, number)
            else:
                joined.append(message)
        object.__setattr__(self, "messages", joined)


ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""Role names of other projects. A role that is not listed is kept; the renderer checks it."""

TOOL_PLACES = ("info", "metadata", "extra_info")
"""Keys of objects in a row that may hold its tools, as `oai_tools` or under any of `TOOL_KEYS`."""

TOOL_KEYS = (
    *("tools", "functions", "tool_defs", "tool_definitions", "tool_schemas"),
    *("available_tools", "available_functions", "function_definitions", "function_schemas"),
)
UNREAD_MESSAGE_KEYS = "Message keys not read"
"""The heading of these keys in the report."""
TEMPLATE_KWARGS = "chat_template_kwargs"
SYSTEM_KEYS = ("system", "system_prompt")
CALL_NAMES = ("name", "tool", "tool_name")
CALL_ARGUMENTS = ("arguments", "args", "input", "tool_input", "parameters")

MAX_WEIGHT = 1e6
"""The largest weight of a message that is accepted; a larger one is taken for a mistake."""

_PLAIN_ROLES = ("system", "developer", "user", "assistant", "tool")
_SAYS_OF_TRAINING = TRAINING_KEYS | FINER_KEYS
_KEYS_OF_OTHER_CONTENT = frozenset(
    (
        *(
            "parts",
            "blocks",
            "segments",
            "contents",
            "kwargs",
            "tool_messages",
            "tool_responses",
            "tool_uses",
        ),
        *("toolInvocations", "tool_invocations", "toolCalls", "toolRequests", "toolResults", "functionCall"),
        *("functionResponse", "toolUse", "toolResult", "functionCalls", "toolUses", "responseParts"),
    )
)
"""Keys of messages under which Gemini, the AI SDK, LlamaIndex, AutoGen and others keep content."""
KEYS_OF_OTHERS = _KEYS_OF_OTHER_CONTENT | {"additional_kwargs"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")
_RESULT_PARTS = (
    "tool_result",
    "tool_call",
    "tool_response",
    "toolresult",
    "toolresponse",
    "function_call_output",
)
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")


# -- messages ---------------------------------------------------------------------------------


def message_of(value: Any, where: str) -> Message:
    """Returns a message in OpenAI's format, in one spelling.

    `content` becomes a string: text parts are joined, and a tool result that is not text is printed as JSON.
    Reasoning, including `thinking` parts, becomes `reasoning_content`. Calls become `tool_calls` with a dict
    of arguments; they are also read from the legacy `function_call` and from the content of a message whose
    role is `function_call`. Training flags become `trainable` and `weight`. Keys without a value and an empty
    list of calls are dropped; other keys are kept. Raises DataError; `where` names the message in it.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with role and content.")
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(
            f"{where} has no `role` (keys: {names(message)}). Convert the messages to `role`, `content` and "
            "`tool_calls`."
        )
    message["role"] = role_of(message["role"])
    is_plain = len(message) == 2 and isinstance(message.get("content"), str)
    if is_plain and message["role"] in _PLAIN_ROLES and not WRITTEN.match(message["content"]):
        return message  # type: ignore[return-value] # most messages: there is nothing else to read
    check_no_media(message, where)
    if not KEYS_OF_OTHERS.isdisjoint(message):
        message = read_keys_of_others(message, where)
    calls = calls_of(message.pop("tool_calls", None), where)
    calls += calls_of(message.pop("function_call", None), where)
    if calls and message["role"] not in ("assistant", "function_call"):
        raise DataError(f"{where} is of role `{message['role']}` and makes calls, as only the assistant may.")
    if message["role"] == "function_call":
        message["role"] = "assistant"
        calls += calls_of(message.pop("content", None), where)
    if calls:
        message["tool_calls"] = calls
    thoughts = [message.pop(key) for key in THINKING_KEYS if key in message]
    if not isinstance(message.get("content", ""), str):
        message["content"], thought = content_of(message["content"], where, message["role"] == "tool")
        thoughts += [thought] if thought else []
    elif not message.get("content") and isinstance(message.get("refusal"), str):
        message["content"] = message.pop("refusal")
    if message["role"] == "tool":
        message.pop("is_error", None)
        if "error" in message:
            message["content"] = with_error(message.get("content", ""), message.pop("error"), where)
    if thoughts:
        message["reasoning_content"] = _as_data_error(one_text_of_thinking, thoughts, where)
    if not _SAYS_OF_TRAINING.isdisjoint(message):
        training = _as_data_error(training_of, message, where)
        if training.weight is not None and training.weight > MAX_WEIGHT:
            raise DataError(f"the weight of {where} is {training.weight}, more than a million.")
        message = {key: item for key, item in message.items() if key not in _SAYS_OF_TRAINING}
        if training.weight is not None:
            message["weight"] = training.weight
        if training.is_wanted is not None and training.weight != 0:
            message["trainable"] = training.is_wanted
    return message  # type: ignore[return-value]


def read_keys_of_others(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the message with the calls of its `additional_kwargs`, as LangChain and LlamaIndex write them.

    Raises DataError for a key under which another tool keeps text, calls or results, unless it only repeats
    the text of the message in parts.
    """
    found = dict(message)
    for key in sorted(_KEYS_OF_OTHER_CONTENT & found.keys()):
        value = found[key]
        if value in EMPTY:
            continue
        texts = [
            first(part, ("text", "content")) if isinstance(part, Mapping) else None
            for part in listed(value) or ()
        ]
        is_text = bool(texts) and all(isinstance(text, str) for text in texts)
        if is_text and "".join(map(str, texts)) == found.get("content"):
            continue
        raise DataError(
            f"{where} has `{key}`, which is not read and may hold what was said, called or returned (keys: "
            f"{names(message)}). Convert its messages to `role`, `content` and `tool_calls`, with each "
            "result in a message of role `tool`."
        )
    extra = found.get("additional_kwargs")
    if isinstance(extra, Mapping):
        read = ("tool_calls", "function_call", "tool_call_id")
        found |= {key: extra[key] for key in read if extra.get(key) and not found.get(key)}
        found["additional_kwargs"] = {key: value for key, value in extra.items() if key not in read}
    return found


def with_error(text: str, error: Any, where: str) -> str:
    """The text of a tool's result with the message of its error, unless the text has it already.

    The error is a string, or an object with a message; true and false say nothing.
    """
    if error is None or isinstance(error, bool):
        return text
    told = first(error, ("message", "text", "detail", "error")) if isinstance(error, Mapping) else error
    if not isinstance(told, str):
        told = printed(error, where)
    if not told or told in text:
        return text
    return f"{text}\n{told}" if text else told


def messages_of(values: Iterable[Any], of: str = "") -> list[Message]:
    return [message_of(value, f"message {number}{of}") for number, value in enumerate(values, 1)]


def role_of(role: str) -> str:
    return ROLES.get(role.strip().lower(), role)


def content_of(value: Any, where: str, from_tool: bool = False) -> tuple[str, str]:
    """Returns the text of a message's content, and the thoughts among its parts."""
    if isinstance(value, str):
        return text_of(value, where), ""
    if from_tool and not is_parts(value):
        check_no_files(value, where)
        check_no_results(value, where)
        return printed(value, where), ""
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"the content of {where} is a {type(value).__name__}, not a string or a list of parts."
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if isinstance(part, Mapping) and kind not in _OTHER_PARTS:
            check_no_media(part, f"a part of {where}")
        if isinstance(part, Mapping) and "type" not in part and first(part, ("text", "value")) is None:
            raise DataError(f"{where} has a part that is no text (keys: {names(part)}).")
        if kind in _TEXT_PARTS:
            found, into = _text_of_part(part), texts
        elif kind in _THINKING_PARTS:
            found, into = first(part, (*_THINKING_PARTS, "text", "value")), thoughts
        else:
            raise DataError(f"{where} has a part of type `{kind}`, and only text can be trained on.")
        if not isinstance(found, str):
            raise DataError(f"{where} has a part of type `{kind}` without text.")
        text_of(found, where)
        into.append(found)
        if isinstance(part, Mapping):
            _as_data_error(refuse_on_part, part, where)
    return "".join(texts), "".join(thoughts)


def check_no_results(value: Any, where: str) -> None:
    """Raises DataError for a list of typed results of calls, in the content of one result."""
    for part in value if isinstance(value, (list, tuple)) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind.lower().replace("-", "_") in _RESULT_PARTS:
            raise DataError(
                f"{where} has a part of type `{kind}`, which is not read. Give each result as a message of "
                "role `tool`, with its text in `content`."
            )


def _text_of_part(part: Any) -> Any:
    """Returns the text of a part: the part itself, its `text` or `value`, or the `value` of its `text`."""
    found = first(part, ("text", "value")) if isinstance(part, Mapping) else part
    return found.get("value") if isinstance(found, Mapping) else found


def is_parts(value: Any) -> bool:
    """Returns whether this is a list of content parts rather than data that happens to be a list."""
    known = (*_TEXT_PARTS, *_THINKING_PARTS, *_OTHER_PARTS)
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(part, Mapping) and part.get("type") in known for part in value)
    )


def _as_data_error(check: Callable[[V, str], T], value: V, where: str) -> T:
    """Returns what a check of `renderers` returns; its RendererError becomes a DataError."""
    try:
        return check(value, where)
    except RendererError as error:
        raise DataError(str(error)) from error


# -- calls and tools --------------------------------------------------------------------------


def calls_of(value: Any, where: str) -> list[ToolCall]:
    """Returns the calls in a call, a list of calls, or JSON of either."""
    if isinstance(value, str):
        value = decoded(value, f"a tool call of {where}") if value.strip() else None
    if value is None:
        return []
    return [call_of(call, where) for call in (value if isinstance(value, (list, tuple)) else [value])]


def call_of(value: Any, where: str) -> ToolCall:
    """Returns `{"id", "type", "function": {"name", "arguments"}}`, without `id` if the call has none."""
    if isinstance(value, str):
        value = decoded(value, f"a tool call of {where}")
    if not isinstance(value, Mapping):
        raise DataError(f"a tool call of {where} is a {type(value).__name__}, not an object.")
    inner = value.get("function")
    function = inner if isinstance(inner, Mapping) else value
    name = inner if isinstance(inner, str) else first(function, CALL_NAMES)
    if not isinstance(name, str):
        raise DataError(f"a tool call of {where} has no `name` (keys: {names(function)}).")
    arguments = _arguments_of(first(function, CALL_ARGUMENTS), f"the call of `{name}` in {where}")
    call_id = first(value, ("id", "tool_call_id"))
    return {
        **({} if call_id is None else {"id": call_id}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments_of(value: Any, where: str) -> dict[str, Any]:
    """Returns the arguments as a dict; null and a blank string mean an empty one."""
    if isinstance(value, str):
        value = decoded(value, f"the arguments of {where}") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"the arguments of {where} are a {type(value).__name__}, not an object.")
    return dict(value)


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the tools of a row as OpenAI's schemas; a bare function is wrapped. None if there are none.

    The value is a list or JSON of one. The first of `TOOL_KEYS` that holds tools counts. A list of names
    without schemas is ignored, except under `tools` and `functions`, where it is refused.
    """
    values = unrecorded(row)
    for key in TOOL_KEYS:
        if not values.get(key) or (key not in TOOL_KEYS[:2] and not _are_schemas(values[key])):
            continue
        tools = row[key]
        if isinstance(tools, str):
            tools = decoded(tools, f"`{key}`") if tools.strip() else None
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise DataError(f"`{key}` is a {type(tools).__name__}, not a list of function schemas.")
        if tools:
            return [_tool_of(tool, f"tool {number}") for number, tool in enumerate(tools, 1)]
    for key in TOOL_PLACES:
        place = values.get(key)
        if isinstance(place, str) and place.lstrip().startswith("{"):
            place = decoded(place, f"`{key}`")
        if isinstance(place, Mapping):
            names = (name for name in ("oai_tools", *TOOL_KEYS) if _are_schemas(place.get(name)))
            name = next(names, None)
            if name is not None:
                row[key]  # it counts as read
                return tools_of({"tools": place[name]})
    return None


def _are_schemas(value: Any) -> bool:
    items = listed(value)
    return bool(items) and all(
        isinstance(item, Mapping) or (isinstance(item, str) and item.lstrip().startswith("{"))
        for item in items or ()
    )


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the variables that a row sets for the chat template (an object or JSON of one), or None."""
    value = row.get(TEMPLATE_KWARGS)
    if isinstance(value, str):
        value = decoded(value, f"`{TEMPLATE_KWARGS}`") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(
            f"`{TEMPLATE_KWARGS}` is a {type(value).__name__}, not an object of the template's variables."
        )
    printed(value, f"`{TEMPLATE_KWARGS}`")
    return {key: item for key, item in value.items() if item is not None} or None


def _tool_of(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = decoded(value, where)
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is a {type(value).__name__}, not a function schema.")
    if isinstance(value.get("function"), Mapping):
        tool = {"type": "function", **value}
    else:
        tool = {
            "type": "function",
            "function": {key: item for key, item in value.items() if key != "type"},
        }
    if not isinstance(tool["function"].get("name"), str):
        raise DataError(f"{where} has no `name` (keys: {names(tool['function'])}).")
    return tool


# -- whole conversations ----------------------------------------------------------------------


def conversation_of(row: Mapping[str, Any], messages: Sequence[Message]) -> Conversation:
    """Returns a conversation of the messages, and of the keys that a row may have in every format.

    The system prompt of the row is put first, unless it is empty or the messages begin with their own.
    """
    whole = Conversation([*messages]).messages
    if not (whole and whole[0]["role"] in ("system", "developer")):
        system = first(row, SYSTEM_KEYS)
        if system is not None and not isinstance(system, str):
            raise DataError(f"the system prompt is a {type(system).__name__}, not a string.")
        if system:
            whole.insert(0, {"role": "system", "content": system})
    if any(message.get("tool_calls") or message["role"] == "tool" for message in whole):
        whole = linked(whole)
    return Conversation(whole, tools_of(row), template_kwargs=template_kwargs_of(row))


def _join(one: Message, two: Message, number: int) -> Message:
    """Returns message `number` joined to the message before it."""
    both = f"messages {number - 1} and {number} are both the assistant's"
    says, calls = bool(two.get("content")), bool(two.get("tool_calls"))
    has_thought_alone = bool(_thought(one)) and not one.get("content") and not one.get("tool_calls")
    if not has_thought_alone and (says or not calls):
        if one.get("tool_calls"):
            raise DataError(
                f"{both}, and there is no result between the call and "
                f"{_excerpt(two)}. Insert the result, or remove the call."
            )
        raise DataError(
            f"{both} ({_excerpt(one)}, {_excerpt(two)}). Join them, or put what was said between them there."
        )
    thoughts = [_thought(one), _thought(two)]
    if thoughts[1] and thoughts[0] != thoughts[1]:
        raise DataError(
            f"{both}, and joined they would have a thought in the middle, which no format supports. Join "
            "the thoughts before the first, or remove the second."
        )
    trainings = [_as_data_error(training_of, message, "it") for message in (one, two)]
    flags = {(is_wanted, 1.0 if weight is None else weight) for is_wanted, weight in trainings}
    if len(flags) > 1:
        raise DataError(
            f"{both}, and would be joined, but differ in what is trained "
            f"({_flags(one)}; {_flags(two)}). Set the same for both."
            ""
        )
    if one.get("name") != two.get("name"):
        raise DataError(f"{both}, under different names ({one.get('name')}, {two.get('name')}).")
    kept = {key: value for key, value in two.items() if value not in (None, "") and key not in THINKING_KEYS}
    joined: dict[str, Any] = {**kept, **one}
    if calls or one.get("tool_calls"):
        joined["tool_calls"] = [*(one.get("tool_calls") or ()), *(two.get("tool_calls") or ())]
    if says:
        joined["content"] = two.get("content")
    return joined  # type: ignore[return-value]


def _thought(message: Message) -> Any:
    return next((message[key] for key in THINKING_KEYS if message.get(key)), "")  # type: ignore[literal-required]


def _flags(message: Message) -> str:
    said = {key: value for key, value in message.items() if key in TRAINING_KEYS and value is not None}
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in said.items()) or "nothing said"


def _excerpt(message: Message) -> str:
    text = message.get("content") or ""
    if not isinstance(text, str):
        return "parts"
    if not text and message.get("tool_calls"):
        return "a call"
    return repr(text if len(text) <= 30 else f"{text[:27]}...")


def linked(messages: Sequence[Message]) -> list[Message]:
    """Returns copies of the messages, with an id in each call (call00001, ...) and in its result.

    A result without an id answers the first open call with its name, else the first open call. Raises
    DataError for a result whose id is that of no call, where calls have ids.
    """
    copies: list[dict[str, Any]] = [dict(message) for message in messages]
    taken = {str(call["id"]) for message in copies for call in message.get("tool_calls", ()) if "id" in call}
    number = 0
    waiting: list[ToolCall] = []
    answered = True
    for place, message in enumerate(copies, 1):
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                if "id" not in call:
                    number += 1
                    while f"call{number:05d}" in taken:
                        number += 1
                    call = {"id": f"call{number:05d}", **call}
                calls.append(call)
            message["tool_calls"] = calls
            waiting = [*([] if answered else waiting), *calls]
            answered = False
        elif message["role"] == "tool":
            answered = True
            call_id = message.get("tool_call_id")
            if call_id is not None and taken and str(call_id) not in taken:
                raise DataError(f"message {place} answers the call `{call_id}`, which no message makes.")
            _answer(message, waiting)
        elif message["role"] != "assistant":
            waiting = []
    return copies  # type: ignore[return-value]


def _answer(message: dict[str, Any], waiting: list[ToolCall]) -> None:
    call_id, name = message.get("tool_call_id"), message.get("name")
    fits = [call for call in waiting if call_id is not None and call["id"] == call_id]
    if call_id is None and waiting:
        fits = [call for call in waiting if call["function"]["name"] == name] or waiting
        message["tool_call_id"] = fits[0]["id"]
    if fits:
        waiting.remove(fits[0])


# -- values -----------------------------------------------------------------------------------


def first(values: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Returns the value of the first of these keys that has one, else None."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def opened(value: Any, begins_with: tuple[str, ...] = ("{", "[")) -> Any:
    """Returns the object or list that a string holds as JSON; any other value as it is, a tuple as a list."""
    if isinstance(value, str) and value.lstrip().startswith(begins_with):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return list(value) if isinstance(value, tuple) else value


def listed(value: Any) -> list[Any] | None:
    """Returns a list, which may be given as JSON in a string; None for any other value."""
    if isinstance(value, str):
        value = opened(value, ("[",))
    return list(value) if isinstance(value, (list, tuple)) else None


def mapped(value: Any) -> Mapping[str, Any] | None:
    """Returns an object, which may be given as JSON in a string; None for any other value."""
    if isinstance(value, str):
        value = opened(value, ("{",))
    return value if isinstance(value, Mapping) else None


def decoded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is not JSON: {error.msg} at character {error.pos} of {text[:60]!r}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is JSON that cannot be read: {error}.") from error


def printed(value: Any, where: str) -> str:
    """Returns the value as JSON, with its order of keys and without escapes for non-ASCII text."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be printed as JSON: {error}.") from error


def names(values: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, values)) or "none"
