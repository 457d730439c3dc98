"""Selects the messages of a conversation that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers.training_flags import UNSAID, Training


class TrainOnWhat(StrEnum):
    """The part of a conversation that is trained; everything else has weight 0.

    A message whose flags exclude it from training (`train: false`, `weight: 0`, `mask: true` and others of
    `renderers.training_flags`) is not trained in any mode.

    The trained tokens of a message are its text and the end-of-turn token that follows it. The text of an
    assistant message is everything after the generation prompt, including thinking and tool calls. The text
    of any other message is its content as the format prints it, with the end-of-turn token only if that
    follows directly. A token belongs to the text in which it begins,
    except that one with the first word of a text may begin with the space before it.
    """

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    """The last assistant message of the conversation, even if other messages follow it."""

    LAST_ASSISTANT_TURN = "last_assistant_turn"
    """Every assistant message after the last user message: a reply with its tool calls."""

    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    """Every assistant message."""

    ALL_MESSAGES = "all_messages"
    """Every message of every role; the headers between them are not trained."""

    ALL_TOKENS = "all_tokens"
    """Every token of the sequence, including headers and special tokens, except those of messages that are
    excluded by their flags and of their headers."""

    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    """Every user and system message."""

    CUSTOMIZED = "customized"
    """The messages with `trainable: true` (or `train`, `training` or `loss`)."""


def chosen_messages(
    roles: Sequence[str], trainings: Sequence[Training], train_on_what: TrainOnWhat
) -> dict[int, float]:
    """Returns the weight of each message to train, by its position, ascending; none of the weights is 0.

    ALL_TOKENS selects tokens, so the result is empty; it raises RendererError for weights other than 0 and 1.
    Messages whose flags ask for training that the mode does not do are counted.
    """
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    assistants = [i for i, role in enumerate(roles) if role == "assistant"]
    match train_on_what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            of_mode = assistants[-1:]
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            of_mode = [i for i in assistants if i > last_user]
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            of_mode = assistants
        case TrainOnWhat.ALL_MESSAGES:
            of_mode = list(range(len(roles)))
        case TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
            of_mode = [i for i, role in enumerate(roles) if role in ("user", "system")]
        case TrainOnWhat.CUSTOMIZED:
            of_mode = [i for i, training in enumerate(trainings) if training.is_wanted is True]
        case TrainOnWhat.ALL_TOKENS:
            of_mode = []
    weights = [training.factor for training in trainings]
    num_kept_out = 0
    if train_on_what == TrainOnWhat.ALL_TOKENS:
        if not {0.0, 1.0}.issuperset(weights):
            raise RendererError(
                "A message has a weight, but all_tokens trains headers as well as messages. Remove the "
                "weight, or choose all_messages."
            )
        num_kept_out = weights.count(0)
    else:
        for index, training in enumerate(trainings):
            if training is UNSAID or (index in of_mode and weights[index] > 0):
                continue
            if weights[index] == 0 and index in of_mode:
                num_kept_out += 1
            elif training.is_wanted is True:
                what = f"asked to be trained, which train_on_what={train_on_what} does not do"
                notes.count("message", what)
            elif weights[index] not in (0, 1):
                notes.count("message", f"had a weight and no part in train_on_what={train_on_what}")
    if num_kept_out:
        what = "kept out of training by a key such as `train: false`"
        notes.count("message", what, number=num_kept_out)
    return {index: weights[index] for index in of_mode if weights[index] > 0}
