"""Converts agent rollouts (steps of observations and actions) to conversations.

The keys that are read; in each group the first key with a value counts:

    a row       `rollouts` or `trajectories` (several), else `steps`, `trajectory`, `rollout`,
                `transitions`, `turns` or `traj` (one): a list of steps, or an object that holds one
    a rollout   `system`/`system_prompt`, `task`/`instruction`/`goal`/`prompt`/`question`, `tools` and its
                other names, `chat_template_kwargs`, `observation_order`, and
                `reward`/`total_reward`/`score`/`return`, in the rollout or else in its row
    a step      `observation`/`obs`/`ob`/`state` and `action`/`act`/`ac`/`response`, with
                `thought`/`reasoning`/`thinking`, `tool_calls` and `tool_results`; or `messages`; or it is a
                message itself (`role`, or `from` and `value`)

An action becomes an assistant message. An observation that follows an action with tool calls becomes their
results: one result per call if the observation is a list with one item per call, else a single result. Any
other observation becomes a user message. Consecutive user messages are joined by a blank line. Messages after
the last action are dropped, because no action answers them. The task becomes the first user message, unless
the first observation contains it.

`observation_comes_first` decides whether a step's observation precedes its action or results from it. If the
steps do not show it, `observation_order` (`before` or `after`) must be set in the row, the rollout or the
config. The order of keys in an object never matters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias, cast

from cookbook.data.columns import EMPTY, Recorded, unrecorded
from cookbook.data.conversation import (
    SYSTEM_KEYS,
    TEMPLATE_KWARGS,
    TOOL_KEYS,
    Conversation,
    conversation_of,
    first,
    listed,
    message_of,
    messages_of,
    names,
)
from cookbook.data.importers.base import Imported, Importer
from cookbook.data.importers.openhands import is_event
from cookbook.data.importers.steps import (
    ACTIONS,
    NEXT_OBSERVATIONS,
    OBSERVATIONS,
    QUESTIONS,
    ROLLOUTS,
    STEPS,
    Step,
    acts,
    extend,
    has,
    is_same,
    observed,
    role_in,
)
from cookbook.data.importers.swe_agent import is_step as is_swe_agent_step
from cookbook.data.media import check_no_media
from cookbook.data.selection import (
    FLAGS,
    ObservationOrder,
    ReadingOptions,
    check_one_conversation,
    found_at,
    no_reward,
    number_of,
    reward_in,
    untrained,
    why_step_untrained,
    with_mask,
)
from cookbook.errors import DataError
from cookbook.utils import notes
from renderers import Message

TASKS = ("task", "instruction", "goal", "prompt", "question")
GROUP_REWARDS = ("rewards", "scores", "returns")
ORDER_KEY = "observation_order"

_FOREIGN_KEYS = {
    **dict.fromkeys(("model_input_messages", "model_output_message", "observations"), "smolagents"),
    **dict.fromkeys(
        ("subagent_trajectories", "subagent_trajectory", "sub_agent", "subagents"), "a sub-agent"
    ),
}
"""Keys of steps that hold what the agent saw or did in a way that is not known here."""

_AGENTS = ("agent", "agent_name", "agent_id", "player", "player_id")
"""Keys of steps for the agent that acts in them."""

_RESULTS_ELSEWHERE = (
    *("output", "outputs", "result", "results", "tool_output", "tool_outputs", "tool_result"),
    *("tool_response", "tool_responses", "env_response", "feedback", "response_from_env"),
)
_RESULTS_READ = (*OBSERVATIONS, *NEXT_OBSERVATIONS, "tool_results", "messages")
_ACTIONS_ELSEWHERE = (
    *("action_input", "action_inputs", "action_args", "action_arguments", "action_kwargs", "action_params"),
    *("action_parameters", "tool_input", "tool_args", "arguments", "model_output", "model_response"),
    *("llm_response", "llm_output", "raw_prediction", "raw_response", "raw_output", "raw_completion"),
    *("raw_action", "full_response", "completion", "completions", "generation", "chat_completions"),
    *("content", "rationale", "thoughts", "cot", "chain_of_thought", "scratchpad", "reflection", "plan"),
)
"""Keys of steps beside those that are read, which may hold what an action returned, or all of the action."""
_ABOUT_STEPS = frozenset(
    (
        *("reward", "done", "info", "metadata", "meta", "extra", "extras", "id", "step", "step_id", "index"),
        *("type", "kind", "timestamp", "time", "ts", "date", "status", "usage", "metrics", "logprobs"),
        *("step_number", "step_num", "duration", "timing", "token_usage", *NEXT_OBSERVATIONS),
    )
)
"""Keys of a step without an observation and an action that say nothing that the model saw or wrote."""

Levels: TypeAlias = Sequence[Mapping[str, Any]]
"""The objects that contain a rollout, the innermost first."""


class TrajectoryImporter(Importer):
    """Rollouts as steps of observations and actions, under any of the usual keys."""

    name = "trajectory"
    title = "a rollout of steps"

    def read(self, document: Mapping[str, Any]) -> Imported:
        return Imported(read_trajectories(document, self.options), Counter())


# -- rows and rollouts ------------------------------------------------------------------------


def read_trajectories(row: Mapping[str, Any], options: ReadingOptions | None = None) -> list[Conversation]:
    """Returns the conversations of a row: one per rollout, more where its history was replaced midway.

    The reward of a rollout is its own reward key, else its number in the rewards of its group, else that of
    its row, else the sum of its steps' rewards; it is read only where the options select by it.
    """
    options = options or ReadingOptions()
    key = next((key for key in ROLLOUTS if listed(unrecorded(row).get(key)) is not None), None)
    if key is None:
        return _read(row, [], "", None, options)
    rollouts = listed(row[key]) or []
    if not rollouts:
        raise DataError(f"`{key}` is empty.")
    rewards = _group_rewards(row, len(rollouts), options)
    return [
        conversation
        for number, rollout in enumerate(rollouts, 1)
        for conversation in _read(rollout, [row], f"rollout {number}: ", rewards[number - 1], options)
    ]


def _group_rewards(row: Mapping[str, Any], num_rollouts: int, options: ReadingOptions) -> list[float | None]:
    """Returns the rewards that a row lists for its rollouts; None for each where it does not."""
    if options.selects:
        for key in (options.reward_key,) if options.reward_key else GROUP_REWARDS:
            rewards = listed(found_at(row, key))
            if rewards is None:
                continue
            if len(rewards) != num_rollouts:
                raise DataError(f"`{key}` has {len(rewards)} rewards for {num_rollouts} rollouts.")
            return [number_of(reward, key) for reward in rewards]
    return [None] * num_rollouts


def _read(
    value: Any, levels: Levels, where: str, group_reward: float | None, options: ReadingOptions
) -> list[Conversation]:
    try:
        found, inner = _steps_of(value)
        steps = [Recorded(step) if isinstance(step, Mapping) else step for step in found]
        levels = [*inner, *levels]
        reward = None
        if options.selects:
            own = reward_in(inner, options)
            reward = own if own is not None else group_reward
            if reward is None:
                reward = reward_of(levels, options, steps)
            if reward is None:
                raise no_reward(levels[0], options)
        if reward is not None and not options.accepts(reward):
            return [Conversation([], reward=reward)]
        conversations = _conversations_of(steps, _context_of(levels), options)
        key = options.mask_key
        for level in inner if len(levels) > len(inner) else inner[:-1]:  # the mask of a row is applied later
            if key is not None and found_at(unrecorded(level), key) is not None:
                check_one_conversation(conversations, key)
                conversations = [with_mask(conversations[0], level, key)]
        for level in inner:
            if isinstance(level, Recorded) and level is not value:
                level.count_unread("rollout", "Keys of rollouts not read")
        return [replace(conversation, reward=reward, is_rollout=True) for conversation in conversations]
    except DataError as error:
        raise DataError(f"{where}{error}") from error


def _context_of(levels: Levels) -> dict[str, Any]:
    """Returns the system prompt, task, tools and similar keys, each from the innermost level that has it."""
    context: dict[str, Any] = {}
    for keys in (SYSTEM_KEYS, TASKS, TOOL_KEYS, (TEMPLATE_KWARGS,), (ORDER_KEY,)):
        for level in levels:
            found = [key for key in keys if unrecorded(level).get(key) is not None]
            if found:
                # Several keys may hold tools; `tools_of` picks the one that holds schemas.
                context |= {key: level[key] for key in (found if keys is TOOL_KEYS else found[:1])}
                break
    return context


def _steps_of(value: Any) -> tuple[list[Any], Levels]:
    """Returns the steps, and the objects that contain them, the innermost first."""
    if (steps := listed(value)) is not None:
        return steps, []
    if not isinstance(value, Mapping):
        raise DataError(f"a rollout is a {type(value).__name__}, not a list of steps.")
    level = value if isinstance(value, Recorded) else Recorded(value)
    check_no_media(unrecorded(level))
    inner = first(level, (*STEPS, "messages"))
    if isinstance(inner, Mapping) or listed(inner) is not None:
        steps, levels = _steps_of(inner)
        return steps, [*levels, level]
    raise DataError(f"no list of `steps` (keys: {names(value)}).")


def reward_of(levels: Levels, options: ReadingOptions, steps: Sequence[Any] = ()) -> float | None:
    """Returns the reward of the innermost level that has one, else the sum over the steps, else None."""
    reward = reward_in(levels, options)
    if reward is not None or options.reward_key is not None:
        return reward
    found = [number_of(step["reward"], "reward") for step in steps if has(step, ("reward",))]
    return sum(found) if found else None


# -- a rollout --------------------------------------------------------------------------------


def _conversations_of(
    steps: Sequence[Any], context: Mapping[str, Any], options: ReadingOptions
) -> list[Conversation]:
    for number, step in enumerate(steps, 1):
        if not isinstance(step, Mapping):
            raise DataError(f"step {number} is a {type(step).__name__}, not an object.")
        check_no_media(unrecorded(step), f"step {number}")
        _refuse_foreign(unrecorded(step), f"step {number}")
    steps = _with_histories(steps)
    for key in _AGENTS:
        agents = {str(value) for step in steps if (value := unrecorded(step).get(key)) not in EMPTY}
        if len(agents) > 1 and any(acts(step) for step in steps):
            raise DataError(
                f"its steps are of several agents (`{key}`: {', '.join(sorted(agents)):.60}), whose turns "
                "are not one conversation. Give the steps of each agent as a rollout of its own."
            )
    opening = _opening(context)
    looked_at = [unrecorded(step) for step in steps]
    is_opened = bool(opening or first(context, SYSTEM_KEYS)) or _opens_with_message(looked_at)
    order = _order_of(context) or options.observation_order
    obs_first = observation_comes_first(looked_at, is_opened, order)
    histories = [_history_of(step, f"step {number}") for number, step in enumerate(steps, 1)]
    are_snapshots = any(
        _begins_with(later, earlier) for earlier, later in pairwise(histories) if earlier and later
    )
    segments: list[list[Message]] = [[]]
    for number, (step, history) in enumerate(zip(steps, histories, strict=True), 1):
        said = segments[-1]
        num_known = len(said)
        if history and _begins_with(history, said):
            said += history[len(said) :]
        elif history and said and (are_snapshots or history[0]["role"] == "system"):
            segments.append([*map(_as_context, history[:-1]), history[-1]])
            num_known = len(history) - 1
        elif history:
            said += history
        num_messages = len(segments[-1])
        if history and not acts(step):
            _mask_answers(segments[-1], num_known, step, f"step {number}", options)
        extend(segments[-1], step, f"step {number}", obs_first, options)
        if not history and len(segments[-1]) == num_messages:
            _refuse_unread(unrecorded(step), f"step {number}")
        step.count_unread("step", "Keys of steps not read")
    if len(segments) > 1:
        notes.count("rollout", "replaced its history midway, so what follows is a conversation of its own")
    segments[0] = _after(opening, segments[0]) if segments[0] else []
    found = []
    for said in segments:
        num_messages = len(said)
        while said and said[-1]["role"] != "assistant":
            said.pop()
        if len(said) < num_messages:
            notes.count("conversation", "ended without an answer to its last message, which was dropped")
        if said:
            _check_results(said)
            found.append(conversation_of(context, _joined(said)))
    if not found:
        keys = names(steps[0]) if steps else "none"
        raise DataError(f"a rollout without any action ({len(steps)} steps; keys of the first: {keys}).")
    return found


def _mask_answers(said: list[Message], start: int, step: Step, where: str, options: ReadingOptions) -> None:
    """Applies what a step says of its training to the answers from `start` on, which its messages added."""
    keys = (*FLAGS, "success", "reward", *([options.mask_key] if options.mask_key is not None else []))
    told = {key: step[key] for key in keys if key in step and step[key] is not None}
    why = why_step_untrained(told, options, where) if told else None
    flags = {key: told[key] for key in FLAGS if key in told}
    for number in range(start, len(said)):
        if said[number]["role"] == "assistant" and told:
            flagged = message_of({**said[number], **flags}, where)
            said[number] = flagged if why is None else untrained(flagged, why)


def _with_histories(steps: Sequence[Recorded]) -> list[Recorded]:
    """Returns the steps with observations that are all messages before the action under `messages`.

    They are that where one holds an answer of the assistant, or a later one a system prompt.
    """
    found: list[dict[str, Any]] = []
    are_histories = False
    for number, step in enumerate(steps):
        values = unrecorded(step)
        changed: dict[str, Any] = {}
        for keys in (OBSERVATIONS, NEXT_OBSERVATIONS):
            key = next((key for key in keys if values.get(key) is not None), None)
            items = None if key is None else listed(values[key])
            if (
                key is None
                or not items
                or not all(isinstance(each, Mapping) and role_in(each) for each in items)
            ):
                continue
            roles = {role_in(item) for item in items}
            is_history = "assistant" in roles or (number > 0 and bool(roles & {"system", "developer"}))
            if keys is NEXT_OBSERVATIONS and is_history and not has(values, OBSERVATIONS):
                raise DataError(
                    f"`{key}` of step {number + 1} repeats the messages before it. Give what the agent saw "
                    "before each action as `observation`, or all messages of the rollout in one list."
                )
            are_histories |= is_history
            changed[key] = None
            if keys is OBSERVATIONS and not values.get("messages"):
                changed["messages"] = items
        found.append(changed)
    if not are_histories:
        return list(steps)
    return [Recorded({**unrecorded(step), **each}) for step, each in zip(steps, found, strict=True)]


def _history_of(step: Step, where: str) -> list[Message]:
    """Returns the messages that a step holds under `messages`."""
    value = step.get("messages")
    if not value:
        return []
    items = listed(value)
    if items is None:
        raise DataError(f"`messages` of {where} is a {type(value).__name__}, not a list.")
    return messages_of(items, f" of {where}")


def _as_context(message: Message) -> Message:
    """Returns a message of a history that replaced another, not trained: an earlier step wrote it."""
    return untrained(message, "copied context") if message["role"] == "assistant" else message


def _begins_with(messages: Sequence[Message], beginning: Sequence[Message]) -> bool:
    """Returns whether messages repeat all of an earlier beginning, perhaps without its thinking."""
    return len(messages) >= len(beginning) and all(map(is_same, messages, beginning))


def _check_results(messages: Sequence[Message]) -> None:
    """Raises DataError for a result that answers a call by an id that was not given to one."""
    made: set[str] = set()
    for message in messages:
        made |= {str(call["id"]) for call in message.get("tool_calls") or () if "id" in call}
        answered = message.get("tool_call_id")
        if message["role"] == "tool" and answered is not None and made and str(answered) not in made:
            raise DataError(f"a result answers the call `{answered}`, which no step before it makes.")


def _refuse_foreign(step: Step, where: str) -> None:
    """Raises DataError for a step that is an event of a tool whose rollouts are read in another way."""
    for key, tool in _FOREIGN_KEYS.items():
        if step.get(key):
            raise DataError(
                f"{where} has `{key}`, as {tool} writes it, which format=trajectory does not read. Convert "
                "the rollout to ATIF (format=atif) or to messages."
            )
    if is_event(step):
        raise DataError(f"{where} is an event of OpenHands, not a step. Read it with format=openhands.")
    if is_swe_agent_step(step):
        raise DataError(
            f"{where} is a step of SWE-agent, whose action is only a part of the answer. Read it with "
            "format=swe_agent."
        )
    for key in _RESULTS_ELSEWHERE if acts(step) and not has(step, _RESULTS_READ) else ():
        if isinstance(value := step.get(key), (str, list, tuple, Mapping)) and value not in EMPTY:
            raise DataError(
                f"{where} has `{key}`, which is not read. Rename it to `observation` if it is what the "
                "action returned, else remove it."
            )
    beside = "action" if has(step, ACTIONS) else "observation"
    is_known = has(step, ACTIONS) or (has(step, OBSERVATIONS) and role_in(step) is None)
    for key in _ACTIONS_ELSEWHERE if is_known else ():
        if isinstance(value := step.get(key), (str, list, tuple, Mapping)) and value not in EMPTY:
            raise DataError(
                f"{where} has `{key}` beside its {beside}, which may be a part of what the model wrote. Give "
                "all of that as `action`: a text, or a call with `name` and `arguments`."
            )
    for key in (*ROLLOUTS, *STEPS):
        items = listed(step.get(key))
        if items and isinstance(items[0], Mapping):
            raise DataError(f"{where} holds a rollout of its own under `{key}`. Give it as a row of its own.")


def _refuse_unread(step: Step, where: str) -> None:
    """Raises DataError for a step that gave no message and holds more than what is known about it."""
    for key, value in step.items():
        if value not in EMPTY and isinstance(value, (str, list, tuple, Mapping)) and key not in _ABOUT_STEPS:
            raise DataError(
                f"{where} has neither an observation nor an action, and `{key}` is not read (keys: "
                f"{names(step)}). Rename it to `observation`, `action` or `role` and `content`, or remove it."
            )


def _order_of(context: Mapping[str, Any]) -> ObservationOrder | None:
    value = context.get(ORDER_KEY)
    if value not in (None, "before", "after"):
        raise DataError(f"`{ORDER_KEY}` is {value!r:.40}, not `before` or `after`.")
    return cast("ObservationOrder | None", value)


def observation_comes_first(
    steps: Sequence[Step], is_opened: bool, order: ObservationOrder | None = None
) -> bool:
    """Returns True if the observation of a step precedes its action, False if it results from the action.

    The first rule that applies decides. None of them depends on the order of keys.

    1. The key. A `next_observation` (`next_obs`, `next_state`) results from the action, so an `observation`
       in the same step precedes it. A `prompt`, a `question` or a `query` precedes the action as well.
    2. `order`, if it is given.
    3. Incomplete steps. If the first step has no observation, or the last no action, the observation comes
       first. If the last step has no observation, or the first no action, it comes after. If the steps
       indicate both, this rule does not apply. Two consecutive steps that hold only an observation and only
       an action are not counted.
    4. If every step has both and no system prompt, task or message precedes the steps, the observation comes
       first: the first action has nothing else to answer.

    Raises DataError if no rule applies.
    """
    both = [step for step in steps if has(step, OBSERVATIONS) and acts(step)]
    if any(has(step, NEXT_OBSERVATIONS) for step in steps):
        if not any(has(step, OBSERVATIONS) for step in steps):
            return False
        if any(has(step, NEXT_OBSERVATIONS) for step in both):
            return True
    if all(_name_of_observation(step) in QUESTIONS for step in both):
        return True
    if order is not None:
        return order == "before"
    seen = _without_separate_steps([(has(step, OBSERVATIONS), acts(step)) for step in steps])
    is_first = not seen[0][0] or not seen[-1][1]
    is_after = not seen[-1][0] or not seen[0][1]
    if is_first != is_after:
        return is_first
    if not is_first and not is_opened:
        return True
    name = _name_of_observation(both[0])
    raise DataError(
        f"it is unknown whether the `{name}` of a step precedes its action or results from it ({len(steps)} "
        f"steps). Set {ORDER_KEY}=before (the action answers it) or {ORDER_KEY}=after (it results from the "
        f"action), in the config or as a column of the row."
    )


def _name_of_observation(step: Step) -> str:
    return next(key for key in OBSERVATIONS if step.get(key) is not None)


def _without_separate_steps(seen: Sequence[tuple[bool, bool]]) -> list[tuple[bool, bool]]:
    kept: list[tuple[bool, bool]] = []
    for saw, acted in seen:
        if kept and kept[-1] == (True, False) and (saw, acted) == (False, True):
            kept.pop()
        elif saw or acted:
            kept.append((saw, acted))
    return kept


def _opening(context: Mapping[str, Any]) -> list[Message]:
    task = first(context, TASKS)
    return [] if task is None or task == "" else observed(task, 0, "the task")


def _opens_with_message(steps: Sequence[Step]) -> bool:
    """Returns whether a message precedes the first action."""
    for step in steps:
        if acts(step):
            return False
        if step.get("messages") or role_in(step) is not None:
            return True
    return False


def _after(opening: list[Message], said: list[Message]) -> list[Message]:
    """Returns the opening followed by the steps, with a system message first and the task only once."""
    num_system = 1 if said[0]["role"] in ("system", "developer") else 0
    system, rest = said[:num_system], said[num_system:]
    if opening and opening[0]["role"] in ("system", "developer") and system:
        opening = opening[1:]
    if rest[: len(opening)] == opening:
        return said
    if len(opening) == 1 and rest[0]["role"] == "user":
        task, seen = opening[0].get("content"), rest[0].get("content")
        if isinstance(task, str) and isinstance(seen, str) and _says(seen, task.strip()):
            return said
    return [*system, *opening, *rest]


def _says(text: str, words: str) -> bool:
    """Returns whether the text contains these words as whole words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Joins consecutive user messages that have no keys besides `role` and `content`."""
    joined: list[Message] = []
    plain = {"role", "content"}
    for message in messages:
        last = joined[-1] if joined else None
        if last and last["role"] == message["role"] == "user" and last.keys() == message.keys() == plain:
            texts = [text for text in (last["content"], message["content"]) if text]
            joined[-1] = {"role": "user", "content": "\n\n".join(map(str, texts))}
        else:
            joined.append(message)
    return joined
