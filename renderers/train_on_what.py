"""Which messages of a conversation are trained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.messages import Message
from renderers.training_flags import say_nothing, training_of


class TrainOnWhat(StrEnum):
    """What is trained; everything else carries weight 0.

    A message that says it is not trained (`renderers.training_flags`: `train: false`, `weight: 0`,
    `mask: true` and more) is not, in any of the modes.

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
    """Every token of the sequence, headers and special tokens included; but of a message that is not
    trained none, from its header on."""

    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    """Every user and system message."""

    CUSTOMIZED = "customized"
    """The messages that ask for it: `trainable: true`, or `train`, `training` or `loss`."""


def weight_of(message: Message, where: str = "a message") -> float:
    """The factor on the loss of the message's tokens; 0 if it says that it is not trained."""
    training = training_of(message, where)
    if training.is_wanted is False:
        return 0.0
    return 1.0 if training.weight is None else float(training.weight)


def chosen_messages(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    """The positions of the messages to train, ascending: those of the mode that do not weigh 0.

    ALL_TOKENS chooses tokens, so no messages; it has no place for weights other than 0 and 1. Messages
    that ask for what the mode does not do are counted.
    """
    if say_nothing(messages):
        return _chosen_by_mode(messages, train_on_what)
    weights = [weight_of(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if train_on_what == TrainOnWhat.ALL_TOKENS:
        if not {0.0, 1.0}.issuperset(weights):
            raise RendererError(
                "A message has a weight, but all_tokens trains headers and messages alike. Remove the "
                "weight, or choose all_messages."
            )
        _count_kept_out(weights.count(0))
        return []
    of_mode = set(_chosen_by_mode(messages, train_on_what))
    chosen = sorted(index for index in of_mode if weights[index] > 0)
    for index, message in enumerate(messages):
        if index in of_mode and weights[index] > 0:
            continue
        if weights[index] == 0 and index in of_mode:
            _count_kept_out()
        elif _asks(message):
            notes.count("message", f"asked to be trained, which train_on_what={train_on_what} does not do")
        elif weights[index] not in (0, 1):
            notes.count("message", f"had a weight and no part in train_on_what={train_on_what}")
    return chosen


def _count_kept_out(number: int = 1) -> None:
    if number:
        notes.count("message", "kept out of training by a key such as `train: false`", number=number)


def untrained_messages(messages: Sequence[Message]) -> list[int]:
    """The positions of the messages that say they are not trained."""
    return [index for index, message in enumerate(messages) if weight_of(message) == 0]


def _asks(message: Message) -> bool:
    return training_of(message, "a message").is_wanted is True


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
            return [i for i, message in enumerate(messages) if _asks(message)]
        case TrainOnWhat.ALL_TOKENS:
            return []
