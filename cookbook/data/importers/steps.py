"""One step of a rollout as messages: what was observed, what the agent did and what its calls returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cookbook.data.columns import Recorded
from cookbook.data.conversation import (
    KEYS_OF_OTHERS,
    UNREAD_MESSAGE_KEYS,
    calls_of,
    content_of,
    first,
    is_parts,
    listed,
    message_of,
    messages_of,
    names,
    printed,
    role_of,
    with_error,
)
from cookbook.data.media import check_no_files, check_no_media
from cookbook.data.selection import FLAGS, ReadingOptions, untrained, why_step_untrained
from cookbook.errors import DataError
from renderers import Message
from renderers.messages import THINKING_KEYS

ROLLOUTS = ("rollouts", "trajectories")
STEPS = ("steps", "trajectory", "rollout", "transitions", "turns", "traj")
QUESTIONS = ("prompt", "question", "query")
OBSERVATIONS = ("observation", "obs", "ob", "state", *QUESTIONS)
NEXT_OBSERVATIONS = ("next_observation", "next_obs", "next_ob", "next_state")
ACTIONS = ("action", "act", "ac", "response")
THOUGHTS = ("thought", *THINKING_KEYS)
ERRORS = ("error", "is_error")

_CALL_KEYS = ("name", "tool", "tool_name", "function")
_MESSAGE_KEYS = (*THINKING_KEYS, "name", "refusal", "tool_calls", "function_call", "tool_call_id")
_RESULT_KEYS = {"content", "tool_call_id", "id", "name", "role", *ERRORS, *FLAGS}

Step: TypeAlias = Mapping[str, Any]


def is_trajectory(row: Mapping[str, Any]) -> bool:
    """Returns whether a row holds rollouts or the steps of one, itself or in an object under their keys."""
    for key in (*ROLLOUTS, *STEPS):
        value = row.get(key)
        items = listed(value)
        if items and isinstance(items[0], (Mapping, list) if key in ROLLOUTS else Mapping):
            return True
        if key in STEPS and isinstance(value, Mapping) and is_trajectory(value):
            return True
    return False


def has(step: Any, keys: Sequence[str]) -> bool:
    return isinstance(step, Mapping) and first(step, keys) is not None


def role_in(step: Step) -> str | None:
    role = first(step, ("role", "from"))
    return role_of(role) if isinstance(role, str) else None


def acts(step: Step) -> bool:
    return (
        has(step, ACTIONS) or bool(step.get("tool_calls")) or role_in(step) in ("assistant", "function_call")
    )


def extend(said: list[Message], step: Step, where: str, obs_first: bool, options: ReadingOptions) -> None:
    """Appends the messages of a step to `said`: observation, action and results, in order.

    An action that is the last of the step's own messages already is not repeated.
    """
    flags = _flags_of(step)
    observation = first(step, OBSERVATIONS)
    if observation is None and not obs_first:
        observation = first(step, NEXT_OBSERVATIONS)
    if obs_first and observation is not None:
        said += _flagged(observed(observation, num_open_calls(said), where), step, flags, where)
    if acts(step):
        _append_action(said, _action_of(step, flags, where), step, where, options)
    elif role_in(step) is not None:
        said.append(message_of({**_as_message(step), **flags}, where))
    elif has(step, THOUGHTS):
        raise DataError(f"{where} has a thought and no action (keys: {names(step)}).")
    if step.get("tool_results") is not None:
        results = listed(step["tool_results"])
        said += [_result_of(item, where) for item in ([step["tool_results"]] if results is None else results)]
    elif num_open_calls(said) and (obs_first or observation is None) and step.get("error"):
        said.append(message_of({"role": "tool", "content": with_error("", step["error"], where)}, where))
    if not obs_first and (observation is not None or not num_open_calls(said)):
        error = step.get("error")
        seen = [] if observation is None else observed(observation, num_open_calls(said), where)
        if error and not isinstance(error, bool):
            last = seen.pop() if seen else {"role": "user", "content": ""}
            seen.append({**last, "content": with_error(str(last.get("content") or ""), error, where)})
        said += _flagged(seen, step, flags, where)


def _append_action(
    said: list[Message], action: Message, step: Step, where: str, options: ReadingOptions
) -> None:
    """Appends an action, or lets it replace the same one at the end of the messages of its step."""
    keys = ("success", *(["reward"] if options.min_step_reward is not None else []), options.mask_key)
    told = {key: step[key] for key in keys if key is not None and key in step}
    why = why_step_untrained(told, options, where)  # its flags are those of the action already
    if why is not None:
        action = untrained(action, why)
    if step.get("messages") and said and said[-1]["role"] == "assistant":
        if not is_same(said[-1], action):
            raise DataError(f"the messages of {where} end with an answer that is not its action.")
        said[-1] = {**said[-1], **action}
    else:
        said.append(action)


def is_same(one: Message, other: Message) -> bool:
    """Returns whether two messages say the same, whatever they were thought to be and are trained."""
    return _said_by(one) == _said_by(other)


def _said_by(message: Message) -> Any:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return message["role"], message.get("content") or "", calls


def _flags_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the training flags of an object."""
    return {key: values[key] for key in FLAGS if key in values and values[key] is not None}


def _flagged(messages: list[Message], step: Step, flags: Mapping[str, Any], where: str) -> list[Message]:
    """Returns the messages of an observation, with the flags of the step unless the step has an action."""
    if not flags or acts(step):
        return messages
    return [message_of({**message, **flags}, where) for message in messages]


def num_open_calls(said: Sequence[Message]) -> int:
    """Returns the number of calls in the last message. Earlier calls are answered or ignored."""
    return len(said[-1].get("tool_calls") or ()) if said else 0


def observed(value: Any, num_calls: int, where: str) -> list[Message]:
    """Returns an observation as messages: its own, else tool results if calls are open, else the user's."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if items and all(isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in items):
        return messages_of(items, f" of {where}")
    if num_calls:
        is_one_each = isinstance(value, (list, tuple)) and len(value) == num_calls and not is_parts(value)
        return [_result_of(item, where) for item in (value if is_one_each else [value])]
    if isinstance(value, str) or is_parts(value):
        return [{"role": "user", "content": content_of(value, where)[0]}]
    if isinstance(value, Mapping):
        check_no_media(value, f"the observation of {where}")
    check_no_files(value, f"the observation of {where}")
    return [{"role": "user", "content": printed(value, where)}]


def _result_of(value: Any, where: str) -> Message:
    """Returns a tool message: the `content` of an object with result keys only, any other object as JSON."""
    if isinstance(value, Mapping) and "content" in value and value.keys() <= _RESULT_KEYS:
        call_id = first(value, ("tool_call_id", "id"))
        result = {key: value[key] for key in ("content", "name", *ERRORS, *FLAGS) if key in value}
        return message_of({"role": "tool", **result, "tool_call_id": call_id}, where)
    return message_of({"role": "tool", "content": value}, where)


def _as_message(step: Step) -> dict[str, Any]:
    """Returns the message keys of a step that is a message itself."""
    content = first(step, ("content", "value", "text", "system_prompt"))
    kept = {key: step[key] for key in (*_MESSAGE_KEYS, *KEYS_OF_OTHERS) if key in step}
    return {"role": first(step, ("role", "from")), "content": content, **kept}


def _action_of(step: Step, flags: Mapping[str, Any], where: str) -> Message:
    """Returns the assistant message of a step: its text, thought and calls."""
    action = first(step, ACTIONS)
    if action is None:
        said = _as_message(step)
    elif isinstance(action, str):
        said = {"content": action}
    elif isinstance(action, Mapping):
        said = _action_object(action, where)
    elif isinstance(action, (list, tuple)) and action and not is_parts(action):
        said = {"tool_calls": calls_of(action, where)}
    elif is_parts(action):
        said = {"content": action}
    else:
        raise DataError(
            f"the action of {where} is a {type(action).__name__}, not a string, a message or a call."
        )
    if action is not None and step.get("tool_calls"):
        said["tool_calls"] = [*calls_of(said.get("tool_calls"), where), *calls_of(step["tool_calls"], where)]
    if first(said, THINKING_KEYS) is None and (thought := first(step, THOUGHTS)) is not None:
        said["reasoning_content"] = thought
    role = said.get("role") or "assistant"
    if not isinstance(role, str) or role_of(role) not in ("assistant", "function_call"):
        raise DataError(f"the action of {where} is a message of role `{role}`, not of the assistant.")
    for key, flag in flags.items():
        if said.setdefault(key, flag) != flag:
            raise DataError(f"`{key}` of {where} is {flag!r}, and of its action {said[key]!r}. Give it once.")
    return message_of({**said, "role": role}, where)


def _action_object(action: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_no_media(action, f"the action of {where}")
    action = Recorded(action)
    content = first(action, ("content", "text"))
    kept = {key: action[key] for key in ("role", *_MESSAGE_KEYS) if action.get(key) is not None}
    kept |= _flags_of(action)
    if "thought" in action:
        kept.setdefault("reasoning_content", action["thought"])
    calls = [*calls_of(action.get("tool_calls"), where), *calls_of(action.get("function_call"), where)]
    kept.pop("function_call", None)
    if not calls and first(action, _CALL_KEYS) is not None and "role" not in action:
        kept.pop("name", None)
        calls = calls_of(action, where)
    if content is None and not calls:
        raise DataError(f"the action of {where} has neither `content` nor a call (keys: {names(action)}).")
    action.count_unread("message", UNREAD_MESSAGE_KEYS)
    return {**kept, "content": content, "tool_calls": calls}
