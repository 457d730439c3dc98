"""Which messages of a conversation are trained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from cookbook.errors import RendererError
from renderers.messages import Message


class TrainOnWhat(StrEnum):
    """What is trained; everything else carries weight 0.

    Training a message means its text and the end-of-turn token that closes it. For an assistant
    the text is all that follows the generation prompt (thinking and tool calls included); for
    another role it is the message's content as the format prints it, with the end-of-turn token
    where that stands right behind it. A token belongs to the text in which it begins.
    """

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    """The last assistant message of the conversation, wherever it stands."""

    LAST_ASSISTANT_TURN = "last_assistant_turn"
    """Every assistant message after the last user message: a reply with its tool calls."""

    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    """Every assistant message."""

    ALL_MESSAGES = "all_messages"
    """Every message of every role; the headers between them are not trained."""

    ALL_TOKENS = "all_tokens"
    """Every token of the sequence, headers and special tokens included."""

    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    """Every user and system message."""

    CUSTOMIZED = "customized"
    """The messages whose `trainable` is true; without the key a message is not trained."""


_SMALLEST, _LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
"""The bounds of what float32 holds above 0."""


def weight_of(message: Message) -> float:
    """The factor on the loss of the message's tokens."""
    weight = message.get("weight")
    if weight is None:
        return 1.0
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or _SMALLEST <= weight <= _LARGEST):
        raise RendererError(
            f"The weight of a message is {str(weight)[:40]}. Give a number of 0 or more that fits float32."
        )
    return float(weight)


def chosen_messages(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    """The positions of the messages to train, ascending: those of the mode that do not weigh 0.

    ALL_TOKENS chooses tokens, so no messages; it has no place for their weights.
    """
    if train_on_what == TrainOnWhat.ALL_TOKENS and any(weight_of(message) != 1 for message in messages):
        raise RendererError(
            "A message has a weight, but all_tokens trains headers and messages alike. Remove the weight, or "
            "choose all_messages."
        )
    return [index for index in _chosen_by_mode(messages, train_on_what) if weight_of(messages[index]) > 0]


def _chosen_by_mode(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    roles = [message["role"] for message in messages]
    assistants = [i for i, role in enumerate(roles) if role == "assistant"]
    match train_on_what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            return assistants[-1:]
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
            return [i for i in assistants if i > last_user]
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            return assistants
        case TrainOnWhat.ALL_MESSAGES:
            return list(range(len(roles)))
        case TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
            return [i for i, role in enumerate(roles) if role in ("user", "system")]
        case TrainOnWhat.CUSTOMIZED:
            return [i for i, message in enumerate(messages) if message.get("trainable", False)]
        case TrainOnWhat.ALL_TOKENS:
            return []
