"""The rule that decides when a sequence is complete."""

from __future__ import annotations

from cookbook.engine.model.base_model import BaseModel
from cookbook.types import SamplingParams
from cookbook.utils.token_ids import known_tokens


class StopRule:
    """The stop tokens and stop strings of a request.

    If it has neither, these are the end-of-sequence tokens of the model's generation config or its tokenizer.
    """

    def __init__(self, base: BaseModel, params: SamplingParams) -> None:
        stop = stop_items(params)
        self._strings = [item for item in stop if isinstance(item, str)]
        self._token_ids = {int(item) for item in stop if not isinstance(item, str)}
        self._token_ids.update(params.stop_token_ids or ())
        if params.stop is None and not self._token_ids:
            self._token_ids.update(end_tokens(base))
        self._tokenizer = base.tokenizer
        self._tail_tokens = max((len(string.encode()) for string in self._strings), default=0) + 4
        """A token has at least one byte, so a stop string spans at most this many tokens."""

    def is_met(self, tokens: list[int]) -> bool:
        """Returns whether the last of `tokens` is a stop token or completes a stop string."""
        if tokens[-1] in self._token_ids:
            return True
        if not self._strings:
            return False
        known = known_tokens(self._tokenizer, tokens[-self._tail_tokens :])
        tail = self._tokenizer.decode(known)
        return any(string in tail for string in self._strings)


def end_tokens(base: BaseModel) -> list[int]:
    """Returns the tokens with which the model ends a sequence by itself."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = base.tokenizer.eos_token_id
    if configured is None:
        return []
    return [*configured] if isinstance(configured, (list, tuple)) else [int(configured)]


def stop_items(params: SamplingParams) -> list[str | int]:
    """Returns the entries of `params.stop`, which may be a single string."""
    return [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
