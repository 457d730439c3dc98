"""History that conversations repeat: every turn trained once, and held-out data split by their roots.

Logs hold each turn together with all messages before it. The conversations of a source form a tree over their
tools and messages: one that is the beginning of another is merged into it, and where two part, the turns
before that are trained in the first of them only.

A node of the tree is known by a hash of everything up to it. There are two of them: the second one leaves out
what was thought, because a log often drops the thinking of earlier turns.

Shape suffixes: C conversations, M messages of all conversations, R rows, K keys of all rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from cookbook.data.conversation import Conversation
from cookbook.utils import notes
from renderers import Message, TrainOnWhat
from renderers.messages import THINKING_KEYS
from renderers.train_on_what import chosen_messages
from renderers.training_flags import FINER_KEYS, TRAINING_KEYS, UNSAID, Training, training_of

Repeated: TypeAlias = Literal["merge", "keep", "raise"]

NEIGHBOURS = 256
"""Rows of a stream that are merged with each other."""

_UNSEEN = frozenset((*THINKING_KEYS, *TRAINING_KEYS, *FINER_KEYS, "tool_calls", "tool_call_id", "name"))
"""Keys of a message that are not hashed as they are."""

_FLAGS = TRAINING_KEYS | FINER_KEYS


class Decision(NamedTuple):
    """What becomes of a conversation that shares history with another."""

    is_merged: bool
    """Whether it is the beginning of another one, which trains its turns."""
    weights: Mapping[int, float] = {}
    """The weight of each message that this conversation trains, by its position."""
    num_elsewhere: int = 0
    """Turns of the assistant that another conversation trains."""
    num_context: int = 0
    """Turns of the assistant that no conversation trains."""


@dataclass
class Paths:
    """The conversations of some rows as paths through the tree."""

    full_M: np.ndarray
    """A hash of the tools and the messages up to this one. uint64"""
    bare_M: np.ndarray
    """The same without what was thought. uint64"""
    weights_M: np.ndarray
    """The weight of the message; 0 where it is not trained. float32"""
    kinds_M: np.ndarray
    """`_ASSISTANT`, with `_THINKS` if it thought; `_USER`; 0 for other roles. uint8"""
    lengths_C: np.ndarray
    """The messages of each conversation. int64"""
    are_rollouts_C: np.ndarray
    """Whether a conversation is a rollout or a log, or calls tools. bool"""
    num_conversations_R: np.ndarray
    """The conversations of each row. int64"""

    @classmethod
    def concatenated(cls, parts: Sequence[Paths]) -> Paths:
        """All conversations of some parts, in their order."""
        parts = parts or [EMPTY]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))


_ASSISTANT, _THINKS, _USER = 1, 2, 4
EMPTY = Paths(
    *(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.float32), np.zeros(0, np.uint8)),
    *(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64)),
)


# -- one row ----------------------------------------------------------------------------------


def paths_of(rows: Iterable[Sequence[Conversation]], train_on_what: TrainOnWhat) -> Paths:
    """The paths of the conversations of some rows. Messages must be checked: those of a bad row are left out
    by the caller."""
    full: list[int] = []
    bare: list[int] = []
    weights: list[float] = []
    kinds: list[int] = []
    lengths: list[int] = []
    rollouts: list[bool] = []
    per_row: list[int] = []
    for conversations in rows:
        per_row.append(len(conversations))
        for conversation in conversations:
            num_before = len(full)
            _add_path(conversation, train_on_what, full, bare, weights, kinds)
            lengths.append(len(full) - num_before)
            has_calls = any(message["role"] == "tool" for message in conversation.messages)
            rollouts.append(conversation.is_rollout or bool(conversation.tools) or has_calls)
    return Paths(
        np.asarray(full, np.uint64),
        np.asarray(bare, np.uint64),
        np.asarray(weights, np.float32),
        np.asarray(kinds, np.uint8),
        np.asarray(lengths, np.int64),
        np.asarray(rollouts, bool),
        np.asarray(per_row, np.int64),
    )


def _add_path(
    conversation: Conversation,
    train_on_what: TrainOnWhat,
    full: list[int],
    bare: list[int],
    weights: list[float],
    kinds: list[int],
) -> None:
    digest = hashlib.blake2b(digest_size=8)
    if conversation.text is not None:
        digest.update(conversation.text.encode(errors="surrogatepass"))
        full.append(int.from_bytes(digest.digest(), "little"))
        bare.append(full[-1])
        weights.append(1.0)
        kinds.append(_ASSISTANT)
        return
    messages = conversation.messages
    roles = [str(message.get("role")) for message in messages]
    trainings = [UNSAID if _FLAGS.isdisjoint(message) else training_of(message, "it") for message in messages]
    chosen = _chosen(roles, trainings, train_on_what)
    context = [conversation.tools or [], conversation.template_kwargs or {}]
    digest.update(json.dumps(context, sort_keys=True, default=str).encode())
    with_thinking = digest.copy()
    numbers: dict[str, int] = {}
    for number, message in enumerate(messages):
        # What it says, with calls numbered in place of their ids, which may differ from log to log.
        calls = []
        for call in message.get("tool_calls") or ():
            numbers[str(call.get("id"))] = len(numbers)
            calls.append(call.get("function", call))
        is_result = message["role"] == "tool"
        answers = numbers.get(str(message.get("tool_call_id"))) if is_result else None
        others = {key: value for key, value in message.items() if key not in _UNSEEN and value is not None}
        others["content"] = message.get("content") or ""
        thought = next((message[key] for key in THINKING_KEYS if message.get(key)), None)  # type: ignore[literal-required]
        said = json.dumps(
            [others, calls, answers, None if is_result else message.get("name")], sort_keys=True, default=str
        ).encode()
        digest.update(said)
        with_thinking.update(said)
        if thought is not None:
            with_thinking.update(json.dumps(thought, default=str).encode())
        full.append(int.from_bytes(with_thinking.digest(), "little"))
        bare.append(int.from_bytes(digest.digest(), "little"))
        weights.append(chosen.get(number, 0.0))
        role = {"assistant": _ASSISTANT, "user": _USER}.get(message["role"], 0)
        kinds.append(role | (_THINKS if thought is not None else 0))


def weights_of(messages: Sequence[Message], train_on_what: TrainOnWhat) -> dict[int, float]:
    """The weight of each message that the mode trains, by its position. `all_tokens` trains those of the
    assistant."""
    roles = [str(message.get("role")) for message in messages]
    return _chosen(roles, [training_of(message, "it") for message in messages], train_on_what)


def _chosen(
    roles: Sequence[str], trainings: Sequence[Training], train_on_what: TrainOnWhat
) -> dict[int, float]:
    mode = train_on_what
    if mode == TrainOnWhat.ALL_TOKENS:
        mode = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    with notes.collected():  # they are counted when the conversation is rendered
        return chosen_messages(roles, trainings, mode)


def with_weights(
    messages: Sequence[Message], weights: Mapping[int, float], train_on_what: TrainOnWhat
) -> tuple[list[Message], TrainOnWhat]:
    """Returns the messages with flags that train these alone, and the mode that obeys them."""
    is_all_tokens = train_on_what == TrainOnWhat.ALL_TOKENS
    flagged: list[Message] = []
    for number, message in enumerate(messages):
        plain = {key: value for key, value in message.items() if key not in TRAINING_KEYS}
        weight = weights.get(number, 0.0)
        if is_all_tokens:
            if message["role"] == "assistant" and not weight:
                plain["trainable"] = False
        else:
            plain["trainable"] = weight > 0
            if weight not in (0.0, 1.0):
                plain["weight"] = weight
        flagged.append(plain)  # type: ignore[arg-type]
    return flagged, train_on_what if is_all_tokens else TrainOnWhat.CUSTOMIZED


# -- the tree ---------------------------------------------------------------------------------


@dataclass
class Tree:
    """What becomes of the conversations of a source, by their number."""

    decisions: dict[int, Decision]
    twins: dict[int, int]
    """A conversation that is the beginning of another, and one that begins so."""
    num_kept: int
    """Conversations that are the beginning of another and are trained all the same."""
    first_R: np.ndarray
    """The first conversation of each row, and their number. int64, R + 1"""

    def of_rows(self, start: int, stop: int) -> dict[int, list[Decision | None]]:
        """The decisions on the conversations of rows `start` to `stop` that have any, by row from `start`."""
        found = {}
        bounds = self.first_R[start : stop + 1].tolist()
        for row, (first, end) in enumerate(pairwise(bounds)):
            decisions = [self.decisions.get(conversation) for conversation in range(first, end)]
            if any(decision is not None for decision in decisions):
                found[row] = decisions
        return found


def grow(paths: Paths, repeated: Repeated | None) -> Tree:
    """Decides what becomes of conversations that share history.

    `repeated` of None merges rollouts and logs, and keeps other conversations as they are.
    """
    takes_part_C = np.full(len(paths.lengths_C), True) if repeated is not None else paths.are_rollouts_C
    takes_part_C = takes_part_C & (paths.lengths_C > 0)
    twins = _twins(paths, takes_part_C)
    first_R = np.concatenate([[0], np.cumsum(paths.num_conversations_R)])
    num_kept = len(twins) if repeated == "keep" else 0
    if repeated is None:
        num_kept = len(_twins(paths, ~takes_part_C & (paths.lengths_C > 0)))
    if repeated in ("keep", "raise") or not _shares_turns(paths, takes_part_C):
        return Tree({}, twins, num_kept, first_R)
    starts = np.concatenate([[0], np.cumsum(paths.lengths_C)])
    best, weight_of = _trained_nodes(paths, takes_part_C, starts)
    decisions: dict[int, Decision] = {}
    assigned: set[int] = set()
    for conversation in np.flatnonzero(takes_part_C).tolist():
        if conversation in twins:
            decisions[conversation] = Decision(True)
            continue
        start, end = int(starts[conversation]), int(starts[conversation + 1])
        full, bare = paths.full_M[start:end].tolist(), paths.bare_M[start:end].tolist()
        own, kinds = paths.weights_M[start:end].tolist(), paths.kinds_M[start:end].tolist()
        weights: dict[int, float] = {}
        num_elsewhere = num_context = 0
        for number, node in enumerate(bare):
            if node not in weight_of:
                num_context += bool(kinds[number] & _ASSISTANT)
            elif not kinds[number] & _ASSISTANT:
                weights[number] = weight_of[node]
            elif best[node] == full[number] and node not in assigned:
                assigned.add(node)
                weights[number] = weight_of[node]
            else:
                num_elsewhere += 1
        if any(weights.get(number, 0.0) != weight for number, weight in enumerate(own)):
            decisions[conversation] = Decision(False, weights, num_elsewhere, num_context)
    return Tree(decisions, twins, num_kept, first_R)


def _twins(paths: Paths, takes_part_C: np.ndarray) -> dict[int, int]:
    """Returns the conversations that are the beginning of another, or the same as an earlier one."""
    ends = np.cumsum(paths.lengths_C)
    conversation_M = np.repeat(np.arange(len(paths.lengths_C)), paths.lengths_C)
    last_M = np.zeros(len(paths.full_M), bool)
    last_M[ends[paths.lengths_C > 0] - 1] = True
    part_M = takes_part_C[conversation_M]
    found: dict[int, int] = {}
    inner = part_M & ~last_M
    inner_keys, first_inner = np.unique(paths.full_M[inner], return_index=True)
    holders = conversation_M[inner][first_inner]
    last = part_M & last_M
    end_keys, end_conversations = paths.full_M[last], conversation_M[last]
    if len(inner_keys):
        at = np.minimum(np.searchsorted(inner_keys, end_keys), len(inner_keys) - 1)
        is_inner = inner_keys[at] == end_keys
        for conversation, holder in zip(
            end_conversations[is_inner].tolist(), holders[at[is_inner]].tolist(), strict=True
        ):
            found[conversation] = holder
    _, first_of, inverse = np.unique(end_keys, return_index=True, return_inverse=True)
    for number in np.flatnonzero(first_of[inverse] != np.arange(len(end_keys))).tolist():
        found.setdefault(int(end_conversations[number]), int(end_conversations[first_of[inverse[number]]]))
    return found


def _shares_turns(paths: Paths, takes_part_C: np.ndarray) -> bool:
    """Returns whether a turn of the assistant is in several conversations."""
    conversation_M = np.repeat(np.arange(len(paths.lengths_C)), paths.lengths_C)
    turns = paths.bare_M[takes_part_C[conversation_M] & (paths.kinds_M & _ASSISTANT > 0)]
    return len(np.unique(turns)) < len(turns)


def _trained_nodes(
    paths: Paths, takes_part_C: np.ndarray, starts: np.ndarray
) -> tuple[dict[int, int], dict[int, float]]:
    """For each node that a conversation trains: the path to train it in, with its thinking if one has it,
    and its weight."""
    best: dict[int, int] = {}
    weight_of: dict[int, float] = {}
    thinks: set[int] = set()
    for conversation in np.flatnonzero(takes_part_C).tolist():
        part = slice(int(starts[conversation]), int(starts[conversation + 1]))
        for full, bare, weight, kind in zip(
            paths.full_M[part].tolist(),
            paths.bare_M[part].tolist(),
            paths.weights_M[part].tolist(),
            paths.kinds_M[part].tolist(),
            strict=True,
        ):
            if weight == 0:
                continue
            weight_of.setdefault(bare, weight)
            if bare not in best or (kind & _THINKS and bare not in thinks):
                best[bare] = full
            if kind & _THINKS:
                thinks.add(bare)
    return best, weight_of


# -- roots ------------------------------------------------------------------------------------


class RowKeys(NamedTuple):
    """What rows may share with each other: answers that they train, and what these answer."""

    keys_K: np.ndarray
    """Hashes whose last bit is 0 for an answer and 1 for what the first one answers. uint64"""
    num_keys_R: np.ndarray
    """The keys of each row. int64"""

    def of_answers(self) -> RowKeys:
        """Returns the keys of answers alone."""
        is_answer_K = answers_in(self.keys_K)
        row_of_K = np.repeat(np.arange(len(self.num_keys_R)), self.num_keys_R)
        return RowKeys(
            self.keys_K[is_answer_K], np.bincount(row_of_K[is_answer_K], minlength=len(self.num_keys_R))
        )


def row_keys(paths: Paths, tree: Tree | None = None) -> RowKeys:
    """Returns the keys of each row: of its trained turns, and of the messages before the first of them.

    Messages without any of the user, such as a system prompt alone, are no key: many rows may begin so.
    """
    keys: list[int] = []
    counts: list[int] = []
    decisions = {} if tree is None else tree.decisions
    starts = np.concatenate([[0], np.cumsum(paths.lengths_C)])
    bare, weights, kinds = paths.bare_M.tolist(), paths.weights_M.tolist(), paths.kinds_M.tolist()
    first = 0
    for number in paths.num_conversations_R.tolist():
        before = len(keys)
        for conversation in range(first, first + number):
            start, end = int(starts[conversation]), int(starts[conversation + 1])
            decision = decisions.get(conversation)
            if decision is None:
                trained = [at for at in range(start, end) if weights[at] and kinds[at] & _ASSISTANT]
            else:
                trained = [start + at for at in decision.weights if kinds[start + at] & _ASSISTANT]
            keys += [bare[at] & ~1 for at in trained]
            if trained and any(kinds[at] & _USER for at in range(start, trained[0])):
                keys.append(bare[trained[0] - 1] | 1)
        first += number
        counts.append(len(keys) - before)
    return RowKeys(np.asarray(keys, np.uint64), np.asarray(counts, np.int64))


def answers_in(keys_K: np.ndarray) -> np.ndarray:
    """Which keys are of answers that are trained; the others are of what the first one answers. bool, K"""
    return keys_K & np.uint64(1) == 0


def groups_of(keys: RowKeys) -> np.ndarray:
    """The group of each row. Rows that share a key, directly or by way of others, are one. int64, R"""
    num_rows = len(keys.num_keys_R)
    parent = list(range(num_rows))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    row_of_K = np.repeat(np.arange(num_rows), keys.num_keys_R)
    order = np.argsort(keys.keys_K, kind="stable")
    sorted_keys, rows = keys.keys_K[order], row_of_K[order]
    same = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
    for one, other in zip(rows[same].tolist(), rows[same + 1].tolist(), strict=True):
        a, b = find(one), find(other)
        if a != b:
            parent[max(a, b)] = min(a, b)
    return np.asarray([find(row) for row in range(num_rows)], np.int64)


def held_out_of(groups_R: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Returns which rows are held out: the first groups of an order that are `size` rows together. bool, R

    A group that would be too many is passed over, so there may be fewer.
    """
    sizes = np.bincount(groups_R, minlength=len(groups_R))
    is_held_out = np.zeros(len(groups_R), bool)
    left, taken = size, []
    for row in order.tolist():
        if left == 0:
            break
        group = int(groups_R[row])
        if sizes[group] and sizes[group] <= left:
            left -= int(sizes[group])
            sizes[group] = 0  # it is taken
            taken.append(group)
    is_held_out[np.isin(groups_R, taken)] = True
    return is_held_out
