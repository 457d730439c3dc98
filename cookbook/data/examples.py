"""Converts rendered examples to Datums: here tokens are truncated and shifted, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cookbook.errors import DataError
from cookbook.types import Datum, EncodedTextChunk, ModelInput
from renderers import Message, TrainOnWhat
from renderers.messages import Tool

if TYPE_CHECKING:
    from renderers import Renderer


def datum_from_tokens(
    tokens: Sequence[int] | np.ndarray, weights: Sequence[float] | np.ndarray, max_length: int | None = None
) -> Datum:
    """Returns a rendered example as a Datum, truncated to its first `max_length` tokens and shifted by one.

    `weights[t]` is the loss weight of token t; in the Datum it is at the position whose target is token t.
    Raises DataError for fewer than two tokens.
    """
    tokens, weights = np.asarray(tokens[:max_length]), np.asarray(weights[:max_length])
    if len(tokens) < 2:
        raise DataError(f"An example of {len(tokens)} token has nothing to predict. It needs two at least.")
    return Datum(
        model_input=ModelInput([EncodedTextChunk(tokens[:-1])]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def conversation_to_datum(
    messages: Sequence[Message],
    renderer: Renderer,
    max_length: int | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    tools: Sequence[Tool] | None = None,
) -> Datum:
    """Returns a conversation as one Datum."""
    model_input, weights = renderer.build_supervised_example(messages, train_on_what, tools)
    return datum_from_tokens(model_input.to_numpy(), weights, max_length)
